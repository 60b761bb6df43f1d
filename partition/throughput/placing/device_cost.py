"""What a step takes where a device computes some of a plan's blocks and this machine's processor the others, all where
they are.

Each block takes what it takes in its home, one after the other; hidden states pass the link where the home changes. Of
a mixture whose experts are in both places both compute beside each other, and the processor's part begins and ends with
a copy. For many tokens experts come instead: what takes longer counts, copying them or computing with them, and of the
other what the first ones take. What the processor computes may come from disk, through a window, or into slots for
experts: `schedule` says how that overlaps. As the device's calls are tried one by one, what overlaps in between counts
twice: a device is rather thought too slow than too fast. Pure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from ...plan import Plan
from ...spec import BlockId
from ..laws import NOTHING, Rows, Share, as_it_ran, distinct_experts, products
from ..prediction import Binding
from ..profile import Accelerator, Device
from ..schedule import Experts, Use, contended
from ..step_pieces import Pieces
from ..weights_of import LayerKind, Weighed

NUMBER_BYTES = 4  # of hidden states, scores and logits


class DeviceStep(NamedTuple):
    """Seconds, and of what they are put together, as if nothing ran beside anything else. `stall_s`: of them all wait
    for the disk."""

    seconds: float
    parts: dict[Binding, float]
    stall_s: float = 0.0


def staying_step(
    model: Weighed,
    plan: Plan,
    machine: Device,
    there: Accelerator,
    segments: Sequence[Rows],
    wanted: int,
    share: float | None,
) -> DeviceStep:
    """A step of these segments that gives logits for `wanted` rows. `machine`: with the threads of the plan; `there`:
    what computes the plan's other blocks. `share`: see `distinct_experts`."""
    return _DeviceStep(model, plan, machine, there, segments, share).taken(wanted)


class _DeviceStep:
    """Adds up, block by block."""

    def __init__(
        self,
        model: Weighed,
        plan: Plan,
        machine: Device,
        there: Accelerator,
        segments: Sequence[Rows],
        share: float | None,
    ) -> None:
        self._model, self._plan, self._link, self._share = model, plan, there, share
        self._homes = {False: machine, True: there.computing}
        self._pieces = {
            away: Pieces(model, plan, home, segments, share) for away, home in self._homes.items()
        }
        self._away = {it.block: it.tier == "gpu" for it in plan.blocks}
        experts = [it for it in plan.blocks if it.block.kind == "expert"]
        self._experts = Counter(it.block.layer for it in experts)
        self._there = Counter(it.block.layer for it in experts if it.tier == "gpu")
        self._rows = sum(segment.alike * segment.rows for segment in segments)
        self._computing, self._seconds, self._link_s, self._calls_s = NOTHING, 0.0, 0.0, 0.0
        self._on_disk = {it.block: it.nbytes for it in plan.blocks if it.tier == "disk" and not it.slotted}
        self._uses: list[Use] = []
        self._used_s = 0.0  # in which those before were computed
        self._mixtures: dict[int, Experts] = {}

    def taken(self, wanted: int) -> DeviceStep:
        model, machine = self._model, self._homes[False]
        rows, away, last = self._rows, False, len(model.spec.layers) - 1
        for layer in range(last + 1):
            kind, block = model.kind_of(layer), BlockId("attn", layer)
            away = self._moved(away, self._away[block], rows)
            self._add(away, self._pieces[away].attention(kind), self._homes[away].overheads.layer_s / 2)
            self._use(block)
            if layer == last:  # of the last layer only what logits are wanted of is needed
                rows = wanted
            block = model.spec.ffn_blocks(layer)[0]
            away = self._moved(away, self._away[block], rows)
            overheads = self._homes[away].overheads
            own_s = overheads.layer_s / 2 + (overheads.mixture_s if kind.expert else 0.0)
            self._add(away, self._pieces[away].feeding(kind, rows), own_s)
            if kind.expert and rows:
                self._mix(layer, kind, rows, away)
            self._use(block)
        heads = [it.block for it in self._plan.blocks if it.block.kind == "head"]
        for block in heads if wanted else ():
            away = self._moved(away, self._away[block], wanted)
            self._add(away, products(self._homes[away], model.products[block], wanted), 0.0)
            self._use(block)
        if away and wanted:
            self._copied(wanted * model.spec.vocab)
        begun_s = max(machine.overheads.step_s, self._link.step_s)
        self._add(False, NOTHING, begun_s + machine.overheads.logit_s * wanted * model.spec.vocab)
        parts: dict[Binding, float] = {
            "memory": self._computing.memory_s,
            "compute": self._computing.seconds - self._computing.memory_s,
            "disk": 0.0,
            "link": self._link_s,
            "overhead": self._calls_s,
        }
        if not self._plan.streams:
            return DeviceStep(self._seconds, parts)
        between_s = self._seconds - self._used_s
        window_bytes, slower = self._plan.window_bytes, machine.corrections.disk
        found = contended(machine, window_bytes, self._uses, self._mixtures, between_s, slower)
        parts["disk"] = found.disk_s
        seconds = max(found.step_s, found.disk_s)
        return DeviceStep(seconds, parts, max(0.0, seconds - self._seconds))

    def _use(self, block: BlockId) -> None:
        """A block has been computed."""
        self._uses.append(Use(self._seconds - self._used_s, self._on_disk.get(block, 0)))
        self._used_s = self._seconds

    def _mix(self, layer: int, kind: LayerKind, rows: int, away: bool) -> None:
        """The experts of a layer whose router is `away` from the processor, or is not."""
        model, moe = self._model, self._model.spec.moe
        assert moe is not None
        used = distinct_experts(moe.experts, moe.active, rows, self._share)
        each = {
            place: as_it_ran(home, products(home, kind.expert, max(1.0, rows * moe.active / used)))
            for place, home in self._homes.items()
        }
        share = self._there[layer] / self._experts[layer]
        theirs, ours = each[True].times(used * share), each[False].times(used * (1 - share))
        attending = self._pieces[self._away[BlockId("attn", layer)]].attention(kind)
        if (its := self._pieces[False].on_disk(kind, rows, ours, attending)) is not None and share < 1:
            here = its._replace(used=its.used * (1 - share), missing=its.missing * (1 - share))
            self._mixtures[len(self._uses)] = here
        if share == 1 or not away:
            self._computing += theirs + ours
            self._seconds += (theirs + ours).seconds
        elif self._plan.staged_tokens and rows >= self._plan.staged_tokens:
            coming = used * (1 - share)
            come_s = coming * sum(it.nbytes for it in kind.expert) / self._link.host_bytes_per_s
            computed = each[True].times(used)
            self._computing += computed
            self._link_s += come_s
            both = (come_s, computed.seconds)
            self._seconds += max(both) + min(1.0, self._plan.staged_experts / coming) * min(both)
        else:
            carried_s = self._carry_s(rows * (model.spec.hidden + moe.experts))
            carried_s += self._carry_s(rows * model.spec.hidden)
            self._computing += theirs + ours
            self._link_s += carried_s
            self._seconds += max(theirs.seconds, ours.seconds + carried_s)

    def _add(self, away: bool, share: Share, calls_s: float) -> None:
        home = self._homes[away]
        share, calls_s = as_it_ran(home, share), home.corrections.overhead * calls_s
        self._computing += share
        self._calls_s += calls_s
        self._seconds += share.seconds + calls_s

    def _moved(self, away: bool, to: bool, rows: int) -> bool:
        if away is not to and rows:
            self._copied(rows * self._model.spec.hidden)
        return to

    def _copied(self, numbers: int) -> None:
        seconds = self._carry_s(numbers)
        self._link_s += seconds
        self._seconds += seconds

    def _carry_s(self, numbers: int) -> float:
        return self._link.copy_s + NUMBER_BYTES * numbers / self._link.host_bytes_per_s
