"""The command as a whole: lazy verbs, one line for every error, exit codes, Ctrl-C."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from fakes import tiny
from fakes.cli_fakes import shoal, shoal_process

from shoal.cli import verbs
from shoal.cli.exit_codes import explain
from shoal.cli.interrupt import deferred_interrupt
from shoal.cli.options import AnswerOptions, PlanOptions
from shoal.cli.terminal.output import print_json
from shoal.cli.verbs import VERBS
from shoal.comm.errors import NoDaemon, ProtocolError, RequestFailed, TimedOut
from shoal.daemon.errors import DaemonError
from shoal.kernels.errors import NoSuchHome
from shoal.models.errors import CorruptCheckpoint


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_HOME", str(tmp_path / "home"))


def test_neither_help_nor_any_verb_imports_torch() -> None:
    look = """
import click, sys
from shoal.cli.verbs import VERBS, cli
cli.get_help(click.Context(cli))
assert "shoal.cli.run" not in sys.modules, "help imports the verbs"
for verb in VERBS:
    cli.get_command(click.Context(cli), verb)
print([name for name in ("torch", "transformers", "huggingface_hub") if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", look], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"


def test_help_lists_every_verb() -> None:
    result = shoal("--help")
    assert result.exit_code == 0
    assert all(f"\n  {name} " in result.stdout for name in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example(verb: str) -> None:
    result = shoal(verb, "--help")
    assert result.exit_code == 0
    assert f"Examples:\n    shoal {verb}" in result.stdout


def test_no_verb_at_all_shows_the_help() -> None:
    result = shoal()
    assert (result.exit_code, result.stdout) == (2, "")
    assert all(f"\n  {name} " in result.stderr for name in VERBS)


def test_closed_standard_streams_lead_nowhere() -> None:
    look = """
import os
from shoal.cli import main, verbs
def probe():
    assert os.open(os.devnull, os.O_RDONLY) > 2, "a file has taken the place of a stream"
    print(sys.stdin.read(), file=sys.stderr)
verbs.cli.main = probe
"""
    program = f"import os, sys\nos.closerange(0, 3)\nsys.stdin = sys.stdout = sys.stderr = None\n{look}\nmain.main()"
    done = subprocess.run([sys.executable, "-c", program], timeout=60, check=False)
    assert done.returncode == 0


def test_version_and_unknown_verbs() -> None:
    assert shoal("--version").stdout.startswith("shoal ")
    result = shoal("chta")
    assert result.exit_code == 2
    assert result.stderr == "shoal: there is no verb 'chta'; did you mean chat? (see shoal --help)\n"


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("sevre", "serve"), ("lst", "ls"), ("list", "ls"), ("delete", "rm"), ("download", "pull"), ("top", "ps"),
        ("staus", "ps"), ("start", "serve"), ("RUN", "run"), ("quit", "stop"), ("perplexiti", "perplexity"),
        ("embed", ""), ("cp", ""), ("copy", ""), ("create", ""), ("push", ""), ("x", ""), ("naïve", ""),
    ],
)  # fmt: skip
def test_only_a_verb_that_may_be_meant_is_suggested(written: str, meant: str) -> None:
    result = shoal(written)
    assert result.exit_code == 2
    said = f"; did you mean {meant}?" if meant else ""
    assert result.stderr == f"shoal: there is no verb {written!r}{said} (see shoal --help)\n"


def test_help_is_a_verb_too() -> None:
    assert shoal("help").stdout == shoal("help", "help").stdout == shoal("--help").stdout
    assert shoal("help", "run").stdout == shoal("run", "--help").stdout
    assert "there is no verb 'nothing'" in shoal("help", "nothing").stderr


@pytest.mark.parametrize(
    ("error", "line", "code"),
    [
        (DaemonError("bad_request", "x=1: must be 2"), "x=1: must be 2", 2),
        (DaemonError("not_found", "no model", "pull it"), "no model (pull it)", 1),
        (DaemonError("corrupt", "broken"), "broken", 1),
        (DaemonError("unsupported", "new"), "new", 1),
        (DaemonError("resources", "too big"), "too big", 3),
        (DaemonError("context_overflow", "too long"), "too long", 3),
        (RequestFailed("busy", "queue full"), "queue full", 3),
        (RequestFailed("internal", "two\nlines"), "two lines", 1),
        (RequestFailed("a_code_of_the_future", "hm"), "hm", 1),
        (NoDaemon("no daemon is running"), "no daemon is running", 4),
        (TimedOut("silent"), "the daemon does not answer: silent (see shoal logs)", 1),
        (ProtocolError("odd"), "talking to the daemon failed: odd (see shoal logs)", 1),
        (MemoryError(), "out of memory (give --memory or a smaller --ctx)", 3),
        (KeyboardInterrupt(), "interrupted", 130),
        (click.Abort(), "interrupted", 130),
        (FileNotFoundError(2, "No such file", "x"), "x: No such file", 1),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            "No space left on device (free some space, or set SHOAL_HOME to another disk)",
            3,
        ),
        (
            OSError(errno.EFBIG, "File too large"),
            "File too large (raise the limit of a file's size (ulimit -f), or set SHOAL_HOME to another disk)",
            3,
        ),
        (OSError(errno.EIO, "Input/output error"), "Input/output error", 1),
        (DaemonError("shutting_down", "the daemon is stopping"), "the daemon is stopping", 4),
        (RequestFailed("shutting_down", "the daemon is stopping"), "the daemon is stopping", 4),
        (NoSuchHome("SHOAL_KERNELS='x': …"), "SHOAL_KERNELS='x': …", 2),
        (CorruptCheckpoint("m.gguf: broken"), "m.gguf: broken", 1),
        (
            KeyError("k"),
            "unexpected error: KeyError: 'k' (SHOAL_DEBUG=1 shows where; please report it)",
            1,
        ),
    ],
)
def test_every_error_is_one_line_and_a_code(error: BaseException, line: str, code: int) -> None:
    assert explain(error) == (line, code)


def test_json_has_lists_of_numbers_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    value = {
        "text": "[\n 1,\n 2 ]",
        "ids": [1, -2, 3.5e-9],
        "none": [],
        "deep": [[1], {"a": [2, 3]}, ["x", 4]],
    }
    print_json(value)
    said = capsys.readouterr().out
    assert json.loads(said) == value
    assert '"ids": [1, -2, 3.5e-9],\n' in said
    assert '"a": [2, 3]\n' in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run"], "missing argument 'MODEL'"),
        (["run", "--frobnicate", "m"], "no such option '--frobnicate' (see"),
        (["run", "--temp", "1", "m", "p"], "no such option '--temp'. Did you mean '--temperature'? (see"),
        (["chat", "--memry", "1GB"], "no such option '--memry'. Did you mean '--memory'? (see"),
        (["bench", "--tries", "3", "m"], "no such option '--tries' (see"),
        (["load", "--ctx", "99999999", "m"], "'99999999': must be a whole number, from 1 to 67,108,864"),
        (["run", "--memory", "3XB", "m", "p"], '"3XB" is not an amount of memory; write 3GB'),
        (["run", "--memory", "0", "m", "p"], "--memory 0 B: must be from 1 B to 1.13 PB"),
        (["run", "m", "\udcff\udcfe"], r"argument 3 is not UTF-8 text: '\udcff\udcfe'"),
        (["run", "--threads", "0", "m", "p"], "'0': must be a whole number, at least 1"),
        (["run", "--threads", "99999", "m", "p"], "--threads 99999: must be from 1 to"),
        (["run", "--stop", "", "m", "p"], "'--stop': an empty text would end every answer at once (see"),
        (["run", "--top-p", "2", "m", "p"], "'2': must be a number, above 0 and at most 1"),
        (["run", "--ctx", "99999999", "m", "p"], "'99999999': must be a whole number, from 1 to 67,108,864"),
        (["run", "--ctx", "4k", "m", "p"], "'4k': must be a whole number, from 1 to 67,108,864"),
        (
            ["run", "--max-tokens", "99999999", "m", "p"],
            "'99999999': must be a whole number, from 1 to 67,108,864",
        ),
        (["run", "--max-tokens", "9" * 5000, "m", "p"], ": must be a whole number, from 1 to 67,108,864"),
        (["run", "--temperature", "warm", "m", "p"], "'warm': must be a number, from 0 to 100"),
        (["run", "--deadline", "nan", "m", "p"], "'nan': must be a number, above 0 and at most 1,000,000"),
        (["serve", "--sequences", "many"], "'many': must be a whole number, at least 1"),
        (["serve", "--queue", "99999999"], "--queue 99999999: must be from 0 to 16384"),
        (["bench", "--repeat", "1.5", "m"], "'1.5': must be a whole number, at least 1"),
        (["logs", "-n", "all"], "'all': must be a whole number, at least 0"),
        (["run", "--raw", "--system", "s", "m", "p"], "--system needs the chat template"),
        (["run", "--seed", str(1 << 70), "m", "p"], "an option is out of range"),
    ],
)
def test_wrong_usage_is_told_in_one_line(arguments: list[str], said: str) -> None:
    result = shoal(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert said in result.stderr
    assert result.stderr.startswith("shoal: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "name", ["gpu", "cuda", "cuda:x", "cuda:0,many", "sim", "sim:0", "sim:1GB,fast", "CPU", ""]
)
def test_what_is_no_device_is_told_in_one_line(name: str) -> None:
    result = shoal("run", "--device", name, "m", "p")
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"--device {name!r} is no device; write auto, cpu, cuda:0" in result.stderr
    assert result.stderr.count("\n") == 1


def test_tracebacks_show_only_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(verbs.Shoal, "get_command", broken)
    result = shoal("run")
    assert result.exit_code == 1
    assert "unexpected error: ZeroDivisionError: oops" in result.stderr
    assert "Traceback" not in result.stderr
    monkeypatch.setenv("SHOAL_DEBUG", "1")
    assert "Traceback" in shoal("run").stderr


def test_options_become_requests_and_command_lines() -> None:
    answer = AnswerOptions(seed=3, temperature=0.0, repeat_penalty=1.5, max_tokens=9, stop=("END",))
    fields = answer.request_fields("m")
    assert (fields["model"], fields["max_tokens"], fields["stop"]) == ("m", 9, ["END"])
    sampling = fields["sampling"]
    assert (sampling.seed, sampling.temperature, sampling.repetition_penalty) == (3, 0.0, 1.5)
    assert sampling.top_k is None
    assert not PlanOptions(ctx=9).beyond_context
    plan = PlanOptions(memory=3_000_000_000, threads=1)
    assert plan.beyond_context
    assert plan.arguments() == ["--memory", "3000000000", "--threads", "1"]
    assert plan.config().memory_bytes == 3_000_000_000


def test_ctrl_c_in_a_verb_is_quiet() -> None:
    press = "import os, signal, shoal.cli.store as s; s.Library = lambda home: os.kill(os.getpid(), signal.SIGINT)"
    done = shoal_process(press, "ls")
    assert (done.returncode, done.stdout, done.stderr.strip()) == (130, "", "")


def test_ctrl_c_while_importing_is_quiet() -> None:
    press = """
import os, signal, sys
class Press:
    def find_spec(self, name, path=None, target=None):
        if name == "shoal.cli.verbs":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Press())
"""
    done = shoal_process(press, "ls")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_ctrl_c_waits_for_the_end_of_a_deferring_block() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    reached: list[bool] = []

    def press() -> None:
        with deferred_interrupt():
            os.kill(os.getpid(), signal.SIGINT)
            reached.append(True)

    try:
        with pytest.raises(KeyboardInterrupt):
            press()
        assert reached
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_reader_that_has_had_enough_ends_it_quietly() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "shoal.cli.main", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=60) == 1


@pytest.mark.parametrize(
    "verb",
    ["--help", "help run", "--version", "ls --json", "doctor", "doctor --json", "run", "run --json"],
)
def test_an_output_that_cannot_be_written_is_not_the_home_s_fault(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """/dev/full says what a full disk says. A reader that has gone is told nothing."""
    monkeypatch.setenv("SHOAL_HOME", str(tmp_path / "home"))
    arguments = verb.split()
    if arguments[0] == "run":
        path = tiny.save_gguf(tiny.hf_model("qwen2"), tmp_path / "tiny.gguf")
        arguments += ["--raw", "--local", "--threads", "1", "--max-tokens", "40", str(path), "hi"]
    command = [sys.executable, "-m", "shoal.cli.main", *arguments]
    reading, writing = os.pipe()
    os.close(reading)
    for output, expected in ((os.open("/dev/full", os.O_WRONLY), (3, True)), (writing, (1, False))):
        done = subprocess.run(
            command, stdout=output, stderr=subprocess.PIPE, text=True, timeout=60, stdin=subprocess.DEVNULL
        )
        os.close(output)
        full = "shoal: standard output could not be written: No space left on device\n"
        assert (done.returncode, done.stderr == full) == expected
        assert "Traceback" not in done.stderr
    assert done.stderr == ""


@pytest.mark.parametrize("sink", ["full", "gone"])
@pytest.mark.parametrize(
    ("verb", "code"), [("ls", 0), ("run", 0), ("run --json", 0), ("run --ctx 99999", 3), ("ls --nonsense", 2)]
)
def test_what_is_said_beside_a_result_never_decides_about_it(
    verb: str, code: int, sink: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Standard error on a full disk, or without a reader: results and exit codes are the same."""
    monkeypatch.setenv("SHOAL_HOME", str(tmp_path / "home"))
    arguments = verb.split()
    if arguments[0] == "run":
        path = tiny.save_gguf(tiny.hf_model("qwen2"), tmp_path / "tiny.gguf")
        arguments += ["--raw", "--local", "--threads", "1", "--max-tokens", "4", str(path), "hi"]
    reading, writing = os.pipe()
    os.close(reading)
    if sink == "full":
        os.dup2(full := os.open("/dev/full", os.O_WRONLY), writing)
        os.close(full)
    command = [sys.executable, "-m", "shoal.cli.main", *arguments]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=writing, timeout=60, stdin=subprocess.DEVNULL
    )
    os.close(writing)
    assert done.returncode == code
    assert bool(done.stdout) == (arguments[0] == "run" and not code)


@pytest.mark.parametrize("verb", ["run", "chat", "serve", "bench", "perplexity", "show", "plan", "batch"])
def test_what_is_no_device_is_one_line_everywhere(verb: str, model: Path, tmp_path: Path) -> None:
    requests = tmp_path / "requests.jsonl"
    requests.write_text("{}\n")
    more = {"perplexity": [requests], "run": ["hello"], "batch": [requests, tmp_path / "answers"]}
    arguments = [*([] if verb in ("serve", "batch") else [model]), *more.get(verb, [])]
    for name in ("cuda:-1", "sim:0", "CUDA:0", "x" * 10_000, "é\n"):
        result = shoal(verb, *map(str, arguments), "--device", name)
        assert (result.exit_code, result.stderr.count("\n")) == (2, 1), result.stderr
        assert result.stderr.startswith("shoal: --device")
        assert " is no device; write auto, cpu, cuda:0" in result.stderr


@pytest.mark.parametrize(
    "verb",
    [
        ("batch", "gone", "out"),
        ("perplexity", "m", "gone"),
        ("plan", "--profile", "gone", "m"),
        ("profile", "--profile", "gone"),
        ("cluster", "launch", "gone"),
    ],
)
def test_a_file_that_is_not_there_is_no_wrong_usage(
    verb: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = shoal(*verb)
    assert (result.exit_code, result.stderr) == (1, "shoal: no such file: gone\n")
