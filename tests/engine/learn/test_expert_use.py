"""Which experts change places: those that are used much more often with those that are not, and then no more."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from shoal.engine.learn.expert_use import FADING, LEAST_USES, ExpertUse, all_exchanges
from shoal.partition.spec import BlockId

EXPERTS = [BlockId("expert", layer, expert) for layer in range(2) for expert in range(4)]


@given(
    st.lists(st.integers(0, 1000), min_size=8, max_size=8),
    st.sets(st.sampled_from(EXPERTS)),
    st.lists(st.sampled_from("ab"), min_size=8, max_size=8),
)
def test_exchanges_spare_the_cpu_and_end(counts: list[int], there: set[BlockId], kinds: list[str]) -> None:
    uses, forms = dict(zip(EXPERTS, counts, strict=True)), dict(zip(EXPERTS, kinds, strict=True))
    found, before = all_exchanges(uses, there, forms), len(there)
    for pair in found:
        assert pair.from_device in there
        assert pair.from_cpu not in there
        assert forms[pair.from_device] == forms[pair.from_cpu]
        assert uses[pair.from_cpu] >= max(2 * uses[pair.from_device], uses[pair.from_device] + LEAST_USES)
        there = there - {pair.from_device} | {pair.from_cpu}
    spared = [uses[pair.from_cpu] - uses[pair.from_device] for pair in found]
    assert spared == sorted(spared, reverse=True)
    assert len(there) == before
    assert not all_exchanges(uses, there, forms)
    for form in "ab":  # nothing is left that would have been worth it
        here = [uses[it] for it in EXPERTS if it not in there and forms[it] == form]
        away = [uses[it] for it in there if forms[it] == form]
        if here and away:
            assert max(here) < max(2 * min(away), min(away) + LEAST_USES)


def test_one_expert_that_gets_everything() -> None:
    uses = dict.fromkeys(EXPERTS, 0) | {EXPERTS[3]: 10**6}
    found = all_exchanges(uses, {EXPERTS[0]}, dict.fromkeys(EXPERTS, 0))
    assert found == [(EXPERTS[0], EXPERTS[3])]
    assert not all_exchanges(uses, {EXPERTS[3]}, dict.fromkeys(EXPERTS, 0))
    assert not all_exchanges(uses, set(), dict.fromkeys(EXPERTS, 0))


def test_exchanges_are_looked_for_when_so_much_was_used_that_one_may_be_worth_it() -> None:
    use = ExpertUse()
    for _ in range(2):
        for _ in range(LEAST_USES):
            assert not use.fresh
            use.note(EXPERTS[:2])
            use.note(EXPERTS[4:])
        use.note(EXPERTS[:2])
        assert use.fresh
        use.seen()


def test_what_was_used_long_ago_counts_less() -> None:
    use = ExpertUse()
    for _ in range(FADING - 1):
        use.note(EXPERTS[:2])
    assert use.uses[EXPERTS[0]] == FADING - 1
    use.note(EXPERTS[1:2])
    assert (use.uses[EXPERTS[0]], use.uses[EXPERTS[1]]) == ((FADING - 1) // 2, FADING // 2)
    assert use.uses[EXPERTS[4]] == 0


def test_counts_go_on_from_what_is_known() -> None:
    use = ExpertUse()
    for _ in range(10):
        use.note(EXPERTS[:2])
    again = ExpertUse(use.counts)
    assert not again.fresh
    for _ in range(FADING - 10):
        again.note(EXPERTS[1:2])
    assert (again.uses[EXPERTS[0]], again.uses[EXPERTS[1]]) == (5, FADING // 2)
    assert use.uses[EXPERTS[1]] == 10


def test_counts_fit_together_also_while_a_part_is_noted() -> None:
    """Somebody else may write them down in the middle of a step, and would not believe what they are then."""
    use, seen = ExpertUse(), []

    class Noted(list[BlockId]):
        def __getitem__(self, place: Any) -> Any:
            seen.append(use.counts)  # when its experts have been counted, and the part has not
            return super().__getitem__(place)

    for _ in range(FADING + 1):
        use.note(Noted(EXPERTS[:2]))
    assert len(seen) > FADING
    for counts in seen:
        assert all(count <= counts.parts[it.layer] for it, count in counts.uses.items() if count)
        assert all(count < FADING for count in counts.parts.values())
