"""`shoal serve`, `stop`, `ps` and `logs`: the daemon as a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
import pytest
from fakes import tiny
from fakes.cli_fakes import FakeClient, model_status, shoal, shoal_process

from shoal import client as client_room
from shoal.cli import background
from shoal.cli import serve as serve_verbs
from shoal.cli.observe import followed, tail
from shoal.client import Client
from shoal.comm.errors import RequestFailed
from shoal.comm.home import Home
from shoal.comm.messages import Stage, Tokenize
from shoal.daemon.errors import DaemonError
from shoal.daemon.private_files import private_dir

HOLDER = """
import signal, sys
from pathlib import Path
from shoal.daemon.server.socket_lock import socket_lock
stubborn = sys.argv[2] == "stubborn"
terms = []
signal.signal(signal.SIGTERM, lambda *_: terms.append(1) if stubborn and not terms else sys.exit())
if sys.argv[2] == "deaf":
    signal.signal(signal.SIGTERM, lambda *_: None)
try:
    with socket_lock(Path(sys.argv[1])):
        print("up", flush=True)
        while True:
            signal.pause()
finally:
    while sys.argv[2] == "lingering":
        signal.pause()
"""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    monkeypatch.setenv("SHOAL_HOME", str(tmp_path / "h"))
    monkeypatch.setenv("COLUMNS", "200")
    made = Home(tmp_path / "h")
    private_dir(made.root)
    private_dir(made.run)
    return made


@contextmanager
def holder(home: Home, kind: str = "obedient") -> Iterator[subprocess.Popen[str]]:
    """A process that holds the daemon's lock. It ends at the first SIGTERM, a stubborn one at the second."""
    command = [sys.executable, "-c", HOLDER, str(home.socket), kind]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "up\n"
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("arguments", [["stop"], ["stop", "--now"], ["ps"], ["ps", "--json"]])
def test_without_a_daemon_the_code_is_four(arguments: list[str]) -> None:
    result = shoal(*arguments)
    assert (result.exit_code, result.stdout) == (4, "")
    assert result.stderr == "shoal: no daemon is running (start one with: shoal serve --detach)\n"


@pytest.mark.parametrize(("kind", "arguments"), [("obedient", ["stop"]), ("stubborn", ["stop", "--now"])])
def test_stop_ends_the_process_that_holds_the_lock(home: Home, kind: str, arguments: list[str]) -> None:
    with holder(home, kind) as process:
        assert background.running_pid(home) == process.pid
        result = shoal(*arguments)
        assert result.exit_code == 0, result.stderr
        assert process.wait(timeout=10) == 0
    assert background.running_pid(home) is None


@pytest.mark.parametrize(("kind", "arguments"), [("lingering", ["stop"]), ("deaf", ["stop", "--now"])])
def test_stop_ends_what_does_not_end_by_itself_and_says_so(
    home: Home, monkeypatch: pytest.MonkeyPatch, kind: str, arguments: list[str]
) -> None:
    """A daemon that has let go of its lock and stays, and one that hears no signal."""
    monkeypatch.setattr(background, "CLOSED_LIMIT_S", 0.5)
    monkeypatch.setattr(serve_verbs, "NOW_LIMIT_S", 1.5)
    with holder(home, kind) as process:
        result = shoal(*arguments)
        assert process.wait(timeout=10) == -signal.SIGKILL
    assert result.exit_code == 0
    assert f"the daemon (pid {process.pid}) did not end by itself and was killed" in result.stderr
    assert shoal("stop").exit_code == 4


STUCK = """
import sys, threading
from shoal.comm.home import Home
from shoal.daemon import service
from shoal.daemon.config import NodeConfig
from shoal.daemon.node import Node

def tokenize(self, request):
    if request.text == "keep the lock":
        10 ** 10 ** 8
    threading.Event().wait()

Node.tokenize = tokenize
service.ENDING_S, service.THREADS_S = 3.0, 0.5
service.serve(NodeConfig(threads=1), home=Home.from_env())
"""


@pytest.mark.parametrize(("text", "words"), [("wait", "has stopped"), ("keep the lock", "was killed")])
def test_a_daemon_ends_whatever_its_threads_do(
    home: Home, monkeypatch: pytest.MonkeyPatch, text: str, words: str
) -> None:
    """A worker that never returns is left alone. One that keeps Python's lock lets nobody hear the signal."""
    monkeypatch.setattr(serve_verbs, "NOW_LIMIT_S", 40.0 if text == "wait" else 2.0)
    with subprocess.Popen([sys.executable, "-c", STUCK], stderr=subprocess.PIPE, text=True) as process:
        try:
            while not background.answers(home):
                assert process.poll() is None
            with Client(home.address) as client:
                client.ping()
                exchange = client._begin(Tokenize(text=text))
                client._pump(0.5)
                assert not exchange.finished
                result = shoal("stop", "--now")
            assert result.exit_code == 0
            assert words in result.stderr
            assert process.stderr is not None
            assert text != "wait" or "is stuck; the process ends without it" in process.stderr.read()
            assert process.wait(timeout=5) is not None
        finally:
            process.kill()


CHILDREN = """
import os, signal, sys
from pathlib import Path
from shoal.comm.home import Home
from shoal.daemon import service
from shoal.daemon.config import NodeConfig
from shoal.daemon.node import Node
from shoal.models.children import ChildKind, Confined, Limits

KIND = ChildKind(Path(sys.argv[1]), ())

def tokenize(self, request):
    work = Confined(KIND, b"", Limits(64 << 20, 30.0))
    print(work.do(b"pid", Limits(64 << 20, 30.0)).decode(), flush=True)
    work.do(request.text.encode(), Limits(64 << 20, 30.0))

Node.tokenize = tokenize
service.serve(NodeConfig(threads=1), home=Home.from_env())
"""
SCRIPT = """
import os, signal
def begin(first):
    def work(job):
        if job == b"stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        while job == b"work":
            pass
        return str(os.getpid()).encode()
    return work
"""


@pytest.mark.parametrize("job", ["stop", "work"])
@pytest.mark.parametrize("signals", [1, 2])
def test_a_daemon_that_ends_leaves_no_child(home: Home, tmp_path: Path, job: str, signals: int) -> None:
    (tmp_path / "some_jobs.py").write_text(SCRIPT)
    command = [sys.executable, "-c", CHILDREN, str(tmp_path / "some_jobs.py")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            while not background.answers(home):
                assert process.poll() is None
            with Client(home.address) as client:
                client.ping()
                exchange = client._begin(Tokenize(text=job))
                assert process.stdout is not None
                child = psutil.Process(int(process.stdout.readline()))
                client._pump(0.3)
                assert not exchange.finished
                started = time.monotonic()
                for _ in range(signals):
                    process.terminate()
                assert process.wait(timeout=10) == 0
            assert time.monotonic() - started < 20
            _, left = psutil.wait_procs([child], timeout=5)
            assert left == []
        finally:
            process.kill()


def test_stop_that_takes_too_long_says_what_to_do(home: Home) -> None:
    with (
        holder(home, "stubborn") as process,
        pytest.raises(DaemonError, match=r"still runs after 1 s .*shoal stop --now"),
    ):
        background.stop(home, process.pid, now=False, limit_s=1, sleep=lambda s: None)


def test_a_second_daemon_is_refused(home: Home) -> None:
    with holder(home) as process:
        result = shoal("serve", "--detach")
    assert result.exit_code == 3
    assert f"a daemon is already running, pid {process.pid}" in result.stderr


def test_a_stale_pid_is_not_signalled(home: Home) -> None:
    (home.run / "daemon.sock.lock").write_text(f"{os.getpid()}\n")
    assert shoal("stop").exit_code == 4


def test_detached_start_passes_the_options_on(
    home: Home, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    started: list[Any] = []

    class Process:
        pid = 77

        def __init__(self, command: list[str], **options: Any) -> None:
            started.append((command, options))

        def poll(self) -> None:
            return None

    looks = iter([False, False, True])
    monkeypatch.setattr(background.subprocess, "Popen", Process)
    monkeypatch.setattr(background, "answers", lambda home: next(looks))
    pids = iter([None, 76, 77, 77, 77, 77])  # none yet, then somebody else's for a moment
    monkeypatch.setattr(background, "running_pid", lambda home: next(pids))
    monkeypatch.setattr(background, "DAEMON_POLL_S", 0.001)
    loaded: list[tuple[int, str, str]] = []
    monkeypatch.setattr(
        background, "load", lambda home, pid, model, draft, heard: loaded.append((pid, model, draft))
    )
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    monkeypatch.chdir(tmp_path)
    result = shoal(
        *("serve", "--detach", "--model", "m.gguf", "--threads", "1", "--address", "tcp://127.0.0.1:0"),
        *("--queue", "0", "--kv-disk", "2GB", "--draft", "m.gguf"),
    )
    assert result.exit_code == 0, result.stderr
    assert "the daemon is running (pid 77)" in result.stderr
    command, options = started[0]
    address = ["--address", "tcp://127.0.0.1:0"]
    assert command[-9:] == ["serve", "--threads", "1", *address, "--queue", "0", "--kv-disk", "2000000000"]
    assert loaded == [(77, str(tmp_path / "m.gguf"), str(tmp_path / "m.gguf"))]
    assert options["start_new_session"]
    assert options["env"]["SHOAL_HOME"] == str(home.root)


def test_a_daemon_that_dies_while_starting_is_told_with_its_last_words(
    home: Home, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    dying = tmp_path / "python"
    dying.write_text("#!/bin/sh\necho starting\necho 'shoal: no room for it' >&2\nexit 3\n")
    dying.chmod(0o755)
    monkeypatch.setattr(background.sys, "executable", str(dying))
    with pytest.raises(DaemonError, match=r"while starting \(exit 3\): no room for it") as caught:
        background.start(home, [])
    assert caught.value.code == "resources"
    assert "no room for it" in shoal("logs").stdout


@pytest.mark.parametrize(
    ("arguments", "file"), [(["serve"], "run/daemon.sock.lock"), (["serve", "--detach"], "logs")]
)
def test_a_disk_without_room_is_told_with_the_file_and_what_to_do(
    home: Home, arguments: list[str], file: str
) -> None:
    """Here no file may grow; on a full disk the words are others."""
    limit = "import resource as r, os, sys; r.setrlimit(r.RLIMIT_FSIZE, (0, 0)); os.execv(sys.argv[1], sys.argv[1:])"
    command = [sys.executable, "-c", limit, sys.executable, "-m", "shoal.cli.main", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 3
    assert f"{home.root / file}: File too large (free some space, or set SHOAL_HOME" in done.stderr


def test_a_daemon_for_models_of_the_store_only_loads_no_path(home: Home, tmp_path: Path) -> None:
    model = tiny.save_gguf(tiny.hf_model("llama"), tmp_path / "tiny.gguf")
    assert shoal("pull", "--name", "mine", str(model)).exit_code == 0
    refused = shoal("serve", "--models-only", "--model", str(model))
    assert refused.exit_code == 1
    assert "is no model of this daemon's store, and it loads no others (--models-only)" in refused.stderr
    started = shoal_process("", "serve", "--detach", "--models-only", "--model", "mine", "--threads", "1")
    try:
        assert started.returncode == 0, started.stderr
        with Client(home.address) as client:
            client.unload()
            for path in (str(model), str(tmp_path / "missing"), "/etc/passwd"):
                for ask in (
                    lambda path=path: client.load(path),
                    lambda path=path: client.load("mine", draft=path),
                    lambda path=path: client.text("a", model=path),
                    lambda path=path: client.text(
                        messages=[{"role": "user", "content": "a"}], model=path + ":q4"
                    ),
                    lambda path=path: client.tokenize("a", model=path),
                ):
                    with pytest.raises(RequestFailed, match="no model of this daemon's store") as caught:
                        ask()
                    assert caught.value.code == "not_found"
            assert client.text("a", model="mine", max_tokens=2)[1].usage.completion_tokens > 0
    finally:
        stopped = shoal("stop", "--now")
    assert stopped.exit_code == 0, stopped.stderr


def test_ctrl_c_while_a_daemon_starts_ends_it(
    home: Home, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sleeping = tmp_path / "python"
    sleeping.write_text("#!/bin/sh\nexec sleep 60\n")
    sleeping.chmod(0o755)
    monkeypatch.setattr(background.sys, "executable", str(sleeping))
    started: list[subprocess.Popen[bytes]] = []
    real = subprocess.Popen

    def popen(*command: Any, **options: Any) -> subprocess.Popen[bytes]:
        started.append(real(*command, **options))
        return started[0]

    def press(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(background.subprocess, "Popen", popen)
    with pytest.raises(KeyboardInterrupt):
        background.start(home, [], sleep=press)
    assert started[0].wait(timeout=10) == -signal.SIGTERM


def test_old_logs_are_kept_once(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    private_dir(home.logs)
    background.log_path(home).write_text("old\n" * 10)
    monkeypatch.setattr(background, "LOG_LIMIT_BYTES", 20)
    monkeypatch.setattr(background.sys, "executable", "/bin/false")
    with pytest.raises(DaemonError, match="it said nothing"):
        background.start(home, [])
    assert (home.logs / "daemon.log.1").read_text().startswith("old")
    assert background.log_path(home).read_text() == ""


def test_ps_shows_models_and_has_every_field_as_json(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = {"kv_cached_tokens": 90, "prompt_tokens_total": 400, "cached_tokens_total": 300}
    figures |= {"kv_disk_bytes": 46_000_000, "kv_disk_pages_read_total": 7, "kv_disk_pages_written_total": 31}
    figures |= {
        "predicted_tokens_per_s": 21.04,
        "predicted_band": [18.0, 24.0],
        "measured_tokens_per_s": 19.5,
        "tried": "4 threads took 9 ms for a token of one stream, 8 took 10 ms: 4 compute it",
    }
    client = FakeClient(model_status("big", running=2, waiting=1, **figures))
    client.changed["corrections"] = {"memory": 1.12}
    monkeypatch.setattr(client_room, "Client", client)
    monkeypatch.setattr(background, "running_pid", lambda home: 4242)
    text = shoal("ps").stdout
    assert "predicted 21 tokens/s, measured 19.5" in text
    assert "tried: 4 threads took 9 ms" in text
    assert "as models ran: memory 1.12 times as long as this machine's profile says" in text
    assert "pid 4242 · up 1 min 1 s · 2 threads · 5 MB resident · 3 requests · 99 tokens" in text
    assert "big: 1 rank, all in ram" in text
    assert "prefix cache: holds 45% of the KV, gave 75% of 400 prompt tokens; 0 preemptions" in text
    assert "KV on disk: 46 MB, 31 pages written, 7 read" in text
    reading = Stage(doing="reading", done=3, total=9, bytes_per_s=2e9)
    client.models["big"] = model_status("big", stage=reading)
    packing = Stage(doing="packing", done=10**8, total=10**9, bytes_per_s=1e8)
    client.changed = {"loading": "other:q4", "stage": packing}
    text = shoal("ps").stdout
    assert "other:q4: packing 100 MB of 1 GB, 100 MB/s, 9 s left" in text
    assert "now reading 3/9 blocks, 2 GB/s" in text
    found = json.loads(shoal("ps", "--json").stdout)
    assert found["stage"]["doing"] == "packing"
    assert found["draining"] is False
    assert (found["models"][0]["name"], found["models"][0]["chat_template"]) == ("big", True)
    client.fails = RequestFailed("shutting_down", "the daemon is stopping")
    assert shoal("ps").exit_code == 4


def test_logs_end_where_asked(home: Home) -> None:
    assert "there is no log at" in shoal("logs").stderr
    private_dir(home.logs)
    background.log_path(home).write_text("".join(f"line {n}\n" for n in range(100)))
    assert shoal("logs", "-n", "2").stdout == "line 98\nline 99\n"
    assert shoal("logs", "-n", "0").stdout == ""
    assert shoal("logs").stdout.count("\n") == 50


def test_following_a_log_survives_its_replacement(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("one\n")
    naps: list[float] = []

    def nap(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 1:
            with path.open("a") as log:
                log.write("two\n")
        elif len(naps) == 2:
            path.unlink()
        else:
            path.write_text("new\n")

    text, offset = tail(path, 10)
    assert text == "one\n"
    assert list(islice(followed(path, offset, nap), 2)) == ["two\n", "new\n"]


def test_a_real_daemon_from_start_to_stop(home: Home, tmp_path: Path) -> None:
    model = tiny.save_gguf(tiny.hf_model("llama"), tmp_path / "tiny.gguf")
    started = shoal_process("", "serve", "--detach", "--model", str(model), "--threads", "1")
    try:
        assert started.returncode == 0, started.stderr
        assert background.running_pid(home) is not None
        (loaded,) = json.loads(shoal("ps", "--json").stdout)["models"]
        assert loaded["path"] == str(model)
        options = ["--max-tokens", "4", "--seed", "1"]
        there = shoal("run", "--raw", *options, str(model), "the and")
        here = shoal("run", "--raw", "--local", *options, str(model), "the and")
        assert (there.exit_code, here.exit_code) == (0, 0), there.stderr + here.stderr
        assert there.stdout == here.stdout
        assert json.loads(shoal("ps", "--json").stdout)["requests_total"] == 1
    finally:
        stopped = shoal("stop", "--now")
    assert stopped.exit_code == 0, stopped.stderr
    assert shoal("ps").exit_code == 4


def test_a_model_that_does_not_load_ends_the_detached_daemon(home: Home, tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF")
    result = shoal("serve", "--detach", "--model", str(tmp_path / "bad.gguf"))
    assert result.exit_code == 1
    assert "bad.gguf" in result.stderr
    assert shoal("stop").exit_code == 4


def test_a_model_is_loaded_for_everybody_and_unloaded(
    home: Home, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """These are the acts that concern others, so they say so."""
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF")
    assert [shoal(*verb).exit_code for verb in (("load", str(file)), ("unload", str(file)))] == [4, 4]
    client = FakeClient(model_status("m", path=str(file)))
    monkeypatch.setattr(client_room, "Client", client)
    monkeypatch.setattr(background, "running_pid", lambda home: 42)
    home.run.mkdir(parents=True, exist_ok=True)
    home.socket.touch()
    result = shoal("load", str(file), "--ctx", "64")
    assert (result.exit_code, client.loads) == (0, [(str(file), 64)])
    assert result.stderr == "m is loaded with a context of 64 tokens, for all who use the daemon\n"
    assert shoal("unload", "m").exit_code == 0
    assert shoal("unload", str(file)).exit_code == 0
    assert client.unloaded == ["m", str(file)]
    shoal("unload", "nothing")  # the daemon says what it has
    assert client.unloaded[-1] == "nothing"
    assert shoal("load", str(file), "--ctx", "0").exit_code == 2
