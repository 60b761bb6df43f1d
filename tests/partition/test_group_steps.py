"""What steps take of a group that was chosen: usual requests take what it was chosen by, others in proportion."""

from __future__ import annotations

import pytest
from fakes.group.group_cases import CABLE, all_linked, block_bytes, machine, mixture, model, wanted

from shoal.partition.group_choice import Choice
from shoal.partition.group_cuts import GroupSteps, group_steps
from shoal.partition.group_search import choose
from shoal.partition.machines import Workload
from shoal.partition.slicing import ANYWHERE
from shoal.partition.spec import ModelSpec
from shoal.partition.sum_cost import Means

MACHINES = [machine("a"), machine("b")]
LINKS = all_linked(2, CABLE)
USUAL = Workload().context_tokens


def both(spec: ModelSpec, measured: dict[tuple[int, ...], float]) -> tuple[Choice, GroupSteps]:
    about = wanted(spec), block_bytes(spec), MACHINES, LINKS
    found = choose(*about, topologies=("star",), wires=("f32",), ranks=2, measured=measured)
    assert isinstance(found, Choice)
    steps = group_steps(found, *about, [Means("star", "f32")], ANYWHERE, may_cut_vocabulary=True)
    assert steps is not None
    return found, steps


@pytest.mark.parametrize("spec", [model(), mixture()], ids=["dense", "mixture"])
@pytest.mark.parametrize("measured", [{}, {(0, 1): 0.5}])
def test_usual_requests_take_what_the_group_was_chosen_by(
    spec: ModelSpec, measured: dict[tuple[int, ...], float]
) -> None:
    found, steps = both(spec, measured)
    assert steps.answer_s(1, USUAL - 0.5) == pytest.approx(found.figures.token_s)
    took = [steps.prompt_s(tokens) for tokens in found.prompts]
    assert took == pytest.approx(found.figures.first_token_s)
    assert took == sorted(took)
    if measured:
        assert steps.answer_s(1, USUAL) == pytest.approx(0.5, rel=0.01)
    assert steps.answer_s(1, 8) < steps.answer_s(8, 8) <= steps.answer_s(8, 4000)


def test_a_cut_that_cannot_be_made_any_more_takes_nobody_knows_how_long() -> None:
    spec = model()
    found, _ = both(spec, {})
    tight = [it._replace(memory_bytes=1) for it in MACHINES]
    about = found, wanted(spec), block_bytes(spec), tight, LINKS
    assert group_steps(*about, [Means("star", "f32")], ANYWHERE, may_cut_vocabulary=True) is None
