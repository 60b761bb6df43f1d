"""What a step takes, put together block by block from the laws of those who compute it (`laws`), as the executor goes
through it.

Each block takes what it takes in its home, one after the other: this machine's processor, or an accelerator where the
plan has one. Where blocks pass through a window, or experts through their slots, `schedule` says how reading and
computing overlap. Hidden states pass the link where the home changes. Of a mixture whose experts are in both homes both
compute beside each other, and the processor's part begins and ends with a copy. For many tokens experts come instead:
what takes longer counts, copying them or computing with them, and of the other what the first ones take. As an
accelerator's calls are tried one by one, what overlaps in between counts twice: it is rather thought too slow than too
fast. Pure.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ..plan import Plan
from ..spec import BlockId
from .laws import (
    LEASE_CALLS,
    NOTHING,
    Rows,
    Share,
    as_it_ran,
    embedded_s,
    passing_bytes_per_s,
    products,
)
from .prediction import Binding
from .profile import Accelerator, Device, Overheads
from .schedule import Experts, Use, contended
from .step_pieces import Pieces
from .weights_of import LayerKind, Weighed, queried

NUMBER_BYTES = 4  # of hidden states, scores and logits


class StepTime(NamedTuple):
    """Seconds, those of them that wait for the disk, and what the parts would take if nothing ran beside anything
    else; `away`: what of them an accelerator takes."""

    seconds: float
    stall_s: float
    parts: dict[Binding, float]
    away: Mapping[Binding, float] = {}

    def after(self, seconds: float) -> StepTime:
        """With so many seconds besides."""
        return self._replace(seconds=self.seconds + seconds, parts=and_overhead(self.parts, seconds))


def and_overhead(parts: dict[Binding, float], seconds: float) -> dict[Binding, float]:
    return {part: its + (seconds if part == "overhead" else 0.0) for part, its in parts.items()}


def staying_step(
    model: Weighed,
    plan: Plan,
    machine: Device,
    there: Accelerator | None,
    segments: Sequence[Rows],
    wanted: int,
    share: float | None,
) -> StepTime:
    """A step of these segments that gives logits for `wanted` rows, whose weights stay where they are computed.
    `machine`: with the threads of the plan; `there`: what computes the blocks on the plan's device, None if nothing is
    known of it: as if the processor computed all. `share`: see `distinct_experts`."""
    return _Step(model, plan, machine, there, segments, share).taken(wanted)


class _Mixture(NamedTuple):
    """The experts of a layer: what they compute at home and away, seconds of both beside each other, seconds of copies,
    and those of them that are on disk."""

    ours: Share
    theirs: Share
    seconds: float
    link_s: float
    on_disk: Experts | None


_NO_EXPERTS = _Mixture(NOTHING, NOTHING, 0.0, 0.0, None)


class _Step:
    """Goes from block to block. `away`: on the accelerator."""

    def __init__(
        self,
        model: Weighed,
        plan: Plan,
        machine: Device,
        there: Accelerator | None,
        segments: Sequence[Rows],
        share: float | None,
    ) -> None:
        self._model, self._plan, self._machine, self._link = model, plan, machine, there
        self._segments = segments
        self._rows = sum(segment.alike * segment.rows for segment in segments)
        self._homes = {False: machine} | ({True: there.computing} if there else {})
        self._pieces = {
            away: Pieces(model, plan, home, segments, share) for away, home in self._homes.items()
        }
        self._gone = {it.block for it in plan.blocks if it.tier == "gpu"} if there else set()
        experts = [it.block for it in plan.blocks if it.block.kind == "expert"]
        self._experts = Counter(it.layer for it in experts)
        self._experts_gone = Counter(it.layer for it in experts if it in self._gone)
        self._coming = {it.block: it.nbytes for it in plan.coming} if there else {}
        self._coming_s = self._came_s = 0.0  # all that come; when the last did
        self._freed_s = defaultdict[str, list[float]](list)
        self._on_disk = {it.block: it.nbytes for it in plan.blocks if it.tier == "disk" and not it.slotted}
        self._computing = dict.fromkeys((False, True), NOTHING)
        self._calls_s, self._link_s = dict.fromkeys((False, True), 0.0), 0.0
        self._seconds = 0.0
        self._uses: list[Use] = []
        self._used_s = 0.0  # in which those before were computed
        self._mixtures: dict[int, Experts] = {}  # by the place of the use that waits for them

    def taken(self, wanted: int) -> StepTime:
        last, away = len(self._model.spec.layers) - 1, False
        for layer in range(last + 1):  # of the last layer only what logits are wanted of is needed
            away = self._layer(layer, away, self._rows if layer < last else wanted, last=layer == last)
        for block in (it.block for it in self._plan.blocks if it.block.kind == "head" and wanted):
            away = self._moved(away, block in self._gone, wanted)
            home = self._homes[away]
            self._compute(as_it_ran(home, products(home, self._model.products[block], wanted)), away)
            self._use(block)
        if away and wanted:
            self._copied(self._carry_s(wanted * self._model.spec.vocab))
        self._between(wanted)
        found = contended(
            self._machine,
            self._plan.window_bytes,
            self._uses,
            self._mixtures,
            self._seconds - self._used_s,
            self._machine.corrections.disk,
        )
        seconds = max(found.step_s, found.disk_s, self._coming_s)
        ours, theirs = self._parts(away=False), self._parts(away=True)
        parts = {part: its + theirs[part] for part, its in ours.items()} | {"disk": found.disk_s}
        if self._link is not None:
            parts["link"] = self._link_s
        return StepTime(seconds, max(0.0, seconds - self._seconds), parts, theirs)

    def _parts(self, *, away: bool) -> dict[Binding, float]:
        computing = self._computing[away]
        return {
            "memory": computing.memory_s,
            "compute": computing.seconds - computing.memory_s,
            "overhead": self._calls_s[away],
        }

    def _layer(self, layer: int, away: bool, fed: int, *, last: bool) -> bool:
        """→ where its last block is computed. `fed`: rows that its feed-forward part is computed of."""
        spec, kind, rows = self._model.spec, self._model.kind_of(layer), self._rows
        attn, feed = BlockId("attn", layer), spec.ffn_blocks(layer)[0]
        asks, feeds = self._away(attn, rows), self._away(feed, fed)
        looks = attn in self._gone  # K and V stay where they are
        asking, looking = self._pieces[asks].asking(kind), self._pieces[looks].looking(kind)
        feeding = self._pieces[feeds].feeding(kind, fed)
        mixed = self._mixture(layer, kind, fed, asking + looking)
        parts = ((asks, asking), (looks, looking), (feeds, feeding))
        kernels_s = mixed.ours.seconds + sum(its.seconds for there, its in parts if not there)
        swept_s = self._machine.overheads.swept_s(kernels_s) / 2

        away = self._moved(away, asks, rows)
        self._wait_for(attn, rows)
        its = self._homes[away].overheads
        normed_s = its.hidden_s * queried(spec) / 2 if spec.qk_norm == "full" else 0.0
        self._compute(asking, asks)
        self._compute(looking, looks)
        if asks is not looks:  # q, k and v leave, and what was found comes
            for heads in (spec.heads + 2 * spec.kv_heads, spec.heads):
                self._copied(self._carry_s(rows * heads * spec.head_dim))
        self._call(swept_s)
        self._call(its.layer_s / 2 + (self._added_s(its) + normed_s) * rows, away)
        self._use(attn)

        away = self._moved(away, feeds, fed)
        self._wait_for(feed, fed)
        its = self._homes[away].overheads
        self._compute(feeding, away)
        self._call(swept_s)
        self._call(its.layer_s / 2 + self._added_s(its) * fed, away)
        if kind.expert and fed:
            # Its rows are normalised apart, and its sum begins with zeros.
            self._call(its.mixture_s + 2 * self._added_s(its) * fed, away)
            self._add_mixture(layer, kind, fed, away, mixed, last=last)
        self._use(feed)
        return away

    def _away(self, block: BlockId, rows: int) -> bool:
        """Whether the accelerator computes it, if so many rows pass it: it is there, or it comes."""
        return block in self._gone or (block in self._coming and rows >= self._plan.staged_tokens)

    def _wait_for(self, block: BlockId, rows: int) -> None:
        """A block that comes takes the place of the last but one of its kind, when that has been used; the first two
        come behind the step before."""
        if block in self._coming and self._away(block, rows):
            assert self._link is not None
            come_s = self._times_link(self._coming[block] / passing_bytes_per_s(self._link))
            self._link_s += come_s
            self._coming_s += come_s
            if len(freed := self._freed_s[block.kind]) >= 2:
                self._came_s = max(self._came_s, freed[-2]) + come_s
                self._seconds = max(self._seconds, self._came_s)

    def _mixture(self, layer: int, kind: LayerKind, fed: int, attending: Share) -> _Mixture:
        if not kind.expert or not fed:
            return _NO_EXPERTS
        spec, moe, here = self._model.spec, self._model.spec.moe, self._pieces[False]
        assert moe is not None
        gone = self._experts_gone[layer] / self._experts[layer] if self._link is not None else 0.0
        ours = here.experts(kind, fed).times(1 - gone)
        theirs = self._pieces[True].experts(kind, fed).times(gone) if gone else NOTHING
        on_disk = here.on_disk(kind, fed, ours, attending) if gone < 1 else None
        if on_disk is not None:
            on_disk = on_disk._replace(used=on_disk.used * (1 - gone), missing=on_disk.missing * (1 - gone))
        if gone == 1 or spec.ffn_blocks(layer)[0] not in self._gone:
            return _Mixture(ours, theirs, ours.seconds + theirs.seconds, 0.0, on_disk)
        assert self._link is not None
        if self._plan.staged_tokens and fed >= self._plan.staged_tokens:
            coming = here.used(fed) * (1 - gone)
            come_s = self._times_link(
                coming * sum(it.nbytes for it in kind.expert) / self._link.host_bytes_per_s
            )
            theirs = self._pieces[True].experts(kind, fed)
            both = come_s, theirs.seconds
            first = min(1.0, self._plan.staged_experts / coming)
            return _Mixture(NOTHING, theirs, max(both) + first * min(both), come_s, on_disk)
        carried_s = self._carry_s(fed * (spec.hidden + moe.experts)) + self._carry_s(fed * spec.hidden)
        return _Mixture(ours, theirs, max(theirs.seconds, ours.seconds + carried_s), carried_s, on_disk)

    def _add_mixture(
        self, layer: int, kind: LayerKind, fed: int, away: bool, mixed: _Mixture, *, last: bool
    ) -> None:
        here, its = self._pieces[False], self._machine.overheads
        if mixed.ours.seconds:
            computed = 1 - self._experts_gone[layer] / self._experts[layer]
            self._call(computed * its.expert_s * here.further_experts(fed))
        if mixed.on_disk is not None:
            self._mixtures[len(self._uses)] = mixed.on_disk
            self._call(LEASE_CALLS * its.mixture_s * mixed.on_disk.goes)  # some go together
            if mixed.on_disk.right and not last and not away:  # guessing takes what routing does
                self._compute(here.router(kind, fed))
                self._call(its.mixture_s + self._added_s(its) * fed)
        self._computing[False] += mixed.ours
        self._computing[True] += mixed.theirs
        self._link_s += mixed.link_s
        self._seconds += mixed.seconds

    def _between(self, wanted: int) -> None:
        """From a step's last block to the first of the next."""
        spec, its = self._model.spec, self._machine.overheads
        more = sum(segment.alike for segment in self._segments) - 1
        attends = sum(BlockId("attn", layer) not in self._gone for layer in range(len(spec.layers)))
        streams_s = more * (its.stream_s + attends * its.stream_layer_s)
        self._call(its.step_s + streams_s + its.logit_s * wanted * spec.vocab)
        self._call(embedded_s(self._plan, self._machine, self._rows))
        if self._link is not None:  # which has its own to do meanwhile
            self._call(
                max(0.0, self._link.step_s - self._machine.corrections.overhead * its.step_s), away=True
            )

    def _added_s(self, its: Overheads) -> float:
        """Of a row, by one block of two."""
        return its.hidden_s * self._model.spec.hidden / 2

    def _compute(self, its: Share, away: bool = False) -> None:
        self._computing[away] += its
        self._seconds += its.seconds

    def _call(self, seconds: float, away: bool = False) -> None:
        seconds *= self._homes[away].corrections.overhead
        self._calls_s[away] += seconds
        self._seconds += seconds

    def _use(self, block: BlockId) -> None:
        """A block has been computed."""
        nbytes = self._on_disk.get(block, 0)
        if nbytes:
            self._call(LEASE_CALLS * self._machine.overheads.layer_s)
        self._uses.append(Use(self._seconds - self._used_s, nbytes))
        self._used_s = self._seconds
        if block in self._coming:
            self._freed_s[block.kind].append(self._seconds)

    def _moved(self, away: bool, to: bool, rows: int) -> bool:
        """→ where the next block is computed, to which so many rows have gone."""
        if away is not to and rows:
            self._copied(self._carry_s(rows * self._model.spec.hidden))
        return to

    def _copied(self, seconds: float) -> None:
        self._link_s += seconds
        self._seconds += seconds

    def _carry_s(self, numbers: int) -> float:
        assert self._link is not None
        return self._times_link(self._link.copy_s + NUMBER_BYTES * numbers / self._link.host_bytes_per_s)

    def _times_link(self, seconds: float) -> float:
        return self._machine.corrections.link * seconds
