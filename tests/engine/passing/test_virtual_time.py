"""Steps whose weights pass through a device take, on its virtual clock, what the schedule of the throughput model says,
whatever takes longest; and that is the longest of copying, computing and attending, but for what is at the ends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import pytest
from fakes import tiny
from fakes.on_device import Attending, executor_of, sim, with_blocks_passing
from fakes.running import Running
from fakes.throughput.clocked_disk import ClockedDisk, ClockedStore, sim_behind_disk

from shoal.devices import sim_device
from shoal.devices.sim_device import Scheduled, SimDevice
from shoal.engine.executor import Executor
from shoal.models.step import Step
from shoal.partition.plan import BlockPlan, Plan
from shoal.partition.spec import BlockId
from shoal.partition.throughput.placing.two_groups import (
    ComingBlock,
    Disk,
    Feeding,
    Layer,
    LayerTurn,
    LookingThere,
    PassingPiece,
    Tail,
    alternate,
    step_ends,
)

LAYERS, STEPS = 4, 5
FAMILIES = ("qwen2_moe", "olmoe", "mixtral", "llama")


@pytest.fixture(scope="module", params=FAMILIES)
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Running:
    path = tmp_path_factory.mktemp(request.param) / "m"
    tiny.save_hf(tiny.hf_model(request.param, num_hidden_layers=LAYERS), path)
    return Running(path)


def ends(executor: Executor, device: SimDevice) -> list[float]:
    """When each of some like steps ends: two prompts, and an answer."""
    began_s, found = device.now_s, []
    device.schedule.clear()
    ids = [*range(1, 200, 2)]  # for which all experts are used
    for _ in range(STEPS):
        segments = [(ids[:40], 0, [0], 40), ([7], 1, [1], 1), (ids[-50:], 0, [2], 50)]
        step = Step.build(segments, executor.plan.rows_together(91), alike=True)
        executor.head(executor.forward(step))
        found.append(device.now_s - began_s)
    return found


class Durations:
    """Of what was done first in each queue, in its order."""

    def __init__(self, device: SimDevice) -> None:
        self._device = device
        self._queues: dict[str, Iterator[Scheduled]] = {
            queue: iter([it for it in device.schedule if it.queue == queue])
            for queue in ("in", "out", "stage", "compute")
        }

    def of(self, queue: str, *whats: str) -> float:
        seconds = 0.0
        for what in whats:
            it = next(self._queues[queue])
            assert it.what == what
            seconds += it.end_s - it.begin_s
        return seconds

    def copies(self, queue: str, count: int = 1) -> float:
        return self.of(queue, *["copy"] * count)


def measured(
    running: Running, plan: Plan, device: SimDevice, attends_s: float
) -> tuple[list[Layer], Tail, float]:
    """The parts of the first step, as the schedule has their durations."""
    spec, took = running.spec, Durations(device)
    moe, norms = spec.moe, {"full": ["norm", "norm"]}.get(spec.qk_norm, [])
    after = ["norm"] if spec.post_norm else []
    blocks = {it.block: it for it in plan.blocks}

    def coming(all: Sequence[BlockId]) -> list[ComingBlock]:
        """A copy for each block from disk, and one for those of a layer's experts that lie in memory together."""
        its = [blocks[block] for block in all if blocks[block].passes]
        found = []
        for tier, together in groupby(its, lambda it: it.tier):
            if tier == "ram":
                found.append(ComingBlock(took.copies("stage")))
            else:
                found += [ComingBlock(took.copies("stage"), it.nbytes) for it in together]
        return found

    comes: list[dict[PassingPiece, list[ComingBlock]]] = []
    for layer in range(LAYERS):
        feeding, *experts = spec.ffn_blocks(layer)
        pieces: dict[PassingPiece, list[ComingBlock]] = {"attn": coming([BlockId("attn", layer)])}
        if moe:
            pieces |= {"router": coming([feeding]), "experts": coming(experts)}
        else:
            pieces["ffn"] = coming([feeding])
        comes.append({piece: its for piece, its in pieces.items() if its})

    def fed() -> Feeding:
        if not moe:
            mixed_s = took.of("compute", "feed forward")
            return Feeding(0.0, 0.0, 0.0, 0.0, 0.0, mixed_s, took.of("compute", *after, "add"))
        shared = ["feed forward", "linears", "gate"] if moe.shared_gated else []
        return Feeding(
            took.of("compute", "zeros", "norm"),
            took.of("compute", "scores"),
            took.copies("out"),
            took.of("compute", *shared),
            took.copies("in", 2),
            took.of("compute", "experts"),
            took.of("compute", *(["add"] if shared else []), *after, "add"),
        )

    enters_s = took.copies("in")
    asked: list[tuple[float, float]] = []
    turns: list[list[LayerTurn]] = [[] for _ in range(LAYERS)]
    alone = plan.attending_rows == ALL_THERE  # each group has a text that goes on

    def ask() -> None:
        asked_s = took.of("compute", "linears", *norms, *([] if alone else ["join"]))
        asked.append((asked_s, took.copies("out", 0 if alone else 1)))

    def looked(layer: int, comes_s: float) -> LookingThere | None:
        """Pages of texts that go on have come; for the first layer also where they are, and two tables of angles."""
        if not plan.attending_rows:
            return None
        told_s = took.copies("in", 0 if layer else 3)
        looks_s, leaves_s = took.of("compute", "attention"), took.copies("out")
        joined_s = 0.0 if alone else took.of("compute", "zeros", "add")
        return LookingThere(comes_s, looks_s, leaves_s, 0.0, told_s, joined_s, alone)

    ask()
    ask()
    for layer in range(LAYERS):
        for _ in range(2):
            asked_s, leaves_s = asked.pop(0)
            comes_s = took.copies("in", 1 if alone else 0)
            back_s = took.copies("in", 0 if alone else 1)
            looking = looked(layer, comes_s)
            attended_s = took.of("compute", *(["add"] if looking and not alone else []), "linears")
            added_s = took.of("compute", *after, "add")
            feeding = fed() if layer < LAYERS - 1 else None
            turn = LayerTurn(asked_s, leaves_s, attends_s, back_s, attended_s, added_s, feeding, looking)
            turns[layer].append(turn)
            if layer < LAYERS - 1:
                ask()
    ids_s, picked_s = took.copies("in"), took.of("compute", "rows")
    tail = Tail(ids_s, picked_s, fed(), took.of("compute", "linears"), took.copies("out"), 0.0)
    return [Layer(its, tuple(both)) for its, both in zip(comes, turns, strict=True)], tail, enters_s


def test_the_host_waits_twice_in_a_layer_of_each_group(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For queries, and for what a router says; in the last layer once for both groups, and for logits. When it attends
    for a group, the device has the other one's experts still before it."""
    monkeypatch.setattr(sim_device, "SIM_FLOPS", 1e8)
    device, home = sim()
    executor = executor_of(running, with_blocks_passing(running.plan), home)
    waits: list[object] = []
    wait, attended = device.wait, []

    def waited(event: Any) -> None:
        waits.append(event)
        wait(event)
        attended.append((device.now_s, max(it.end_s for it in device.schedule if it.queue == "compute")))

    monkeypatch.setattr(device, "wait", waited)
    device.schedule.clear()
    ids = [*range(1, 200, 2)]
    executor.head(executor.forward(Step.build([(ids, 0, [0, 1], 100)], 50)))
    routed = 2 * (LAYERS - 1) + 1 if running.spec.moe else 0
    assert len({id(event) for event in waits}) == 2 * LAYERS + routed + 1
    if running.spec.moe:
        busy = [now_s < until_s for event, (now_s, until_s) in zip(waits, attended, strict=True)]
        assert busy.count(True) >= 3 * (2 * LAYERS - 2)  # q, k and v of all but the last of each group


CASES = {  # bytes per second of the link, of its arithmetic, seconds of attention
    "nothing": (16e9, 20e12, 0.0),
    "weights": (100e6, 20e12, 1e-4),
    "device": (16e9, 1e9, 1e-4),
    "host": (16e9, 20e12, 5e-3),
    "weights and host": (400e6, 20e12, 1e-3),
    "all alike": (400e6, 2e10, 4e-4),
}


ALL_THERE, PROMPTS_THERE = 1, 16


@pytest.mark.parametrize("attending_rows", [0, PROMPTS_THERE, ALL_THERE])
@pytest.mark.parametrize("longest", CASES)
def test_steps_take_what_the_schedule_says(
    running: Running, longest: str, attending_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    link, flops, attends_s = CASES[longest]
    monkeypatch.setattr(sim_device, "SIM_FLOPS", flops)
    monkeypatch.setattr(sim_device, "PACKET_BYTES", 1)  # what small copies wait for packets
    device, home = sim(link_bytes_per_s=link)
    plan = replace(with_blocks_passing(running.plan), attending_rows=attending_rows)
    found = ends(executor_of(running, plan, home, Attending(device, attends_s)), device)
    layers, tail, enters_s = measured(running, plan, device, attends_s)
    assert found == pytest.approx(step_ends(layers, tail, enters_s, STEPS), rel=1e-5)
    passage = alternate(layers, tail, enters_s)
    assert passage.step_s == pytest.approx(found[-1] - found[-2], rel=1e-5)
    busy = {"weights": passage.weights_s, "device": passage.device_s, "host": passage.host_s}
    if longest in busy and not attending_rows:
        assert busy[longest] == max(busy.values())
        assert 0.999 * busy[longest] < passage.step_s < 1.15 * busy[longest]


FROM_DISK = {  # bytes per second of the disk, of the link, of the device's arithmetic, seconds of attention
    "disk": (20e6, 16e9, 20e12, 1e-4),
    "weights": (1e9, 100e6, 20e12, 1e-4),
    "device": (1e10, 16e9, 1e9, 1e-4),
    "host": (1e10, 16e9, 20e12, 5e-3),
    "disk and weights": (110e6, 100e6, 20e12, 1e-4),
    "all alike": (400e6, 400e6, 2e10, 4e-4),
}
PIECE_BYTES = 4096


def from_disk(plan: Plan, spare_bytes: int) -> Plan:
    """The same plan; half of what passes comes from disk, through a window that holds the largest block, and more."""

    def placed(it: BlockPlan) -> BlockPlan:
        here = (
            it.tier == "gpu" or it.block.kind == "embed" or it.block.layer == 1 or it.block.kind == "router"
        )
        return it if here else replace(it, tier="disk")

    blocks = tuple(map(placed, plan.blocks))
    largest = max(it.nbytes for it in blocks if it.tier == "disk")
    return replace(plan, blocks=blocks, window_bytes=largest + spare_bytes)


def kept_there(block: BlockId) -> bool:
    return block.kind == "head" or (block.kind == "ffn" and block.layer == 2)


@pytest.mark.parametrize("spare_bytes", [0, 1 << 16])
@pytest.mark.parametrize("longest", FROM_DISK)
def test_steps_whose_weights_come_from_disk_take_what_the_schedule_says(
    running: Running, longest: str, spare_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, link, flops, attends_s = FROM_DISK[longest]
    monkeypatch.setattr(sim_device, "SIM_FLOPS", flops)
    monkeypatch.setattr(sim_device, "PACKET_BYTES", 1)
    device, home = sim_behind_disk(link)
    plan = from_disk(with_blocks_passing(running.plan, kept_there), spare_bytes)
    disk = ClockedDisk(plan, device, read, PIECE_BYTES)
    executor = executor_of(
        running, plan, home, Attending(device, attends_s), lambda store: ClockedStore(store, disk)
    )
    found = ends(executor, device)
    layers, tail, enters_s = measured(running, plan, device, attends_s)
    law = Disk(read, plan.window_bytes, PIECE_BYTES)
    assert found == pytest.approx(step_ends(layers, tail, enters_s, STEPS, law), rel=1e-5)
    passage = alternate(layers, tail, enters_s, law)
    assert passage.step_s == pytest.approx(found[-1] - found[-2], rel=1e-5)
    busy = {
        "disk": passage.disk_s,
        "weights": passage.weights_s,
        "device": passage.device_s,
        "host": passage.host_s,
    }
    if longest in busy:
        assert busy[longest] == max(busy.values())
        # A window for one block is not read into while that is copied.
        overlapped = spare_bytes or longest != "disk"
        assert 0.999 * busy[longest] < passage.step_s < (1.15 if overlapped else 1.3) * busy[longest]
