"""A path is no identity: whatever takes the place of a model's files is noticed by the next request."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes import tiny
from fakes.asking import CONFIG, GREEDY

from shoal.comm.home import Home
from shoal.comm.messages import Chat, ChatMessage, Done, Error, Generate, Load, Token, Tokenize
from shoal.daemon.backend import Event
from shoal.daemon.errors import DaemonError
from shoal.daemon.library.kv_files import fingerprint
from shoal.daemon.library.library import Library
from shoal.daemon.library.packs import Packs
from shoal.daemon.library.pull import pull
from shoal.daemon.node import Node
from shoal.models.checkpoint.checkpoint import open_checkpoint
from shoal.models.checkpoint.identity import replaced, stamped

IDS = [7 * i % 250 for i in range(30)]


@pytest.fixture(scope="module")
def ggufs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two models of the same size."""
    root = tmp_path_factory.mktemp("g")
    return [tiny.save_gguf(tiny.hf_model("llama", seed=n), root / f"{n}.gguf", type="Q8_0") for n in (1, 2)]


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("d")
    return [tiny.save_hf(tiny.hf_model("llama", seed=n), root / str(n), sharded=True) for n in (1, 2)]


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    home = Home(tmp_path / "home")
    with Node(CONFIG, Library(home).resolve, packs=Packs(home), kv_root=home.kv) as made:
        yield made


def said(node: Node, model: Path | str, ids: list[int] = IDS) -> list[int]:
    request = Generate(model=str(model), prompt_tokens=ids, max_tokens=8, ignore_eos=True, sampling=GREEDY)
    return [token for event in node.stream(request) if isinstance(event, Token) for token in event.ids]


def alone(path: Path | str) -> list[int]:
    with Node(CONFIG) as fresh:
        return said(fresh, path)


def same_times(old: Path, new: Path) -> None:
    info = old.stat()
    os.utime(new, ns=(info.st_atime_ns, info.st_mtime_ns))


def moved_over(path: Path, other: Path) -> None:
    shutil.copy(other, path.with_suffix(".new"))
    path.with_suffix(".new").rename(path)


def written_over(path: Path, other: Path) -> None:
    path.write_bytes(other.read_bytes())


def with_old_times(path: Path, other: Path) -> None:
    before = path.stat()
    path.write_bytes(other.read_bytes())
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def linked(path: Path, other: Path) -> None:
    path.unlink()
    path.symlink_to(other)


def hard_linked(path: Path, other: Path) -> None:
    path.unlink()
    path.hardlink_to(other)


WAYS = [moved_over, written_over, with_old_times, linked, hard_linked]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("quant", ["", ":q4"])
def test_another_gguf_file(
    node: Node, ggufs: list[Path], way: Callable[[Path, Path], None], quant: str, tmp_path: Path
) -> None:
    """Its weights in fewer bits come from a pack, which has to be another one, too."""
    path = tmp_path / "m.gguf"
    shutil.copy(ggufs[0], path)
    first = said(node, f"{path}{quant}")
    way(path, ggufs[1])
    assert not node.has(f"{path}{quant}")
    second = said(node, f"{path}{quant}")
    assert node.has(f"{path}{quant}")
    assert first != second
    if not quant:
        assert (first, second) == (alone(ggufs[0]), alone(ggufs[1]))
    assert len(node.status().models) == 1
    assert said(node, "m.gguf" + quant) == second  # as the model is called


def test_a_link_that_is_switched(node: Node, ggufs: list[Path], tmp_path: Path) -> None:
    same_times(*ggufs)
    path = tmp_path / "current.gguf"
    for number in (0, 1, 0):
        path.unlink(missing_ok=True)
        path.symlink_to(ggufs[number])
        assert said(node, path) == alone(ggufs[number])
        assert said(node, f"{path}:q4") == said(node, f"{ggufs[number]}:q4")


def test_a_link_to_a_directory_that_is_switched(node: Node, directories: list[Path], tmp_path: Path) -> None:
    path = tmp_path / "current"
    for number in (0, 1):
        path.unlink(missing_ok=True)
        path.symlink_to(directories[number])
        assert said(node, path) == alone(directories[number])


def shard(path: Path, other: Path) -> None:
    name = sorted(path.glob("*.safetensors"))[1].name
    shutil.copy(other / name, path / name)


def config(path: Path, other: Path) -> None:
    text = (path / "config.json").read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-02')
    (path / "config.json").write_text(text)


@pytest.mark.parametrize("change", [shard, config])
def test_one_file_of_a_directory(
    node: Node, directories: list[Path], change: Callable[[Path, Path], None], tmp_path: Path
) -> None:
    path = shutil.copytree(directories[0], tmp_path / "m")
    first = said(node, path)
    change(path, directories[1])
    second = said(node, path)
    assert first != second == alone(path)


def test_tokenizer_template_and_advice(node: Node, directories: list[Path], tmp_path: Path) -> None:
    path = shutil.copytree(directories[0], tmp_path / "m")

    def chat() -> str:
        message = ChatMessage(role="user", content="hi")
        return node.tokenize(Tokenize(model=str(path), messages=[message])).text

    assert "<|im_start|>" in chat()
    (path / "chat_template.jinja").write_text("A{{ messages[0].content }}")
    assert chat() == "Ahi"
    (path / "chat_template.jinja").write_text("B{{ messages[0].content }}")
    assert chat() == "Bhi"
    (path / "chat_template.jinja").unlink()
    assert "<|im_start|>" in chat()
    (model,) = node._models
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "tool_use.jinja").write_text("C")
    assert not node.has(str(path))
    chat()
    assert node.has(str(path))
    assert list(node._models) != [model]
    before = node.tokenize(Tokenize(model=str(path), text="the")).ids
    text = (path / "tokenizer.json").read_text().replace('"t h"', '"t z"').replace('["t", "h"]', '["t", "z"]')
    (path / "tokenizer.json").write_text(text.replace('"th"', '"tz"').replace('"th e"', '"tz e"'))
    with pytest.raises(DaemonError):  # the merges no longer fit
        node.tokenize(Tokenize(model=str(path), text="the"))
    shutil.copy(directories[0] / "tokenizer.json", path / "tokenizer.json")
    assert node.tokenize(Tokenize(model=str(path), text="the")).ids == before
    (path / "generation_config.json").write_text('{"do_sample": true, "temperature": 0.25}')
    said(node, path)
    (model,) = node._models
    assert model.advice.values["temperature"] == 0.25


def test_who_is_answered_is_not_disturbed(
    node: Node, ggufs: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "m.gguf"
    shutil.copy(ggufs[0], path)
    events: list[Event] = []
    started, done = threading.Event(), threading.Event()

    def emit(event: Event) -> None:
        events.append(event)
        if isinstance(event, Token):
            started.set()
        if isinstance(event, Done | Error):
            done.set()

    with Node(CONFIG) as other:
        request: dict[str, Any] = {
            "prompt_tokens": IDS,
            "max_tokens": 60,
            "ignore_eos": True,
            "sampling": GREEDY,
        }
        want = [
            t
            for e in other.stream(Generate(model=str(path), **request))
            if isinstance(e, Token)
            for t in e.ids
        ]
    node.submit(Generate(model=str(path), **request), emit)
    assert started.wait(20)
    moved_over(path, ggufs[1])
    with caplog.at_level(logging.INFO):
        assert said(node, path) == alone(ggufs[1])
    assert done.wait(20)
    assert isinstance(events[-1], Done)
    assert [token for event in events if isinstance(event, Token) for token in event.ids] == want
    lines = [record.getMessage() for record in caplog.records if "another file" in record.getMessage()]
    assert len(lines) == 1
    assert str(path) in lines[0]
    deadline = threading.Event()
    while len(node.status().models) > 1:
        assert not deadline.wait(0.1)
    held = {purpose for purpose in node.budget._held if purpose.startswith("model")}
    assert held == {"model m.gguf"}


@pytest.mark.parametrize("kind", ["chat", "prompt"])
def test_a_request_whose_model_goes_before_it_begins(
    node: Node, ggufs: list[Path], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a request is tokenised, other files may take the place of the model's: it is answered from these."""
    path = tmp_path / "m.gguf"
    shutil.copy(ggufs[0], path)
    said(node, path)
    asked, came = node._model, threading.Event()

    def replaced_meanwhile(name: str, least_context: int | None = None) -> Any:
        found = asked(name, least_context)
        if not came.is_set():
            came.set()
            moved_over(path, ggufs[1])
            said(node, path)
            assert found not in node._models
        return found

    monkeypatch.setattr(node, "_model", replaced_meanwhile)
    if kind == "prompt":
        assert said(node, path) == alone(ggufs[1])
        return
    ask = Chat(model=str(path), messages=[ChatMessage(role="user", content="hi")], max_tokens=2)
    assert isinstance([*node.stream(ask)][-1], Done)


def test_a_file_that_is_gone_leaves_the_model(node: Node, ggufs: list[Path], tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    shutil.copy(ggufs[0], path)
    first = said(node, path)
    path.unlink()
    assert said(node, path) == first


def test_a_file_that_is_being_written(node: Node, ggufs: list[Path], tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    shutil.copy(ggufs[0], path)
    said(node, path)
    path.write_bytes(ggufs[1].read_bytes()[:5000])
    with pytest.raises(DaemonError, match="cut short") as caught:
        said(node, path)
    assert caught.value.code == "corrupt"
    shutil.copy(ggufs[1], path)
    assert said(node, path) == alone(ggufs[1])


def test_nothing_is_loaded_again_without_need(node: Node, directories: list[Path]) -> None:
    said(node, directories[0])
    (model,) = node._models
    said(node, directories[0])
    node.load(Load(model=str(directories[0])))
    assert list(node._models) == [model]


def test_a_draft_model(node: Node, ggufs: list[Path], tmp_path: Path) -> None:
    draft = tmp_path / "draft.gguf"
    shutil.copy(ggufs[0], draft)
    node.load(Load(model=str(ggufs[1]), draft=str(draft)))
    (model,) = node._models
    moved_over(draft, ggufs[1])
    said(node, ggufs[1])
    (again,) = node._models
    assert again is not model
    assert again.draft_path == draft


def test_the_store(node: Node, ggufs: list[Path], tmp_path: Path) -> None:
    library = Library(Home(tmp_path / "home"))
    source = tmp_path / "source.gguf"
    shutil.copy(ggufs[0], source)
    pull(str(source), library, name="tiny")
    first = said(node, "tiny")
    moved_over(source, ggufs[1])
    assert said(node, "tiny") == first  # the store has a copy
    with pytest.raises(DaemonError, match="has changed since it was pulled as tiny"):
        pull(str(source), library, name="tiny")
    library.remove("tiny")
    assert said(node, "tiny") == first  # nothing else to load
    pull(str(source), library, name="tiny")
    assert said(node, "tiny") == alone(ggufs[1])
    stored = library.entry("tiny").path
    stored.chmod(0o640)  # touched, but the same
    assert said(node, "tiny") == alone(ggufs[1])
    with_old_times(stored, ggufs[0])
    with pytest.raises(DaemonError, match="is not the file that was pulled as tiny") as caught:
        said(node, "tiny")
    assert caught.value.code == "corrupt"
    os.utime(source)
    shutil.copy(ggufs[1], stored)
    assert pull(str(source), library, name="tiny")[1] is False
    assert said(node, "tiny") == alone(ggufs[1])
    digest = hashlib.sha256(ggufs[1].read_bytes()).hexdigest()
    assert [file.sha256 for file in library.entry("tiny").manifest.files] == [digest]


def test_kv_on_disk_belongs_to_a_file(ggufs: list[Path], tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    shutil.copy(ggufs[0], path)
    with Node(CONFIG) as node:
        node.load(Load(model=str(path)))
        (model,) = node._models
        before = fingerprint(model.checkpoint, "keep", model.plan)
        with_old_times(path, ggufs[1])
        with open_checkpoint(path) as now:
            assert fingerprint(now, "keep", model.plan) != before


@pytest.mark.parametrize("way", WAYS)
def test_stamps_tell_files_apart(way: Callable[[Path, Path], None], tmp_path: Path) -> None:
    path, other = tmp_path / "tokenizer.json", tmp_path / "other"
    path.write_text("one")
    other.write_text("two")
    stamps = stamped([path, tmp_path / "chat_template.jinja"])
    assert replaced(stamps) is None
    way(path, other)
    assert replaced(stamps) == path
    stamps = stamped([path, tmp_path / "chat_template.jinja"])
    (tmp_path / "chat_template.jinja").write_text("")
    assert replaced(stamps) == tmp_path / "chat_template.jinja"


def test_chat_with_a_new_template_while_another_answers(
    node: Node, directories: list[Path], tmp_path: Path
) -> None:
    path = shutil.copytree(directories[0], tmp_path / "m")
    message = [ChatMessage(role="user", content="hi")]
    stream = node.stream(Chat(model=str(path), messages=message, max_tokens=40, sampling=GREEDY))
    next(stream)
    (path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert node.tokenize(Tokenize(model=str(path), messages=message)).text == "hi"
    assert isinstance(list(stream)[-1], Done)
