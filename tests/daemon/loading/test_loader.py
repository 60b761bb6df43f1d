"""Models of a node: loaded on demand, loaded again, dropped, and refused where there is no room."""

from __future__ import annotations

import gc
import re
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fakes import tiny
from fakes.asking import CONFIG, prompt, text_of

from shoal.comm.messages import Accepted, Done, Generate, Load, Sampling, Tokenize, Unload
from shoal.daemon.config import NodeConfig
from shoal.daemon.errors import DaemonError
from shoal.daemon.library import registry
from shoal.daemon.loading.advice import advice_of
from shoal.daemon.loading.assembly import Assembly
from shoal.daemon.loading.grouping import Judgement, Unseated
from shoal.daemon.loading.planning import make_plan
from shoal.daemon.memory import PROCESS, RUNTIMES
from shoal.daemon.node import Node
from shoal.daemon.request import DEFAULT_SAMPLING, sampling_of
from shoal.daemon.sizes import parse_bytes
from shoal.daemon.throughput.model_sizes import weighed
from shoal.models.checkpoint.checkpoint import open_checkpoint
from shoal.partition.plan import Misfit, Plan


def test_models_are_loaded_on_demand_and_dropped(node: Node, path: Path) -> None:
    node.unload(Unload())
    assert node.status().models == []
    with pytest.raises(DaemonError, match="no model is loaded"):
        list(node.stream(prompt(0)))
    assert text_of(node, prompt(0, new=3, model=str(path)))[2].finish_reason == "length"
    with pytest.raises(DaemonError, match="nope") as caught:
        node.unload(Unload(model="nope"))
    assert caught.value.code == "not_found"
    assert node.load(Load(model=str(path), context=48)).model.context_tokens == 48


def test_files_of_one_name_are_two_models(path: Path, tmp_path: Path) -> None:
    other = tiny.save_gguf(tiny.hf_model("qwen2", seed=2), tmp_path / path.name)
    with Node(CONFIG) as node:
        names = [node.load(Load(model=str(file))).model.name for file in (path, other, path)]
        assert names == [path.name, str(other), path.name]
        assert {(m.name, m.family) for m in node.status().models} == {
            (names[0], "llama"),
            (names[1], "qwen2"),
        }
        (accepted, *_) = node.stream(prompt(0, new=2, model=str(other)))
        assert isinstance(accepted, Accepted)
        assert accepted.model == str(other)


def test_a_refused_context_leaves_the_model_loaded(node: Node, path: Path) -> None:
    for context, code in ((9999, "context_overflow"), (128, "resources")):
        before, node.budget.limit_bytes = node.budget.limit_bytes, 1 << 20 if code == "resources" else 1 << 30
        with pytest.raises(DaemonError) as caught:
            node.load(Load(model=str(path), context=context))
        node.budget.limit_bytes = before
        assert caught.value.code == code
    stream = node.stream(prompt(0, new=50))
    next(stream)
    with pytest.raises(DaemonError, match="is answering") as caught:
        node.load(Load(model=str(path), context=48))
    assert caught.value.code == "busy"
    assert [type(event) for event in stream][-1] is Done


def test_a_draft_model_stays_until_another_is_asked_for(node: Node, path: Path, tmp_path: Path) -> None:
    small = tiny.save_gguf(tiny.hf_model("llama", seed=12), tmp_path / "small.gguf")
    plain = text_of(node, prompt(0, new=20))
    held_bytes = node.budget.held_bytes
    for request in (
        Load(model=str(path), draft=str(small)),
        Load(model=str(path)),
        Load(model=str(path), context=80),
    ):
        assert node.load(request).model.plan.endswith(", drafts by small.gguf")
        assert node.budget.held_bytes > held_bytes
    assert text_of(node, prompt(0, new=20))[:2] == plain[:2]
    with pytest.raises(DaemonError, match="nope"):
        node.load(Load(model=str(path), draft="nope"))
    with pytest.raises(DaemonError, match="`ranks=2` was asked for, and a draft model"):
        node.load(Load(model=str(path), ranks=2))
    assert "drafts by small.gguf" in node.status().models[0].plan
    node.unload(Unload())
    assert node.budget.held_bytes == node.budget.held_by(PROCESS) + node.budget.held_by(RUNTIMES)


def test_a_loaded_model_can_be_kept(node: Node, path: Path, tmp_path: Path) -> None:
    """Who only wants an answer does not change the model for others."""
    small = tiny.save_gguf(tiny.hf_model("llama", seed=12), tmp_path / "small.gguf")
    node.load(Load(model=str(path), keep=True))
    for wanted, has in (
        (Load(model=str(path), draft=str(small), keep=True), "no draft model"),
        (Load(model=str(path), context=48, keep=True), "a context of 96 tokens and no draft model"),
    ):
        with pytest.raises(DaemonError, match=f"is loaded with {has}, for all who use it") as caught:
            node.load(wanted)
        assert caught.value.code == "bad_request"
        assert f"`load({path})`" in caught.value.hint
    node.load(Load(model=str(path), draft=str(small)))
    for wanted in (
        Load(model=str(path), draft=str(small), keep=True),
        Load(model=str(path), least_context=500, keep=True),
        Load(model=str(path), context=96, keep=True),
    ):
        assert node.load(wanted).model.plan.endswith(", drafts by small.gguf")
    with pytest.raises(DaemonError, match=r"is loaded with draft model small\.gguf, for all"):
        node.load(Load(model=str(path), draft=str(path), keep=True))


def test_who_names_no_model_waits_for_the_one_that_is_being_loaded(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, go_on = threading.Event(), threading.Event()
    real = Assembly.load

    def slow(self: Assembly, *given: Any, **more: Any) -> Any:
        began.set()
        assert go_on.wait(30)
        return real(self, *given, **more)

    monkeypatch.setattr(Assembly, "load", slow)
    with Node(CONFIG) as node, ThreadPoolExecutor() as pool:
        with pytest.raises(DaemonError, match="no model is loaded"):
            node.tokenize(Tokenize(text="hi"))
        loading = pool.submit(node.load, Load(model=str(path)))
        assert began.wait(30)
        assert node.status().loading == path.name
        asked = [
            pool.submit(text_of, node, Generate(prompt="hi", max_tokens=2)),
            pool.submit(node.tokenize, Tokenize(text="hi")),
        ]
        time.sleep(0.1)
        assert not any(future.done() for future in asked)
        go_on.set()
        for future in asked:
            assert future.result(30)
        assert loading.result(30).model.name == path.name
        assert len(node.status().models) == 1
        node.unload(Unload())
        with pytest.raises(DaemonError, match="no model is loaded"):
            node.tokenize(Tokenize(text="hi"))


def test_who_names_no_model_is_told_of_the_one_that_cannot_be_loaded(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF")
    with (
        Node(CONFIG) as node,
        node._loader.announced(str(broken)),
        pytest.raises(DaemonError, match=r"broken\.gguf"),
    ):
        node.tokenize(Tokenize(text="hi"))


def test_an_unloaded_model_leaves_memory(node: Node) -> None:
    kept = weakref.ref(next(iter(node._models)))
    text_of(node, prompt(0, new=3))
    node.unload(Unload())
    deadline_s = time.monotonic() + 30
    while kept() is not None and time.monotonic() < deadline_s:
        gc.collect()
    assert kept() is None


def leave(node: Node, nbytes: int) -> None:
    """Leaves `nbytes` free in the budget."""
    node.budget.limit_bytes = node.budget.held_bytes + nbytes


def test_an_idle_model_makes_room(path: Path, tmp_path: Path) -> None:
    other = tiny.save_gguf(tiny.hf_model("qwen2", seed=2), tmp_path / "other.gguf")
    with Node(NodeConfig(context_tokens=96, kv_tokens=768)) as node:
        node.load(Load(model=str(path)))
        leave(node, 4 << 20)
        node.load(Load(model=str(other)))
        assert [model.name for model in node.status().models] == ["other.gguf"]


def test_what_never_fits_leaves_idle_models_alone(path: Path, tmp_path: Path) -> None:
    large = tiny.save_gguf(
        tiny.hf_model("qwen2", seed=2, vocab_size=100_000, max_position_embeddings=4096),
        tmp_path / "large.gguf",
    )
    with Node(NodeConfig(context_tokens=96, kv_tokens=768)) as node:
        node.load(Load(model=str(path)))
        leave(node, 6 << 20)
        with pytest.raises(
            DaemonError, match=r"needs at least [\d.]+ [MG]B: .* budget is [\d.]+ [MG]B"
        ) as refused:
            node.load(Load(model=str(large)))
        assert "for the process" in str(refused.value)
        assert "memory_bytes" in refused.value.hint
        assert [model.name for model in node.status().models] == ["tiny.gguf"]


class Others:
    """Other machines, which take part if `room_bytes` are free here."""

    machines, arrivals = 2, 0

    def __init__(self) -> None:
        self.room_bytes = 1 << 62
        self.dropping: list[str] = []

    def seat(self, *asked: Any) -> Unseated:
        return Unseated("")

    def would_seat(self, name: str, checkpoint: Any, config: Any, free_bytes: int, dropping: Any) -> bool:
        self.dropping = sorted(dropping)
        return free_bytes >= self.room_bytes

    def note(self, *measured: Any) -> None:
        pass

    def better(self, *asked: Any) -> Judgement:
        return Judgement(False, "alone: two machines would be slower")


def test_a_model_says_why_a_machine_that_came_is_not_used(path: Path) -> None:
    others = Others()
    with Node(CONFIG, grouping=others) as node:
        node.load(Load(model=str(path)))
        assert node.status().models[0].machines_why == ""
        others.arrivals += 1
        deadline_s = time.monotonic() + 20
        while not node.status().models[0].machines_why and time.monotonic() < deadline_s:
            time.sleep(0.01)
        assert node.status().models[0].machines_why == "alone: two machines would be slower"


def test_a_choice_that_fails_stops_nobody(path: Path) -> None:
    """Not even who looks at deadlines."""

    class Broken(Others):
        def better(self, *asked: Any) -> Judgement:
            raise ValueError("no figures")

    others = Broken()
    with Node(CONFIG, grouping=others) as node:
        node.load(Load(model=str(path)))
        (model,) = node._models
        others.arrivals += 1
        node._regrouping.look()
        assert model.arrivals == others.arrivals
        assert text_of(node, prompt(0, new=3))[2].finish_reason == "length"


def test_what_only_a_group_has_room_for_is_loaded_again(path: Path, tmp_path: Path) -> None:
    """As is a model that needs idle ones to make room, here and elsewhere."""
    other = tiny.save_gguf(tiny.hf_model("qwen2", seed=2), tmp_path / "other.gguf")
    others = Others()
    with Node(CONFIG, grouping=others) as node:
        for file in (path, other):
            node.load(Load(model=str(file)))
        (model, _) = node._models
        loader, config = node._loader, replace(CONFIG, kv_tokens=1 << 24)
        with pytest.raises(DaemonError, match="needs at least"):
            loader.check_reload(model, config, None)
        more = node.budget.free_bytes + sum(it.peak_bytes for it in node._models)
        others.room_bytes = more - model.checkpoint.tokenizer_memory().kept
        loader.check_reload(model, config, None)
        assert others.dropping == sorted(it.name for it in node._models)
        with pytest.raises(DaemonError, match="needs at least"):
            loader.check_reload(model, config, other)  # drafts are for who computes alone


def test_the_budget_that_is_said_to_do_does(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.daemon.loading.budgeting.buffer_bytes", lambda page_bytes: 25_000_000)
    monkeypatch.setattr("shoal.daemon.loading.loader.return_freed", lambda: None)
    with Node(NodeConfig(context_tokens=96), kv_root=tmp_path) as node:
        node.budget.limit_bytes = 1
        with pytest.raises(
            DaemonError, match=r", 25 MB for KV-to-disk buffers and any draft model"
        ) as refused:
            node.load(Load(model=str(path)))
        assert "other models" not in str(refused.value)
        said = re.search(r"`memory_bytes=([\d.]+[kMG]B)` would do", refused.value.hint)
        assert said is not None
        node.budget.limit_bytes = int(0.985 * parse_bytes(said[1])) - 2 * 10**6  # it is said in three digits
        with pytest.raises(DaemonError, match="MB for KV-to-disk buffers"):
            node.load(Load(model=str(path)))
        node.budget.limit_bytes = parse_bytes(said[1])
        assert node.load(Load(model=str(path))).model.name == path.name


def test_too_little_memory_is_refused_with_the_figure(path: Path) -> None:
    with Node(NodeConfig(context_tokens=96, memory_bytes=32 << 20)) as node:
        with pytest.raises(DaemonError, match=r"needs at least [\d.]+ [MG]B: .* budget is 33.6 MB") as caught:
            node.load(Load(model=str(path)))
        assert caught.value.code == "resources"


def test_sampling_falls_back_from_request_to_authors_to_shoal(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Node(CONFIG) as node:
        node.load(Load(model=str(path)))
        model = next(iter(node._models))
        assert sampling_of(model, Sampling()).temperature == DEFAULT_SAMPLING["temperature"]
        # A model is known by its file, not by what somebody calls it.
        monkeypatch.setattr(
            registry, "MODELS", [replace(registry.MODELS[0], member_bytes=path.stat().st_size)]
        )
        model.advice = advice_of(model.checkpoint)
        assert sampling_of(model, Sampling()).temperature == 0.2
        assert sampling_of(model, Sampling(temperature=0.0)).temperature == 0.0


def test_a_default_context_shrinks_until_it_fits(path: Path) -> None:
    with open_checkpoint(path) as checkpoint:
        spec = replace(checkpoint.spec, context=8192)
        roomy = replace(weighed(checkpoint, "keep"), spec=spec)

        def planned(memory: int, **options: int) -> Plan | Misfit:
            config = NodeConfig(max_sequences=1, **options)
            return make_plan(roomy, config, memory, streaming=False)

        roomiest = planned(1 << 30)
        assert isinstance(roomiest, Plan)
        assert roomiest.context_tokens == 8192
        refused = planned(1 << 20, context_tokens=8192)
        assert isinstance(refused, Misfit)
        assert refused.plan.kv.tokens == 8192
        shorter = planned(refused.least_bytes - 1)
        assert isinstance(shorter, Plan)
        assert 512 <= shorter.context_tokens < 8192
        refused = planned(1 << 20)
        assert isinstance(refused, Misfit)
        assert refused.plan.kv.tokens == 512


def test_a_request_has_a_context_of_its_own(node: Node, path: Path) -> None:
    """It ends there; the model and other requests keep theirs. More than the model has is refused."""
    whole = text_of(node, prompt(0, new=50))
    short = text_of(node, prompt(0, new=50, context_tokens=60))
    assert (short[2].finish_reason, short[2].context_tokens) == ("length", 60)
    assert (short[1], short[2].usage.completion_tokens) == (whole[1][:20], 20)
    with pytest.raises(DaemonError, match="40 tokens, the context holds 30") as caught:
        list(node.stream(prompt(0, context_tokens=30)))
    assert (caught.value.code, "`context_tokens=96`" in caught.value.hint) == ("context_overflow", True)
    with pytest.raises(DaemonError, match=r"97 tokens was asked for, tiny.gguf is loaded with 96") as caught:
        list(node.stream(prompt(0, context_tokens=97)))
    assert caught.value.code == "context_overflow"
    assert node.status().models[0].context_tokens == 96
    assert text_of(node, prompt(0, new=50))[:2] == whole[:2]


def test_a_model_is_loaded_with_room_for_who_asks_first(path: Path) -> None:
    """What a conversation asks for never makes the model smaller for others, nor loads it anew."""
    with Node(replace(CONFIG, context_tokens=48)) as node:
        assert text_of(node, prompt(0, new=50, model=str(path), context_tokens=64))[2].context_tokens == 64
        for least, context in ((32, 64), (96, 64)):
            loaded = node.load(Load(model=str(path), least_context=least))
            assert (loaded.model.context_tokens, loaded.seconds) == (context, 0.0)
        node.unload(Unload())
        assert node.load(Load(model=str(path), least_context=16)).model.context_tokens == 48
    with pytest.raises(ValueError, match="not both"):
        Load(model=str(path), context=16, least_context=32)
