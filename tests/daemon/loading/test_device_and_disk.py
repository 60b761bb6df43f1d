"""A node with a simulated device and a model that neither that nor memory has room for: the same answers, within both
budgets, whatever fails."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from fakes import tiny
from fakes.asking import CONFIG, prompt, text_of

from shoal.comm.home import Home
from shoal.comm.messages import Load, ModelStatus
from shoal.daemon.errors import DaemonError
from shoal.daemon.library.packs import Packs
from shoal.daemon.loading.outlook import Outlook, outlook
from shoal.daemon.memory import budget_of
from shoal.daemon.node import Node
from shoal.daemon.throughput.own_machine import OwnMachine
from shoal.devices import opening
from shoal.devices.sim_device import SimDevice
from shoal.kernels.arrays import Bytes
from shoal.offload.direct_io import DirectFile
from shoal.partition.placement import PINNED_BYTES
from shoal.partition.throughput.placing import device_choice

MB = 10**6
ONE = replace(CONFIG, kv_type="f32", kv_disk_bytes=0)
MANY = replace(ONE, slowdown=math.inf)
CASES = {  # model, configuration, memory, what the device has, how it is said
    "dense, beside": (
        "dense",
        ONE,
        18 * MB,
        12 * MB,
        "2 of 6 layers (the last) and the head on sim:12000000 with ",
    ),
    "dense, passing": ("dense", MANY, 18 * MB, 16 * MB, " pass through it in every step, "),
    "mixture, beside": ("mixture", ONE, 10 * MB, 8 * MB, "all 6 layers (without experts) and the head on "),
    "mixture, passing": ("mixture", MANY, 14 * MB, 14 * MB, " pass through it in every step, "),
}
case = pytest.mark.parametrize("which", CASES)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is usual beside weights is larger than these."""
    monkeypatch.setattr("shoal.partition.streamed_plan.READING_BYTES", 1 << 18)
    monkeypatch.setattr("shoal.partition.throughput.placing.passing_plans.READING_BYTES", 1 << 18)
    monkeypatch.setattr("shoal.partition.throughput.placing.passing_plans.READ_AHEAD_BYTES", 1 << 20)
    monkeypatch.setattr("shoal.partition.placement.LOADING_BYTES", 1 << 18)
    monkeypatch.setattr(device_choice, "mixed_rate", lambda model, plan, *_: 1.0 + plan.passes)
    yield
    opening._opened.clear()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("m")
    dense = tiny.hf_model("qwen2", num_hidden_layers=6, hidden_size=256, intermediate_size=1024)
    mixture = tiny.hf_model(
        "qwen3_moe", num_hidden_layers=6, hidden_size=256, moe_intermediate_size=192, num_experts=8
    )
    return {
        "dense": tiny.save_gguf(dense, directory / "dense.gguf"),
        "mixture": tiny.save_gguf(mixture, directory / "mixture.gguf"),
    }


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> Packs:
    return Packs(Home(tmp_path_factory.mktemp("home")))


@pytest.fixture
def loaded(models: dict[str, Path], packs: Packs) -> Iterator[Callable[..., Node]]:
    nodes: list[Node] = []

    def load(which: str, **more: Any) -> Node:
        model, config, memory, there, _ = CASES[which]
        node = Node(replace(config, **{"device": f"sim:{there}"} | more), packs=packs)
        nodes.append(node)
        if node.config.device != "cpu":
            node.budget.limit_bytes = node.budget.held_bytes + memory + PINNED_BYTES
        node.load(Load(model=str(models[model])))
        return node

    yield load
    for node in nodes:
        node.close()


def status(node: Node) -> ModelStatus:
    (found,) = node.status().models
    return found


def sim(which: str) -> SimDevice:
    device = opening.device_home(f"sim:{CASES[which][3]}").device
    assert isinstance(device, SimDevice)
    return device


def answers(node: Node) -> list[Any]:
    return [text_of(node, prompt(i, tokens=40, new=8))[:2] for i in range(3)]


@case
def test_answers_are_those_of_the_cpu(which: str, loaded: Callable[..., Node]) -> None:
    node = loaded(which, device="cpu")
    expected = answers(node)
    node.close()
    there = loaded(which)
    found = status(there)
    assert CASES[which][4] in found.plan
    assert found.streamed_bytes > 0
    assert answers(there) == expected
    assert there.budget.held_bytes <= there.budget.limit_bytes
    device, ledger = sim(which), there.budget.on(sim(which).name)
    assert device.budget.peak_bytes <= found.device_bytes == ledger.held_bytes <= ledger.limit_bytes


@pytest.mark.parametrize("what", ["lost", "disk"])
@case
def test_what_fails_in_the_middle(
    which: str, what: str, loaded: Callable[..., Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the device the model goes on from disk alone, as far as memory has room for that; a disk that fails ends
    what is asked for with one line, and the next request is answered."""
    node = loaded(which, device="cpu")
    expected = answers(node)
    node.close()
    there = loaded(which)
    if what == "lost":
        there.budget.limit_bytes += 20 * MB  # or the processor would have to do with less than it can
        device, compute, calls = sim(which), sim(which).compute, count()

        def computing(*args: Any) -> Any:
            if next(calls) == 300:
                device.lose("the driver was restarted")
            return compute(*args)

        monkeypatch.setattr(device, "compute", computing)
        assert answers(there) == expected
        found = status(there)
        assert (found.device, found.device_bytes) == ("", 0)
        assert any("is lost (the driver was restarted), so the cpu computes" in it for it in found.warnings)
        return
    read, failing = DirectFile.read, True

    def faulty(file: DirectFile, offset: int, into: Bytes) -> None:
        if failing:
            raise OSError(5, "Input/output error")
        read(file, offset, into)

    monkeypatch.setattr(DirectFile, "read", faulty)
    for _ in range(8):  # what has been read already is there
        with suppress(DaemonError):
            answers(there)
    with pytest.raises(DaemonError, match=r"cannot be read: Input/output error$") as caught:
        answers(there)
    assert "\n" not in str(caught.value)
    failing = False
    assert answers(there) == expected
    assert status(there).device == sim(which).name


@case
def test_what_is_shown_before_it_is_loaded(which: str, models: dict[str, Path], packs: Packs) -> None:
    model, config, memory, there, said = CASES[which]
    process = budget_of(3 << 30).held_bytes
    config = replace(config, device=f"sim:{there}", memory_bytes=process + memory + PINNED_BYTES + MB)
    found = outlook(models[model], config, packs, OwnMachine(1))
    assert isinstance(found, Outlook), found
    assert said in found.plan
    assert found.device == f"sim:{there}"
    assert 0 < found.device_bytes <= there
