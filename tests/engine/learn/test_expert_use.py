"""Which experts change places: those that are used much more often with those that are not, and then no more."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from shoal.engine.learn.expert_use import FADING, LEAST_USES, ExpertUse, all_exchanges, best_exchange
from shoal.partition.spec import BlockId

EXPERTS = [BlockId("expert", layer, expert) for layer in range(2) for expert in range(4)]


@given(
    st.lists(st.integers(0, 1000), min_size=8, max_size=8),
    st.sets(st.sampled_from(EXPERTS)),
    st.lists(st.sampled_from("ab"), min_size=8, max_size=8),
)
def test_exchanges_spare_the_cpu_and_end(counts: list[int], there: set[BlockId], kinds: list[str]) -> None:
    uses, forms = dict(zip(EXPERTS, counts, strict=True)), dict(zip(EXPERTS, kinds, strict=True))
    many = len(there)
    together = all_exchanges(uses, there, forms)
    at_once = there - {pair.from_device for pair in together} | {pair.from_cpu for pair in together}
    while (found := best_exchange(uses, there, forms)) is not None:
        assert found.from_device in there
        assert found.from_cpu not in there
        assert forms[found.from_device] == forms[found.from_cpu]
        assert uses[found.from_cpu] >= max(2 * uses[found.from_device], uses[found.from_device] + LEAST_USES)
        there = there - {found.from_device} | {found.from_cpu}
    assert len(there) == len(at_once) == many
    assert sorted(uses[it] for it in there) == sorted(uses[it] for it in at_once)
    assert all(forms[one] == forms[other] for one, other in together)
    for form in "ab":  # nothing is left that would have been worth it
        here = [uses[it] for it in EXPERTS if it not in there and forms[it] == form]
        away = [uses[it] for it in there if forms[it] == form]
        if here and away:
            assert max(here) < max(2 * min(away), min(away) + LEAST_USES)


def test_one_expert_that_gets_everything() -> None:
    uses = dict.fromkeys(EXPERTS, 0) | {EXPERTS[3]: 10**6}
    found = best_exchange(uses, {EXPERTS[0]}, dict.fromkeys(EXPERTS, 0))
    assert found == (EXPERTS[0], EXPERTS[3])
    assert best_exchange(uses, {EXPERTS[3]}, dict.fromkeys(EXPERTS, 0)) is None
    assert best_exchange(uses, set(), dict.fromkeys(EXPERTS, 0)) is None


def test_what_was_used_long_ago_counts_less() -> None:
    use = ExpertUse()
    assert not use.fresh
    for _ in range(FADING - 1):
        use.note(EXPERTS[:2])
    assert use.fresh
    assert use.of(EXPERTS[0]) == FADING - 1
    use.note(EXPERTS[1:2])
    assert (use.of(EXPERTS[0]), use.of(EXPERTS[1])) == ((FADING - 1) // 2, FADING // 2)
    assert use.of(EXPERTS[4]) == 0


def test_counts_go_on_from_what_is_known() -> None:
    use = ExpertUse()
    for _ in range(10):
        use.note(EXPERTS[:2])
    again = ExpertUse(use.counts)
    assert not again.fresh
    for _ in range(FADING - 10):
        again.note(EXPERTS[1:2])
    assert (again.of(EXPERTS[0]), again.of(EXPERTS[1])) == (5, FADING // 2)
    assert use.of(EXPERTS[1]) == 10


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
