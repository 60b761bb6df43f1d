"""K and V that pass between rank 0, which has those of all heads, and ranks that have some of the heads.

A frame is one layer of one page: each side knows its size, and an order may be given up between any two of them. Knows
pools and collectives; not which pages have to pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from shoal.kernels.arrays import Bytes
from shoal.offload.kv.pool import KvPool
from shoal.partition.memory_layout import kv_page_bytes
from shoal.partition.slicing import Range
from shoal.partition.spec import ModelSpec

from .executor import Abandoned, Executor, StillWanted


def frame_bytes(spec: ModelSpec, kv_type: str) -> int:
    """Of K and V of one layer of a page."""
    return kv_page_bytes(spec, kv_type) // len(spec.layers)


def receive(executor: Executor, pages: Sequence[int]) -> None:
    """At a rank other than 0: K and V of these pages come from rank 0."""
    for page, layer in _frames(executor, pages):
        executor.collective.deal((), executor.kv.layer(page, layer).reshape(-1))


def give_back(executor: Executor, pages: Sequence[int]) -> None:
    """At a rank other than 0: K and V of these pages go to rank 0."""
    for page, layer in _frames(executor, pages):
        executor.collective.collect(executor.kv.layer(page, layer).reshape(-1), ())


class HeadsElsewhere:
    """At rank 0: the heads that other ranks have. `share` is its own part in the group, `kv` the pool of all heads,
    `kv_heads` which of them ranks 0, 1, … have, in ascending order; several may have the same one."""

    def __init__(self, share: Executor, kv: KvPool, kv_heads: Sequence[Range]) -> None:
        self._share = share
        self._kv = kv
        self._heads = [slice(*heads) for heads in kv_heads[1:]]
        self._known = [here.start < before.stop for before, here in pairwise(kv_heads)]  # to a rank before it

    def send(self, pages: Sequence[int], wanted: StillWanted) -> None:
        """Each rank gets K and V of its heads. Raises Abandoned, and what the collective raises."""
        for page, layer in _frames(self._share, pages):
            _go_on(wanted, 0.0)
            self._share.collective.deal(self._parts(page, layer), None)

    def fetch(self, pages: Sequence[int], wanted: StillWanted) -> None:
        """Get K and V of all of them; of a head that several ranks have, those of the first. Raises as `send`."""
        for page, layer in _frames(self._share, pages):
            _go_on(wanted, 1.0)
            parts = zip(self._parts(page, layer), self._known, strict=True)
            self._share.collective.collect(
                None, [np.empty_like(part) if known else part for part, known in parts]
            )

    def _parts(self, page: int, layer: int) -> list[Bytes]:
        return [self._kv.layer(page, layer, heads).reshape(-1) for heads in self._heads]


def _frames(executor: Executor, pages: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(page, layer), in the order in which they pass."""
    return ((page, layer) for page in pages for layer in range(len(executor.model.spec.layers)))


def _go_on(wanted: StillWanted, share: float) -> None:
    if not wanted(share):
        raise Abandoned
