"""Experts that lie with the CPU and come to a device for steps of many tokens: logits are those of the CPU to the bit,
nothing is read before it has come or overwritten while it is read, and the next ones come while these are computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import tiny
from fakes.on_device import ROOMY, executor_of, logits, sim, with_blocks_on
from fakes.running import FP32, Running, relative_error
from fakes.torch_on_host import torch_home

from shoal.devices import sim_device
from shoal.devices.device import StagedPart
from shoal.devices.device_home import DeviceHome
from shoal.devices.errors import DeviceFull, DeviceLost
from shoal.devices.sim_device import LAUNCH_S, Scheduled, SimDevice
from shoal.devices.sim_kernels import SimKernels
from shoal.kernels import routing
from shoal.kernels.arrays import Floats
from shoal.kernels.homes import cpu
from shoal.partition.plan import Plan
from shoal.partition.spec import BlockId

FAMILIES = ("mixtral", "olmoe", "qwen3_moe", "qwen2_moe")
# Tokens from which on experts come; those of a step (in its last layer 71).
ALWAYS, PROMPTS, ROWS = 1, 50, 3 * 70
IN_TORCH = {"F32": 1e-4, "Q4_0": 1e-3}  # whose inputs the CPU rounds to 16 bits
There = Callable[[BlockId], bool]


def dense(block: BlockId) -> bool:
    return block.kind not in ("embed", "expert")


def some_experts(block: BlockId) -> bool:
    return dense(block) or (block.kind == "expert" and block.expert in (0, 2, 3))


def staged(plan: Plan, there: There = dense, together: int = 2, tokens: int = PROMPTS) -> Plan:
    return replace(with_blocks_on(plan, there), staged_experts=together, staged_tokens=tokens)


@pytest.fixture(scope="module", params=FAMILIES)
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Running:
    path = tmp_path_factory.mktemp(request.param) / "m"
    tiny.save_hf(tiny.hf_model(request.param), path)
    return Running(path)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Running:
    path = tmp_path_factory.mktemp("m") / "m"
    tiny.save_hf(tiny.hf_model("qwen3_moe"), path)
    return Running(path)


def of(device: SimDevice, queue: str) -> list[Scheduled]:
    return [it for it in device.schedule if it.queue == queue]


def mixes(device: SimDevice) -> list[Scheduled]:
    return [it for it in of(device, "compute") if it.what == "experts"]


def routed_s(device: SimDevice, mix: Scheduled) -> float:
    """When the routes of these experts had come, which are copied last before they are computed."""
    begun = list(device.schedule)
    return next(it.end_s for it in reversed(begun[: begun.index(mix)]) if it.queue == "in")


@pytest.mark.parametrize("there", [dense, some_experts])
@pytest.mark.parametrize(("together", "tokens"), [(1, ALWAYS), (2, ALWAYS), (4, PROMPTS)])
def test_logits_are_those_of_the_cpu(running: Running, there: There, together: int, tokens: int) -> None:
    device, home = sim()
    plan = staged(running.plan, there, together, tokens)
    executor = executor_of(running, plan, home)
    held = device.budget.held_bytes
    assert held >= plan.device_weights_bytes + plan.device_kv_bytes + plan.staging_bytes
    found, expected = logits(executor), logits(running.executor)
    assert of(device, "stage")
    if there is dense or tokens == ALWAYS:  # else small steps add up experts of both places in another order
        assert np.array_equal(found, expected)
    assert relative_error(found, expected) < 1e-5
    executor.let_go()
    del executor
    assert device.budget.held_bytes == 0


def test_fewer_tokens_leave_experts_where_they_are(mixture: Running) -> None:
    for tokens, come in ((ROWS + 1, False), (ROWS, True)):
        device, home = sim()
        assert np.array_equal(
            logits(executor_of(mixture, staged(mixture.plan, tokens=tokens), home), rounds=1),
            logits(mixture.executor, rounds=1),
        )
        assert bool(of(device, "stage")) == come


@pytest.mark.parametrize("kv_type", ["i8", "bf16"])
def test_parts_of_steps_have_them_come_once(tmp_path: Path, kv_type: str) -> None:
    tiny.save_hf(tiny.hf_model("qwen3_moe"), tmp_path / "m")
    running = Running(tmp_path / "m", replace(FP32, kv_type=kv_type))  # type: ignore[arg-type]
    copied = []
    for part_tokens in (33, 1 << 30):
        device, home = sim()
        plan = replace(staged(running.plan), part_tokens=part_tokens)
        found = logits(executor_of(running, plan, home), rounds=1)
        assert np.array_equal(found, logits(running.executor, rounds=1))
        copied.append(sum(it.nbytes for it in of(device, "stage")))
    assert copied[0] == copied[1] > 0


@pytest.mark.parametrize("stored", IN_TORCH)
@pytest.mark.parametrize("there", [dense, some_experts])
def test_in_torch_they_are_the_same_but_for_rounding(tmp_path: Path, stored: str, there: There) -> None:
    model, path = tiny.hf_model("qwen3_moe"), tmp_path / "m.gguf"
    running = Running(tiny.save_hf(model, path) if stored == "F32" else tiny.save_gguf(model, path, stored))
    home = torch_home()
    found = logits(executor_of(running, staged(running.plan, there), home))
    assert relative_error(found, logits(running.executor)) < IN_TORCH[stored]
    if isinstance(home.device, SimDevice):  # a card has no schedule
        assert of(home.device, "stage")


class _Impatient(SimDevice):
    """Computes with experts without waiting for them to have come."""

    def compute(self, what, work, run, after):  # type: ignore[no-untyped-def]
        known = [event for event in after if what != "experts" or event.queue != "stage"]
        return super().compute(what, work, run, known)


def test_what_is_read_before_it_has_come_is_poisoned(mixture: Running) -> None:
    home = DeviceHome(_Impatient("sim:test", ROOMY), SimKernels(cpu()))
    assert np.isnan(logits(executor_of(mixture, staged(mixture.plan), home), rounds=1)).all()


@pytest.mark.parametrize("longer", ["copy", "compute"])
def test_the_clock_is_that_of_the_schedule(
    mixture: Running, monkeypatch: pytest.MonkeyPatch, longer: str
) -> None:
    """Of each layer: the longer of copying and computing, and the first copy (or the routes beside it) or what the last
    group takes."""
    if longer == "compute":
        monkeypatch.setattr(sim_device, "SIM_FLOPS", 1e8)
    device, home = sim(link_bytes_per_s=50e6 if longer == "copy" else 16e9)
    together, moe = 2, mixture.spec.moe
    assert moe is not None
    executor = executor_of(mixture, staged(mixture.plan, together=together), home)
    device.schedule.clear()
    assert np.array_equal(logits(executor, rounds=1), logits(mixture.executor, rounds=1))
    copies, computed = of(device, "stage"), mixes(device)
    groups = moe.experts // together  # all are used
    layers = len(mixture.spec.layers)
    assert len(copies) == len(computed) == groups * layers  # one for each group
    assert all(it.nbytes == 3 * together * moe.ffn * mixture.spec.hidden * 4 for it in copies)
    copy_s = LAUNCH_S + copies[0].nbytes / device.link_bytes_per_s
    for layer in range(layers):
        mine = computed[groups * layer : groups * (layer + 1)]
        came = copies[groups * layer : groups * (layer + 1)]
        took = [it.end_s - it.begin_s for it in mine]
        for group in range(groups):
            earlier = [came[group - 1].end_s] if group else [came[0].begin_s]
            free = [mine[group - 2].end_s] if group > 1 else []
            assert came[group].begin_s == max(earlier + free)  # its buffer is not read any more
            before = [mine[group - 1].end_s] if group else []
            assert mine[group].begin_s == max([came[group].end_s, routed_s(device, mine[group]), *before])
            assert came[group].end_s - came[group].begin_s == pytest.approx(copy_s, rel=1e-9)
        whole_s = mine[-1].end_s - came[0].begin_s
        first_s = max(copy_s, routed_s(device, mine[0]) - came[0].begin_s)
        expected_s = groups * copy_s + took[-1] if longer == "copy" else first_s + sum(took)
        assert all((copy_s > its) == (longer == "copy") for its in took)
        assert whole_s == pytest.approx(expected_s, rel=1e-9)
        if longer == "compute" and groups > 2:  # a buffer was waited for
            assert came[2].begin_s == mine[0].end_s > came[1].end_s


def test_one_expert_gets_everything(mixture: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def skewed(scores: Floats, count: int, normalize: bool) -> routing.Routing:
        rows = len(scores), 1
        return routing.Routing.of(np.full(rows, 3), np.ones(rows, np.float32))

    monkeypatch.setattr(routing, "route", skewed)
    monkeypatch.setattr(type(cpu()), "route", lambda _, *operands: skewed(*operands))
    device, home = sim()
    executor = executor_of(mixture, staged(mixture.plan), home)
    device.schedule.clear()
    assert np.array_equal(logits(executor), logits(mixture.executor))
    layers = len(mixture.spec.layers)
    assert len(of(device, "stage")) == layers
    assert len(mixes(device)) == layers


@pytest.mark.parametrize("copy", [0, 1, 3])
def test_a_device_that_is_lost_while_experts_come(
    mixture: Running, monkeypatch: pytest.MonkeyPatch, copy: int
) -> None:
    device, home = sim()
    executor = executor_of(mixture, staged(mixture.plan), home)
    stage_in, copies = device.stage_in, []

    def going(*args: Any) -> Any:
        if len(copies) == copy:
            device.lose("the driver was restarted")
        copies.append(stage_in(*args))
        return copies[-1]

    monkeypatch.setattr(device, "stage_in", going)
    for _ in range(2):
        with pytest.raises(DeviceLost, match="the driver was restarted"):
            logits(executor)
        executor.kv.table.give_back(list(executor.kv.table._taken))
    assert len(copies) == copy
    executor.let_go()
    copies.clear()
    del executor
    assert device.budget.held_bytes == 0  # nothing has to be asked of it for that


def test_no_room_for_buffers_is_said_before_any_step(mixture: Running) -> None:
    plan = staged(mixture.plan)
    device, home = sim()
    executor = executor_of(mixture, plan, home)
    least = device.budget.held_bytes
    del executor
    with pytest.raises(DeviceFull):
        executor_of(mixture, plan, sim(least - 1)[1])


def test_small_copies_pass_between_packets() -> None:
    device, home = sim(link_bytes_per_s=1e9)
    packet_s = sim_device.PACKET_BYTES / 1e9
    weights = np.ones(8 * sim_device.PACKET_BYTES, np.uint8)
    there = device.allocate(weights.shape, weights.dtype)
    large = device.stage_in([StagedPart(weights, there)])
    for late_s in (0.0, 0.3 * packet_s, 6.5 * packet_s):
        device.now_s = late_s
        x = home.place(np.ones((2, 3), np.float32))
        assert np.array_equal(home.fetch(x), np.ones((2, 3)))
        (small,) = [it for it in of(device, "in") if it.begin_s >= late_s][-1:]
        assert small.end_s - late_s <= packet_s + 3 * LAUNCH_S
    device.wait(large)
    (staged,) = of(device, "stage")
    begins = [it.begin_s for it in of(device, "in")]
    assert all(before < after for before, after in pairwise([*begins, staged.end_s]))
