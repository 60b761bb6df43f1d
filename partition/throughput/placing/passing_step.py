"""What a step takes in which weights pass through a device while the CPU attends (`two_groups` has the schedule).

Host and device are known by their laws, the link by its speed. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from math import ceil, inf
from typing import NamedTuple

from ...memory_layout import PAGE_TOKENS, kv_page_bytes
from ...plan import BlockPlan, Plan
from ...spec import BlockId
from ..contention import Slower, longer, settled, together
from ..laws import (
    Rows,
    as_it_ran,
    attention,
    embedded_s,
    passing_bytes_per_s,
    product,
    products,
    ring_bytes_per_s,
    used_experts,
)
from ..prediction import Binding
from ..profile import Accelerator, Device
from ..step_time import NUMBER_BYTES, StepTime
from ..weights_of import LayerKind, Weighed
from .two_groups import (
    Alternation,
    ComingBlock,
    Disk,
    Feeding,
    Layer,
    LayerTurn,
    LookingThere,
    PassingPiece,
    Tail,
    alternate,
)

_ROUTE_BYTES = 8 + NUMBER_BYTES  # of each expert that a row chose: its number and a factor
_GROUPS = 2  # of rows, that take turns
_PIECES = 1000  # of a step's reads, about, at most: larger pieces tell as much


def passing_step(
    model: Weighed,
    plan: Plan,
    machine: Device,
    there: Accelerator,
    segments: Sequence[Rows],
    wanted: int,
    share: float | None,
) -> StepTime:
    """A step of these segments that gives logits for `wanted` rows, in which weights come to the device. Arguments as
    of `staying_step`."""
    return _Passing(model, plan, machine, there, segments, wanted, share).step()


class _Slower(NamedTuple):
    """How many times longer each takes than alone, by what goes on beside it."""

    host: float = 1.0
    device: float = 1.0
    link: float = 1.0
    disk: float = 1.0


class _Passing:
    def __init__(
        self,
        model: Weighed,
        plan: Plan,
        host: Device,
        there: Accelerator,
        segments: Sequence[Rows],
        wanted: int,
        share: float | None,
    ) -> None:
        self._model, self._plan, self._share = model, plan, share
        self._host, self._link = host, there
        self._there = there.computing
        self._segments, self._wanted = segments, wanted
        self._rows = sum(it.alike * it.rows for it in segments)
        self._parts: dict[Binding, float] = dict.fromkeys(
            ("memory", "compute", "disk", "link", "overhead"), 0.0
        )

    @cached_property
    def _blocks(self) -> Mapping[BlockId, BlockPlan]:
        return {it.block: it for it in self._plan.blocks}

    @property
    def _further(self) -> int:
        """Streams besides the first."""
        return sum(it.alike for it in self._segments) - 1

    def step(self) -> StepTime:
        found, calls_s = settled(self._gone_through, len(_Slower._fields))
        parts = self._parts
        parts["link"], parts["compute"] = found.weights_s, found.device_s
        parts["memory"], parts["overhead"] = max(0.0, found.host_s - calls_s), calls_s
        parts["disk"] = found.disk_s if self._read_bytes else 0.0
        others_s = max(found.weights_s, found.device_s, found.host_s)
        stall_s = max(0.0, found.step_s - others_s) if self._read_bytes else 0.0
        return StepTime(found.step_s, stall_s, parts, {"compute": found.device_s})

    @cached_property
    def _read_bytes(self) -> int:
        return self._plan.cyclic_bytes

    def _gone_through(self, slower: Slower) -> tuple[tuple[Alternation, float], Slower]:
        found, calls_s, own_s = self._alternation(_Slower(*slower))
        return (found, calls_s), self._contended(found, own_s)

    def _contended(self, found: Alternation, own_s: float) -> _Slower:
        """If things go on beside each other as `found`. A processor that attends, a disk that reads and copies that
        pass share the host's memory; where the device is this machine's processor, so does what it computes."""
        keeps, step_s = self._link.contention, found.step_s
        coming = found.weights_s / step_s
        attended, read = together(
            self._host, own_s / step_s, found.disk_s / step_s if self._read_bytes else 0.0
        )
        return _Slower(
            attended * longer(keeps.host_keeps, coming),
            longer(keeps.device_keeps, coming),
            longer(keeps.link_keeps, (own_s + found.device_s) / step_s),
            read,
        )

    def _alternation(self, slower: _Slower) -> tuple[Alternation, float, float]:
        """(the step, seconds of calls, seconds in which the processor attends), where each takes so many times as long
        as alone."""
        spec, own = self._model.spec, self._host.overheads
        groups = _GROUPS if self._rows > 1 else 1
        rows = self._rows / groups
        last = len(spec.layers) - 1
        turns: dict[tuple[LayerKind, bool], LayerTurn] = {}
        layers = []
        for layer in range(last + 1):
            kind = self._model.kind_of(layer)
            key = kind, layer == last
            if key not in turns:
                turn = self._turn(kind, rows, groups, fed=layer < last)
                turns[key] = turn.slower(slower.host, slower.device)
            comes = {
                piece: [it._replace(copy_s=slower.link * it.copy_s) for it in its]
                for piece, its in self._comes(layer, kind).items()
            }
            layers.append(Layer(comes, (turns[key],) * groups))
        fed = self._feeding(self._model.kind_of(last), self._wanted) if self._wanted else None
        heads_s = logits_s = 0.0
        if self._wanted:
            heads_s = products(self._there, self._model.head, self._wanted).seconds
            logits_s = self._carried_s(self._wanted * spec.vocab)
        calls_s = self._further * own.stream_s + own.logit_s * self._wanted * spec.vocab
        calls_s += embedded_s(self._plan, self._host, self._rows)
        learnt = self._host.corrections.overhead
        between_s = max(learnt * own.step_s, self._link.step_s) + learnt * calls_s
        if fed is not None:
            fed = fed.slower(slower.device)
        tail = Tail(0.0, 0.0, fed, slower.device * heads_s, logits_s, between_s)
        speed = ring_bytes_per_s(self._host, self._plan.window_bytes) / (
            self._host.corrections.disk * slower.disk
        )
        piece_bytes = max(Disk().piece_bytes, self._read_bytes // _PIECES)
        disk = Disk(speed, self._plan.window_bytes, piece_bytes)
        found = alternate(layers, tail, self._carried_s(self._rows * spec.hidden), disk)
        kinds = self._model.layer_kinds.items()
        calls_s = between_s + groups * sum(count * self._calls_s(kind, groups) for kind, count in kinds)
        return found, calls_s, found.host_s - between_s

    def _comes(self, layer: int, kind: LayerKind) -> dict[PassingPiece, list[ComingBlock]]:
        """What passes of a layer, from memory or from disk."""
        feeding, *experts = self._model.spec.ffn_blocks(layer)
        pieces: dict[PassingPiece, Sequence[BlockId]] = {"attn": [BlockId("attn", layer)]}
        if kind.expert:
            pieces |= {"router": [feeding], "experts": experts}
        else:
            pieces["ffn"] = [feeding]
        found = {
            piece: [self._coming(self._blocks[it]) for it in its if self._blocks[it].passes]
            for piece, its in pieces.items()
        }
        return {piece: _merged(its) for piece, its in found.items() if its}

    def _coming(self, its: BlockPlan) -> ComingBlock:
        if its.tier == "disk":  # the window's memory is not locked
            return ComingBlock(self._times_link(its.nbytes / self._link.host_bytes_per_s), its.nbytes)
        return ComingBlock(self._times_link(its.nbytes / passing_bytes_per_s(self._link)))

    def _turn(self, kind: LayerKind, rows: float, groups: int, *, fed: bool) -> LayerTurn:
        spec, there = self._model.spec, self._there
        *asking, last = kind.attention
        heads, kv_heads = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        calls_s = there.overheads.layer_s / 2
        host_rows = sum(it.alike * it.rows for it in self._looks_here) / groups
        return LayerTurn(
            asked_s=products(there, asking, rows).seconds + calls_s,
            leaves_s=self._carried_s(host_rows * (heads + 2 * kv_heads)),
            attends_s=self._attends_s(kind, groups) + self._calls_s(kind, groups),
            back_s=self._carried_s(host_rows * heads),
            attended_s=product(there, last, rows).seconds + calls_s,
            added_s=0.0,
            feeding=self._feeding(kind, rows) if fed else None,
            looking=self._looking(kind, groups),
        )

    def _looking(self, kind: LayerKind, groups: int) -> LookingThere | None:
        """Of the texts for which the device attends."""
        spec, kv_type, its = self._model.spec, self._plan.kv.dtype, self._looks_there
        if not its:
            return None
        page_bytes = kv_page_bytes(spec, kv_type) / len(spec.layers)
        coming = page_bytes / groups * sum(it.alike * ceil(it.before / PAGE_TOKENS) for it in its)
        leaving = page_bytes / groups * sum(it.alike * ceil(it.rows / PAGE_TOKENS) for it in its)
        looks_s = sum(
            it.alike * attention(self._there, spec, kv_type, it.rows, it.before, kind.window).seconds
            for it in its
        )
        return LookingThere(
            comes_s=self._copied_s(coming) if coming else 0.0,
            looks_s=looks_s / groups,
            leaves_s=self._copied_s(leaving),
            stored_s=leaving / self._host.laid_out_bytes_per_s,  # by one thread
            alone=not self._looks_here,
        )

    @cached_property
    def _looks_there(self) -> list[Rows]:
        """The segments for which the device attends …"""
        return [it for it in self._segments if it.rows >= (self._plan.attending_rows or inf)]

    @cached_property
    def _looks_here(self) -> list[Rows]:
        """… and those for which the host does."""
        return [it for it in self._segments if it.rows < (self._plan.attending_rows or inf)]

    def _feeding(self, kind: LayerKind, rows: float) -> Feeding:
        moe, there = self._model.spec.moe, self._there
        if not kind.expert or moe is None:
            return Feeding(0.0, 0.0, 0.0, 0.0, 0.0, products(there, kind.dense, rows).seconds, 0.0)
        router = [it for it in kind.dense if it.rows == moe.experts]
        shared = [it for it in kind.dense if it.rows != moe.experts]
        used, each = self._used(rows)
        return Feeding(
            normed_s=0.0,
            scored_s=products(there, router, rows).seconds,
            leaves_s=self._carried_s(rows * moe.experts),
            shared_s=products(there, shared, rows).seconds,
            routes_s=self._copied_s(rows * moe.active * _ROUTE_BYTES),
            mixed_s=used * products(there, kind.expert, each).seconds + there.overheads.mixture_s,
            added_s=0.0,
        )

    def _attends_s(self, kind: LayerKind, groups: int) -> float:
        """The host for one group."""
        spec, kv_type, host = self._model.spec, self._plan.kv.dtype, self._host
        whole_s = sum(
            it.alike
            * as_it_ran(host, attention(host, spec, kv_type, it.rows, it.before, kind.window)).seconds
            for it in self._looks_here
        )
        return whole_s / groups

    def _calls_s(self, kind: LayerKind, groups: int) -> float:
        """The host's, of a layer for one group."""
        its = self._host.overheads
        own_s = its.layer_s + its.swept_s(self._attends_s(kind, groups))
        own_s += self._further / groups * its.stream_layer_s
        return self._host.corrections.overhead * own_s

    def _used(self, rows: float) -> tuple[float, float]:
        """How many experts of a layer are used, and for how many rows each."""
        moe = self._model.spec.moe
        assert moe is not None
        used = used_experts(self._model, rows, self._share)
        return used, max(1.0, rows * moe.active / used)

    def _carried_s(self, numbers: float) -> float:
        return self._copied_s(NUMBER_BYTES * numbers)

    def _copied_s(self, nbytes: float) -> float:
        return self._times_link(self._link.copy_s + nbytes / self._link.host_bytes_per_s)

    def _times_link(self, seconds: float) -> float:
        return self._host.corrections.link * seconds


def _merged(all: Sequence[ComingBlock]) -> list[ComingBlock]:
    """What comes from memory one behind the other is as one."""
    merged: list[ComingBlock] = []
    for its in all:
        if merged and not its.disk_bytes and not merged[-1].disk_bytes:
            merged[-1] = ComingBlock(merged[-1].copy_s + its.copy_s)
        else:
            merged.append(its)
    return merged
