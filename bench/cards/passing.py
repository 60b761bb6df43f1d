"""Weights that pass through a device whose link is slow, in real time: a step against the longest of what goes on
beside each other in it, and against what was predicted.

    python bench/cards/passing.py MODEL.gguf… [--links 0.5,1,2] [--rows 4,32] [--disk] [--steps 5]

The device is played by this machine's processor, as the simulated one is; but weights come by a thread of their own
that keeps to so many GB/s of real time (`--links`). What the device and the processor compute takes both of them
together, as they are one processor here: so only cells say something in which copies or reads take longer than that
does, and these are marked. `--disk`: half of what passes comes from a pack on disk, through a window.

Figures of each cell: bytes that come ÷ link, computing (the same step where nothing is copied), reading (laps of the
window in which nothing is copied), and a step, in ms, medians with the least and the most of the steps; the ratio of a
step to the longest of them; the prediction of the throughput model, from speeds measured in the same minute and written
before any step is.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from shoal.comm.home import Home
from shoal.daemon.config import default_threads
from shoal.daemon.library.packs import Packs
from shoal.daemon.throughput.brief_profile import _measured
from shoal.daemon.throughput.device_figures import device_figures
from shoal.daemon.throughput.model_sizes import weighed
from shoal.devices.copy_thread import CopyThread
from shoal.devices.device import PACKET_BYTES, DeviceEvent, StagedPart
from shoal.devices.device_home import DeviceHome
from shoal.devices.sim_device import SimDevice
from shoal.devices.sim_kernels import SimKernels
from shoal.engine.collective import Alone
from shoal.engine.executor import Executor, attention_homes
from shoal.kernels import set_threads
from shoal.kernels.compute_home import HERE
from shoal.kernels.homes import cpu
from shoal.models.checkpoint.checkpoint import Checkpoint, open_checkpoint
from shoal.models.step import Step
from shoal.models.transformer import Transformer
from shoal.offload.block_store import ResidentStore
from shoal.offload.budget import Budget
from shoal.offload.kv.pool import KvPool
from shoal.offload.pack.pack import Pack
from shoal.offload.window.pinned import PackReader
from shoal.offload.window.window_store import WindowStore
from shoal.partition.placement import PINNED_BYTES, ModelBytes, NoRoomThere
from shoal.partition.plan import Plan, Wanted
from shoal.partition.throughput.cost import step_of
from shoal.partition.throughput.laws import Rows
from shoal.partition.throughput.placing.passing_plans import ahead_bytes, plan_passing_from_disk, spread
from shoal.partition.throughput.profile import Device

NAME = "sim:link"
ROOMY = 1 << 40
CONTEXT = 32
LEAST_SLEEP_S = 2e-4
RING_BYTES = PINNED_BYTES // 3  # that a card's weights pass through
NOTHING = 0.0  # bytes a second: nothing is copied, and what came last is computed with


class SlowLink(SimDevice):
    """Weights that come and go take the time that a link of so many bytes a second takes, on this machine's clock."""

    def __init__(self) -> None:
        self.bytes_per_s = NOTHING
        self._free_s = 0.0
        self._thread = CopyThread("link")
        super().__init__(NAME, ROOMY)

    @property  # type: ignore[override]
    def now_s(self) -> float:
        return time.perf_counter()

    @now_s.setter
    def now_s(self, value: float) -> None: ...

    def stage_in(
        self,
        parts: Sequence[StagedPart],
        after: Sequence[DeviceEvent] = (),
        lent: AbstractContextManager[object] = HERE,
    ) -> DeviceEvent:
        with self._lock:  # what used the targets has been computed, as that is done at once
            asked_s, bytes_per_s = self.now_s, self.bytes_per_s
            copy = self._thread.begin(lambda: self._carry(parts, lent, asked_s, bytes_per_s))
            begun = self._begin("stage", "copy", sum(it.source.nbytes for it in parts), 0.0, ())
            begun.land = lambda: copy.event
            self._queues["stage"].flying.append(begun)
            return begun

    def _carry(
        self,
        parts: Sequence[StagedPart],
        lent: AbstractContextManager[object],
        asked_s: float,
        bytes_per_s: float,
    ) -> None:
        if not bytes_per_s:
            return
        began_s = time.perf_counter()
        with lent:
            came_s = time.perf_counter()
            if came_s - began_s > LEAST_SLEEP_S:  # it was read meanwhile
                asked_s = came_s
            # What lies in page-locked memory already keeps the link busy while this thread waits for its turn: of
            # weights that are locked where they lie all, of others what the ring holds.
            locked = all(self._ranges.whole(it.source.ctypes.data, it.source.nbytes) for it in parts)
            ahead_s = np.inf if locked else RING_BYTES / bytes_per_s
            self._free_s = max(self._free_s, asked_s, came_s - ahead_s)
            for source, target in parts:
                for start in range(0, len(source), PACKET_BYTES):
                    packet = slice(start, start + PACKET_BYTES)
                    np.copyto(target.inside[packet], source[packet])
                    self._free_s += len(source[packet]) / bytes_per_s
                    ahead_s = self._free_s - time.perf_counter()
                    if ahead_s > LEAST_SLEEP_S:
                        time.sleep(ahead_s)


class Case:
    """A model that passes through the device, from memory, or half of it from disk."""

    def __init__(self, checkpoint: Checkpoint, pack: Pack, rows: int, threads: int, disk: bool) -> None:
        self.device = SlowLink()
        self.device.pin()
        home = DeviceHome(self.device, SimKernels(cpu()))
        self.model = weighed(checkpoint, "keep")
        wanted = Wanted(checkpoint.spec, 64, rows * 64, "bf16", 64, rows, 0, threads)
        sizes = ModelBytes(self.model.extents, 0, self.model.vectors_bytes)
        made = plan_passing_from_disk([wanted], sizes, home.room(0), memory_bytes=ROOMY, kv_share=8)
        assert isinstance(made, NoRoomThere)
        room = home.room(made.least_bytes)  # so that all passes but the head
        made = plan_passing_from_disk([wanted], sizes, room, memory_bytes=ROOMY, kv_share=8)
        assert isinstance(made, Plan)
        self.plan = _half_from_disk(made) if disk else made
        homes = {"cpu": cpu(), NAME: home}
        self.store: Any
        if disk:
            self.store = WindowStore.open(self.plan, pack, home_of=homes.__getitem__)
        else:
            away = [it.block for it in self.plan.blocks if it.tier == "gpu"]
            in_memory = replace(
                self.plan,
                blocks=tuple(replace(it, tier="ram") if it.tier == "disk" else it for it in made.blocks),
            )
            self.plan = in_memory
            self.store = ResidentStore.load(in_memory, PackReader(pack, away), home_of=homes.__getitem__)
        kv = KvPool(checkpoint.spec, self.plan.kv, attention_homes(self.plan, homes.__getitem__))
        self.executor = Executor(
            Transformer(checkpoint.spec), self.plan, self.store, kv, Alone(), homes.__getitem__
        )
        vocab = checkpoint.spec.vocab
        segments = [([(97 * it) % vocab], CONTEXT, [it], 1) for it in range(rows)]
        self._step = Step.build(segments, self.plan.rows_together(rows), alike=True)
        self.home, self._rows = home, rows
        self.come_bytes = sum(it.nbytes for it in self.plan.blocks if it.passes)

    def took_s(self, link: float, steps: int) -> list[float]:
        """Steps in the long run, after one that fills what was empty."""
        self.device.bytes_per_s, found = link, []
        for _ in range(steps + 1):
            began_s = time.perf_counter()
            self.executor.head(self.executor.forward(self._step))
            found.append(time.perf_counter() - began_s)
        return found[1:]

    def read_s(self, laps: int) -> list[float]:
        """Laps of what comes from disk, in which each block is given back as soon as it is there."""
        blocks = [it.block for it in self.plan.blocks if it.passes and it.tier == "disk"]
        if not blocks:
            return [0.0]
        found = []
        for _ in range(laps + 1):
            began_s = time.perf_counter()
            for block in blocks:
                with self.store.acquire(block):
                    pass
            found.append(time.perf_counter() - began_s)
        return found[1:]

    def predicted_s(self, machine: Device, link: float) -> float:
        """From what is tried of the device now."""
        self.device.bytes_per_s = link
        there = device_figures(self.home, self.model, ROOMY, None, Budget(ROOMY), laws=True).laws
        assert there is not None
        self.there = replace(there, name=NAME, host_bytes_per_s=link, locked_bytes_per_s=0.0)
        host = replace(machine, accelerators=(self.there,))
        return step_of(self.model, self.plan, host, [Rows(self._rows, 1, CONTEXT)], self._rows, None).seconds

    def close(self) -> None:
        self.executor.let_go()


def _half_from_disk(plan: Plan) -> Plan:
    passing = [it for it in plan.blocks if it.passes]
    kept = spread(passing, sum(it.nbytes for it in passing) // 2)
    blocks = tuple(
        it
        if it.tier == "gpu" or it.block.kind == "embed"
        else replace(it, tier="ram" if it.block in kept else "disk")
        for it in plan.blocks
    )
    return replace(plan, blocks=blocks, window_bytes=ahead_bytes(passing))


@contextmanager
def packed(path: Path, directory: Path) -> Iterator[tuple[Checkpoint, Pack]]:
    with open_checkpoint(path) as checkpoint:
        yield checkpoint, Packs(Home(directory)).get(checkpoint, lambda done, total: None, quant="keep")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--links", default="0.5,1,2", help="GB/s")
    parser.add_argument("--rows", default="4,32")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--disk", action="store_true", help="half of what passes comes from disk")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    set_threads(options.threads)
    for path in options.models:
        with (
            tempfile.TemporaryDirectory(dir=path.parent) as directory,
            packed(path, Path(directory)) as (checkpoint, pack),
        ):
            for rows in map(int, options.rows.split(",")):
                for found in cells(checkpoint, pack, rows, options, path.parent):
                    print(json.dumps(found) if options.json else said(found), flush=True)


def cells(
    checkpoint: Checkpoint, pack: Pack, rows: int, options: Any, place: Path
) -> Iterator[dict[str, Any]]:
    case = Case(checkpoint, pack, rows, options.threads, options.disk)
    kinds = Counter({it.kind: it.nbytes for its in case.model.products.values() for it in its})
    most = [kind for kind, _ in kinds.most_common(2)]
    machine = _measured(options.threads, place, most, None, lambda: True)  # whoever else computes
    read = case.read_s(options.steps)  # before the first step, or copies would want others
    if any(read):
        speed = case.plan.cyclic_bytes / median(read)
        machine = replace(machine, disk_bytes_per_s=speed, reads=None)
    links, cell = [float(it) * 1e9 for it in options.links.split(",")], {}
    for link in links:
        predicted = case.predicted_s(machine, link)
        cell[link] = {
            "model": checkpoint.path.name, "rows": rows, "link": link, "come_bytes": case.come_bytes,
            "disk_bytes": case.plan.cyclic_bytes, "predicted": predicted, "keeps": asdict(case.there.contention),
        }  # fmt: skip
        yield cell[link]
    steps = {link: case.took_s(link, options.steps) for link in links}
    computed = case.took_s(NOTHING, options.steps)
    for link in links:
        step = steps[link]
        each = {"copy": case.come_bytes / link, "compute": median(computed), "disk": median(read)}
        longest = max(each.values())
        yield {
            **cell[link], **each, "computes": computed, "reads": read, "steps": step,
            "ratio": median(step) / longest, "bound": max(each, key=lambda it: each[it]),
            "error": cell[link]["predicted"] / median(step) - 1,
        }  # fmt: skip
    case.close()


def said(its: dict[str, Any]) -> str:
    ms = 1e3
    line = f"{its['model']}, {its['rows']} rows, {its['link'] / 1e9:g} GB/s: "
    if "steps" not in its:
        keeps = ", ".join(
            f"{name.removesuffix('_keeps')} {share:.0%}" for name, share in its["keeps"].items()
        )
        return f"{line}predicted {its['predicted'] * ms:.0f} ms (beside others keep: {keeps})"
    step = its["steps"]
    line += f"copy {its['copy'] * ms:.0f}, compute "
    line += f"{its['compute'] * ms:.0f} ({min(its['computes']) * ms:.0f}–{max(its['computes']) * ms:.0f})"
    if its["disk"]:
        line += f", disk {its['disk'] * ms:.0f} ({min(its['reads']) * ms:.0f}–{max(its['reads']) * ms:.0f})"
    line += f", step {median(step) * ms:.0f} ({min(step) * ms:.0f}–{max(step) * ms:.0f}) ms"
    line += f", {its['ratio']:.3f} times the longest"
    line += f", predicted {its['predicted'] * ms:.0f} ms ({its['error']:+.1%})"
    return line + (f"  [{its['bound']}-bound]" if its["bound"] != "compute" else "")


if __name__ == "__main__":
    main()
