"""The home of a device: hidden states, weights and K and V are handles of arrays in its memory (`DeviceArray`).

The same for every device. It takes room for results, says which copies a computation has to wait for, and brings small
operands of the host over. The arithmetic is that of the device's `OnDevice`, on what is inside of the handles.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from itertools import accumulate
from math import prod
from typing import Any

import numpy as np

from shoal.kernels import routing
from shoal.kernels.arrays import Array, Bytes, Floats, Hidden, Ids
from shoal.kernels.attention_operands import HeadNorms, KvPages, Rotation, Scoring, Segments
from shoal.kernels.compute_home import HERE, ComputeHome, Staged
from shoal.kernels.matrix import FeedForward, Linears, Matrix, Routes
from shoal.partition.placement import DeviceRoom

from .device import (
    DeviceArray,
    DeviceEvent,
    DeviceMemory,
    DeviceWork,
    Leaving,
    OpenDevice,
    StagedPart,
)
from .on_device import OnDevice, places_of
from .page_locked import PageLocked

UINT8 = np.dtype(np.uint8)
F32_BYTES = 4


class DeviceHome(ComputeHome):
    """Computes on one device. `not_better`: why its kernels are not the best that there could be, or ""."""

    def __init__(self, device: OpenDevice, kernels: OnDevice, not_better: str = "") -> None:
        self.device = device
        self._kernels = kernels
        self.not_better = not_better

    @property
    def kernels(self) -> str:
        """What computes, in a word or two."""
        return self._kernels.name

    def room(self, free_bytes: int) -> DeviceRoom:
        """What plans count with."""
        device, kernels = self.device, self._kernels
        limit_bytes = device.budget.limit_bytes
        return DeviceRoom(device.name, free_bytes, kernels.scratch_bytes, kernels.gathers, limit_bytes)

    # --- what stays ------------------------------------------------------------------------------------------

    def keep_matrix(self, w: Matrix) -> Matrix:
        return Matrix(w.type, self._kept(self._kernels.laid_out(w)), w.rows, w.cols)

    def keep_vector(self, x: Floats) -> Any:
        return self._kept(x)

    def exchange(self, mine: Matrix, hosts: Matrix) -> None:
        there: Any = mine.data
        self._change("exchange", there, lambda: None)  # after all that reads them
        before = self._fetched(there)
        self._arrived(self._kernels.laid_out(hosts), there)
        self._kernels.put_back(before, hosts)

    def staging(self, nbytes: int) -> Any:
        made = self.device.allocate((nbytes,), UINT8)
        if made.memory.ready is not None:
            self.device.wait(made.memory.ready)
        return made

    def staged(self, its: Staged) -> Matrix:
        w, staging, _ = its
        inside = self._kernels.as_they_lie(self._target(its), w)
        there: Any = DeviceArray(_memory(staging), inside, UINT8, w.data.shape, (1,))
        return Matrix(w.type, there, w.rows, w.cols)

    def stage(self, all: Sequence[Staged], lent: AbstractContextManager[object] = HERE) -> None:
        memories = {id(it.staging): _memory(it.staging) for it in all}.values()
        # Copies there come one after the other anyhow, and one that failed is no reason why the next one should.
        after = [memory.used for memory in memories if memory.used is not None]
        within = self.device.within
        parts = [StagedPart(it.matrix.data, within(_memory(it.staging), self._target(it))) for it in all]
        came = self.device.stage_in(parts, after, lent)
        for memory in memories:
            memory.ready = came

    def _target(self, its: Staged) -> Any:
        staging: Any = its.staging
        return self._kernels.part(staging.inside, slice(its.start, its.start + its.matrix.nbytes))

    def lock(self, all: Sequence[Bytes]) -> PageLocked | None:
        # What lies beside locked pages has to pass through other memory: drivers copy nothing that is locked in part.
        return PageLocked(self.device, all) if self.device.pinned_bytes else None

    def settle(self) -> None:
        self.device.settle()

    def pages(self, shape: tuple[int, int, int, int]) -> Any:
        made = self.device.allocate(shape, UINT8)
        self._change("clear", made, lambda: self._kernels.clear(made.inside))
        return made

    def layer_of(self, pages: Any, place: int) -> Any:
        return self.device.within(pages.memory, self._kernels.part(pages.inside, (slice(None), place)))

    def copy_page(self, pages: Any, source: int, target: int) -> None:
        part, inside = self._kernels.part, pages.inside
        self._change(
            "copy a page", pages, lambda: self._kernels.copy(part(inside, source), part(inside, target))
        )

    def page_out(self, pages: Any, number: int) -> Any:
        return self._fetched(self.device.within(pages.memory, self._kernels.part(pages.inside, number)))

    def page_in(self, pages: Any, number: int, page: Bytes) -> None:
        target = self.device.within(pages.memory, self._kernels.part(pages.inside, number))
        self._arrived(page, target)

    def lent_pages(self, shape: tuple[int, int, int]) -> Any:
        return self.device.allocate(shape, UINT8)

    def pages_in(self, pages: Any, sources: Sequence[Bytes]) -> None:
        memory, part = pages.memory, self._kernels.part
        parts = [
            StagedPart(source, self.device.within(memory, part(pages.inside, number)))
            for number, source in enumerate(sources)
        ]
        memory.ready = self.device.bring_in(parts, _events([pages]))

    # --- hidden states ---------------------------------------------------------------------------------------

    def place(self, rows: Floats) -> Hidden:
        return self._brought(rows)

    def fetch(self, x: Hidden) -> Any:
        return self._fetched(x)

    def prefetch(self, *all: Hidden) -> None:
        if len(all) == 1:
            all[0].leaving = self._begun_to_leave(all[0])
            return
        counts = [prod(x.shape) for x in all]
        joined = self._made(
            "join", [(sum(counts),)], all, lambda: [self._kernels.joined([x.inside for x in all])]
        )
        here, ended, _ = self._begun_to_leave(joined)
        for x, stop, count in zip(all, accumulate(counts), counts, strict=True):
            x.leaving = Leaving(here[stop - count : stop].reshape(x.shape), ended, joined)

    def rows(self, x: Hidden, which: slice | Ids) -> Hidden:
        if isinstance(which, slice):
            return self.device.within(x.memory, self._kernels.part(x.inside, which))
        ids = self._brought(which)
        shape = (len(which), x.shape[1])
        return self._made("rows", [shape], [x, ids], lambda: [self._kernels.picked(x.inside, ids.inside)])

    def zeros_like(self, x: Hidden) -> Hidden:
        return self._made("zeros", [x.shape], [x], lambda: [self._kernels.zeros_like(x.inside)])

    def add(self, x: Hidden, y: Hidden) -> None:
        self._change("add", x, lambda: self._kernels.add(x.inside, y.inside), y)

    def scale(self, x: Hidden, factor: float) -> Hidden:
        return self._made("scale", [x.shape], [x], lambda: [self._kernels.scale(x.inside, factor)])

    def clip(self, x: Hidden, limit: float) -> None:
        self._change("clip", x, lambda: self._kernels.clip(x.inside, limit))

    def gate(self, x: Hidden, gates: Hidden) -> None:
        self._change("gate", x, lambda: self._kernels.gate(x.inside, gates.inside), gates)

    def pad(self, x: Hidden, margins: tuple[int, int]) -> Hidden:
        shape = (x.shape[0], x.shape[1] + sum(margins))
        return self._made("pad", [shape], [x], lambda: [self._kernels.pad(x.inside, margins)])

    # --- layers ----------------------------------------------------------------------------------------------

    def linears(self, x: Hidden, all: Linears, norm: Floats | None = None, eps: float = 0.0) -> list[Hidden]:
        return self._all_made(
            "linears",
            [(x.shape[0], w.rows) for w in all.matrices],
            [x, norm, *_arrays(all)],
            lambda: self._kernels.linears(x.inside, all, _inside(norm), eps),
            _multiplying(x.shape[0], all),
        )

    def feed_forward(
        self, x: Hidden, layer: FeedForward, norm: Floats | None = None, eps: float = 0.0
    ) -> Hidden:
        rows = x.shape[0]
        return self._made(
            "feed forward",
            [(rows, layer.form.rows)],
            [x, norm, *_arrays(layer.enter), *_arrays(layer.leave)],
            lambda: [self._kernels.feed_forward(x.inside, layer, _inside(norm), eps)],
            _multiplying(rows, layer.enter, layer.leave),
        )

    def experts(self, x: Hidden, all: Sequence[FeedForward], routes: Routes, into: Hidden) -> None:
        placed = Routes(routes.starts, self._brought(routes.tokens), self._brought(routes.factors))
        parts = [part for layer in all for part in (layer.enter, layer.leave)]
        work = _multiplying(len(routes.tokens) // len(all) + 1, *parts)
        reading = [x, placed.tokens, placed.factors, *(array for part in parts for array in _arrays(part))]
        self._change(
            "experts",
            into,
            lambda: self._kernels.experts(x.inside, all, placed, into.inside),
            *reading,
            work=work,
        )

    def scores(self, x: Hidden, router: Linears) -> Hidden:
        (matrix,) = router.matrices
        return self._made(
            "scores",
            [(x.shape[0], matrix.rows)],
            [x, *_arrays(router)],
            lambda: [self._kernels.scores(x.inside, router)],
            _multiplying(x.shape[0], router),
        )

    def rms_norm(self, x: Hidden, weight: Floats, eps: float) -> Hidden:
        return self._made(
            "norm", [x.shape], [x, weight], lambda: [self._kernels.rms_norm(x.inside, _inside(weight), eps)]
        )

    def rms_norm_heads(self, x: Hidden, weight: Floats, eps: float) -> Hidden:
        return self._made(
            "norm",
            [x.shape],
            [x, weight],
            lambda: [self._kernels.rms_norm_heads(x.inside, _inside(weight), eps)],
        )

    def squares(self, parts: Sequence[Hidden], counted: Sequence[bool]) -> Hidden:
        shape = (parts[0].shape[0], len(parts))
        return self._made(
            "squares", [shape], parts, lambda: [self._kernels.squares([x.inside for x in parts], counted)]
        )

    def normed_by(
        self, x: Hidden, weight: Floats, squares: Hidden, column: int, numbers: int, eps: float
    ) -> Hidden:
        def run() -> list[Any]:
            normed = self._kernels.normed_by(x.inside, _inside(weight), squares.inside, column, numbers, eps)
            return [normed]

        return self._made("norm", [x.shape], [x, weight, squares], run)

    def attention(
        self, kv: KvPages, segments: Segments, q: Hidden, k: Hidden, v: Hidden, scoring: Scoring
    ) -> Hidden:
        there = segments.prepared.get(self)
        if there is None:
            there = segments.prepared[self] = self._brought(places_of(segments))
        turning = scoring.rotation.prepared.get(self) or self._rotation(scoring.rotation)
        norms = scoring.norms
        if norms is not None:
            norms = HeadNorms(_inside(norms.q), _inside(norms.k), norms.eps)
        placed = scoring._replace(rotation=turning, norms=norms)
        seen = sum(rows * (start + rows) for _, rows, start, _ in segments.table.tolist())
        work = DeviceWork(
            int(len(segments.pages) * kv.kv_heads * kv.layout.head_bytes),
            4 * seen * kv.heads * kv.layout.head_dim,
        )
        reading = [q, k, v, kv.data, there, turning.cos, turning.sin]
        made = self._made(
            "attention",
            [q.shape],
            reading,
            lambda: [
                self._kernels.attention(kv, segments, there.inside, q.inside, k.inside, v.inside, placed)
            ],
            work,
        )
        kv.data.memory.ready = made.memory.ready  # type: ignore[attr-defined]
        return made

    def route(self, scores: Hidden, count: int, normalize: bool) -> routing.Routing:
        return routing.route(self._fetched(scores), count, normalize)

    def likeliest(self, scores: Hidden, count: int) -> list[int]:
        return routing.likeliest(self._fetched(scores), count)

    # --- how -------------------------------------------------------------------------------------------------

    def _rotation(self, rotation: Rotation) -> Rotation:
        cos, sin = self._brought(rotation.cos), self._brought(rotation.sin)
        there = rotation.prepared[self] = Rotation(rotation.dims, rotation.interleaved, cos, sin)
        return there

    def _made(
        self, what: str, shapes: Any, reading: Any, run: Any, work: DeviceWork | None = None
    ) -> DeviceArray:
        (made,) = self._all_made(what, shapes, reading, run, work)
        return made

    def _all_made(
        self,
        what: str,
        shapes: Sequence[Sequence[int]],
        reading: Sequence[Any],
        run: Callable[[], Sequence[Any]],
        work: DeviceWork | None = None,
    ) -> list[DeviceArray]:
        """What `run` computes from what it reads: f32 arrays of these shapes."""
        room = [self.device.reserve(F32_BYTES * prod(shape)) for shape in shapes]
        work = work or DeviceWork(
            sum(it.nbytes for it in room) + sum(it.nbytes for it in reading if it is not None)
        )
        insides, event = self.device.compute(what, work, run, _events(reading))
        _note_used(reading, event)
        made = [self.device.within(memory, inside) for memory, inside in zip(room, insides, strict=True)]
        for memory in room:
            memory.ready = event
        return made

    def _change(
        self,
        what: str,
        x: DeviceArray,
        run: Callable[[], None],
        *reading: Any,
        work: DeviceWork | None = None,
    ) -> None:
        """`run` writes to x."""
        work = work or DeviceWork(2 * x.nbytes)
        _, event = self.device.compute(what, work, run, _events([x, *reading]))
        _note_used(reading, event)
        x.memory.ready = event

    def _brought(self, array: Array) -> Any:
        """The same numbers on the device, as soon as they have come."""
        array = np.ascontiguousarray(array)
        there = self.device.allocate(array.shape, array.dtype)
        there.memory.ready = self.device.copy_in(array, there, _events([there]))
        return there

    def _kept(self, array: Array) -> Any:
        """The same numbers on the device; those on the host may go."""
        there = self._brought(array)
        self.device.wait(there.memory.ready)
        return there

    def _arrived(self, source: Array, target: DeviceArray) -> None:
        ready = self.device.copy_in(np.ascontiguousarray(source), target, _events([target]))
        target.memory.ready = ready
        self.device.wait(ready)

    def _fetched(self, x: DeviceArray) -> Any:
        """The same numbers on the host."""
        leaving, x.leaving = x.leaving or self._begun_to_leave(x), None
        self.device.wait(leaving.ended)
        return leaving.here

    def _begun_to_leave(self, x: DeviceArray) -> Leaving:
        here: Array = np.empty(x.shape, x.dtype)
        return Leaving(here, self.device.copy_out(x, here, _events([x])))


def _memory(staging: Any) -> DeviceMemory:
    memory: DeviceMemory = staging.memory
    return memory


def _inside(x: Any) -> Any:
    return None if x is None else x.inside


def _arrays(all: Linears) -> list[Any]:
    return [*(w.data for w in all.matrices), *all.biases]


def _events(reading: Sequence[Any]) -> list[DeviceEvent]:
    """What has to have happened before somebody looks at these."""
    return [it.memory.ready for it in reading if it is not None and it.memory.ready is not None]


def _note_used(reading: Sequence[Any], event: DeviceEvent) -> None:
    """Until this has ended, nobody may write to these."""
    for it in reading:
        if it is not None:
            it.memory.used = event


def _multiplying(rows: int, *parts: Linears) -> DeviceWork:
    matrices = [w for part in parts for w in part.matrices]
    return DeviceWork(sum(w.nbytes for w in matrices), 2 * rows * sum(w.rows * w.cols for w in matrices))
