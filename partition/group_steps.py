"""What steps of a group take that was chosen, whatever they hold: its figures say it of usual requests only. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from .group_choice import Choice
from .group_cost import Cost, first_token_s
from .group_cuts import Cuts
from .machines import Links, Machine, Workload
from .plan import Wanted
from .rank_sizes import Memory, Sizes
from .slicing import Grains
from .spec import BlockId
from .sum_cost import Means, Network


class GroupSteps(NamedTuple):
    """`answer_s`: seconds of a step, by its rows and by the tokens before them; `prompt_s`: until the first token, by
    the tokens of a prompt that all machines read."""

    answer_s: Callable[[int, float], float]
    prompt_s: Callable[[int], float]


def group_steps(
    choice: Choice,
    wanted: Wanted,
    block_bytes: Mapping[BlockId, int],
    machines: Sequence[Machine],
    links: Links,
    means: Sequence[Means],
    grains: Grains,
    *,
    may_cut_vocabulary: bool,
    workload: Workload = Workload(),  # noqa: B008 it is frozen
) -> GroupSteps | None:
    """Of what `choose` chose with the same arguments: usual requests take what its figures say, with what was measured
    of these machines. None if its cut cannot be made any more."""
    sizes, places = Sizes.of(wanted.spec, block_bytes), [rank.place for rank in choice.ranks]
    memory, cost = Memory(wanted, sizes), Cost(wanted, sizes, workload)
    cuts = Cuts(wanted, sizes, memory, grains, may_cut_vocabulary=may_cut_vocabulary)
    its, beside = [machines[place] for place in places], choice.split == "prompts"
    parts = cuts.as_before(
        memory.beside(its) if beside else its, choice.shares, choice.experts, beside=beside
    )
    network = Network(machines, links, places)
    if not parts:
        return None
    able = [it for it in means if network.can(it.topology)]
    step_s, chunk = cost.together(parts, network, able).step_s, cost.chunk(parts)

    def first_s(tokens: int) -> float:
        return first_token_s(tokens, chunk, step_s, step_s)

    usual = min(workload.context_tokens, wanted.context_tokens)
    answers = choice.figures.token_s / step_s(1, usual)
    prompts = choice.figures.first_token_s[0] / first_s(cost.prompts[0])
    return GroupSteps(
        lambda rows, before: answers * step_s(rows, before + rows / 2),
        lambda tokens: prompts * first_s(tokens),
    )
