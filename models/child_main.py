"""What runs in a child process: one script's jobs, within limits of memory and processor time.

`children` starts it as `python -I -S child_main.py SCRIPT FOLDER…`; the folders hold the packages that the script
imports. The script has a function `begin`, which takes the first job and returns the function that answers all later
ones. Imports nothing else of Shoal, because somebody waits for a child that starts. Does not know what jobs are about.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import resource
import signal
import socket
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

# Parent → child, before each job: its bytes, the memory that it may take, its seconds of processor time.
JOB = struct.Struct("<QQd")
# Child → parent, before each reply: 1 for an answer and 0 for an error (as JSON: its class, its text), and its bytes.
# The first reply, which is empty, says that the child has started.
REPLY = struct.Struct("<BQ")
_ERROR_CHARS = 1000

Work = Callable[[bytes], bytes]


def main(script: str, *folders: str) -> None:
    """Serves the parent at descriptor 0 until it closes its end."""
    path = Path(script)
    sys.path += [*folders, str(path.parent)]
    begin: Callable[[bytes], Work] = __import__(path.stem).begin
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError):  # where memory is short, this process goes, and the parent stays
        Path("/proc/self/oom_score_adj").write_text("1000")
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    parent, work, own_bytes = socket.socket(fileno=0), None, _address_space_bytes()
    _reply(parent, True, b"")
    while head := _receive(parent, JOB.size):
        size, memory_bytes, cpu_s = JOB.unpack(head)
        job, answer, failed = _receive(parent, size), b"", None
        try:
            with _limits(own_bytes + memory_bytes, cpu_s), _until_hung_up(parent):
                if work is None:
                    work, own_bytes = begin(job), _address_space_bytes()
                else:
                    answer = work(job)
        except BaseException as error:  # a panic of a Rust library is no Exception
            failed = [type(error).__name__, str(error)[:_ERROR_CHARS]]
        del job  # before the next one comes
        _reply(parent, failed is None, answer if failed is None else json.dumps(failed).encode())


def _reply(parent: socket.socket, answered: bool, data: bytes) -> None:
    parent.sendall(REPLY.pack(answered, len(data)))
    parent.sendall(data)


def _receive(parent: socket.socket, size: int) -> bytes:
    """So many bytes; b"" when the parent has hung up."""
    data = bytearray(size)
    view, at = memoryview(data), 0
    while at < size:
        count = parent.recv_into(view[at:])
        if not count:
            return b""
        at += count
    return bytes(data)


@contextlib.contextmanager
def _limits(address_space_bytes: int, cpu_s: float) -> Iterator[None]:
    """Allocating more raises MemoryError (or ends the process, where a library cannot bear it); more processor time
    ends the process by SIGPROF, which nobody handles. A system without a limit of memory, such as macOS, goes without
    it."""
    _set(resource.RLIMIT_AS, address_space_bytes)
    signal.setitimer(signal.ITIMER_PROF, cpu_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        _set(resource.RLIMIT_AS, resource.RLIM_INFINITY)


def _set(limit: int, value: int) -> None:
    _, most = resource.getrlimit(limit)
    bounds = [bound for bound in (value, most) if bound != resource.RLIM_INFINITY]
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(limit, (min(bounds, default=resource.RLIM_INFINITY), most))


@contextlib.contextmanager
def _until_hung_up(parent: socket.socket) -> Iterator[None]:
    """The system ends this process when the parent ends, also within a long call that lets nothing else run: the
    socket sends SIGIO, which nobody handles. The parent sends nothing while it waits for an answer."""
    flags = fcntl.fcntl(parent, fcntl.F_GETFL)
    fcntl.fcntl(parent, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(parent, fcntl.F_SETFL, flags | os.O_ASYNC)
    with contextlib.suppress(BlockingIOError):  # perhaps it has hung up just before
        if not parent.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT):
            os._exit(1)
    try:
        yield
    finally:
        fcntl.fcntl(parent, fcntl.F_SETFL, flags)


def _address_space_bytes() -> int:
    """What this process has mapped; where that cannot be told, so much that no limit is felt."""
    try:
        return int(Path("/proc/self/statm").read_bytes().split()[0]) * resource.getpagesize()
    except OSError:
        return 1 << 40


if __name__ == "__main__":
    main(*sys.argv[1:])
