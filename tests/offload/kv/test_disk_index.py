"""The index of KV pages on disk: finds what was entered, forgets the least recently used, survives a restart."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from shoal.offload.kv.disk_index import NO_TEXT, Entry, KvIndex, chained, packed

SLOTS = 5
PAGE = 3
PARENTS = [NO_TEXT, chained(NO_TEXT, packed([1, 2, 3])), chained(NO_TEXT, packed([1, 2, 4]))]
parents = st.sampled_from(PARENTS)
pages = st.lists(st.integers(0, 1), min_size=1, max_size=PAGE).map(tuple)
Text = tuple[bytes, tuple[int, ...]]


class KvIndexMachine(RuleBasedStateMachine):
    """Compares the index with a list of the pages that it should have, least recently used first."""

    def __init__(self) -> None:
        super().__init__()
        self.index = KvIndex(SLOTS)
        self.truth: list[tuple[Text, int]] = []
        self.lost: set[int] = set()  # slots that could not be written

    def covering(self, parent: bytes, page: tuple[int, ...]) -> list[int]:
        return [i for i, ((p, t), _) in enumerate(self.truth) if p == parent and t[: len(page)] == page]

    @rule(parent=parents, page=pages, works=st.booleans())
    def write(self, parent: bytes, page: tuple[int, ...], works: bool) -> None:
        if self.index.touch(parent, packed(page)):
            self.touched(parent, page)
            return
        assert not self.covering(parent, page)
        entry = self.index.claim(parent, packed(page), 7)
        full = len(self.truth) == self.index.slots - len(self.lost)
        if full and self.truth:
            self.truth.pop(0)
        if entry is None:
            assert not self.truth
            return
        assert entry.slot not in [slot for _, slot in self.truth]
        if works:
            self.index.add(entry)
            known = [((p, t), s) for (p, t), s in self.truth if p != parent or page[: len(t)] != t]
            self.truth = [*known, ((parent, page), entry.slot)]
        else:
            self.index.refuse(entry)
            if entry.slot < self.index.slots:
                self.lost.add(entry.slot)

    def touched(self, parent: bytes, page: tuple[int, ...]) -> None:
        positions = self.covering(parent, page)
        assert positions
        latest = self.index.entries()[-1]
        position = next(i for i in positions if self.truth[i][1] == latest.slot)
        self.truth.append(self.truth.pop(position))

    @rule(parent=parents, page=pages)
    def forget(self, parent: bytes, page: tuple[int, ...]) -> None:
        entry = self.index.find(parent, packed(page))
        if entry is not None:
            self.index.forget(entry)
            self.index.forget(entry)
            self.truth = [item for item in self.truth if item[0] != (parent, page)]

    @rule(slots=st.integers(0, SLOTS))
    def resize(self, slots: int) -> None:
        self.index.resize(slots)
        self.truth = [item for item in self.truth if item[1] < slots]
        self.lost = {slot for slot in self.lost if slot < slots}

    @rule()
    def restart(self) -> None:
        self.index = KvIndex(self.index.slots, reversed(self.index.entries()))
        self.lost = set()

    @invariant()
    def it_has_what_it_should(self) -> None:
        entries = self.index.entries()
        assert [((e.parent, e.tokens), e.slot) for e in entries] == [
            ((p, packed(t)), s) for (p, t), s in self.truth
        ]
        assert len(self.index) == len(entries) <= self.index.slots <= SLOTS
        assert len({e.slot for e in entries}) == len(entries)
        assert all(e.slot < self.index.slots for e in entries)
        for parent in PARENTS:
            for page in ((0,), (1, 0), (1, 1, 1)):
                found = self.index.find(parent, packed(page))
                assert (found is not None) == any(text == (parent, page) for text, _ in self.truth)
                nearest, shared = self.index.nearest(parent, packed(page))
                agreeing = [common(t, page) for (p, t), _ in self.truth if p == parent]
                assert shared == max(agreeing, default=0)
                assert (nearest is None) == (shared == 0)


def common(first: tuple[int, ...], second: tuple[int, ...]) -> int:
    shared = [a == b for a, b in zip(first, second, strict=False)]
    return shared.index(False) if False in shared else len(shared)


TestKvIndex = KvIndexMachine.TestCase
TestKvIndex.settings = settings(deadline=None, max_examples=60, stateful_step_count=40)


def put(index: KvIndex, parent: bytes, tokens: list[int]) -> Entry:
    entry = index.claim(parent, packed(tokens), 0)
    assert entry is not None
    index.add(entry)
    return entry


def test_a_chain_of_hashes_names_a_text() -> None:
    """All texts of one or two pages over two tokens have different digests."""
    ones = [packed([a, b]) for a in range(2) for b in range(2)]
    digests = [chained(chained(NO_TEXT, one), other) for one in ones for other in ones]
    digests += [chained(NO_TEXT, one) for one in ones]
    assert len(set(digests)) == len(digests) == 20


def test_of_two_records_of_one_page_the_later_counts() -> None:
    entries = [Entry(slot, NO_TEXT, packed([1, 2]), slot, used) for slot, used in ((0, 9), (1, 4), (2, 5))]
    index = KvIndex(3, entries)
    assert [entry.slot for entry in index.entries()] == [0]
    assert {put(index, NO_TEXT, [7]).slot, put(index, NO_TEXT, [8]).slot} == {1, 2}
    assert put(index, NO_TEXT, [9]).slot == 0  # the oldest, though it was there first


def test_fewer_slots_than_before_keep_what_fits() -> None:
    index = KvIndex(2, [Entry(slot, NO_TEXT, packed([slot]), 0, slot) for slot in range(4)])
    assert sorted(entry.slot for entry in index.entries()) == [0, 1]


def test_without_slots_nothing_is_kept() -> None:
    assert KvIndex(0).claim(NO_TEXT, packed([1]), 0) is None
