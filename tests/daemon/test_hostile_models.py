"""Models whose files and prompts are made to stop a node: others are served meanwhile, and the node ends at once."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
from fakes import tiny
from fakes.asking import CONFIG, GREEDY

from shoal.comm.messages import Chat, Done, Generate, Load, Tokenize
from shoal.daemon.errors import DaemonError
from shoal.daemon.node import Node
from shoal.models.chat.renderer import Renderer

SLOW = (
    "{% set ns = namespace(a=[1], b=[1]) %}"
    "{% for i in range(50) %}{% set ns.a = [ns.a, ns.a] %}{% set ns.b = [ns.b, ns.b] %}{% endfor %}"
    "{{ ns.a == ns.b }}"
)
DOUBLING = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tiny.save_hf(tiny.hf_model("qwen2"), tmp_path_factory.mktemp("hostile") / "slow")
    (directory / "chat_template.jinja").write_text(SLOW)
    file: dict[str, Any] = json.loads((directory / "tokenizer.json").read_text())
    file["normalizer"] = {"type": "Sequence", "normalizers": [DOUBLING] * 40}
    (directory / "tokenizer.json").write_text(json.dumps(file))
    return directory


def chat(model: Path) -> Chat:
    return Chat(messages=[{"role": "user", "content": "hi"}], model=str(model), sampling=GREEDY, max_tokens=2)


def test_others_are_served_while_a_template_runs_and_the_node_ends(
    path: Path, slow: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures: list[str] = []
    render = Renderer.render

    def at_length(self: Renderer, variables: Mapping[str, Any]) -> str:
        self._seconds = 60.0
        return render(self, variables)

    monkeypatch.setattr(Renderer, "render", at_length)
    with Node(CONFIG) as node:
        for model in (path, slow):
            node.load(Load(model=str(model)))

        def attack() -> None:
            try:
                list(node.stream(chat(slow)))
            except DaemonError as error:
                failures.append(error.code)

        threads = [threading.Thread(target=attack) for _ in range(6)]
        for thread in threads:
            thread.start()
        time.sleep(0.5)
        started = time.monotonic()
        assert isinstance([*node.stream(chat(path))][-1], Done)
        assert time.monotonic() - started < 30
        started = time.monotonic()
    for thread in threads:
        thread.join()
    assert time.monotonic() - started < 30
    assert len(failures) == 6


def test_a_slow_template_is_the_model_s_fault_after_one_deadline(
    slow: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[Renderer] = []
    render = Renderer.render

    def short(self: Renderer, variables: Mapping[str, Any]) -> str:
        tries.append(self)
        self._seconds = 0.5
        return render(self, variables)

    monkeypatch.setattr(Renderer, "render", short)
    with Node(CONFIG) as node, pytest.raises(DaemonError, match="did not end in time") as caught:
        list(node.stream(chat(slow)))
    assert caught.value.code == "corrupt"
    assert len(tries) == 1


def test_what_a_tokenizer_explodes_is_the_model_s_fault(slow: Path) -> None:
    with Node(CONFIG) as node, pytest.raises(DaemonError, match="memory") as caught:
        list(node.stream(Generate(prompt="a", model=str(slow), max_tokens=2)))
    assert caught.value.code == "corrupt"


@pytest.mark.parametrize("text", ["word " * 3_000_000, "a" * 15_000_000, "\n" * 15_000_000])
def test_a_prompt_that_cannot_fit_takes_neither_time_nor_memory(node: Node, text: str) -> None:
    before, started = psutil.Process().memory_info().rss, time.process_time()
    for request in (
        Generate(prompt=text, max_tokens=2),
        Chat(messages=[{"role": "user", "content": text}], max_tokens=2),
    ):
        with pytest.raises(DaemonError, match=r"at least \d+ tokens, the context holds 96") as caught:
            list(node.stream(request))
        assert caught.value.code == "context_overflow"
    assert time.process_time() - started < 8
    assert psutil.Process().memory_info().rss - before < 400 << 20


def test_what_the_ledger_has_no_room_for_is_refused(node: Node) -> None:
    node.budget.hold("others", node.budget.free_bytes - (10 << 20))
    with pytest.raises(DaemonError, match="tokenising text of 10000000 characters needs") as caught:
        node.tokenize(Tokenize(text="word " * 2_000_000))
    assert caught.value.code == "resources"
    assert len(node.tokenize(Tokenize(text="word " * 100)).ids) > 100
    node.budget.release("others")


def test_ids_that_make_too_long_a_text_are_refused(node: Node) -> None:
    longest = max(range(len(tiny.TOKENS)), key=lambda token: len(tiny.TOKENS[token]))
    with pytest.raises(DaemonError, match="must be at most") as caught:
        node.tokenize(Tokenize(tokens=[longest] * 4_000_000))
    assert caught.value.code == "bad_request"
