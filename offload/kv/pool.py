"""The KV pool: fixed-size pages of K and V that all sequences of a model share.

A page holds 64 positions of every layer. Memory is touched only when it is written, so a large pool costs nothing until
it is used. The pool knows pages; `prefix_cache` decides who may use them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from copy import copy
from math import prod
from typing import Any, Protocol

from shoal.kernels.arrays import Bytes
from shoal.kernels.attention_operands import KvPages, kv_layout
from shoal.kernels.huge_pages import Arena
from shoal.partition.plan import KvPlan
from shoal.partition.slicing import Range
from shoal.partition.spec import ModelSpec

from .pages import PageTable
from .prefix_cache import Copy, Move, Put, Save

KV_LAYOUT = 1  # add one whenever the meaning of a page's bytes changes


class KvShelf(Protocol):
    """Where a rank keeps pages besides its pool. `KvDisk` decides where they lie, `KvSlots` is told."""

    @property
    def nbytes(self) -> int: ...
    @property
    def pages_read(self) -> int: ...
    @property
    def pages_written(self) -> int: ...
    @property
    def closed(self) -> bool: ...
    def place(self, what: Save, wait_s: float = 0.0) -> Put | None: ...
    def put(self, put: Put, page: Bytes, wait_s: float = 0.0) -> None: ...
    def read(self, entries: Sequence[Any], into: Sequence[Bytes]) -> int: ...
    def disown(self, entry: Any) -> None: ...
    def worth_keeping(self, known: Sequence[Save]) -> Sequence[Save]: ...
    def close(
        self, known: Sequence[Save], page: Callable[[int], Bytes] | None, limit_s: float = ...
    ) -> None: ...


class KvPool:
    """K and V of every layer. Memory has page after page, and within a page layer after layer. `layers` are the views
    that attention takes."""

    def __init__(self, spec: ModelSpec, plan: KvPlan) -> None:
        self.page_tokens = plan.page_tokens
        self.table = PageTable(plan.pages)
        self._layout = kv_layout(plan.dtype, spec.head_dim)
        shape = (plan.pages, len(spec.layers), spec.kv_heads, self._layout.head_bytes)
        self._pages: Bytes = Arena().take(prod(shape)).reshape(shape)
        self.layers = self._views(spec.heads)

    def of_heads(self, kv_heads: Range, heads: int) -> KvPool:
        """The same pages for somebody who knows only some of the KV heads, to which `heads` query heads attend: in the
        same memory, so what either writes there both have."""
        some = copy(self)
        some._pages = self._pages[:, :, kv_heads.start : kv_heads.stop]
        some.layers = some._views(heads)
        return some

    def _views(self, heads: int) -> list[KvPages]:
        return [KvPages(self._layout, heads, self._pages[:, i]) for i in range(self._pages.shape[1])]

    @property
    def nbytes(self) -> int:
        return self._pages.nbytes

    def page(self, number: int) -> Bytes:
        """A view of one page with all its layers, (bytes of a page,)."""
        page: Bytes = self._pages[number].reshape(-1)
        return page

    def layer(self, number: int, layer: int, kv_heads: slice = slice(None)) -> Bytes:
        """A view of one layer of a page, of some heads, (heads, bytes of a head)."""
        return self._pages[number, layer, kv_heads]

    @property
    def page_bytes(self) -> int:
        return self.nbytes // len(self._pages)

    def let_go(self) -> None:
        """Give the memory back; there are no pages any more."""
        self._pages = self._pages[:0].copy()
        self.layers = []

    def move(self, moves: Iterable[Move], shelf: KvShelf | None = None, wait_s: float = 0.0) -> None:
        """Carry out moves in their order: copy pages, and put pages on `shelf`, where it must be decided where they go.
        Each may wait for `wait_s` until there is room."""
        for move in moves:
            if isinstance(move, Copy):
                self._pages[move.target] = self._pages[move.source]
            elif shelf is not None:
                assert isinstance(move, Put), move
                shelf.put(move, self.page(move.page), wait_s)
