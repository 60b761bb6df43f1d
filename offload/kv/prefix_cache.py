"""The prefix cache: KV pages whose tokens are known, so that sequences find them by those tokens and share them.

The cache is a tree. (It is one for each length that ropes are chosen for, where that matters.) A node is one page and
the token ids that its KV was computed from. That KV also depends on the text before it, which is the node's path from
the root. A node is looked up among its parent's children by its token ids themselves, hashed and compared, so a
collision of hashes cannot mix up texts. Nodes of less than a page (the end of a text) have no children. They are only
copied from, as is a page of which only the beginning is wanted.

Pages may also be on disk (`disk_index`). Evicted pages are saved there, and pages that continue a text are found there,
so that they are read instead of computed. This module knows neither where they are on disk nor when reading pays.

Pure bookkeeping: it knows page numbers and token ids, not arrays. `take_moves` tells the owner of the memory what to
move.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from typing import NamedTuple

from .disk_index import NO_TEXT, Entry, KvIndex, chained, most_alike, packed
from .pages import PageTable


@dataclass(eq=False, slots=True)
class PageNode:
    """`users` sequences hold this page. `used` orders pages by when they were last let go. `digest` names the text that
    ends with the page."""

    parent: PageNode | None
    tokens: tuple[int, ...]
    page: int
    digest: bytes
    children: dict[tuple[int, ...], PageNode] = field(default_factory=dict)
    users: int = 0
    used: int = 0


@dataclass(eq=False, slots=True)
class Holding:
    """The pages of one sequence in order of position: first those of shared nodes (`path`), then its own. `length`: for
    which length of text the ropes of its keys were chosen; keys with different ropes are never shared."""

    path: list[PageNode] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    length: int = 0

    @property
    def own_pages(self) -> int:
        """How many pages nobody else holds, so that letting go frees them."""
        # Whoever holds a node holds its ancestors, so the nodes that others hold come first.
        return len(self.pages) - bisect_left(self.path, True, key=lambda node: node.users <= 1)


class Copy(NamedTuple):
    """Copy page `source` to page `target`."""

    source: int
    target: int


class Save(NamedTuple):
    """Save page `page` before somebody else gets it. It holds the KV of `tokens` (packed) after the text of digest
    `parent`."""

    page: int
    parent: bytes
    tokens: bytes


class Put(NamedTuple):
    """Save page `page` in a slot: what a `Save` becomes once rank 0 has decided where, the same for all ranks. `digest`
    is of the text that ends with the page."""

    page: int
    slot: int
    digest: bytes


Move = Copy | Save | Put


class Found(NamedTuple):
    """A page on disk. Once it is read, the KV of the first `computed` tokens of the text is there."""

    entry: Entry
    computed: int


class PrefixCache:
    """Hands out the pages of `table` and remembers what they hold until they are needed for something else.

    Every page is free, cached (a node without users), or used (held by a sequence). `index` knows the pages on disk.
    """

    def __init__(self, table: PageTable, page_tokens: int, index: KvIndex | None = None) -> None:
        self.page_tokens = page_tokens
        self._table = table
        self._index = index
        self._root = PageNode(None, (), -1, NO_TEXT)
        self._roots = {0: self._root}  # by the length that the ropes of the keys below are chosen for
        self._nodes = 0
        self._clock = 0
        # A heap with the least recently used first. It may hold stale entries.
        self._leaves: list[tuple[int, int, PageNode]] = []
        self._moves: list[Move] = []
        self.cached_pages = 0

    @property
    def pages(self) -> int:
        return self._table.pages

    @property
    def used_pages(self) -> int:
        return self._table.pages - self.available_pages

    @property
    def available_pages(self) -> int:
        """Pages that can be had: the free ones, and the cached ones if they are forgotten."""
        return self._table.free_pages + self.cached_pages

    @property
    def free_pages(self) -> int:
        """Pages that can be had without forgetting anything."""
        return self._table.free_pages

    def pages_of(self, tokens: int) -> int:
        """How many pages hold so many tokens."""
        return -(-tokens // self.page_tokens)

    # --- for sequences -------------------------------------------------------------------------------------

    def held_pages(self, holding: Holding, tokens: Sequence[int]) -> int:
        """How many of the first pages of a text, for whose sequence `holding` is, somebody holds already."""
        return sum(1 for node in self._walk(self._tree(holding.length), tokens, 0) if node.users)

    def take_moves(self) -> list[Move]:
        """The moves that have come up since the last call. They must be made in this order, before any page is written
        or read, so that a page that was evicted and taken meanwhile is still intact when it is copied or saved."""
        moves, self._moves = self._moves, []
        return moves

    def adopt(self, holding: Holding, tokens: Sequence[int], computed: int) -> int:
        """Take over the known KV after the first `computed` tokens, but never that of the last token.

        Returns how many tokens have their KV as soon as the moves are made.
        """
        path, pages, size = holding.path, holding.pages, self.page_tokens
        for node in self._walk(self._end(holding), tokens, len(path) * size):
            self._hold(node)
            if len(pages) > len(path):  # drop its own page, which is not full
                self._table.give_back([pages.pop(len(path))])
            pages.insert(len(path), node.page)
            path.append(node)
        computed = max(computed, len(path) * size)
        if len(pages) > len(path):
            return computed
        source, shared = most_alike(self._end(holding).children, tuple(tokens[computed : computed + size]))
        shared = min(shared, len(tokens) - 1 - computed)
        if source is None or shared < 1:
            return computed
        self._touch(source)
        page = source.page
        if not self.extend(holding, computed + shared):
            return computed
        self._moves.append(Copy(page, pages[-1]))
        return computed + shared

    def on_disk(self, holding: Holding, tokens: Sequence[int], computed: int, most: int) -> list[Found]:
        """At most `most` pages on disk that continue the holding's shared pages; none if they do not reach beyond the
        first `computed` tokens. The KV of the last token is never taken. Of the last page, perhaps only the beginning
        agrees with the text."""
        if self._index is None:
            return []
        size, found = self.page_tokens, list[Found]()
        start, digest = len(holding.path) * size, self._end(holding).digest
        while start + size < len(tokens) and len(found) < most:
            wanted = packed(tokens[start : start + size])
            entry = self._index.find(digest, wanted)
            if entry is None:
                break
            start += size
            digest = chained(digest, wanted)
            found.append(Found(entry, start))
        if len(found) < most:
            entry, shared = self._index.nearest(digest, packed(tokens[start : start + size]))
            shared = min(shared, len(tokens) - 1 - start)
            if entry is not None and shared > 0:
                found.append(Found(entry, start + shared))
        return found if found and found[-1].computed > computed else []

    def extend(self, holding: Holding, tokens: int) -> bool:
        """Give the holding pages for so many tokens. Returns False and changes nothing when there are too few pages."""
        missing = self.pages_of(tokens) - len(holding.pages)
        if missing <= 0:
            return True
        if missing > self.available_pages:
            return False
        while self._table.free_pages < missing:
            self._evict()
        holding.pages += self._table.take(missing) or []
        return True

    def publish(self, holding: Holding, tokens: Sequence[int], computed: int) -> None:
        """Share the holding's full pages. The first `computed` of the sequence's `tokens` have their KV stored."""
        size = self.page_tokens
        while (len(holding.path) + 1) * size <= computed:
            index = len(holding.path)
            node = self._add(holding, tuple(tokens[index * size : (index + 1) * size]))
            holding.path.append(node)
            if node.page != holding.pages[index]:  # somebody else computed the same meanwhile
                self._table.give_back([holding.pages[index]])
                holding.pages[index] = node.page
            self._hold(node)

    def release(self, holding: Holding, tokens: Sequence[int], computed: int) -> None:
        """The sequence ends. Keep what it computed until its pages are needed. The holding is empty afterwards."""
        self.publish(holding, tokens, computed)
        index = len(holding.path)
        rest = tuple(tokens[index * self.page_tokens : computed])
        if most_alike(self._end(holding).children, rest)[1] < len(rest):
            self._touch(self._add(holding, rest))
            index += 1
        self._table.give_back(holding.pages[index:])
        self._let_go(holding)

    def drop(self, holding: Holding) -> None:
        """The sequence ends, and the pages that it has not shared yet cannot be relied on."""
        self._table.give_back(holding.pages[len(holding.path) :])
        self._let_go(holding)

    def known(self) -> list[Save]:
        """Every page whose text is known, the most recently used first, so that a page follows the text before it."""
        nodes = list(self._roots.values())
        for node in nodes:  # grows meanwhile
            nodes += node.children.values()
        nodes.sort(key=lambda node: -node.used)
        return [_save(node, node.parent) for node in nodes if node.parent]

    # --- the tree ------------------------------------------------------------------------------------------

    def _end(self, holding: Holding) -> PageNode:
        return holding.path[-1] if holding.path else self._tree(holding.length)

    def _tree(self, length: int) -> PageNode:
        """The root of what was computed with the ropes for that length."""
        root = self._roots.get(length)
        if root is None:
            used = {known: node for known, node in self._roots.items() if node.children or not known}
            digest = chained(NO_TEXT, packed([-1, length]))  # no text has a token -1
            root = PageNode(None, (), -1, digest)
            self._roots = used | {length: root}
        return root

    def _walk(self, node: PageNode, tokens: Sequence[int], start: int) -> Iterator[PageNode]:
        """The known nodes below `node` for the full pages of tokens[start:], without the last token."""
        size = self.page_tokens
        while start + size < len(tokens):
            found = node.children.get(tuple(tokens[start : start + size]))
            if found is None:
                return
            yield found
            node, start = found, start + size

    def _add(self, holding: Holding, tokens: tuple[int, ...]) -> PageNode:
        """The node for the holding's first page after its path; a new one if there is none."""
        parent = self._end(holding)
        known = parent.children.get(tokens)
        if known is not None:
            return known
        for child in list(parent.children.values()):  # the new page contains these ends of texts
            if len(child.tokens) < len(tokens) and tokens[: len(child.tokens)] == child.tokens:
                self._forget(child)
        digest = chained(parent.digest, packed(tokens))
        node = PageNode(parent, tokens, holding.pages[len(holding.path)], digest)
        parent.children[tokens] = node
        self._nodes += 1
        self.cached_pages += 1
        return node

    def _hold(self, node: PageNode) -> None:
        if not node.users:
            self.cached_pages -= 1
        node.users += 1

    def _let_go(self, holding: Holding) -> None:
        for node in reversed(holding.path):  # so that children are older than their parents and go first
            node.users -= 1
            if not node.users:
                self.cached_pages += 1
                self._touch(node)
        holding.path.clear()
        holding.pages.clear()

    def _touch(self, node: PageNode) -> None:
        """Note that it was used just now."""
        self._clock += 1
        node.used = self._clock
        self._offer(node)

    def _offer(self, node: PageNode) -> None:
        """If it is a leaf that nobody holds, enter it among those that may be evicted."""
        if node.users or node.children or node.parent is None:
            return
        if len(self._leaves) > 2 * self._nodes + 64:
            self._leaves = [entry for entry in self._leaves if _evictable(entry)]
            heapify(self._leaves)
        heappush(self._leaves, (node.used, node.page, node))

    def _evict(self) -> None:
        """Forget the leaf that was used longest ago, and have it saved if there is a disk."""
        while not _evictable(entry := heappop(self._leaves)):
            pass
        node = entry[2]
        assert node.parent is not None
        if self._index is not None:
            save = _save(node, node.parent)
            if not self._index.touch(save.parent, save.tokens):
                self._moves.append(save)
        self._forget(node)

    def _forget(self, node: PageNode) -> None:
        assert not node.users
        assert node.parent is not None
        del node.parent.children[node.tokens]
        parent, node.parent = node.parent, None
        self._nodes -= 1
        self.cached_pages -= 1
        self._table.give_back([node.page])
        self._offer(parent)


def _save(node: PageNode, parent: PageNode) -> Save:
    return Save(node.page, parent.digest, packed(node.tokens))


def _evictable(entry: tuple[int, int, PageNode]) -> bool:
    """Whether a heap entry is still valid: nothing has touched, held or extended its node since."""
    used, _, node = entry
    return node.parent is not None and node.used == used and not node.users and not node.children
