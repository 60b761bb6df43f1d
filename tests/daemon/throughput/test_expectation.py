"""A loaded model: what is predicted of it, what was measured, and what the machine's figures learn from that."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from fakes import tiny
from fakes.group.clusters import wait_for

from shoal.comm.messages import Done, Generate, Load, Sampling, Token
from shoal.daemon.config import NodeConfig
from shoal.daemon.loading import assembly, planning
from shoal.daemon.node import Node
from shoal.engine.learn.rival import Rival

CONFIG = NodeConfig(context_tokens=96, kv_tokens=768, max_sequences=4, chunk_tokens=64, threads=1)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_gguf(tiny.hf_model("qwen2"), tmp_path_factory.mktemp("models") / "tiny.gguf")


@pytest.fixture
def node(path: Path) -> Iterator[Node]:
    with Node(CONFIG) as made:
        made.load(Load(model=str(path)))
        yield made


def answer(node: Node, prompt: int, new: int) -> None:
    sampling = Sampling(temperature=0.0)
    tokens = [3 * i % 90 + 5 for i in range(prompt)]
    request = Generate(prompt_tokens=tokens, max_tokens=new, ignore_eos=True, sampling=sampling)
    assert isinstance(list(node.stream(request))[-1], Done)


def look(node: Node) -> None:
    """As is done each half second."""
    for one in node._looks():
        one()


def test_requests_and_loads_are_logged_beside_what_was_predicted(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with Node(CONFIG) as node:
        status = node.load(Load(model=str(path))).model
        assert status.predicted_tokens_per_s > 0
        assert status.predicted_band[0] < status.predicted_tokens_per_s < status.predicted_band[1]
        assert status.measured_tokens_per_s == 0
        assert re.search(r"loaded tiny\.gguf in .* predicted .* tokens/s", caplog.text)
        answer(node, 40, 24)
        look(node)
        said = (
            r"tiny\.gguf: 40 tokens read in .* \(predicted .*\), 24 tokens written at .*/s \(predicted .*/s\)"
        )
        assert re.search(said, caplog.text)
        assert node.status().models[0].measured_tokens_per_s > 0


def test_the_machine_learns_from_who_ran_alone(node: Node) -> None:
    before = node._machine.device.corrections
    for _ in range(3):
        answer(node, 40, 24)
        look(node)
    after = node._machine.device.corrections
    assert after != before
    assert all(0.5 <= value <= 2 for value in vars(after).values())
    said = node.status().corrections
    assert said == {part: times for part, times in vars(after).items() if times != 1}
    assert "network" not in said


def test_the_runner_up_is_tried_and_says_what_came_of_it(
    path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    usual = replace(CONFIG, threads=None, max_guesses=0)
    request = Generate(
        prompt_tokens=[5] * 8, max_tokens=80, ignore_eos=True, sampling=Sampling(temperature=0.0)
    )

    def tokens(tried: bool) -> list[list[int]]:
        monkeypatch.setattr(planning, "rival_threads", lambda model, plan, device: 1 if tried else 0)
        with Node(usual) as node:
            node.load(Load(model=str(path)))
            found = [event for event in node.stream(request) if isinstance(event, Token)]
            look(node)
            said = node.status().models[0].tried
            verdict = r"1 thread took .* for a token of one stream, \d+ took .*: \d+ compute it"
            assert bool(re.search(verdict, said)) == tried
            assert f"tiny.gguf: {said}" in caplog.text
        return [it.ids for it in found]

    assert tokens(True) == tokens(False)


def test_who_computes_next_has_all_threads(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For example a shard of another machine's model."""
    used: list[int] = []
    monkeypatch.setattr(assembly, "set_threads", used.append)
    monkeypatch.setattr(planning, "rival_threads", lambda model, plan, device: 1)
    monkeypatch.setattr(Rival, "threads", lambda self, rows, **how: 1)
    with Node(replace(CONFIG, threads=None)) as node:
        node.load(Load(model=str(path)))
        answer(node, 8, 8)
        wait_for(lambda: used[-1] == NodeConfig().thread_count)
        assert 1 in used


def test_what_ended_before_it_began_is_passed_over(node: Node) -> None:
    (model,) = node._models
    underway = node.submit(Generate(prompt_tokens=[5] * 40, max_tokens=20), lambda event: None)
    underway.cancel()
    look(node)
    assert not model.begun
