"""Wherever blocks are computed, logits are those of the CPU: with a simulated device, whose kernels are the CPU's, to
the bit. Nothing is read there before its copy has ended, and no byte beyond its budget is taken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fakes import tiny
from fakes.on_device import ROOMY, executor_of, logits, sim, with_blocks_on
from fakes.running import FP32, Running, relative_error
from fakes.torch_on_host import torch_home

from shoal.devices.device import DeviceArray
from shoal.devices.device_home import DeviceHome
from shoal.devices.errors import DeviceFull, DeviceLost
from shoal.devices.sim_device import SimDevice
from shoal.devices.sim_kernels import SimKernels
from shoal.kernels.homes import cpu
from shoal.offload.kv.prefix_cache import Copy
from shoal.partition.spec import BlockId

# Between them they scale the embedding, clip q, k and v, have every norm, biases, gated and plain shared experts.
FAMILIES = ("llama", "gemma3", "qwen2", "olmo2", "mixtral", "olmoe", "qwen3_moe", "qwen2_moe")
There = Callable[[BlockId], bool]
IN_TORCH = 1e-4  # of the largest logit

PLACEMENTS: dict[str, There] = {
    "all": lambda block: block.kind != "embed",
    "the last layer and the head": lambda block: block.layer == 1 or block.kind == "head",
    "the first layer": lambda block: block.layer == 0 and block.kind not in ("embed", "head"),
    "attention": lambda block: block.kind == "attn",
    "feed-forward": lambda block: block.kind in ("ffn", "router", "expert"),
    "experts": lambda block: block.kind == "expert",
    "all but experts": lambda block: block.kind not in ("embed", "expert"),
    "all but the experts of the first layers": lambda block: (
        block.layer == 2 or block.kind not in ("embed", "expert")
    ),
    "the head": lambda block: block.kind == "head",
}


@pytest.fixture(scope="module", params=FAMILIES)
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Running:
    overrides = {"clip_qkv": 0.5} if request.param == "olmoe" else {}
    path = tmp_path_factory.mktemp(request.param) / "m"
    tiny.save_hf(tiny.hf_model(request.param, **overrides), path)
    return Running(path)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_every_placement_gives_the_logits_of_the_cpu(running: Running, placement: str) -> None:
    plan = with_blocks_on(running.plan, PLACEMENTS[placement])
    if not plan.device:
        pytest.skip("a dense model has no experts")
    device, home = sim()
    executor = executor_of(running, plan, home)
    assert np.array_equal(logits(executor), logits(running.executor))
    assert (
        device.budget.peak_bytes
        > device.budget.held_bytes
        >= plan.device_weights_bytes + plan.device_kv_bytes
    )
    executor.let_go()
    del executor
    assert device.budget.held_bytes == 0


@pytest.mark.parametrize("placement", ["all", "the last layer and the head", "experts", "all but experts"])
def test_in_torch_they_are_the_same_but_for_rounding(running: Running, placement: str) -> None:
    plan = with_blocks_on(running.plan, PLACEMENTS[placement])
    if not plan.device:
        pytest.skip("a dense model has no experts")
    found, expected = logits(executor_of(running, plan, torch_home())), logits(running.executor)
    assert relative_error(found, expected) < IN_TORCH


@pytest.mark.parametrize("kv_type", ["i8", "bf16"])
@pytest.mark.parametrize("placement", ["the last layer and the head", "all but experts"])
def test_parts_of_steps_and_types_of_kv(tmp_path: Path, kv_type: str, placement: str) -> None:
    tiny.save_hf(tiny.hf_model("qwen3_moe"), tmp_path / "m")
    running = Running(tmp_path / "m", replace(FP32, kv_type=kv_type))  # type: ignore[arg-type]
    plan = with_blocks_on(running.plan, PLACEMENTS[placement])
    executor = executor_of(running, replace(plan, part_tokens=33), sim()[1])
    assert np.array_equal(logits(executor), logits(running.executor))


class _Impatient(SimDevice):
    """Computes without waiting for what has been copied."""

    def compute(self, what, work, run, after):  # type: ignore[no-untyped-def]
        return super().compute(what, work, run, ())


def test_what_is_read_before_its_copy_has_ended_is_poisoned(tmp_path: Path) -> None:
    tiny.save_hf(tiny.hf_model("llama"), tmp_path / "m")
    running = Running(tmp_path / "m")
    plan = with_blocks_on(running.plan, PLACEMENTS["feed-forward"])
    home = DeviceHome(_Impatient("sim:test", ROOMY), SimKernels(cpu()))
    assert np.isnan(logits(executor_of(running, plan, home), rounds=1)).all()


def test_hidden_states_pass_the_link_once(tmp_path: Path) -> None:
    tiny.save_hf(tiny.hf_model("llama"), tmp_path / "m")
    running = Running(tmp_path / "m")
    plan = with_blocks_on(running.plan, PLACEMENTS["all"])
    device, home = sim()
    executor = executor_of(running, plan, home)
    device.schedule.clear()
    logits(executor, rounds=1)
    rows, wanted, spec = 3 * 70, 71, running.spec
    copied = [it.nbytes for it in device.schedule if it.queue == "in"]
    # Hidden states; ids of pages and angles, once for all layers; the rows that are wanted.
    assert max(copied) == copied[0] == 4 * rows * spec.hidden
    assert len(copied) == 1 + 1 + 2 * len(spec.ropes) + 1
    assert [it.nbytes for it in device.schedule if it.queue == "out"] == [4 * wanted * spec.vocab]


@pytest.fixture
def small(tmp_path: Path) -> tuple[Running, SimDevice, DeviceHome]:
    tiny.save_hf(tiny.hf_model("llama"), tmp_path / "m")
    return (Running(tmp_path / "m"), *sim())


def test_a_full_device_fails_the_step_and_computes_on(small: tuple[Running, SimDevice, DeviceHome]) -> None:
    running, device, home = small
    executor = executor_of(running, with_blocks_on(running.plan, PLACEMENTS["all"]), home)
    device.budget.limit_bytes = device.budget.held_bytes + 1000
    with pytest.raises(DeviceFull, match=r"^device sim:test is full: [\d.]+ k?B more were asked for, and "):
        logits(executor)
    assert device.budget.held_bytes <= device.budget.limit_bytes
    device.budget.limit_bytes = ROOMY
    executor.kv.table.give_back(list(executor.kv.table._taken))
    assert np.array_equal(logits(executor), logits(running.executor))


def test_a_device_that_is_lost_says_so_at_every_call(small: tuple[Running, SimDevice, DeviceHome]) -> None:
    running, device, home = small
    executor = executor_of(running, with_blocks_on(running.plan, PLACEMENTS["attention"]), home)
    device.lose("somebody pulled it out")
    for _ in range(2):
        with pytest.raises(DeviceLost, match=r"^device sim:test is lost: somebody pulled it out$"):
            logits(executor)
        executor.kv.table.give_back(list(executor.kv.table._taken))
    held = device.budget.held_bytes
    del executor
    assert device.budget.held_bytes < held  # nothing has to be asked of it for that


def test_pages_come_and_go_whichever_home_they_are_in(small: tuple[Running, SimDevice, DeviceHome]) -> None:
    running, _, home = small
    executor = executor_of(running, with_blocks_on(running.plan, PLACEMENTS["the first layer"]), home)
    for one in (executor, running.executor):
        logits(one)
    pool, twin = executor.kv, running.kv
    assert (pool.page_bytes, pool.nbytes) == (twin.page_bytes, twin.nbytes)
    assert np.array_equal(pool.page(1), twin.page(1))
    pool.move([Copy(0, 5)])
    assert np.array_equal(pool.page(5), twin.page(0))
    pool.put(5, twin.page(2).copy())
    assert np.array_equal(pool.page(5), twin.page(2))
    assert isinstance(pool.layers[0].data, DeviceArray)
    assert isinstance(pool.layers[1].data, np.ndarray)
