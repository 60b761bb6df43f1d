"""What is predicted of a model with a device, beside what was measured: where the device was tried, and only there."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from fakes import tiny
from fakes.asking import CONFIG, prompt, text_of

from shoal.comm.home import Home
from shoal.comm.messages import Load, ModelStatus
from shoal.daemon.loading import device_rooms
from shoal.daemon.node import Node
from shoal.daemon.throughput import expectation, fixed_costs
from shoal.daemon.throughput.own_machine import OwnMachine, profile_file
from shoal.devices import opening, sim_device
from shoal.partition.throughput.cost import Took
from shoal.partition.throughput.placing import staging_worth
from shoal.partition.throughput.profile import Corrections, unmeasured

CARD = "sim:64MB"
READ = r"tokens? read in .* \(predicted .*\)"
WRITTEN = r"24 tokens written at .*/s \(predicted .*/s\)"


@pytest.fixture(autouse=True)
def _devices_of_its_own(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """There is one card; the processor is slow, and calls of the device cost next to nothing."""
    monkeypatch.setattr(device_rooms, "present", lambda: [CARD])
    monkeypatch.setattr(sim_device, "LAUNCH_S", 1e-9)
    monkeypatch.setattr(fixed_costs, "MANY", 4)
    monkeypatch.setattr(fixed_costs, "DEVICE_TOKENS", 4)
    monkeypatch.setattr(staging_worth, "FAST", unmeasured(2))
    yield
    opening._opened.clear()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_gguf(tiny.hf_model("llama"), tmp_path_factory.mktemp("model") / "tiny.gguf")


def answered(node: Node, path: Path) -> ModelStatus:
    """Of a model that has answered once, and was looked back at."""
    node.load(Load(model=str(path)))
    assert len(text_of(node, prompt(0))[1]) == 24
    for look in node._looks():
        look()
    (found,) = node.status().models
    assert found.device == CARD
    return found


def machine(home: Path) -> OwnMachine:
    return OwnMachine(1, profile_file(Home(home), 1), alone=lambda: False)


def test_a_device_that_was_tried_is_predicted(
    path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Also one that is named later, with which nothing is tried."""
    caplog.set_level(logging.INFO)
    for device in ("auto", CARD):
        caplog.clear()
        with Node(replace(CONFIG, device=device), machine=machine(tmp_path)) as node:
            found = answered(node, path)
        assert found.predicted_band[0] < found.predicted_tokens_per_s < found.predicted_band[1]
        assert found.measured_tokens_per_s > 0
        assert re.search(r"loaded tiny\.gguf in .* predicted .* tokens/s", caplog.text)
        assert re.search(rf"tiny\.gguf: .*{READ}, {WRITTEN}", caplog.text)


def test_a_device_that_nobody_tried_is_not(
    path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with Node(replace(CONFIG, device=CARD), machine=machine(tmp_path)) as node:
        found = answered(node, path)
        assert (found.predicted_tokens_per_s, found.predicted_band) == (0.0, [])
        assert node._machine.device.corrections == Corrections()
    assert "predicted" not in caplog.text


def test_first_steps_are_thought_to_take_what_the_device_does(path: Path, tmp_path: Path) -> None:
    """And not what the processor would."""
    with Node(replace(CONFIG, device="auto"), machine=machine(tmp_path)) as node:
        node.load(Load(model=str(path)))
        (model,) = node._models
        took = model.main.expectation._step(64, model.plan.context_tokens // 2)
        assert sum(took.away.values()) > 0
        assert took.parts["link"] > 0
        assert model.engine.scheduler.speeds.cost.seconds(64) == pytest.approx(took.seconds)


def test_only_what_the_machine_itself_takes_is_learnt(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taught: list[tuple[dict[str, float], float, float]] = []
    monkeypatch.setattr(
        OwnMachine, "correct", lambda self, parts, times, others_s: taught.append((parts, times, others_s))
    )
    monkeypatch.setattr(expectation, "TELLING_STEPS", 1)
    with Node(replace(CONFIG, device="auto"), machine=machine(tmp_path)) as node:
        answered(node, path)
        (model,) = node._models
    parts, _, others_s = taught[-1]
    assert "link" in parts
    assert parts["link"] > 0
    assert others_s > 0
    taught.clear()
    took = Took(1.0, {"compute": 0.9, "link": 0.1}, {"compute": 0.9})
    for measured_s in (0.95, 1.0, 1.05, 2.0):
        model.main.expectation._correct(took, measured_s)
    assert [it[0] for it in taught] == [{"compute": 0.0, "link": pytest.approx(0.1)}] * 4
    times = [it[1] for it in taught]
    assert times[:3] == [1.0, 1.0, 1.0], "its laws may be off by so much"
    assert 1.5 < times[3] < 2
