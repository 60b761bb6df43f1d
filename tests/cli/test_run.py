"""`shoal run`: prompt from anywhere, text on stdout, the rest on stderr."""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from fakes import tiny
from fakes.cli_fakes import TIMINGS, FakeAnswers, shoal

from shoal.cli import run as run_verb
from shoal.cli.options import PlanOptions
from shoal.cli.run import _piped, statistics
from shoal.cli.terminal.output import confirmed
from shoal.cli.verbs import cli
from shoal.comm.errors import NoDaemon, RequestFailed
from shoal.comm.messages import Chat, Done, Generate, Timings, Usage
from shoal.daemon.errors import DaemonError
from shoal.daemon.library.library import Library

FIELDS = [
    "text",
    "token_ids",
    "prompt_tokens",
    "cached_tokens",
    "completion_tokens",
    "finish_reason",
    "ttft_s",
    "prefill_tokens_per_s",
    "decode_tokens_per_s",
    "peak_memory_bytes",
    "stall_s",
    "drafted_tokens",
    "accepted_tokens",
    "plan",
    "ranks",
    "rank_bytes",
]


class Stage:
    """The answers that the verb finds: in this process, and from a daemon if one is up."""

    def __init__(self) -> None:
        self.here = FakeAnswers("Blue", " light.")
        self.daemon: FakeAnswers | None = None
        self.configs: list[Any] = []

    @contextmanager
    def in_process(self, config: Any, library: Any) -> Iterator[FakeAnswers]:
        self.configs.append(config)
        yield self.here

    @contextmanager
    def from_daemon(self, home: Any) -> Iterator[FakeAnswers | None]:
        yield self.daemon


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    monkeypatch.setenv("SHOAL_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    made = Stage()
    monkeypatch.setattr(run_verb, "in_process", made.in_process)
    monkeypatch.setattr(run_verb, "from_daemon", made.from_daemon)
    return made


def content(answers: FakeAnswers) -> list[tuple[str, Any]]:
    (request,) = answers.requests
    assert isinstance(request, Chat)
    return [(message.role, message.content) for message in request.messages]


def test_the_answer_is_on_stdout_and_the_figures_on_stderr(stage: Stage, tmp_path: Path) -> None:
    result = shoal("run", "m.gguf", "Why?")
    assert (result.exit_code, result.stdout) == (0, "Blue light.\n")
    assert result.stderr == "7 prompt tokens (80/s) · first token after 0.25 s · 2 tokens (12.5/s)\n"
    assert content(stage.here) == [("user", "Why?")]
    assert stage.here.loaded == [str(tmp_path / "m.gguf")]


def test_guessing_ahead_is_an_option(stage: Stage, tmp_path: Path) -> None:
    (tmp_path / "small.gguf").write_bytes(b"GGUF")
    shoal("run", "m.gguf", "Why?")
    shoal("run", "m.gguf", "Why?", "--speculate", "off")
    shoal("run", "m.gguf", "Why?", "--draft", "small.gguf")
    assert [config.max_guesses for config in stage.configs] == [32, 0, 32]
    assert stage.here.drafts == [None, None, str(tmp_path / "small.gguf")]
    guessed = Usage(prompt_tokens=7, completion_tokens=20, drafted_tokens=9, accepted_tokens=8)
    line = statistics(Done(finish_reason="stop", usage=guessed, timings=TIMINGS))
    assert line.endswith("20 tokens (12.5/s), 8 of them guessed")


def test_how_keys_and_values_are_kept_is_an_option(stage: Stage) -> None:
    shoal("run", "m.gguf", "Why?")
    shoal("run", "m.gguf", "Why?", "--kv-type", "i8")
    assert [config.kv_type for config in stage.configs] == ["f16", "i8"]
    assert shoal("run", "m.gguf", "Why?", "--kv-type", "q4").exit_code == 2
    assert PlanOptions(kv_type="i8", ctx=9).arguments() == ["--ctx", "9", "--kv-type", "i8"]


def test_json_has_exactly_its_fields(stage: Stage) -> None:
    result = shoal("run", "--json", "m.gguf", "Why?")
    found = json.loads(result.stdout)
    assert list(found) == FIELDS
    assert (found["text"], found["token_ids"], found["finish_reason"]) == ("Blue light.", [0, 1], "stop")
    assert (found["prompt_tokens"], found["completion_tokens"], found["ttft_s"]) == (7, 2, 0.25)
    assert found["plan"] == "1 rank, all in ram"
    assert found["peak_memory_bytes"] > 1_000_000
    assert result.stderr == ""


def test_prompts_come_from_the_argument_stdin_or_both(stage: Stage) -> None:
    shoal("run", "m.gguf", stdin="from stdin\n")
    shoal("run", "m.gguf", "Shorten:", "--system", "Be terse.", stdin="a long\ntext\n")
    contents = [[(m.role, m.content) for m in r.messages] for r in stage.here.requests if isinstance(r, Chat)]
    assert contents == [
        [("user", "from stdin")],
        [("system", "Be terse."), ("user", "Shorten:\n\na long\ntext")],
    ]
    result = shoal("run", "m.gguf", stdin="")
    assert result.exit_code == 2
    assert "there is no prompt" in result.stderr


@pytest.mark.parametrize(
    ("piped", "prompt"),
    [
        (b"a\r\nb\rc\n", "a\r\nb\rc"),
        (b"  a\t\n\n\n", "  a\t\n\n"),
        (b"a\0b\x1b[31m\r\n", "a\0b\x1b[31m"),
        ("\ufeffgrüße 👩‍👧\u2028".encode(), "\ufeffgrüße 👩‍👧\u2028"),
    ],
)
def test_stdin_is_taken_as_it_is(stage: Stage, piped: bytes, prompt: str) -> None:
    CliRunner().invoke(cli, ["run", "--raw", "m.gguf"], input=piped, prog_name="shoal")
    (request,) = stage.here.requests
    assert isinstance(request, Generate)
    assert request.prompt == prompt


@pytest.mark.parametrize("piped", [b"caf\xe9", b"\xed\xa0\x80", b"a\xff\xfeb\n", b"half \xc3"])
def test_stdin_that_is_no_utf8_is_refused_with_its_place(stage: Stage, piped: bytes) -> None:
    result = CliRunner().invoke(cli, ["run", "--raw", "m.gguf", "Shorten:"], input=piped, prog_name="shoal")
    assert result.exit_code == 2
    number = next(i for i, byte in enumerate(piped) if byte > 127)
    assert f"stdin is not utf-8 text: byte {number + 1} is {piped[number]:#x} (iconv" in result.stderr
    assert stage.here.loaded == []


@pytest.mark.parametrize("answer", [True, False])
def test_a_known_model_that_is_not_there_is_offered_at_a_terminal(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: bool
) -> None:
    def fetch(model: str, library: Library, **_: Any) -> tuple[Any, bool]:
        with library.stage(model.rpartition("/")[2], "test") as staging:
            (staging.path / "x.gguf").write_bytes(b"GGUF")
            return staging.commit("gguf", {"x.gguf": "0" * 64}), True

    asked: list[str] = []
    monkeypatch.setattr("shoal.cli.store.asks", lambda: True)
    monkeypatch.setattr("shoal.daemon.library.pull.pull", fetch)
    monkeypatch.setattr("shoal.cli.store.confirmed", lambda question, **_: asked.append(question) or answer)
    for model, name in (("smollm2:q8", "smollm2"), ("org/tiny", "org/tiny")):
        result = shoal("run", model, "Why?")
        assert result.exit_code == (0 if answer else 1)
        assert result.stderr.startswith(f"{name} is not in the store yet\n")
    assert asked == ["Fetch smollm2 (98.4 MB) now?", "Fetch org/tiny now?"]
    assert stage.here.loaded == (["smollm2:q8", "tiny"] if answer else [])
    assert shoal("run", "unknown", "Why?").exit_code == shoal("run", "./no.gguf", "Why?").exit_code == 1
    assert len(asked) == 2


def test_what_is_no_answer_is_asked_for_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for default, said, expected in (
        (True, ["", ""], True),
        (False, [""], False),
        (False, ["maybe", "Yes"], True),
    ):
        answers = iter(said)
        monkeypatch.setattr(click, "prompt", lambda *_, answers=answers, **__: next(answers))
        assert confirmed("Go on?", default=default) == expected
    assert capsys.readouterr().err == "answer y or n\n"


def test_ctrl_c_at_a_question_ends_its_line(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(question: str, *_: Any, **__: Any) -> str:
        click.echo(f"{question} ", nl=False, err=True)
        raise click.Abort

    monkeypatch.setattr("shoal.cli.store.asks", lambda: True)
    monkeypatch.setattr(click, "prompt", interrupted)
    result = shoal("run", "org/tiny", "Why?")
    assert result.exit_code == 130
    assert result.stderr.endswith("Fetch org/tiny now? [Y/n] \n")


def test_raw_feeds_the_prompt_as_it_is(stage: Stage) -> None:
    shoal("run", "--raw", "m.gguf", "Once", "--stop", "END", "--max-tokens", "5", "--temperature", "0")
    (request,) = stage.here.requests
    assert isinstance(request, Generate)
    assert (request.prompt, request.stop, request.max_tokens) == ("Once", ["END"], 5)
    assert request.sampling.temperature == 0


def test_priority_and_deadline_are_passed_on_and_told(stage: Stage) -> None:
    result = shoal("run", "m.gguf", "Once", "--priority", "-3", "--deadline", "1.5")
    assert result.exit_code == 0
    (request,) = stage.here.requests
    assert (request.priority, request.deadline_s) == (-3, 1.5)
    assert shoal("run", "m.gguf", "Once", "--deadline", "0").exit_code == 2
    usage = Usage(prompt_tokens=9, completion_tokens=2, cached_tokens=5)
    line = statistics(Done(finish_reason="deadline", usage=usage, timings=Timings()))
    assert line == "9 prompt tokens · 5 of them cached · 2 tokens · cut at the deadline"


def test_an_answer_that_only_repeats_itself_is_ended_and_that_is_told(stage: Stage) -> None:
    stage.here.reason = "repetition"
    result = shoal("run", "m.gguf", "Once")
    assert result.exit_code == 0
    assert result.stderr.endswith(
        "· ended because it only repeated itself (--keep-repeating lets it go on)\n"
    )
    assert json.loads(shoal("run", "--json", "m.gguf", "Once").stdout)["finish_reason"] == "repetition"
    shoal("run", "--keep-repeating", "m.gguf", "Once")
    assert [request.stop_repeating for request in stage.here.requests] == [True, True, False]


def test_a_model_without_template_continues_the_prompt_and_says_so(stage: Stage) -> None:
    stage.here = FakeAnswers("x", chat_template=False)
    result = shoal("run", "m.gguf", "Once")
    assert "tiny has no chat template: it continues the prompt as it is" in result.stderr
    assert isinstance(stage.here.requests[0], Generate)
    result = shoal("run", "m.gguf", "Once", "--system", "s")
    assert result.exit_code == 2
    assert "--system cannot be used" in result.stderr


@pytest.mark.parametrize(
    ("options", "daemon"),
    [
        ([], True),
        (["--seed", "1", "--max-tokens", "3"], True),
        (["--local"], False),
        (["--json"], True),
        (["--json", "--local"], False),
        (["--threads", "1"], False),
        (["--memory", "1GB"], False),
        (["--ctx", "64"], True),
        (["--ctx", "64", "--kv-type", "i8"], False),
        (["--device", "cpu"], False),
    ],
)
def test_a_daemon_is_used_unless_the_plan_is_shaped(stage: Stage, options: list[str], daemon: bool) -> None:
    stage.daemon = FakeAnswers("through the daemon")
    result = shoal("run", *options, "m.gguf", "Why?")
    assert result.exit_code == 0
    assert bool(stage.daemon.requests) == daemon
    assert bool(stage.here.requests) != daemon
    used = stage.daemon if daemon else stage.here
    context = 64 if "--ctx" in options else None
    assert (used.contexts, used.requests[0].context_tokens) == ([context], context)
    if "--json" in options:
        assert json.loads(result.stdout)["text"] == "".join(used.words)


def test_options_reach_the_node(stage: Stage) -> None:
    shoal("run", "--threads", "1", "--memory", "2MiB", "--ctx", "64", "m.gguf", "Why?")
    (config,) = stage.configs
    assert (config.threads, config.memory_bytes, config.context_tokens) == (1, 2 << 20, 64)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DaemonError("resources", "would not fit"), 3),
        (DaemonError("context_overflow", "too long"), 3),
        (RequestFailed("internal", "broke"), 1),
        (NoDaemon("the daemon went away"), 4),
    ],
)
def test_errors_in_the_middle_keep_what_was_written(stage: Stage, error: Exception, code: int) -> None:
    stage.here = FakeAnswers("Half", fails=error)
    result = shoal("run", "m.gguf", "Why?")
    assert result.exit_code == code
    assert result.stdout == "Half\n"
    assert result.stderr == f"shoal: {error}\n"
    assert stage.here.cancelled == 1


def test_ctrl_c_cancels_and_ends_with_130(stage: Stage) -> None:
    stage.here = FakeAnswers("Half", fails=KeyboardInterrupt())
    result = shoal("run", "m.gguf", "Why?")
    assert (result.exit_code, result.stdout, result.stderr.strip()) == (130, "Half\n", "")
    assert stage.here.cancelled == 1


def test_models_that_are_not_there(stage: Stage) -> None:
    result = shoal("run", "smollm2", "Why?")
    assert result.exit_code == 1
    assert "get it with: shoal pull smollm2" in result.stderr
    assert stage.here.loaded == []


def test_a_silent_pipe_beside_a_prompt_does_not_block_for_ever(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_verb, "STDIN_NOTE_S", 0.01)
    monkeypatch.setattr(run_verb, "STDIN_LIMIT_S", 0.02)
    reading, writing = os.pipe()
    with open(reading, encoding="utf-8") as pipe:  # noqa: PTH123  (a descriptor)
        monkeypatch.setattr("sys.stdin", pipe)
        assert _piped(True) == ""
        assert "going on with PROMPT alone" in capsys.readouterr().err
        os.write(writing, b"late")
        os.close(writing)
        assert _piped(True) == "late"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe"), encoding="utf-8"))
    with pytest.raises(DaemonError, match="stdin is not utf-8 text"):
        _piped(False)


def test_a_real_model_in_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_HOME", str(tmp_path / "home"))
    model = tiny.save_gguf(tiny.hf_model("llama"), tmp_path / "tiny.gguf")
    options = ["--json", "--seed", "7", "--max-tokens", "6", "--ctx", "64", "--threads", "1"]
    results = [shoal("run", "--raw", *options, str(model), "the and") for _ in range(2)]
    assert [result.exit_code for result in results] == [0, 0], results[0].stderr
    first, second = (json.loads(result.stdout) for result in results)
    assert first["token_ids"] == second["token_ids"]
    assert first["completion_tokens"] == len(first["token_ids"]) == 6
    assert first["finish_reason"] == "length"
    assert re.search("1 rank", first["plan"])
    refused = shoal("run", "--json", "--raw", "--memory", "1MiB", str(model), "the and")
    assert refused.exit_code == 3, refused.stderr
    long = shoal("run", "--json", "--raw", "--ctx", "8", str(model), "the and " * 50)
    assert long.exit_code == 3, long.stderr


@pytest.mark.peer
def test_the_default_model_answers_the_same_way_twice() -> None:
    model = os.environ.get("SHOAL_TEST_MODEL", "smollm2")
    options = ["--json", "--temperature", "0", "--max-tokens", "12"]
    first, second = (
        json.loads(shoal("run", *options, model, "Name three colours.").stdout) for _ in range(2)
    )
    assert first["token_ids"] == second["token_ids"]
    assert "Red" in first["text"]


def test_the_bits_become_part_of_the_name(stage: Stage, tmp_path: Path) -> None:
    assert shoal("run", "--quant", "q4", "m.gguf", "Hi").exit_code == 0
    assert shoal("run", "m.gguf:q8", "Hi").exit_code == 0
    assert shoal("run", "--quant", "keep", "m.gguf", "Hi").exit_code == 0
    assert stage.here.loaded == [f"{tmp_path}/m.gguf{suffix}" for suffix in (":q4", ":q8", "")]
    refused = shoal("run", "--quant", "q4", "m.gguf:q8", "Hi")
    assert refused.exit_code == 2
    assert "--quant q4 contradicts the name m.gguf:q8" in refused.stderr
