"""The prefix cache: KV pages whose tokens are known, found again by those tokens and shared.

A tree. A node is one page and the token ids its KV was computed from; its path from the root is the text before it,
on which that KV depends. A node is looked up among its parent's children by its token ids themselves, hashed and
compared, so texts cannot be mixed up, whatever collides. Nodes of less than a page (the end of a text) have no
children and are only ever copied from, as is a page of which only the beginning is wanted.

Pages may also be on disk (`kv_disk_index`): evicted ones are saved there, those that continue a text are found there,
to be read instead of computed. Where on disk is not known here, nor when reading pays.

Pure bookkeeping: knows page numbers and token ids, not arrays. Who owns the memory is told what to move
(`take_moves`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush

from .disk_index import NO_TEXT, Entry, KvIndex, chained, common_length, packed
from .pages import PageTable


@dataclass(eq=False, slots=True)
class PageNode:
    """`users` sequences hold this page; `used` orders pages by when they were last let go; `digest` names the text
    up to its end."""

    parent: PageNode | None
    tokens: tuple[int, ...]
    page: int
    digest: bytes
    children: dict[tuple[int, ...], PageNode] = field(default_factory=dict)
    users: int = 0
    used: int = 0


@dataclass(eq=False, slots=True)
class Holding:
    """The pages of one sequence: a path of shared nodes first, then pages of its own, in order of position."""

    path: list[PageNode] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)

    @property
    def own_pages(self) -> int:
        """Pages that nobody else holds, so that letting go frees them."""
        # Whoever holds a node holds its ancestors, so the shared nodes come first.
        low, high = 0, len(self.path)
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if self.path[middle].users > 1 else (low, middle)
        return len(self.pages) - low


@dataclass(frozen=True, slots=True)
class Copy:
    """Page `target` shall hold what page `source` holds."""

    source: int
    target: int


@dataclass(frozen=True, slots=True)
class Save:
    """Page `page` is given to somebody else: it holds the KV of `tokens` (packed) after the text of digest `parent`."""

    page: int
    parent: bytes
    tokens: bytes


Move = Copy | Save


@dataclass(frozen=True, slots=True)
class Found:
    """A page on disk; when it is read, KV of the first `computed` tokens of the text is there."""

    entry: Entry
    computed: int


class PrefixCache:
    """Hands out the pages of `table` and remembers what they hold until they are needed for something else.

    Every page is free, cached (a node without users), or used (held by a sequence). `index`: of the pages on disk.
    """

    def __init__(self, table: PageTable, page_tokens: int, index: KvIndex | None = None) -> None:
        self.page_tokens = page_tokens
        self._table = table
        self._index = index
        self._root = PageNode(None, (), -1, NO_TEXT)
        self._nodes = 0
        self._clock = 0
        # A heap, least recently used first; may hold stale entries.
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
        """Pages that can be had: free ones, and cached ones at the price of forgetting them."""
        return self._table.free_pages + self.cached_pages

    @property
    def free_pages(self) -> int:
        """Pages that can be had without forgetting anything."""
        return self._table.free_pages

    def pages_of(self, tokens: int) -> int:
        """Pages that hold so many tokens."""
        return -(-tokens // self.page_tokens)

    # --- for sequences -------------------------------------------------------------------------------------

    def held_pages(self, tokens: Sequence[int]) -> int:
        """How many of the first pages of a text somebody holds already."""
        return sum(1 for node in self._walk(self._root, tokens, 0) if node.users)

    def take_moves(self) -> list[Move]:
        """What has to be moved since the last call: in this order, before any page is written or read. Then a page
        that is evicted and taken meanwhile is still whole when it is copied or saved."""
        moves, self._moves = self._moves, []
        return moves

    def adopt(self, holding: Holding, tokens: Sequence[int], computed: int) -> int:
        """Take over what is known of the KV after the first `computed` tokens, but never that of the last token.

        Returns how many are computed now, as soon as the moves are made.
        """
        path, pages, size = holding.path, holding.pages, self.page_tokens
        for node in self._walk(self._end(holding), tokens, len(path) * size):
            self._hold(node)
            if len(pages) > len(path):  # its own page, begun but not full
                self._table.give_back([pages.pop(len(path))])
            pages.insert(len(path), node.page)
            path.append(node)
        computed = max(computed, len(path) * size)
        if len(pages) > len(path):
            return computed
        source, shared = self._nearest(self._end(holding), tuple(tokens[computed : computed + size]))
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
        """Pages, at most `most`, that continue the holding's shared ones, up to more than `computed` tokens, but never
        the last. The last found may agree with the text at its beginning only."""
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
        """Give the holding pages for so many tokens. False, and nothing changes, when there are too few."""
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
        """Share the holding's full pages; `computed` is how many of the sequence's `tokens` have their KV stored."""
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
        """The sequence goes: keep what it computed until its pages are needed. The holding is empty afterwards."""
        self.publish(holding, tokens, computed)
        index = len(holding.path)
        rest = tuple(tokens[index * self.page_tokens : computed])
        if self._nearest(self._end(holding), rest)[1] < len(rest):
            self._touch(self._add(holding, rest))
            index += 1
        self._table.give_back(holding.pages[index:])
        self._let_go(holding)

    def drop(self, holding: Holding) -> None:
        """The sequence goes, and what it did not share yet is not to be relied on."""
        self._table.give_back(holding.pages[len(holding.path) :])
        self._let_go(holding)

    def known(self) -> list[Save]:
        """Every page whose text is known, most recently used first, so that what is before a page precedes it."""
        nodes, stack = list[PageNode](), [self._root]
        while stack:
            below = stack.pop().children.values()
            nodes += below
            stack += below
        return [
            _save(node, node.parent) for node in sorted(nodes, key=lambda node: -node.used) if node.parent
        ]

    # --- the tree ------------------------------------------------------------------------------------------

    def _end(self, holding: Holding) -> PageNode:
        return holding.path[-1] if holding.path else self._root

    def _walk(self, node: PageNode, tokens: Sequence[int], start: int) -> Iterator[PageNode]:
        """Nodes below `node` for the full pages of tokens[start:], as far as known, the last token left out."""
        size = self.page_tokens
        while start + size < len(tokens):
            found = node.children.get(tuple(tokens[start : start + size]))
            if found is None:
                return
            yield found
            node, start = found, start + size

    def _nearest(self, parent: PageNode, wanted: tuple[int, ...]) -> tuple[PageNode | None, int]:
        """The child that begins most like `wanted`, and how many tokens they share."""
        best, shared = None, 0
        for child in parent.children.values():
            if child.tokens[: shared + 1] == wanted[: shared + 1] and shared < len(wanted):
                shared = common_length(child.tokens, wanted)
                best = child
        return best, shared

    def _add(self, holding: Holding, tokens: tuple[int, ...]) -> PageNode:
        """The node of the holding's first page beyond its path: the one there is, or a new one."""
        parent = self._end(holding)
        known = parent.children.get(tokens)
        if known is not None:
            return known
        for child in list(parent.children.values()):  # ends of texts that the new page contains
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
        for node in reversed(holding.path):  # children before parents, so that they are older and go first
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
        """Let it be evicted when its turn comes, if it is a leaf that nobody holds."""
        if node.users or node.children or node.parent is None:
            return
        if len(self._leaves) > 2 * self._nodes + 64:
            self._leaves = [entry for entry in self._leaves if _evictable(entry)]
            heapify(self._leaves)
        heappush(self._leaves, (node.used, node.page, node))

    def _evict(self) -> None:
        """Forget the leaf that was used longest ago, or know it on disk only."""
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
    """Whether a heap entry still says what is true: nothing has touched, held or extended its node since."""
    used, _, node = entry
    return node.parent is not None and node.used == used and not node.users and not node.children
