"""How fast a device is with a rank's part of a model, by its tables: what `group_search` asks of a machine.

Matrices are as large as the part has them, since smaller ones are slower; an expert multiplies the rows that come to
it, which are far fewer than the step has. Pure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from ..machines import BlockTimes, DiskTimes, FixedCosts, RankHolds, RankShares, StepRows
from ..spec import BlockId
from ..streamed_plan import experts_together
from ..sum_cost import sums_of
from .contention import Slower, settled, shares, together
from .laws import (
    LEASE_CALLS,
    NOTHING,
    Share,
    attention,
    block_bytes_per_s,
    kv_token_bytes,
    products,
    ring_bytes_per_s,
    used_experts,
)
from .profile import Device
from .schedule import Experts, expert_waits, guessed_right, ring_s
from .weights_of import LayerKind, Product, Weighed, queried

_MORE_ROWS = 256  # of a prompt; fixed costs go with rows on a line


class RankLaws:
    """`PartLaws` of a device. `distinct`: see `distinct_experts`."""

    def __init__(self, device: Device, model: Weighed, kv_type: str, distinct: float | None = None) -> None:
        self._device, self._model, self._kv_type, self._distinct = device, model, kv_type, distinct
        self._known: dict[tuple[object, ...], Share] = {}
        self._layers: dict[int, float] = {}
        self._rounds: dict[tuple[float, float], Device] = {}

    @property
    def device(self) -> Device:
        """Whose laws these are."""
        return self._device

    def fixed(self, share: float) -> FixedCosts:
        """See `PartLaws`."""
        own, spec = self._device.overheads, self._model.spec
        normed = queried(spec) / 2 if spec.qk_norm == "full" else 0.0
        # The rows of a mixture are normalised apart, and its sum begins with zeros.
        numbers = sum(spec.hidden * (2 if layer.moe else 1) + normed for layer in spec.layers)
        one_s, layer_row_s = self._swept_s(share)
        # A sum's two ways cost as much more as a layer's calls do (0.8 to 1.05 times as much: docs/LOG.md), each half.
        sum_s, sum_row_s = self._swept_s(share * len(spec.layers) / sums_of(spec))
        row_s = own.hidden_s * numbers + len(spec.layers) * layer_row_s
        return FixedCosts(
            own.step_s,
            own.layer_s + one_s,
            own.mixture_s,
            row_s,
            sum_s / 2,
            sum_row_s / 2,
            own.stream_s + len(spec.layers) * own.stream_layer_s,
            own.logit_s * spec.vocab,
        )

    def _swept_s(self, share: float) -> tuple[float, float]:
        """What calls cost besides after so much of a layer: for one row, and for each further one."""
        one_s, more_s = (self._device.overheads.swept_s(share * self._layer_s(it)) for it in (1, _MORE_ROWS))
        return one_s, max(0.0, more_s - one_s) / (_MORE_ROWS - 1)

    def _layer_s(self, rows: int) -> float:
        """For which kernels compute in a layer, on average, on a machine that has all of it."""
        if rows not in self._layers:
            moe, device, seconds = self._model.spec.moe, self._with_round(1.0), 0.0
            kinds = Counter(map(self._model.kind_of, range(len(self._model.spec.layers))))
            for kind, layers in kinds.items():
                one_s = products(device, (*kind.attention, *kind.dense), rows).seconds
                if kind.expert and moe is not None:
                    used = used_experts(self._model, rows, self._distinct)
                    one_s += used * products(device, kind.expert, rows * moe.active / used).seconds
                seconds += layers * one_s
            self._layers[rows] = seconds / len(self._model.spec.layers)
        return self._layers[rows]

    def times(self, portion: RankShares, step: StepRows, crowd: float) -> BlockTimes:
        """See `PartLaws`."""
        spec, rows = self._model.spec, step.all_rows
        attending = feeding = NOTHING
        cut = spec.heads * portion.heads + spec.kv_heads * portion.kv_heads
        share = cut / (spec.heads + spec.kv_heads)
        before = max(0.0, step.context - (step.rows + 1) / 2)
        beside = self._further_kv_bytes(step, before)
        of = partial(_Part, portion, crowd, beside)
        home = self._with_round(portion.heads, beside)
        for kind, layers in self._model.layer_kinds.items():
            seen = attention(home, spec, self._kv_type, step.rows, before, kind.window)
            projected = self._products(kind.attention, share, rows, beside)
            attending += (projected + seen.times(step.streams * portion.heads)).times(layers)
            feeding += self._fed(kind, of(rows)).times(layers)
        # Of the last layer, only what logits are wanted of is needed.
        last = self._model.kind_of(len(spec.layers) - 1)
        feeding += self._fed(last, of(step.logits)) + self._fed(last, of(rows)).times(-1)
        calls_s = self._further_experts_s(portion, rows, crowd) if step.answers else 0.0
        head = self._products(self._model.head, portion.vocab, step.logits, beside)
        memory_s = attending.memory_s + feeding.memory_s + head.memory_s
        return BlockTimes(attending.seconds, feeding.seconds + calls_s, head.seconds, memory_s, calls_s)

    def _further_kv_bytes(self, step: StepRows, before: float) -> float:
        """K and V that come round in a step besides those of its first text, of a machine that has all of them."""
        spec = self._model.spec
        tokens = (step.streams - 1) * (before + step.rows)
        return tokens * len(spec.layers) * kv_token_bytes(spec, self._kv_type)

    def _fed(self, kind: LayerKind, part: _Part) -> Share:
        """Of the feed-forward of one layer."""
        if kind.expert:
            return self._mixture(kind.dense, kind.expert, part)
        return self._products(kind.dense, part.portion.ffn, part.rows, part.beside_bytes)

    def _further_experts_s(self, portion: RankShares, rows: int, crowd: float) -> float:
        """What calls of experts cost that these rows use more of than one does."""
        mixtures = sum(layer.moe for layer in self._model.spec.layers)
        dealt = crowd * portion.experts if portion.whole_experts else 1.0
        further = max(0.0, self.used(rows) - self.used(1))
        return self._device.overheads.expert_s * mixtures * further * dealt

    def used(self, rows: int) -> float:
        """See `PartLaws`."""
        return used_experts(self._model, rows, self._distinct) if self._model.spec.moe is not None else 0.0

    def head_s(self, share: float, rows: int) -> float:
        """See `PartLaws`."""
        return self._products(self._model.head, share, rows).seconds

    def disk(
        self, portion: RankShares, held: RankHolds, rows: int, crowd: float, own: BlockTimes
    ) -> DiskTimes:
        """See `PartLaws`: by the schedules of the window and of the cache of experts, as alone (`cost`)."""
        layers, mixtures = len(self._model.spec.layers), sum(layer.moe for layer in self._model.spec.layers)
        computing_s = own.attn_s + own.ffn_s + own.head_s
        block_s = max(own.attn_s, own.ffn_s) / layers

        def gone_through(slower: Slower) -> tuple[DiskTimes, Slower]:
            computed, read = slower
            stall_s = disk_s = leases_s = 0.0
            if held.missing_experts:
                its = self._experts(portion, held, rows, crowd, own)
                speed = block_bytes_per_s(self._device, its.nbytes) / read
                waits = expert_waits(its.slower(computed), speed)
                leases_s = mixtures * LEASE_CALLS * self._device.overheads.mixture_s * its.goes
                stall_s, disk_s = mixtures * waits.stall_s + leases_s, mixtures * waits.disk_s
            speed = ring_bytes_per_s(self._device, held.window_bytes) / read
            passing_s = ring_s(
                held.streamed_bytes, held.block_bytes, held.window_bytes, computed * block_s, speed
            )
            least_s = passing_s + disk_s
            reading_s = held.streamed_bytes / speed + disk_s
            step_s = max(computed * computing_s + stall_s, least_s, 1e-9)
            waited_s = max(0.0, step_s - computed * computing_s - leases_s)
            found = DiskTimes(least_s, computed, stall_s)
            return found, together(self._device, *shares(step_s, waited_s, reading_s))

        return settled(gone_through, 2)

    def _experts(
        self, portion: RankShares, held: RankHolds, rows: int, crowd: float, own: BlockTimes
    ) -> Experts:
        """Those that a layer uses of this rank's."""
        spec = self._model.spec
        assert spec.moe is not None
        kind = next(kind for kind in self._model.layer_kinds if kind.expert)
        used = used_experts(self._model, rows, self._distinct)
        right = guessed_right(used, spec.moe.experts)
        nbytes = sum(it.nbytes for it in kind.expert)
        if portion.whole_experts:
            used *= min(1.0, crowd * portion.experts)
        else:
            nbytes = round(nbytes * portion.experts)
        used, layers = max(1.0, used), len(spec.layers)
        return Experts(
            used,
            used * held.missing_experts,
            max(1, nbytes),
            experts_together(held.expert_slots),
            own.ffn_s / layers,
            own.attn_s / layers,
            right,
        )

    def _mixture(self, dense: Sequence[Product], expert: Sequence[Product], part: _Part) -> Share:
        """Every rank has the whole router, and its part of the shared expert; of experts columns, or some of them."""
        moe = self._model.spec.moe
        portion, crowd, beside_bytes, rows = part
        assert moe is not None
        routers = tuple(it for it in dense if it.rows == moe.experts)
        shared = tuple(it for it in dense if it.rows != moe.experts)
        whole = self._products(routers, 1.0, rows, beside_bytes)
        whole += self._products(shared, portion.shared_ffn, rows, beside_bytes)
        used = self.used(rows)
        each = max(1.0, rows * moe.active / used)
        if portion.whole_experts:
            dealt = used * crowd * portion.experts
            return whole + self._products(expert, 1.0, each, beside_bytes).times(dealt)
        return whole + self._products(expert, portion.experts, each, beside_bytes).times(used)

    def _products(
        self, matrices: Sequence[Product], share: float, rows: float, beside_bytes: float = 0.0
    ) -> Share:
        """Of so many rows with this share of each matrix."""
        key = tuple(matrices), share, rows, beside_bytes
        if key not in self._known:
            cut = [
                it._replace(rows=max(1, round(share * it.rows)), nbytes=max(1, round(share * it.nbytes)))
                for it in matrices
            ]
            home = self._with_round(share, beside_bytes)
            self._known[key] = products(home, cut, rows) if share else NOTHING
        return self._known[key]

    def _with_round(self, share: float, beside_bytes: float = 0.0) -> Device:
        """The device if its part of the model, and of so many bytes beside it, is so much."""
        key = share, beside_bytes
        if key not in self._rounds:
            embedding = 0 if self._model.spec.tied else self._model.block_bytes[BlockId("embed")]
            whole = self._model.weights_bytes - embedding
            self._rounds[key] = self._device.going_round(share * (whole + beside_bytes))
        return self._rounds[key]


class _Part(NamedTuple):
    """What the feed-forward of a layer depends on: a rank's portion, times its share of the experts that it has of
    whole ones, bytes that come round beside weights on a machine that has all, and rows."""

    portion: RankShares
    crowd: float
    beside_bytes: float
    rows: int
