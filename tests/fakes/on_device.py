"""Helpers: a model of which some blocks are computed by a simulated device of the test's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from shoal.devices.device_home import DeviceHome
from shoal.devices.device_names import SIM_LINK_BYTES_PER_S
from shoal.devices.sim_device import SimDevice
from shoal.devices.sim_kernels import SimKernels
from shoal.engine.collective import Alone
from shoal.engine.executor import Executor, attention_homes
from shoal.kernels import ComputeHome
from shoal.kernels.arrays import Floats
from shoal.kernels.homes import cpu
from shoal.models.checkpoint.checkpoint import open_checkpoint
from shoal.models.step import Step
from shoal.offload.block_store import BlockStore, ResidentStore
from shoal.offload.kv.pool import KvPool
from shoal.partition.plan import Plan
from shoal.partition.spec import BlockId

from .running import Running

ROOMY = 1 << 30


def sim(
    limit_bytes: int = ROOMY, name: str = "sim:test", link_bytes_per_s: float = SIM_LINK_BYTES_PER_S
) -> tuple[SimDevice, DeviceHome]:
    """A device with kernels that are there, and its home."""
    device = SimDevice(name, limit_bytes, link_bytes_per_s)
    return device, DeviceHome(device, SimKernels(cpu()))


def with_blocks_on(plan: Plan, there: Callable[[BlockId], bool], name: str = "sim:test") -> Plan:
    """The same plan, some of its blocks on a device."""
    blocks = tuple(
        replace(item, tier="gpu", device=name) if there(item.block) else item for item in plan.blocks
    )
    return replace(plan, blocks=blocks)


def with_blocks_passing(
    plan: Plan, kept: Callable[[BlockId], bool] = lambda block: block.kind == "head", name: str = "sim:test"
) -> Plan:
    """The same plan, with all blocks but the embedding on a device: those that are kept there, others in every step."""
    blocks = tuple(
        item
        if item.block.kind == "embed"
        else replace(item, tier="gpu" if kept(item.block) else "ram", device=name)
        for item in plan.blocks
    )
    return replace(plan, blocks=blocks)


class TakingTime:
    """The CPU; a call of `experts` takes it so many seconds on a device's virtual clock."""

    def __init__(self, device: SimDevice, seconds: float) -> None:
        self._device, self._seconds = device, seconds

    def experts(self, *operands: Any) -> None:
        cpu().experts(*operands)
        self._device.now_s += self._seconds

    def __getattr__(self, name: str) -> Any:
        return getattr(cpu(), name)


class Attending:
    """The CPU; attention takes it so many seconds on a device's virtual clock."""

    def __init__(self, device: SimDevice, seconds: float) -> None:
        self._device, self._seconds = device, seconds

    def attention(self, *operands: Any) -> Any:
        self._device.now_s += self._seconds
        return cpu().attention(*operands)

    def __getattr__(self, name: str) -> Any:
        return getattr(cpu(), name)


def executor_of(
    running: Running,
    plan: Plan,
    home: ComputeHome,
    here: Any = None,
    kept_in: Callable[[ResidentStore], BlockStore] = lambda store: store,
) -> Executor:
    """The same model, read again as `plan` has it, with K and V of its own. `here`: the CPU; `kept_in`: a store around
    that in which all blocks are."""
    homes = {"cpu": here or cpu(), **{item.device: home for item in plan.blocks if item.device != "cpu"}}
    old = running.executor
    with open_checkpoint(running.path) as checkpoint:
        store = ResidentStore.load(plan, checkpoint, home_of=homes.__getitem__)
    kv = KvPool(running.spec, plan.kv, attention_homes(plan, homes.__getitem__))
    return Executor(old.model, plan, kept_in(store), kv, Alone(), homes.__getitem__)


def logits(executor: Executor, rounds: int = 3) -> Floats:
    """Logits, all that there are, of steps of three sequences: 70 tokens each, which is more than a page, then one more
    each. The second sequence wants none, and the third one."""
    table = executor.kv.table
    taken = table.take(6)
    assert taken is not None
    generator, results = np.random.default_rng(5), []
    for start, count in ((0, 70), *((70 + i, 1) for i in range(rounds - 1))):
        chunks = [
            (
                generator.integers(0, executor.model.spec.vocab, count).tolist(),
                start,
                taken[i : i + 2],
                wanted,
            )
            for i, wanted in ((0, count), (2, 0), (4, 1))
        ]
        together = executor.plan.rows_together(3 * count)
        step = Step.build(chunks, together, alike=executor.plan.passes)
        results.append(executor.head(executor.forward(step)))
    table.give_back(taken)
    return np.concatenate(results)
