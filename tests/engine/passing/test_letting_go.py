"""What passes is begun to be copied ahead of steps that never come: nothing of the host's memory is kept for that when
a model goes, whether its device is there or lost."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fakes import tiny
from fakes.on_device import executor_of, logits, sim, with_blocks_on, with_blocks_passing
from fakes.running import Running

from shoal.engine.executor import Executor
from shoal.partition.plan import Plan
from shoal.partition.spec import BlockId


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Running:
    path = tmp_path_factory.mktemp("m") / "model"
    tiny.save_hf(tiny.hf_model("llama"), path)
    return Running(path)


def memory_of(executor: Executor, block: BlockId) -> weakref.ref[Any]:
    """In which a block of the host lies, with others."""
    with executor.store.acquire(block) as weights:
        memory: Any = next(iter(weights.matrix.values())).data
    while isinstance(memory.base, np.ndarray):
        memory = memory.base
    return weakref.ref(memory)


def with_layers_coming(plan: Plan) -> Plan:
    return replace(with_blocks_on(plan, lambda block: block == BlockId("head")), staged_tokens=1)


@pytest.mark.parametrize("planned", [with_blocks_passing, with_layers_coming])
@pytest.mark.parametrize("lost", [False, True])
@pytest.mark.parametrize("ends", ["close", "let_go"])
@pytest.mark.parametrize("pinned", [False, True])
def test_memory_of_the_host_goes_with_the_model(
    running: Running, ends: str, lost: bool, pinned: bool, planned: Callable[[Plan], Plan]
) -> None:
    device, home = sim()
    if pinned:
        device.pin()
    executor = executor_of(running, planned(running.plan), home)
    memory = memory_of(executor, BlockId("ffn", 0))
    logits(executor)
    assert bool(device.locked_bytes) == pinned
    if lost:
        device.lose("the driver was restarted")
    for _ in range(2):
        getattr(executor, ends)()
    assert device.locked_bytes == 0
    del executor
    gc.collect()
    assert memory() is None
    assert device.budget.held_bytes == 0


@pytest.mark.parametrize("planned", [with_blocks_passing, with_layers_coming])
def test_what_was_let_go_holds_no_memory_though_somebody_still_knows_it(
    running: Running, planned: Callable[[Plan], Plan]
) -> None:
    """As a model does while it is loaded anew."""
    device, home = sim()
    executor = executor_of(running, planned(running.plan), home)
    memory = memory_of(executor, BlockId("ffn", 0))
    logits(executor)
    executor.let_go()
    gc.collect()
    assert memory() is None
    assert device.budget.held_bytes == 0
