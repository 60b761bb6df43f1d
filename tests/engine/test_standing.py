"""How far a sequence is on its way to its first token: it never falls back, and it ends at the prompt's length."""

from __future__ import annotations

import random
from pathlib import Path

from fakes.fake_engine import FakeEngine, scheduler, sequence
from hypothesis import given
from hypothesis import strategies as st

from shoal.comm.messages import Load
from shoal.daemon.node import Node
from shoal.engine.sequence import Sequence, Standing


@given(st.integers(0, 1 << 30))
def test_progress_never_falls_back_and_places_are_turns(seed: int) -> None:
    """Unless a sequence has to make room for others; then it is in the queue first."""
    source = random.Random(seed)
    subject = scheduler(
        source.randint(8, 60), sequences=source.randint(1, 4), queue=8, chunk=source.randint(1, 20)
    )
    engine = FakeEngine(subject)
    stem = [source.randrange(5) for _ in range(20)]
    asked = [
        sequence(
            stem[: source.randint(0, 20)] + [source.randrange(5) for _ in range(source.randint(1, 10))],
            source.randint(1, 5),
            client=source.choice("ab"),
            priority=source.choice([0, 0, 1]),
        )
        for _ in range(source.randint(1, 8))
    ]
    before: dict[Sequence, tuple[Standing, int]] = {}
    for one in asked:
        engine.submit(one)
    while not all(one.ended for one in asked):
        engine.step()
        left = [one for one in asked if not one.ended]
        places = sorted(place for one in left if (place := subject.standing(one).place))
        if subject.running:
            assert places == list(range(1, len(subject.waiting) + 1))
        for one in left:
            now = subject.standing(one)
            assert (now.place == 0) == one.running or not subject.running
            assert 0 <= now.done < now.total == len(one.tokens)
            old, preemptions = before.get(one, (now, one.preemptions))
            if preemptions == one.preemptions:
                assert now.done >= old.done
            if one.generated and not one.preemptions:
                assert now.done == now.total - 1 >= one.prompt_tokens
            before[one] = now, one.preemptions


def test_what_is_known_counts_as_done() -> None:
    subject = scheduler(chunk=8)
    engine = FakeEngine(subject)
    engine.submit(sequence(list(range(30)), 1))
    engine.run()
    engine.submit(again := sequence([*range(30), *range(20)], 1))
    assert subject.standing(again) == Standing(0, 1, 0, 50)
    engine.step()
    assert subject.standing(again).done >= 28 + 8


def test_a_step_tells_how_far_it_is(node: Node, path: Path) -> None:
    """Within a step, tokens count by the layers that have been computed."""
    node.load(Load(model=str(path)))
    (model,) = node._models
    engine, asked = model.engine, sequence([*range(10, 50)], 1)
    heard: list[Standing] = []
    goes_on = engine._goes_on

    def listening(batch: object, share: float) -> bool:
        wanted = goes_on(batch, share)  # type: ignore[arg-type]
        heard.append(engine.standing(asked))
        return wanted

    engine._goes_on = listening  # type: ignore[method-assign]
    engine.submit(asked)
    assert engine.standing(asked) == Standing(0, 1, 0, 40)
    while not asked.ended:
        engine.step()
    done = [one.done for one in heard]
    assert done == sorted(done)
    assert any(tokens % 16 for tokens in done)  # which is the length of a chunk
    assert {one.total for one in heard} == {40}
    assert engine._under_way is None
