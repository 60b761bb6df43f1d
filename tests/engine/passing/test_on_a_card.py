"""The queues, threads and page-locked memory of a card carry whole steps: a card is played whose copies are made at the
last moment, so nothing may be read before it has come, nor changed or given back while it is copied."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fakes import tiny
from fakes.cuda_on_host import LOCKED, card
from fakes.on_device import executor_of, logits, with_blocks_on, with_blocks_passing
from fakes.running import Running, relative_error

from shoal.devices.cuda_device import CudaDevice
from shoal.devices.device_home import DeviceHome
from shoal.devices.torch_kernels import TorchKernels
from shoal.engine.executor import Abandoned
from shoal.models.step import Step
from shoal.partition.spec import BlockId

IN_TORCH = 1e-4  # of the largest logit


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Running:
    path = tmp_path_factory.mktemp("m") / "m"
    tiny.save_hf(tiny.hf_model("qwen3_moe"), path)
    return Running(path)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Running:
    path = tmp_path_factory.mktemp("m") / "m"
    tiny.save_hf(tiny.hf_model("gemma3"), path)
    return Running(path)


@pytest.fixture(params=LOCKED)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> CudaDevice:
    return card(monkeypatch, request.param)


def some_experts(block: BlockId) -> bool:
    return block.kind == "head" or (block.kind == "expert" and block.expert in (0, 2, 3))


@pytest.mark.parametrize("attending_rows", [0, 16, 1])  # with 1 texts go on there, whose pages come
def test_weights_that_pass(mixture: Running, device: CudaDevice, attending_rows: int) -> None:
    plan = replace(with_blocks_passing(mixture.plan, some_experts), attending_rows=attending_rows)
    executor = executor_of(mixture, plan, DeviceHome(device, TorchKernels()))
    assert bool(device.locked_bytes) == bool(device.pinned_bytes)
    assert relative_error(logits(executor), logits(mixture.executor)) < IN_TORCH
    executor.let_go()
    device.unpin()
    assert (device.lost, device.locked_bytes, device.budget.held_bytes) == ("", 0, 0)


def test_layers_that_come(dense: Running, device: CudaDevice) -> None:
    """Also after a step that was abandoned while they came."""
    plan = with_blocks_on(dense.plan, lambda block: block.kind == "head", device.name)
    executor = executor_of(dense, replace(plan, staged_tokens=50), DeviceHome(device, TorchKernels()))
    assert bool(device.locked_bytes) == bool(device.pinned_bytes)
    expected = logits(dense.executor)
    for share in (0.0, 0.3, 0.6):
        step = Step.build([([*range(60)], 0, [0], 1)], 60)
        with pytest.raises(Abandoned):
            executor.forward(step, lambda done, share=share: done < share)
        assert relative_error(logits(executor), expected) < IN_TORCH
    del step
    executor.let_go()
    device.unpin()
    assert (device.lost, device.locked_bytes, device.budget.held_bytes) == ("", 0, 0)


def test_blocks_that_stay(mixture: Running, device: CudaDevice) -> None:
    plan = with_blocks_on(mixture.plan, lambda block: block.layer > 0 or block.kind == "head", device.name)
    executor = executor_of(mixture, plan, DeviceHome(device, TorchKernels()))
    assert relative_error(logits(executor), logits(mixture.executor)) < IN_TORCH
    device.unpin()
    assert not device.lost
