"""A daemon as a process of its own: started, awaited, found and signalled.

Knows the pid behind the socket's lock, the log file, and how to wait with a limit. Of messages it knows `ping` and
`load`; verbs it does not know.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from shoal.client import Client
from shoal.comm.errors import CommError, NoDaemon
from shoal.comm.home import Home
from shoal.comm.messages import ErrorCode, Stage
from shoal.daemon.errors import DaemonError
from shoal.daemon.private_files import private_dir
from shoal.daemon.server.socket_lock import holder_pid

from .exit_codes import Exit
from .other_process import OtherProcess, find_process

START_LIMIT_S = 300.0  # a large model from a slow disk
DAEMON_POLL_S = 0.1
SIGNAL_AGAIN = (0, 10)  # polls after which a second signal means "at once": the first may have come too early
# For a daemon that has closed everything to be gone; it ends itself within half of that.
CLOSED_LIMIT_S = 10.0
KILLED_LIMIT_S = 10.0
LOG_LIMIT_BYTES = 10_000_000

Sleep = Callable[[float], None]
# What `serve` ended with.
_CODE_OF_EXIT: dict[int, ErrorCode] = {Exit.USAGE: "bad_request", Exit.REFUSED: "resources"}


def log_path(home: Home) -> Path:
    return home.logs / "daemon.log"


def running_pid(home: Home) -> int | None:
    """The pid of the daemon of this home, None when there is none."""
    return holder_pid(home.socket)


def nobody() -> NoDaemon:
    """The error of verbs that need a daemon."""
    return NoDaemon("no daemon is running (start one with: shoal serve --detach)")


def answers(home: Home) -> bool:
    """Whether the daemon answers now."""
    if not home.socket.exists():
        return False
    try:
        with Client(home.address, timeout_s=5.0) as client:
            client.ping()
    except CommError:
        return False
    return True


def start(
    home: Home, arguments: list[str], *, limit_s: float = START_LIMIT_S, sleep: Sleep = time.sleep
) -> int:
    """Start `shoal serve` detached from this terminal and wait until it answers; returns its pid.

    arguments: further arguments of `serve`. Raises DaemonError with the log's last line when it does not come up.
    """
    private_dir(home.root)
    private_dir(home.logs)
    path = log_path(home)
    _check_disk(path.parent)
    _rotate(path)
    with path.open("ab") as log:
        began = log.tell()
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "shoal.cli.main", "serve", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd="/",
            env={**os.environ, "SHOAL_HOME": str(home.root)},
            start_new_session=True,
        )
    try:
        for _ in range(int(limit_s / DAEMON_POLL_S)):
            if process.poll() is not None:
                _check_disk(path.parent)
                raise DaemonError(
                    _CODE_OF_EXIT.get(process.returncode, "internal"),
                    f"the daemon stopped while starting (exit {process.returncode}): {_last_line(path, began)}",
                    f"the whole log is {path}",
                )
            if running_pid(home) == process.pid and answers(home):  # else another start was first
                return process.pid
            sleep(DAEMON_POLL_S)
        raise DaemonError(
            "internal", f"the daemon did not answer within {limit_s:.0f} s", f"its log is {path}"
        )
    except BaseException:  # Ctrl-C, too: a daemon that nobody waits for must not come up later
        process.terminate()
        raise


def load(home: Home, pid: int, model: str, draft: str | None, heard: Callable[[Stage], None]) -> None:
    """Load a model into the daemon that was just started; `heard` gets the stages. If that fails or is interrupted, the
    daemon is ended, and the error raised."""
    try:
        with Client(home.address) as client:
            client.load(model, draft=draft, heard=heard)
    except (CommError, KeyboardInterrupt):
        stop(home, pid, now=True, limit_s=START_LIMIT_S)
        raise


def stop(home: Home, pid: int, *, now: bool, limit_s: float, sleep: Sleep = time.sleep) -> bool:
    """End the daemon `pid`, and wait until its process is gone: it finishes what it answers, or with `now` drops it.

    Returns False when it had to be killed: with `now` after `limit_s`, and else when it has closed everything and does
    not go. Raises DaemonError.
    """
    try:
        process = find_process(pid)
    except ProcessLookupError:
        return True
    try:
        _signal(process, pid, signal.SIGTERM)
        closed_s = 0.0  # how long it has had nothing to do any more
        for turn in range(int(limit_s / DAEMON_POLL_S)):
            if process.gone():
                return True
            sleep(DAEMON_POLL_S)
            if running_pid(home) != pid:
                closed_s += DAEMON_POLL_S
                if closed_s > CLOSED_LIMIT_S:
                    break
            elif now and turn in SIGNAL_AGAIN:
                _signal(process, pid, signal.SIGTERM)
        else:
            if not now:
                hint = "shoal stop --now drops its requests"
                raise DaemonError("busy", f"the daemon (pid {pid}) still runs after {limit_s:.0f} s", hint)
        _signal(process, pid, signal.SIGKILL)
        if not process.gone(KILLED_LIMIT_S):
            raise DaemonError("internal", f"the daemon (pid {pid}) is dead and waits for a device")
        return False
    finally:
        process.close()


def _signal(process: OtherProcess, pid: int, number: signal.Signals) -> None:
    try:
        process.signal(number)
    except ProcessLookupError:
        return
    except PermissionError as error:
        raise DaemonError("bad_request", f"the daemon (pid {pid}) belongs to another user") from error


def _check_disk(directory: Path) -> None:
    """Raises DaemonError when nothing can be written there: then a daemon cannot say why it stopped."""
    try:
        with tempfile.TemporaryFile(dir=directory) as probe:
            probe.write(b" " * 4096)
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        hint = "free some space, or set SHOAL_HOME to another disk"
        raise DaemonError("resources", f"cannot write into {directory}: {error.strerror}", hint) from error


def _rotate(path: Path) -> None:
    """Keep one old log beside the new."""
    if path.is_file() and path.stat().st_size > LOG_LIMIT_BYTES:
        path.replace(path.with_name(path.name + ".1"))


def _last_line(path: Path, began: int) -> str:
    with path.open("rb") as log:
        log.seek(began)
        lines = log.read(1 << 20).decode(errors="replace").strip().splitlines()
    return lines[-1].removeprefix("shoal: ") if lines else "it said nothing"
