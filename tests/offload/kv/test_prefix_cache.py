"""The prefix cache: the KV it finds was computed from the same tokens, and no page is lost or owned twice."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from shoal.offload.kv.pages import PageTable
from shoal.offload.kv.prefix_cache import Copy, Holding, PageNode, PrefixCache

PAGE = 4
PAGES = 12
TEXT = st.lists(st.integers(0, 2), min_size=1, max_size=22)


def cache(pages: int = PAGES) -> PrefixCache:
    return PrefixCache(PageTable(pages), PAGE)


class Reader:
    """A sequence: its tokens, and pages for the first `computed` of them."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens
        self.holding = Holding()
        self.computed = 0


class PrefixCacheMachine(RuleBasedStateMachine):
    """Sequences come, compute, grow and go in any order. A slot of this memory holds all text up to its position."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = cache()
        self.memory: list[list[tuple[int, ...]]] = [[()] * PAGE for _ in range(PAGES)]
        self.readers: list[Reader] = []

    def move(self) -> None:
        for move in self.cache.take_moves():
            assert isinstance(move, Copy)
            self.memory[move.target] = list(self.memory[move.source])

    @rule(tokens=TEXT)
    def begin(self, tokens: list[int]) -> None:
        self.readers.append(reader := Reader(tokens))
        self.adopt(reader)

    @precondition(lambda self: self.readers)
    @rule(index=st.integers(0, 99))
    def adopt_later(self, index: int) -> None:
        self.adopt(self.readers[index % len(self.readers)])

    def adopt(self, reader: Reader) -> None:
        if reader.computed == len(reader.tokens):
            return
        before = reader.computed
        reader.computed = self.cache.adopt(reader.holding, reader.tokens, before)
        assert before <= reader.computed < len(reader.tokens)
        self.move()

    @precondition(lambda self: self.readers)
    @rule(index=st.integers(0, 99), tokens=st.integers(1, 9))
    def compute(self, index: int, tokens: int) -> None:
        reader = self.readers[index % len(self.readers)]
        end = min(len(reader.tokens), reader.computed + tokens)
        room = self.cache.available_pages
        missing = self.cache.pages_of(end) - len(reader.holding.pages)
        assert self.cache.extend(reader.holding, end) == (missing <= room)
        if missing > room:
            return
        for position in range(reader.computed, end):
            page = reader.holding.pages[position // PAGE]
            self.memory[page][position % PAGE] = tuple(reader.tokens[: position + 1])
        reader.computed = end
        self.cache.publish(reader.holding, reader.tokens, end)

    @precondition(lambda self: self.readers)
    @rule(index=st.integers(0, 99), token=st.integers(0, 2))
    def say(self, index: int, token: int) -> None:
        self.readers[index % len(self.readers)].tokens.append(token)

    @precondition(lambda self: self.readers)
    @rule(index=st.integers(0, 99), keep=st.booleans())
    def end(self, index: int, keep: bool) -> None:
        reader = self.readers.pop(index % len(self.readers))
        if keep:
            self.cache.release(reader.holding, reader.tokens, reader.computed)
        else:
            self.cache.drop(reader.holding)
        assert reader.holding.pages == []

    @invariant()
    def every_reader_has_the_text_it_asked_for(self) -> None:
        for reader in self.readers:
            for position in range(reader.computed):
                page = reader.holding.pages[position // PAGE]
                assert self.memory[page][position % PAGE] == tuple(reader.tokens[: position + 1])

    @invariant()
    def pages_add_up(self) -> None:
        nodes = list(everything(self.cache._root))
        users = dict.fromkeys(nodes, 0)
        for reader in self.readers:
            for node in reader.holding.path:
                users[node] += 1
        assert {node: node.users for node in nodes} == users
        own = [p for reader in self.readers for p in reader.holding.pages[len(reader.holding.path) :]]
        taken = [*own, *(node.page for node in nodes)]
        assert len(set(taken)) == len(taken) == PAGES - self.cache._table.free_pages
        assert self.cache.cached_pages == sum(not count for count in users.values())
        assert self.cache.used_pages == len(taken) - self.cache.cached_pages

    @invariant()
    def own_pages_are_those_of_nobody_else(self) -> None:
        for reader in self.readers:
            shared = [node for node in reader.holding.path if node.users > 1]
            assert reader.holding.own_pages == len(reader.holding.pages) - len(shared)


def everything(node: PageNode) -> list[PageNode]:
    below = [found for child in node.children.values() for found in everything(child)]
    return below if node.parent is None else [node, *below]


TestPrefixCache = PrefixCacheMachine.TestCase
TestPrefixCache.settings = settings(deadline=None, max_examples=50, stateful_step_count=40)


def known(subject: PrefixCache, tokens: list[int]) -> int:
    """Computes a text and lets it go. Returns how many of its tokens were known before."""
    holding = Holding()
    start = subject.adopt(holding, tokens, 0)
    assert subject.extend(holding, len(tokens))
    subject.release(holding, tokens, len(tokens))
    return start


def test_the_least_recently_used_goes_first_and_ends_before_beginnings() -> None:
    subject = cache(pages=4)
    assert known(subject, [1] * 8) == 0
    assert known(subject, [2] * 8) == 0
    assert known(subject, [1] * 9) == 8  # takes a page: the end of the second text goes
    assert subject.available_pages == 4
    assert known(subject, [2] * 8) == 4
    assert known(subject, [1] * 4) == 3  # its beginning is still there


def test_a_longer_end_takes_the_place_of_a_shorter_one() -> None:
    subject = cache()
    for length in (5, 6, 7):
        known(subject, [1, 2, 3, 4, 5, 6, 7][:length])
    assert subject.cached_pages == 2
    known(subject, [1, 2, 3, 4, 5])
    assert subject.cached_pages == 2
    known(subject, [1, 2, 3, 4, 5, 6, 7, 8])
    assert subject.cached_pages == 2


def test_a_page_is_taken_over_as_far_as_it_agrees() -> None:
    subject = cache()
    known(subject, [1, 2, 3, 4, 5, 6, 7, 8])
    assert known(subject, [1, 2, 3, 4, 5, 6, 0, 0, 0]) == 6
    assert known(subject, [1, 2, 9]) == 2


def test_stale_entries_do_not_pile_up() -> None:
    subject = cache()
    for _ in range(2000):
        known(subject, [1] * 8)
    assert len(subject._leaves) < 200


def test_texts_whose_hashes_collide_are_told_apart() -> None:
    """hash(-1) == hash(-2) in Python, so pages made of them have equal hashes, too."""
    subject = cache()
    assert hash((-1,) * PAGE) == hash((-2,) * PAGE)
    known(subject, [-1] * 8)
    assert known(subject, [-2] * 8) == 0
