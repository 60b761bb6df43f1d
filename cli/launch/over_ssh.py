"""One host over the system's ssh: the command that joins it, and what became of it in one line.

The user's configuration of ssh holds, with agent, jump hosts and known hosts. ssh may ask nothing: there would be
several of them at one terminal. Knows how ssh and shells fail; does not know the head.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import BinaryIO

from shoal.daemon.errors import DaemonError

from .hosts_file import Host

SSH_CONNECT_S = 15
SSH_LOOK_S = 0.05
SSH_FAILED = 255
NOT_FOUND, NOT_EXECUTABLE = 127, 126
SAID_BYTES = 64 << 10  # of what a host says, from its end


@dataclass(frozen=True)
class Outcome:
    """What became of a host. `fingerprint` is that of the machine; "" = it has not joined, and `trouble` says why."""

    host: Host
    fingerprint: str = ""
    before: bool = False
    trouble: str = ""


def ssh_command(host: Host, addresses: Sequence[str], head: str) -> list[str]:
    """The whole command. It reads the join code from standard input."""
    return [
        "ssh",
        "-T",
        *("-o", "BatchMode=yes"),
        *("-o", f"ConnectTimeout={SSH_CONNECT_S}"),
        *("-o", "ClearAllForwardings=yes"),
        *(("-l", host.user) if host.user else ()),
        "--",
        host.address,
        _remote(host, addresses, head),
    ]


def _remote(host: Host, addresses: Sequence[str], head: str) -> str:
    """For the shell of the host, whichever it is."""
    words = [host.shoal, "cluster", "join", "-"]
    for address in addresses:
        words += ["--address", shlex.quote(address)]
    words += ["--head", shlex.quote(head), "--detach", "--json"]
    if host.memory is not None:
        words += ["--memory", str(host.memory)]
    if host.threads is not None:
        words += ["--threads", str(host.threads)]
    if host.home is not None:
        words = ["env", f"SHOAL_HOME={_path(host.home)}", *words]
    return " ".join(words)


def _path(path: str) -> str:
    """Quoted, but for a ~ at its beginning."""
    if path == "~" or path.startswith("~/"):
        return '"$HOME"' + (shlex.quote(path[1:]) if path[2:] else "")
    return shlex.quote(path)


def join_over_ssh(
    host: Host, command: Sequence[str], code: str, limit_s: float, given_up: threading.Event
) -> Outcome:
    """Runs `command` with `code` on its standard input, until `given_up` at most. Raises DaemonError if there is no ssh
    on this machine."""
    # Into files: a connection that ssh keeps open for others holds its standard error, and a pipe would never end.
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        with _started(command, out, err) as process:
            with suppress(OSError):  # it has ended already, and says why
                assert process.stdin is not None
                process.stdin.write(code.encode() + b"\n")
                process.stdin.close()
            ends_s = time.monotonic() + limit_s
            while (status := process.poll()) is None:
                if time.monotonic() > ends_s:
                    said = _last_line(_tail(err))
                    more = f"; the last that it said: {said}" if said else ""
                    return Outcome(host, trouble=f"no answer within {limit_s:.0f} s{more}")
                if given_up.wait(SSH_LOOK_S):
                    return Outcome(host, trouble="given up")
        return outcome(host, status, _tail(out), _tail(err))


@contextmanager
def _started(command: Sequence[str], out: BinaryIO, err: BinaryIO) -> Iterator[subprocess.Popen[bytes]]:
    """In a session of its own, so that it cannot ask at the terminal, and ends with its jump hosts."""
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=out, stderr=err, start_new_session=True, bufsize=0
        )
    except FileNotFoundError as error:
        raise DaemonError("not_found", "there is no ssh on this machine", "install OpenSSH") from error
    except OSError as error:
        raise DaemonError("resources", f"ssh cannot be started: {error.strerror}") from error
    try:
        yield process
    finally:
        if process.poll() is None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if process.stdin is not None:
            with suppress(OSError):
                process.stdin.close()


def outcome(host: Host, status: int, out: str, err: str) -> Outcome:
    """From what ssh ended with and what was said there."""
    if status == 0:
        if (joined := _joined(out)) is not None:
            return Outcome(host, *joined)
        return Outcome(host, trouble=f"{host.shoal} there says nothing that is known: is it Shoal?")
    if status == SSH_FAILED and "shoal: " not in err:
        return Outcome(host, trouble=_ssh_trouble(host, err))
    if status in (NOT_FOUND, NOT_EXECUTABLE):
        return Outcome(
            host,
            trouble=f"there is no {host.shoal} there: install Shoal, or say in the file where it is (shoal = …)",
        )
    said = _said_by_shoal(err) or _last_line(err) or f"it ended with {status} and said nothing"
    if "no such option" in said.lower() or "no such command" in said.lower():
        said = f"Shoal there is of another version: {said}"
    return Outcome(host, trouble=said)


_SSH_TROUBLES = (
    (r"host key verification failed|remote host identification has changed",
     "ssh does not trust its host key: type ssh {0} once, and answer what it asks"),
    (r"permission denied|too many authentication failures|no more authentication methods",
     "ssh is not let in without a password: set up a key (ssh-copy-id {0})"),
    (r"could not resolve hostname", "ssh finds no machine of this name"),
    (r"connection timed out|operation timed out|no route to host|network is unreachable|banner exchange",
     "ssh does not reach it: is it on, and is the address right?"),
    (r"connection refused", "it is there, but no ssh server answers"),
)  # fmt: skip


def _ssh_trouble(host: Host, err: str) -> str:
    said = _last_line(err)
    for pattern, meaning in _SSH_TROUBLES:
        if re.search(pattern, err, re.IGNORECASE):
            return f"{meaning.format(shlex.quote(host.destination))} [{said}]"
    return f"ssh failed: {said}" if said else "ssh failed and said nothing"


def _joined(out: str) -> tuple[str, bool] | None:
    """Fingerprint and whether it was paired before, from the JSON at the end; shells may greet before it."""
    found = re.search(r"^\{[^{}]*^\}\s*\Z", out, re.MULTILINE)
    try:
        value = json.loads(found[0]) if found else {}
    except ValueError:
        return None
    fingerprint = value.get("fingerprint")
    if not isinstance(fingerprint, str) or not re.fullmatch(r"[0-9a-f]{64}", fingerprint):
        return None
    return fingerprint, value.get("before") is True


def _said_by_shoal(err: str) -> str:
    lines = [line for line in err.splitlines() if line.startswith("shoal: ")]
    return lines[-1].removeprefix("shoal: ").strip() if lines else ""


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


def _tail(file: BinaryIO) -> str:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - SAID_BYTES))
    return file.read(SAID_BYTES).decode(errors="replace")
