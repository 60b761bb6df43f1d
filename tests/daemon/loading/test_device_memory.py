"""Budgets hold on both sides whatever comes first: libraries of a device are in this machine's ledger, a device that
turned out to be full gets no more than it has room for, and what is page-locked is given back."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import tiny
from fakes.asking import CONFIG, prompt, text_of
from fakes.throughput.throughput_cases import QUICK, SLOW

from shoal.comm.messages import Load, ModelStatus, Unload
from shoal.daemon import memory
from shoal.daemon.errors import DaemonError
from shoal.daemon.loading import device_rooms
from shoal.daemon.loading.loaded_model import LoadedModel
from shoal.daemon.node import Node
from shoal.daemon.throughput import fixed_costs
from shoal.daemon.throughput.own_machine import OwnMachine
from shoal.devices import device as device_module
from shoal.devices import opening, page_locked, sim_device
from shoal.devices.errors import NoSuchDevice
from shoal.devices.page_locked import SYSTEM_PAGE_BYTES
from shoal.devices.sim_device import SimDevice
from shoal.kernels import routing
from shoal.kernels.homes import cpu
from shoal.partition.placement import PINNED_BYTES
from shoal.partition.throughput.placing import device_choice, device_ways, staging_worth

CARD = "sim:64MB"
BALLAST = 48 << 20
NOISE = 12 << 20  # what a process takes and gives back meanwhile
MANY = {"slowdown": math.inf, "chunk_tokens": 256, "max_sequences": 16, "kv_tokens": 4096}


@pytest.fixture(autouse=True)
def _devices_of_its_own(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """There is one card, which is quicker than the processor."""
    monkeypatch.setattr(device_rooms, "present", lambda: [CARD])
    monkeypatch.setattr(memory, "_runtimes", {})
    monkeypatch.setattr(sim_device, "LAUNCH_S", 1e-9)
    monkeypatch.setattr(fixed_costs, "MANY", 4)
    monkeypatch.setattr(fixed_costs, "DEVICE_TOKENS", 4)
    monkeypatch.setattr(staging_worth, "FAST", SLOW)
    yield
    opening._opened.clear()


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What opening a device leaves in this process."""
    kept: list[Any] = []
    begin = SimDevice.__init__

    def heavy(self: SimDevice, *operands: Any) -> None:
        kept.append(np.ones(BALLAST, np.uint8))
        begin(self, *operands)

    monkeypatch.setattr(SimDevice, "__init__", heavy)
    gc.collect()
    memory.return_freed()  # what earlier tests had
    return kept


def loaded(path: Path, **more: Any) -> Node:
    # Of a cluster: alone the CPU would round inputs to 8 bits, and its texts would not be a device's.
    node = Node(replace(CONFIG, **more), machine=OwnMachine(1, alone=lambda: False))
    try:
        node.load(Load(model=str(path)))
    except BaseException:
        node.close()
        raise
    return node


def model_of(node: Node) -> LoadedModel:
    (found,) = node._models
    return found


def status(node: Node) -> ModelStatus:
    return model_of(node).status()


def sim(name: str = CARD) -> SimDevice:
    device = opening.device_home(name).device
    assert isinstance(device, SimDevice)
    return device


def own_bytes(node: Node) -> int:
    return node.budget.held_by(memory.PROCESS) + node.budget.held_by(memory.RUNTIMES)


def later_bytes() -> int:
    return memory.CODE_BYTES + memory.GROWTH_BYTES + memory.CHILD_BYTES


# --- libraries ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["auto", CARD])
def test_libraries_of_a_device_are_in_the_ledger_whenever_it_was_opened(
    path: Path, device: str, libraries: list[Any]
) -> None:
    with loaded(path, device=device) as first:
        assert libraries
        assert abs(first.budget.held_by(memory.RUNTIMES) - BALLAST) < NOISE
        before = first.budget.held_bytes
        first.unload(Unload(model=status(first).name))
        first.load(Load(model=str(path)))
        assert first.budget.held_bytes == before  # once
        with loaded(path, device=device) as second:  # which is made when the device is open
            assert len(libraries) == 1
            assert second.budget.held_by(memory.RUNTIMES) == first.budget.held_by(memory.RUNTIMES)
            assert abs(own_bytes(second) - own_bytes(first)) < NOISE
            assert abs(own_bytes(second) - later_bytes() - memory.private_bytes()) < 2 * NOISE


def test_those_of_one_that_cannot_be_used_stay_too(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []

    def broken(name: str) -> Any:
        kept.append(np.ones(BALLAST, np.uint8) if not kept else None)
        raise NoSuchDevice(f"device {name} cannot be used: the driver is too old")

    monkeypatch.setattr(device_rooms, "device_home", broken)
    with loaded(path) as node:
        assert abs(node.budget.held_by(memory.RUNTIMES) - BALLAST) < NOISE
        held = node.budget.held_by(memory.RUNTIMES)
        node.unload(Unload(model=status(node).name))
        node.load(Load(model=str(path)))
        assert len(kept) == 2
        assert node.budget.held_by(memory.RUNTIMES) == held


def test_a_model_has_what_they_leave(path: Path, libraries: list[Any]) -> None:
    with loaded(path, device="cpu") as node:
        needs = node.budget.held_bytes - own_bytes(node) + later_bytes()
    budget = memory.private_bytes() + needs + NOISE
    loaded(path, device="cpu", memory_bytes=budget).close()
    with pytest.raises(DaemonError, match="needs at least") as refused:
        loaded(path, device=CARD, memory_bytes=budget)
    assert libraries
    assert refused.value.code == "resources"


def test_a_card_that_nobody_named_is_not_opened_where_its_libraries_have_no_room(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_rooms, "present", lambda: ["cuda:0"])
    monkeypatch.setattr(device_rooms, "device_home", None)
    with loaded(path, memory_bytes=memory.private_bytes() + (400 << 20)) as node:
        (said,) = status(node).warnings
        assert said.startswith(
            "cuda:0 is left alone: its libraries take about 537 MB of this machine's memory, "
        )
        assert len(text_of(node, prompt(0))[1]) == 24


# --- full --------------------------------------------------------------------------------------------------


def in_step(device: SimDevice, number: int, act: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Have this happen before a computation in the middle of an answer."""
    steps, compute = count(), device.compute

    def going(*operands: Any) -> Any:
        if next(steps) == number:
            act()
        return compute(*operands)

    monkeypatch.setattr(device, "compute", going)


def raising(error: Callable[[], Exception]) -> None:
    raise error()


@pytest.mark.parametrize("device", ["auto", CARD])
@pytest.mark.parametrize("cause", ["others took the rest", "nothing says how much"])
def test_a_device_that_is_full_in_mid_answer_is_planned_anew_with_what_it_has(
    path: Path,
    device: str,
    cause: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with loaded(path, device="cpu") as alone:
        expected = [text_of(alone, prompt(i))[:2] for i in range(2)]
    with loaded(path, device=device, kv_tokens=16384) as there:  # of which most of its memory is
        here, whole = sim(), status(there).device_bytes
        assert whole

        def others() -> None:
            if cause == "nothing says how much":
                raise here.budget.full()
            here.budget.limit_bytes = here.budget.held_bytes

        in_step(here, 150, others, monkeypatch)
        assert text_of(there, prompt(0))[:2] == expected[0]
        found = status(there)
        assert 0 < found.device_bytes < whole
        assert found.device_bytes <= here.budget.room_bytes
        assert here.budget.held_bytes <= found.device_bytes
        assert there.budget.on(CARD).held_bytes == found.device_bytes
        (said,) = (it for it in found.warnings if "was full lately" in it)
        lines = [it.getMessage() for it in caplog.records if it.levelname in ("WARNING", "ERROR")]
        assert sum("is full" in it for it in lines) == 1
        assert text_of(there, prompt(1))[:2] == expected[1]
        assert status(there).device_bytes == found.device_bytes
        # It is remembered by who loads next, and for so long only.
        for seconds, most in ((0.0, here.budget.room_bytes), (device_module.FULL_S + 1, whole)):
            here.budget._until_s -= seconds
            here.budget.limit_bytes = 64_000_000
            there.unload(Unload(model=status(there).name))
            there.load(Load(model=str(path)))
            assert status(there).device_bytes <= most
        assert status(there).device_bytes == whole
        assert not status(there).warnings
        assert said.endswith("may have all of it")


def test_one_that_has_no_room_for_a_layer_any_more_is_done_without(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where it was named; a model that is loaded then is refused."""
    with loaded(path, device="cpu") as alone:
        expected = text_of(alone, prompt(0))[:2]
    with loaded(path, device=CARD) as there:
        here = sim()

        def full() -> None:
            for _ in range(12):  # each time there is less
                error = here.budget.full()
            raise error

        in_step(here, 150, full, monkeypatch)
        assert text_of(there, prompt(0))[:2] == expected
        assert (status(there).device, status(there).device_bytes) == ("", 0)
        assert status(there).warnings[0].endswith("; it is loaded without")
        assert (sim().pinned_bytes, there.budget.held_by(memory.pinned_for(CARD))) == (0, 0)
        assert sim().budget.held_bytes == there.budget.on(CARD).held_bytes == 0
        assert [it.getMessage() for it in caplog.records if "it is loaded without" in it.getMessage()]
        there.unload(Unload(model=status(there).name))
        with pytest.raises(DaemonError, match="one layer with its KV and scratch takes"):
            there.load(Load(model=str(path)))


@pytest.mark.parametrize("way", ["staying", "coming", "passing"])
def test_budgets_hold_where_one_expert_gets_everything(
    mixture: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def skewed(scores: Any, count: int, normalize: bool) -> routing.Routing:
        rows = len(scores), count
        chosen = np.arange(count)[None] + np.zeros(rows, np.int64)
        return routing.Routing.of(chosen, np.full(rows, 1 / count, np.float32))

    monkeypatch.setattr(routing, "route", skewed)
    monkeypatch.setattr(type(cpu()), "route", lambda _, *operands: skewed(*operands))
    more = MANY if way == "passing" else {"chunk_tokens": 256, "kv_tokens": 4096}
    asked = [prompt(i, tokens=60, new=4) for i in range(3)]
    with loaded(mixture, device="cpu", **more) as node:
        expected = [text_of(node, it)[:2] for it in asked]
    if way == "passing":
        monkeypatch.setattr(device_choice, "mixed_rate", lambda model, plan, *_: 1.0 + plan.passes)
    with loaded(mixture, device=CARD, **more) as there:
        whole = status(there).device_bytes
    name = CARD if way == "passing" else f"sim:{whole - (1 if way == 'coming' else 0)}"
    with loaded(mixture, device=name, **more) as there:
        plan = model_of(there).plan
        assert (plan.passes, bool(plan.staged_experts)) == (way == "passing", way == "coming")
        assert [text_of(there, it)[:2] for it in asked] == expected
        assert sim(name).budget.peak_bytes <= status(there).device_bytes
        assert there.budget.on(name).held_bytes == status(there).device_bytes


def test_budgets_hold_where_dense_layers_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_ways, "staged_from", lambda *_: 32)
    deep = tiny.save_gguf(tiny.hf_model("llama", num_hidden_layers=8), tmp_path / "deep.gguf", type="Q8_0")
    more = {"chunk_tokens": 64, "kv_tokens": 1024}
    asked = [prompt(i, tokens=tokens, new=4) for i, tokens in enumerate((80, 60, 8))]
    with loaded(deep, device="cpu", **more) as node:
        expected = [text_of(node, it)[:2] for it in asked]
    with loaded(deep, device=CARD, **more) as there:
        whole = status(there).device_bytes
    name = f"sim:{3 * whole // 4}"
    with loaded(deep, device=name, **more) as there:
        plan = model_of(there).plan
        assert (plan.staged_tokens, plan.staged_experts) == (32, 0)
        assert "(others come for steps of 32 tokens or more)" in status(there).plan
        assert [text_of(there, it)[:2] for it in asked] == expected
        assert sim(name).budget.peak_bytes <= status(there).device_bytes
        assert there.budget.on(name).held_bytes == status(there).device_bytes
        there.unload(Unload(model=status(there).name))
        assert sim(name).budget.held_bytes == there.budget.on(name).held_bytes == 0


# --- page-locked memory ------------------------------------------------------------------------------------


def test_a_card_that_is_turned_down_keeps_nothing_locked(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging_worth, "FAST", QUICK)
    with loaded(path) as node:
        assert (status(node).device, sim().pinned_bytes) == ("", 0)
        assert not node.budget.held_by(memory.pinned_for(CARD))


def test_one_that_computes_another_model_does(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = path.with_name("other.gguf")
    other.write_bytes(path.read_bytes())
    with loaded(path) as node:
        assert sim().pinned_bytes == PINNED_BYTES == node.budget.held_by(memory.pinned_for(CARD))
        monkeypatch.setattr(staging_worth, "FAST", QUICK)
        node.load(Load(model=str(other)))
        assert [it.device for it in node.status().models] == [CARD, ""]
        assert sim().pinned_bytes == PINNED_BYTES == node.budget.held_by(memory.pinned_for(CARD))
        node.unload(Unload(model=node.status().models[0].name))
        node.load(Load(model=str(path)))
        assert (sim().pinned_bytes, node.budget.held_by(memory.pinned_for(CARD))) == (0, 0)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_gguf(
        tiny.hf_model("qwen3_moe"), tmp_path_factory.mktemp("m") / "mixture.gguf", type="Q8_0"
    )


@pytest.mark.parametrize("ends", ["unloaded", "lost", "full"])
@pytest.mark.parametrize("pages", [None, 8])
def test_weights_that_pass_are_locked_where_they_lie(
    mixture: Path, ends: str, pages: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as the system lets, which a line says; with no more memory, and as long as they pass."""
    monkeypatch.setattr(device_choice, "mixed_rate", lambda model, plan, *_: 1.0 + plan.passes)
    monkeypatch.setattr(page_locked, "LOCKED_AT_ONCE_BYTES", 4 * SYSTEM_PAGE_BYTES)
    asked = [prompt(i, tokens=40, new=8) for i in range(2)]
    with loaded(mixture, device="cpu", **MANY) as node:
        expected = [text_of(node, it)[:2] for it in asked]
    name = "sim:10MB,16GB/s,4GB/s"
    if pages is not None:
        name = f"{name},{PINNED_BYTES + pages * SYSTEM_PAGE_BYTES}"
    with loaded(mixture, device=name, **MANY) as there:
        plan, here = model_of(there).plan, sim(name)
        passing = sum(it.nbytes for it in plan.blocks if it.passes)
        assert passing > 100_000
        if pages is None:
            assert here.locked_bytes > 0.9 * passing
            assert not status(there).warnings
        else:
            assert here.locked_bytes == pages * SYSTEM_PAGE_BYTES
            (said,) = status(there).warnings
            assert said.startswith("32.8 kB of ")
            assert "may be page-locked" in said
        assert there.budget.held_by(f"model {status(there).name}") == model_of(there).peak_bytes
        if ends == "lost":
            in_step(here, 150, lambda: here.lose("the driver was restarted"), monkeypatch)
        elif ends == "full":
            in_step(here, 150, lambda: raising(here.budget.full), monkeypatch)
        assert [text_of(there, it)[:2] for it in asked] == expected
        if ends == "lost":
            assert (status(there).device, here.locked_bytes) == ("", 0)
        there.unload(Unload(model=status(there).name))
        assert here.locked_bytes == 0
