"""A node whose model passes through a simulated device in every step, because nobody waits for a single answer: answers
are the same, within both budgets, also if the device is lost in the middle."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from fakes import tiny
from fakes.asking import CONFIG, prompt, text_of
from fakes.throughput.throughput_cases import SLOW

from shoal.comm.home import Home
from shoal.comm.messages import Load, ModelStatus
from shoal.daemon.library.packs import Packs
from shoal.daemon.loading.outlook import Outlook, outlook
from shoal.daemon.node import Node
from shoal.daemon.throughput.own_machine import OwnMachine
from shoal.devices import opening, sim_device
from shoal.devices.sim_device import SimDevice
from shoal.partition.throughput.placing import device_choice, staging_worth

MANY = replace(CONFIG, slowdown=math.inf, chunk_tokens=256, max_sequences=16, kv_tokens=4096)
NAME = "sim:10MB"


@pytest.fixture(autouse=True)
def _a_device_that_is_worth_it(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sim_device, "LAUNCH_S", 1e-9)  # or such small ones would be quicker where they are
    monkeypatch.setattr(staging_worth, "FAST", SLOW)
    yield
    opening._opened.clear()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_gguf(
        tiny.hf_model("qwen3_moe"), tmp_path_factory.mktemp("m") / "small.gguf", type="Q8_0"
    )


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny.hf_model("qwen3_moe", moe_intermediate_size=512, num_experts=16, num_hidden_layers=8)
    return tiny.save_gguf(model, tmp_path_factory.mktemp("m") / "mixture.gguf", type="Q8_0")


def loaded(path: Path | str, packs: Packs | None = None, **more: Any) -> Node:
    # Of a cluster: alone the CPU would round inputs to 8 bits, and its texts would not be a device's.
    node = Node(replace(MANY, **more), packs=packs, machine=OwnMachine(1, alone=lambda: False))
    node.load(Load(model=str(path)))
    return node


def status(node: Node) -> ModelStatus:
    (found,) = node.status().models
    return found


def sim() -> SimDevice:
    device = opening.device_home(NAME).device
    assert isinstance(device, SimDevice)
    return device


@pytest.mark.parametrize(("quant", "lost"), [("", False), ("", True), (":q4", False)])
def test_answers_are_those_of_the_cpu(
    small: Path, tmp_path: Path, quant: str, lost: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_choice, "mixed_rate", lambda model, plan, *_: 1.0 + plan.passes)
    packs = Packs(Home(tmp_path / "home"))
    with loaded(f"{small}{quant}", packs) as node:
        expected = [text_of(node, prompt(i, tokens=40, new=8))[:2] for i in range(2)]
    with loaded(f"{small}{quant}", packs, device=NAME) as there:
        assert "pass through it in every step while the cpu attends" in status(there).plan
        device, stage_in, copies = sim(), sim().stage_in, count()

        def coming(*args: Any) -> Any:
            if lost and next(copies) == 40:
                device.lose("the driver was restarted")
            return stage_in(*args)

        monkeypatch.setattr(device, "stage_in", coming)
        assert [text_of(there, prompt(i, tokens=40, new=8))[:2] for i in range(2)] == expected
        found = status(there)
        assert found.device == ("" if lost else NAME)
        assert there.budget.on(NAME).held_bytes == found.device_bytes
        if not lost:
            assert device.budget.peak_bytes <= found.device_bytes <= device.budget.limit_bytes


def test_who_waits_for_one_answer_has_blocks_where_they_are(mixture: Path, tmp_path: Path) -> None:
    with loaded(mixture, device=NAME, slowdown=2.5) as there:
        assert "pass through" not in status(there).plan
    packs, machine = Packs(Home(tmp_path / "home")), OwnMachine(1)
    found = outlook(mixture, replace(MANY, device=NAME), packs, machine)
    assert isinstance(found, Outlook)
    assert "pass through it" in found.plan
    assert found.batch_tokens_per_s > 0
