"""Layers of a dense model that lie with the CPU and come to a device for steps of many tokens: logits are those of the
CPU to the bit, they come while the CPU attends, and nothing is read before it has come."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import tiny
from fakes.on_device import ROOMY, Attending, executor_of, logits, sim, with_blocks_on
from fakes.running import FP32, Running, relative_error
from fakes.torch_on_host import torch_home

from shoal.devices import sim_device
from shoal.devices.device_home import DeviceHome
from shoal.devices.errors import DeviceLost
from shoal.devices.sim_device import SimDevice
from shoal.devices.sim_kernels import SimKernels
from shoal.kernels.homes import cpu
from shoal.models.step import Step
from shoal.partition.plan import Plan
from shoal.partition.spec import BlockId

FAMILIES = (
    "llama",
    "gemma3",
    "qwen2",
    "olmo2",
    "phi3",
)  # norms before and after, biases, one matrix for gate and up
# Tokens from which on they come; those of a step (in its last layer 71).
ALWAYS, PROMPTS, ROWS = 1, 50, 3 * 70
There = Callable[[BlockId], bool]


def the_last(block: BlockId) -> bool:
    """Of three layers; the CPU has the others."""
    return block.kind == "head" or (block.kind in ("attn", "ffn") and block.layer == 2)


def attention(block: BlockId) -> bool:
    return block.kind == "attn"


def staged(plan: Plan, there: There = the_last, tokens: int = PROMPTS) -> Plan:
    return replace(with_blocks_on(plan, there), staged_tokens=tokens)


@pytest.fixture(scope="module", params=FAMILIES)
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Running:
    path = tmp_path_factory.mktemp(request.param) / "m"
    tiny.save_hf(tiny.hf_model(request.param), path)
    return Running(path)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Running:
    path = tmp_path_factory.mktemp("m") / "m"
    tiny.save_hf(tiny.hf_model("llama"), path)
    return Running(path)


def came(device: SimDevice) -> int:
    return sum(it.nbytes for it in device.schedule if it.queue == "stage")


@pytest.mark.parametrize("there", [the_last, attention])
@pytest.mark.parametrize("tokens", [ALWAYS, PROMPTS, 72])
def test_logits_are_those_of_the_cpu(running: Running, there: There, tokens: int) -> None:
    device, home = sim()
    plan = staged(running.plan, there, tokens)
    executor = executor_of(running, plan, home)
    assert (
        device.budget.held_bytes >= plan.device_weights_bytes + plan.passing_bytes > plan.device_weights_bytes
    )
    assert np.array_equal(logits(executor), logits(running.executor))
    assert came(device)
    executor.let_go()
    del executor
    assert device.budget.held_bytes == 0


def test_fewer_tokens_leave_them_where_they_are(llama: Running) -> None:
    for tokens, come in ((ROWS + 1, False), (ROWS, True)):
        device, home = sim()
        found = logits(executor_of(llama, staged(llama.plan, tokens=tokens), home), rounds=1)
        assert np.array_equal(found, logits(llama.executor, rounds=1))
        assert bool(came(device)) == come


@pytest.mark.parametrize("kv_type", ["i8", "bf16"])
def test_parts_of_steps_have_them_come_once(tmp_path: Path, kv_type: str) -> None:
    tiny.save_hf(tiny.hf_model("llama"), tmp_path / "m")
    running = Running(tmp_path / "m", replace(FP32, kv_type=kv_type))  # type: ignore[arg-type]
    copied = []
    for part_tokens in (33, 1 << 30):
        device, home = sim()
        plan = replace(staged(running.plan), part_tokens=part_tokens)
        found = logits(executor_of(running, plan, home), rounds=1)
        assert np.array_equal(found, logits(running.executor, rounds=1))
        copied.append(came(device))
    assert copied[0] == copied[1] > 0


@pytest.mark.parametrize(("stored", "tolerance"), [("F32", 1e-4), ("Q4_0", 1e-3)])
def test_in_torch_they_are_the_same_but_for_rounding(tmp_path: Path, stored: str, tolerance: float) -> None:
    model, path = tiny.hf_model("llama"), tmp_path / "m.gguf"
    running = Running(tiny.save_hf(model, path) if stored == "F32" else tiny.save_gguf(model, path, stored))
    home = torch_home()
    found = logits(executor_of(running, staged(running.plan), home))
    assert relative_error(found, logits(running.executor)) < tolerance
    if isinstance(home.device, SimDevice):  # a card has no schedule
        assert came(home.device)


@pytest.mark.parametrize("tokens", [0, PROMPTS])
def test_a_step_leases_no_block_twice(llama: Running, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that reads takes a lease for a use that is over, and what it costs is counted once."""
    _, home = sim()
    executor = executor_of(llama, staged(llama.plan, tokens=tokens), home)
    acquire, leased = executor.store.acquire, list[BlockId]()

    def counted(block: BlockId) -> Any:
        leased.append(block)
        return acquire(block)

    monkeypatch.setattr(executor.store, "acquire", counted)
    logits(executor, rounds=1)
    assert len(leased) == len(set(leased)) > 0


class _Impatient(SimDevice):
    """Computes without waiting for what comes."""

    def compute(self, what, work, run, after):  # type: ignore[no-untyped-def]
        return super().compute(what, work, run, [event for event in after if event.queue != "stage"])


def test_what_is_read_before_it_has_come_is_poisoned(llama: Running) -> None:
    home = DeviceHome(_Impatient("sim:test", ROOMY), SimKernels(cpu()))
    found = logits(executor_of(llama, staged(llama.plan, attention, ALWAYS), home), rounds=1)
    assert np.isnan(found).all()


@pytest.mark.parametrize("longer", ["copy", "attention"])
def test_they_come_while_the_cpu_attends(llama: Running, longer: str) -> None:
    """All four blocks of two layers have room. A step takes the longer of their copies and of attention; of the
    other, what comes before or after."""
    device, home = sim(link_bytes_per_s=1e6)
    attends_s = 1.0 if longer == "attention" else 1e-3
    executor = executor_of(llama, staged(llama.plan), home, Attending(device, attends_s))
    begun_s = device.now_s
    device.schedule.clear()
    logits(executor, rounds=1)
    copies = [it for it in device.schedule if it.queue == "stage"][:4]
    assert all(it.begin_s == before.end_s for before, it in pairwise(copies))
    copied_s = copies[-1].end_s - begun_s
    first_s = copies[0].end_s - begun_s
    assert (copied_s > 2 * attends_s) == (longer == "copy")
    expected_s = copied_s if longer == "copy" else first_s + 2 * attends_s
    # In; q, k and v out and what was found in, in both layers; each of these may wait for a packet of what comes.
    hidden_s = 7 * ROWS * llama.spec.hidden * 4 / 1e6 + 4 * max(it.end_s - it.begin_s for it in copies)
    assert expected_s < device.now_s - begun_s < expected_s + hidden_s


def test_an_answer_waits_for_packets_of_what_comes_ahead_not_for_layers(
    llama: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sim_device, "PACKET_BYTES", 1 << 10)
    link = 1e6
    device, home = sim(link_bytes_per_s=link)
    executor = executor_of(llama, staged(llama.plan), home)
    executor.head(executor.forward(Step.build([([*range(60)], 0, [0], 1)], 60)))

    def token_s() -> float:
        begun_s = device.now_s
        device.schedule.clear()
        executor.head(executor.forward(Step.build([([1], 60, [0], 1)], 1)))
        return device.now_s - begun_s

    comes_until_s = max(it.end_s for it in device.schedule if it.queue == "stage")
    beside_s = token_s()
    assert device.now_s < comes_until_s
    device.now_s = comes_until_s
    alone_s = token_s()
    copies = sum(it.queue == "in" for it in device.schedule)
    assert alone_s <= beside_s <= alone_s + copies * (1 << 10) / link


def test_a_device_that_is_lost_while_one_comes(llama: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    device, home = sim()
    executor = executor_of(llama, staged(llama.plan), home)

    stage_in = device.stage_in

    def lost(*operands: Any) -> Any:
        device.lose("the driver was restarted")
        return stage_in(*operands)

    monkeypatch.setattr(device, "stage_in", lost)
    with pytest.raises(DeviceLost, match="the driver was restarted"):
        logits(executor)
    executor.let_go()
    del executor
    assert device.budget.held_bytes == 0
