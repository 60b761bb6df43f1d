"""Lower rooms name settings as the API does; at a terminal they are options and verbs, wherever an error comes from."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import click
import pytest
from fakes import tiny
from fakes.cli_fakes import FakeClient, model_status, shoal

from shoal import client as client_room
from shoal.cli.cluster import cluster
from shoal.cli.exit_codes import explain
from shoal.cli.verbs import VERBS, cli
from shoal.cli.wording import NONE_WORDS, WORDS, worded
from shoal.comm.errors import RequestFailed
from shoal.comm.home import Home
from shoal.daemon import measurement, memory
from shoal.daemon.config import NodeConfig
from shoal.daemon.error_codes import translated
from shoal.daemon.errors import DaemonError
from shoal.daemon.library.library import MODEL_MANIFEST, Library
from shoal.daemon.library.packs import Packs
from shoal.daemon.library.pull import pull
from shoal.engine.errors import NeverFits


@pytest.mark.parametrize(
    ("hint", "said"),
    [
        (
            "`memory_bytes=512MB` would do, or a smaller `context_tokens`",
            "--memory 512MB would do, or a smaller --ctx",
        ),
        (
            "give it more `memory_bytes` or a smaller `context_tokens`",
            "give it more --memory or a smaller --ctx",
        ),
        ("use `context_tokens=2048` or less", "use --ctx 2048 or less"),
        (
            "shorten it, or load the model with `context_tokens=192`, which takes 7 MB beside the process itself",
            "shorten it, or load the model with --ctx 192, which takes 7 MB beside the process itself",
        ),
        ("`memory_bytes=None` takes what is usual", "--memory auto takes what is usual"),
        (
            "`remove(my-model.Q4)`, then `pull` it again",
            "shoal rm --yes my-model.Q4, then shoal pull it again",
        ),
        ("lower max_tokens, or context_tokens=5", "lower max_tokens, or context_tokens=5"),
        ("`shoal stop` ends it, `chunk_tokens=16` too", "`shoal stop` ends it, `chunk_tokens=16` too"),
        ("a lone ` and `name", "a lone ` and `name"),
    ],
)
def test_names_of_the_api_become_options(hint: str, said: str) -> None:
    assert worded(hint) == said
    for error in (DaemonError("resources", "too big", hint), RequestFailed("resources", "too big", hint)):
        assert explain(error) == (f"too big ({said})", 3)


def test_every_word_is_an_option_or_a_verb() -> None:
    context = click.Context(cli)
    options: set[str] = set()
    for verb in VERBS:
        command = cli.get_command(context, verb)
        assert command is not None
        parts = command.commands.values() if isinstance(command, click.Group) else [command]
        options |= {name for part in parts for option in part.params for name in option.opts}
    known = options | set(cluster.commands)
    for word in WORDS.values():
        shoal_, *rest = word.split()
        assert word in options or (shoal_ == "shoal" and rest[0] in VERBS and set(rest[1:]) <= known)
    assert set(NONE_WORDS) <= set(WORDS)


def test_what_is_said_of_a_budget_larger_than_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "total_bytes", lambda: 2 * 10**9)
    with pytest.raises(DaemonError) as refused:
        memory.budget_of(3 * 10**9)
    assert refused.value.hint == "`memory_bytes=None` takes what leaves the machine usable"
    assert explain(refused.value) == (
        "a budget of 3 GB was asked for, but there are 2 GB of memory "
        "(--memory auto takes what leaves the machine usable)",
        3,
    )


def test_what_is_said_of_a_request_that_never_fits() -> None:
    error = translated(NeverFits(500, 600, 256))
    hint = "shorten it, lower max_tokens, or give the model more --memory"
    assert explain(error) == (f"a prompt of 500 tokens may reach 600, the KV pool holds 256 ({hint})", 3)


def test_errors_of_a_daemon_are_put_into_the_same_words(
    home: Home, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Errors from the wire name the daemon's settings; the user at the terminal knows these as options."""
    (tmp_path / "m.gguf").write_bytes(b"")
    client = FakeClient(model_status("m.gguf"))
    told = translated(NeverFits(500, 600, 256)).to_message()
    client.answers.fails = RequestFailed(told.code, told.message, told.hint)
    monkeypatch.setattr(client_room, "Client", client)
    home.run.mkdir(parents=True)
    home.socket.touch()
    result = shoal("run", str(tmp_path / "m.gguf"), "Why?")
    assert result.exit_code == 3
    assert result.stderr.endswith(
        "shoal: a prompt of 500 tokens may reach 600, the KV pool holds 256 "
        "(shorten it, lower max_tokens, or give the model more --memory)\n"
    )


def test_what_is_said_of_a_damaged_model(home: Home, model: Path) -> None:
    assert shoal("pull", "--name", "tiny", str(model)).exit_code == 0
    (Library(home).root / "tiny" / MODEL_MANIFEST).write_bytes(b"{")
    result = shoal("show", "tiny")
    said = "the store's copy of tiny is damaged (shoal rm --yes tiny, then shoal pull it again)"
    assert (result.exit_code, result.stderr) == (1, f"shoal: {said}\n")


def test_what_is_said_of_a_name_that_is_taken(home: Home, model: Path) -> None:
    assert shoal("pull", "--name", "tiny", str(model)).exit_code == 0
    other = model.with_name("other.gguf")
    other.write_bytes(model.read_bytes())
    result = shoal("pull", "--name", "tiny", str(other))
    said = f"the store has another model called tiny, from {model} (give --name, or first: shoal rm tiny)"
    assert (result.exit_code, result.stderr) == (2, f"shoal: {said}\n")


def test_what_is_said_when_no_hard_link_can_be_made(
    home: Home, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    result = shoal("pull", "--link", str(model))
    said = f"cannot hard-link {model} into the store: Invalid cross-device link (leave out --link to copy)"
    assert (result.exit_code, result.stderr) == (2, f"shoal: {said}\n")
    with pytest.raises(DaemonError, match="leave out `link` to copy"):
        pull(str(model), Library(home), link=True)


def test_what_is_said_of_too_little_memory_to_pack(home: Home, model: Path) -> None:
    result = shoal("pack", "--memory", "1MB", str(model))
    assert result.exit_code == 3
    assert result.stderr.endswith(" of memory; only 1 MB is allowed (give it more --memory)\n")
    with pytest.raises(DaemonError, match="give it more `memory_bytes`"):
        Packs(home).pack(model, "keep", memory_bytes=10**6, progress=lambda *_: None)


def test_what_is_said_of_a_text_shorter_than_a_window(home: Home, tmp_path: Path) -> None:
    model = tiny.save_gguf(tiny.hf_model("llama"), tmp_path / "m.gguf")
    (tmp_path / "text").write_text("the and " * 4)
    result = shoal("perplexity", "--ctx", "64", str(model), str(tmp_path / "text"))
    assert result.exit_code == 2
    assert "must have at least one window of 64 (use --ctx " in result.stderr
    assert result.stderr.endswith(" or a longer text)\n")
    with pytest.raises(DaemonError, match=r"use `ctx=\d+` or a longer text"):
        measurement.perplexity(
            model, tmp_path / "text", ctx=64, config=NodeConfig(), progress=lambda *_: None
        )


def test_only_load_changes_a_model_for_all(home: Home, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = FakeClient(model_status("tiny.gguf"))
    monkeypatch.setattr(client_room, "Client", client)
    home.run.mkdir(parents=True)
    home.socket.touch()
    for verb in ("run", "load"):
        shoal(verb, str(model), "--draft", str(model), *(["Why?"] if verb == "run" else []))
    assert client.kept == [True, False]
    client.load = lambda *given, **more: (_ for _ in ()).throw(  # type: ignore[method-assign]
        RequestFailed(
            "bad_request", "tiny is loaded", "`load(a b.gguf)` `draft=c` loads it anew, for all of them"
        )
    )
    result = shoal("run", str(model), "--draft", str(model), "Why?")
    assert result.exit_code == 2
    assert "(shoal load a b.gguf --draft c loads it anew, for all of them)" in result.stderr
