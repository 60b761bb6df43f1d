"""The KV pool: fixed-size pages of K and V that all sequences of a model share.

A page holds 64 positions of every layer. Memory is touched only when it is written, so a large pool costs nothing until
it is used. The pool knows pages; `prefix_cache` decides who may use them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from copy import copy
from typing import Any, NamedTuple, Protocol

import numpy as np

from shoal.kernels import ComputeHome, home_of
from shoal.kernels.arrays import Bytes
from shoal.kernels.attention_operands import KvPages, kv_layout
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


class _Held(NamedTuple):
    """The pages of the layers that one home computes, (pages, layers, kv_heads, head_bytes)."""

    home: ComputeHome
    layers: list[int]
    pages: Bytes


class KvPool:
    """K and V of every layer, in the home that computes its attention (`homes`: of each layer; by default the CPU). In
    a home memory has page after page, and within a page layer after layer. `layers` are the views that attention
    takes."""

    def __init__(self, spec: ModelSpec, plan: KvPlan, homes: Sequence[ComputeHome] = ()) -> None:
        self.page_tokens = plan.page_tokens
        self.table = PageTable(plan.pages)
        self._layout = kv_layout(plan.dtype, spec.head_dim)
        self._page_shape = (len(spec.layers), spec.kv_heads, self._layout.head_bytes)
        homes = homes or [home_of("cpu")] * len(spec.layers)
        self._held: list[_Held] = []
        for home in dict.fromkeys(homes):
            mine = [layer for layer, its in enumerate(homes) if its is home]
            pages = home.pages((plan.pages, len(mine), *self._page_shape[1:]))
            self._held.append(_Held(home, mine, pages))
        self.layers = self._views(spec.heads)

    def of_heads(self, kv_heads: Range, heads: int) -> KvPool:
        """The same pages for somebody who knows only some of the KV heads, to which `heads` query heads attend: in the
        same memory, so what either writes there both have. All have to be on the host."""
        some = copy(self)
        some._held = [
            held._replace(pages=held.pages[:, :, kv_heads.start : kv_heads.stop]) for held in self._held
        ]
        layers, _, head_bytes = self._page_shape
        some._page_shape = (layers, kv_heads.size, head_bytes)
        some.layers = some._views(heads)
        return some

    def _views(self, heads: int) -> list[KvPages]:
        views = {
            layer: held.home.layer_of(held.pages, place)
            for held in self._held
            for place, layer in enumerate(held.layers)
        }
        return [KvPages(self._layout, heads, views[layer]) for layer in range(len(views))]

    @property
    def nbytes(self) -> int:
        """In all homes."""
        return sum(held.pages.nbytes for held in self._held)

    def page(self, number: int) -> Bytes:
        """One page with all its layers, (bytes of a page,): a view if all are on the host, else a copy."""
        if len(self._held) == 1:
            held = self._held[0]
            page: Bytes = held.home.page_out(held.pages, number).reshape(-1)
            return page
        whole = np.empty(self._page_shape, np.uint8)
        for held in self._held:
            whole[held.layers] = held.home.page_out(held.pages, number)
        return whole.reshape(-1)

    def put(self, number: int, page: Bytes) -> None:
        """One page with all its layers, as `page` gives it; what is a view already has been written."""
        whole = page.reshape(self._page_shape)
        for held in self._held:
            mine = whole if len(self._held) == 1 else whole[held.layers]
            held.home.page_in(held.pages, number, mine)

    def layer(self, number: int, layer: int, kv_heads: slice = slice(None)) -> Bytes:
        """A view of one layer of a page, of some heads, (heads, bytes of a head). It has to be on the host."""
        view: Bytes = self.layers[layer].data[number, kv_heads]
        return view

    @property
    def page_bytes(self) -> int:
        return int(np.prod(self._page_shape))

    def let_go(self) -> None:
        """Give the memory back; there are no pages any more."""
        self._held = []
        self.layers = []

    def move(self, moves: Iterable[Move], shelf: KvShelf | None = None, wait_s: float = 0.0) -> None:
        """Carry out moves in their order: copy pages, and put pages on `shelf`, where it must be decided where they go.
        Each may wait for `wait_s` until there is room."""
        for move in moves:
            if isinstance(move, Copy):
                for held in self._held:
                    held.home.copy_page(held.pages, move.source, move.target)
            elif shelf is not None:
                assert isinstance(move, Put), move
                shelf.put(move, self.page(move.page), wait_s)
