"""The parts of one step: attention, feed-forward, router and experts of each kind of layer, as one device takes them.

Layers of a kind are alike, so each is worked out once. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from ..plan import Plan
from ..streamed_plan import experts_together
from .laws import NOTHING, Rows, Share, as_it_ran, attention, products, used_experts
from .profile import Device
from .schedule import Experts, guessed_right
from .weights_of import LayerKind, Product, Weighed


class Pieces:
    """The parts of one step, with what running has taught of the device."""

    def __init__(
        self, model: Weighed, plan: Plan, device: Device, segments: Sequence[Rows], share: float | None
    ) -> None:
        self._model, self._plan, self._device, self._share = model, plan, device, share
        self._segments = segments
        self._rows = sum(segment.alike * segment.rows for segment in segments)
        self._known: dict[object, Share] = {}
        moe = model.spec.moe
        held = [it for it in plan.blocks if it.slotted] if moe else []
        self._missing = max(0.0, 1 - plan.expert_slots / len(held)) if held else 0.0
        self._expert_bytes = max((it.nbytes for it in held), default=0)
        self._guesses = all(it.tier != "disk" for it in plan.blocks if it.block.kind == "router")

    def asking(self, kind: LayerKind) -> Share:
        """The products of attention."""
        key = "asking", kind.attention
        if key not in self._known:
            self._known[key] = as_it_ran(self._device, self._products(kind.attention, self._rows))
        return self._known[key]

    def looking(self, kind: LayerKind) -> Share:
        """Attention itself."""
        key = "looking", kind.window
        if key not in self._known:
            spec, kv_type, found = self._model.spec, self._plan.kv.dtype, NOTHING
            for alike, rows, before in self._segments:
                found += attention(self._device, spec, kv_type, rows, before, kind.window).times(alike)
            self._known[key] = as_it_ran(self._device, found)
        return self._known[key]

    def feeding(self, kind: LayerKind, rows: int) -> Share:
        key = "dense", kind.dense, rows
        if key not in self._known:
            self._known[key] = as_it_ran(self._device, self._products(kind.dense, rows))
        return self._known[key]

    def router(self, kind: LayerKind, rows: int) -> Share:
        """Without the shared expert."""
        key = "router", kind.dense, rows
        if key not in self._known:
            self._known[key] = as_it_ran(self._device, self._products(kind.dense[:1], rows))
        return self._known[key]

    def experts(self, kind: LayerKind, rows: int) -> Share:
        if not kind.expert or not rows:
            return NOTHING
        key = "experts", kind.expert, rows
        if key not in self._known:
            self._known[key] = as_it_ran(self._device, self._in_parts(rows, partial(self._mixed, kind)))
        return self._known[key]

    def _mixed(self, kind: LayerKind, rows: int) -> Share:
        """What the experts take that so many rows choose, each with its own few of them."""
        used = self.used(rows)
        moe = self._model.spec.moe
        assert moe is not None
        rows_each, narrow = max(1.0, rows * moe.active / used), self._plan.narrow_inputs
        return products(self._device, kind.expert, rows_each, narrow=narrow).times(used)

    def on_disk(self, kind: LayerKind, rows: int, mixed: Share, attending: Share) -> Experts | None:
        """The experts that a layer uses, if every one is as likely to be chosen; None if all are in memory."""
        if not kind.expert or not rows or not self._missing:
            return None
        moe, used = self._model.spec.moe, self.used(rows)
        assert moe is not None
        return Experts(
            used,
            used * self._missing,
            self._expert_bytes,
            experts_together(self._plan.expert_slots),
            mixed.seconds,
            attending.seconds,
            guessed_right(used, moe.experts) if self._guesses else 0.0,
        )

    def further_experts(self, rows: int) -> float:
        """How many more these are than one row uses."""
        moe = self._model.spec.moe
        assert moe is not None
        return max(0.0, self.used(rows) - moe.active)

    def used(self, rows: int) -> float:
        """How many of a layer's experts these rows use."""
        return used_experts(self._model, rows, self._share)

    def _products(self, matrices: Sequence[Product], rows: int) -> Share:
        one = partial(products, self._device, matrices, narrow=self._plan.narrow_inputs)
        return self._in_parts(rows, one)

    def _in_parts(self, rows: int, one: Callable[[int], Share]) -> Share:
        """Rows beyond what passes a block together come in parts, each of which takes `one`."""
        whole, rest = divmod(rows, self._plan.part_tokens)
        found = one(rest) if rest else NOTHING
        return found + one(self._plan.part_tokens).times(whole) if whole else found
