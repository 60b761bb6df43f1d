"""Child processes that do what strangers' files ask for, within limits of memory and time.

Rules inside one interpreter are never complete: a single call can fill the memory, or keep everybody else from
running. So such work is done in a child (`child_main`). A job that passes its limits ends its child, and the next one
gets another. Knows processes, deadlines and whose turn it is. Does not know what jobs are about.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from .child_main import JOB, REPLY
from .errors import Overloaded, one_line
from .turns import CLIENT, Turns, free_for

MOST_CHILDREN = 4  # of one kind: half as many as there are threads that wait for them
MOST_OF_ONE = 2  # that work for one owner
IDLE_CHILD_S = 600.0  # a child that had nothing to do for so long is ended
LARGE_JOB_BYTES = 4 << 20  # a child would keep the memory of such a job, so it is ended after it
_START_S = 30.0  # for a child to start on a busy machine
_LONG_S = 0.5  # where jobs take longer than this …
_MOST_WAITING = 2  # … only so many of one client may wait behind them
_END_S = 2.0  # from the end of a child's connection to its own
_PANIC = "PanicException"  # of a Rust library, whose state nobody knows afterwards
_MAIN = Path(__file__).with_name("child_main.py")
# All that a child knows of this process's environment: what times are told by, and where libraries lie.
_PASSED_ON = ("TZ", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
# Libraries with one thread and one arena: what is limited is address space.
_PLAIN = {"MALLOC_ARENA_MAX": "1", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True)
class Limits:
    """What one job may take: bytes of memory, seconds of processor time, and bytes of its answer. slack_s: how much
    longer it may last where the machine is busy with other things, which is not the job's fault."""

    memory_bytes: int
    seconds: float
    answer_bytes: int = 64 << 20
    slack_s: float = 25.0

    def last_s(self) -> float:
        """When a job that begins now has to have ended."""
        return time.monotonic() + self.seconds + self.slack_s


class LimitPassed(Exception):
    """A job took more than it may; the text says of what, as in "did not end in time …"."""


class JobFailed(Exception):
    """The script raised an exception. kind: its class; the text is its own, as one line."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(one_line(text, 300) if text else kind)
        self.kind = kind


class _Died(Exception):
    """The child ended by itself; it may have been idle for long. killed: somebody else ended it, mostly a system that
    is short of memory."""

    def __init__(self, text: str, killed: bool) -> None:
        super().__init__(text)
        self.killed = killed


class ChildKind:
    """The children that run one script, MOST_CHILDREN at most, each for one owner. Those used least recently go first.

    script: the module that has `begin`. packages: what it imports besides the standard library.
    """

    def __init__(self, script: Path, packages: Sequence[str]) -> None:
        folders = {str(Path(_origin(name)).parent.parent): None for name in packages}
        # -I -S: neither the user's packages nor .pth files, which would take longer to read than all else.
        self._command = [sys.executable, "-I", "-S", str(_MAIN), str(script), *folders]
        self._turns = Turns()
        self._changed = self._turns.changed
        self._idle: list[_Child] = []
        self._working: list[_Child] = []
        self._watched = False
        _KINDS.add(self)

    def take(self, owner: object) -> _Child:
        """An idle child of `owner`, or a new one; waits for its turn. Raises Overloaded."""
        client = CLIENT.get()
        with self._changed:
            self._turns.wait(lambda: _ENDING.is_set() or self._has_room(owner, client), self._look)
            if _ENDING.is_set():
                raise Overloaded("the daemon is stopping")
            child = self._next(owner)
            child.since_s, child.client = time.monotonic(), client
            self._working.append(child)
        return child

    def give_back(self, child: _Child) -> None:
        with self._changed:
            self._working.remove(child)
            if child.alive:
                child.since_s = time.monotonic()
                self._idle.append(child)
                if not self._watched:
                    self._watched = True
                    threading.Thread(target=self._watch, name="shoal-children", daemon=True).start()
            self._turns.served(child.client)

    def forget(self, owner: object) -> None:
        """End the children of an owner, also those that work."""
        with self._changed:
            for child in [child for child in self._idle if child.owner is owner]:
                self._idle.remove(child)
                child.end()
            for child in self._working:
                if child.owner is owner:
                    child.kill()

    def end(self) -> None:
        """End all its children, also those that work."""
        with self._changed:
            while self._idle:
                self._idle.pop().end()
            for child in self._working:
                child.kill()
            self._changed.notify_all()

    def _has_room(self, owner: object, client: str) -> bool:
        for_owner = [child.client for child in self._working if child.owner is owner]
        for_all = [child.client for child in self._working]
        return free_for(client, for_owner, MOST_OF_ONE) and free_for(client, for_all, MOST_CHILDREN)

    def _look(self, before: int) -> None:
        """Whether to go on waiting behind so many of one's own."""
        oldest_s = min((child.since_s for child in self._working), default=math.inf)
        if before >= _MOST_WAITING and time.monotonic() - oldest_s > _LONG_S:
            raise Overloaded("others' templates or texts take long; this one would have to wait")

    def _next(self, owner: object) -> _Child:
        for child in reversed(self._idle):
            if child.owner is owner:
                self._idle.remove(child)
                return child
        if len(self._idle) + len(self._working) >= MOST_CHILDREN:
            self._idle.pop(0).end()
        try:
            return _Child(self._command, owner)
        except OSError as error:
            raise Overloaded(f"no process can be started: {error.strerror}") from error

    def _watch(self) -> None:
        """Ends children that have been idle for long, until there are none."""
        while True:
            time.sleep(IDLE_CHILD_S / 10)
            with self._changed:
                while self._idle and time.monotonic() - self._idle[0].since_s > IDLE_CHILD_S:
                    self._idle.pop(0).end()
                if not self._idle and not self._working:
                    self._watched = False
                    return


_KINDS = weakref.WeakSet[ChildKind]()
_ENDING = threading.Event()


def end_children() -> None:
    """End all children, and start no more: this process is about to end. A child that is stopped, or in the middle of a
    long call, would outlive it otherwise."""
    _ENDING.set()
    for kind in [*_KINDS]:
        kind.end()


class Confined:
    """What children of one kind make of a first job, kept there to do more jobs. Any thread may call it.

    Raises as `do` does, for the first job. What a job may take is counted in processor time: on a machine that is busy
    with other things it lasts longer, and only then is Overloaded.
    """

    def __init__(self, kind: ChildKind, first: bytes, limits: Limits) -> None:
        self._kind = kind
        self._first = first
        self._limits = limits
        self._owner = object()
        self._closed = False
        weakref.finalize(self, kind.forget, self._owner)
        self._with_child(lambda child: b"")

    def do(self, job: bytes, limits: Limits) -> bytes:
        """The answer to a job. Raises LimitPassed, JobFailed, or Overloaded when it would have to wait for long."""
        return self._with_child(lambda child: child.do(job, limits))

    def close(self) -> None:
        """End the jobs that are under way, and refuse later ones with Overloaded. Idempotent."""
        self._closed = True
        self._kind.forget(self._owner)

    def _with_child(self, act: Callable[[_Child], bytes]) -> bytes:
        while True:
            child = self._kind.take(self._owner)
            fresh = not child.begun
            try:
                if self._closed:  # perhaps while it waited for its turn
                    raise Overloaded("the model is being unloaded")
                if fresh:
                    child.begin(self._first, self._limits)
                return act(child)
            except _Died as error:
                # If it is not fresh, it may have died before, and another does the job.
                if fresh and not self._closed and not _ENDING.is_set():
                    if error.killed:
                        raise Overloaded(
                            "the system ended a process of this request; it may be short of memory"
                        ) from error
                    raise LimitPassed(str(error)) from error
            finally:
                self._kind.give_back(child)
                if self._closed:
                    self._kind.forget(self._owner)


class _Child:
    """One process. client: whom it works for, or did last. since_s: when it was taken or given back. begun: it has done
    the first job. alive: it can do more."""

    def __init__(self, command: Sequence[str], owner: object) -> None:
        self.owner = owner
        self.client = ""
        self.since_s = time.monotonic()
        self.begun = False
        self.alive = True
        self._socket, theirs = socket.socketpair()
        environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        try:
            # In a session of its own, so that no Ctrl-C of a terminal reaches it.
            self._process = subprocess.Popen(
                command,
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=environment | _PLAIN,
                cwd="/",
                start_new_session=True,
            )
        except BaseException:
            self._socket.close()
            raise
        finally:
            theirs.close()

    def begin(self, first: bytes, limits: Limits) -> None:
        """Wait until the process has started, and have it do the first job. If that fails, the process ends."""
        try:
            self._receive(Limits(0, 0.0, 0), time.monotonic() + _START_S)
            self.do(first, limits)
        except BaseException:
            self.end()
            raise
        self.begun = True

    def do(self, job: bytes, limits: Limits) -> bytes:
        """The answer to a job. The process ends with anything but an answer or an ordinary error of the script."""
        last_s, fine = limits.last_s(), False
        try:
            self._send(JOB.pack(len(job), limits.memory_bytes, limits.seconds), limits, last_s)
            self._send(job, limits, last_s)  # apart: put together, both would be a copy
            answered, data = self._receive(limits, last_s)
            kind, text = ("", "") if answered else json.loads(data)
            if kind == "MemoryError":
                raise _hungry(limits)
            large = self.begun and len(job) + len(data) > LARGE_JOB_BYTES
            fine = kind != _PANIC and not large
        finally:
            if not fine:
                self.end()
        if not answered:
            raise JobFailed(kind, text)
        return data

    def end(self) -> None:
        """Idempotent."""
        self.alive = False
        self._socket.close()
        self.kill()
        self._process.wait()

    def kill(self) -> None:
        """End the process while a thread waits for its answer."""
        self._process.kill()

    def _send(self, data: bytes, limits: Limits, last_s: float) -> None:
        with self._talking(limits, last_s):
            self._socket.sendall(data)

    def _receive(self, limits: Limits, last_s: float) -> tuple[bool, bytes]:
        """Whether it is an answer, and its bytes."""
        answered, size = REPLY.unpack(self._read(REPLY.size, limits, last_s))
        if size > limits.answer_bytes:
            raise LimitPassed(f"made more than {limits.answer_bytes >> 20} MB and was stopped")
        return bool(answered), self._read(size, limits, last_s)

    def _read(self, size: int, limits: Limits, last_s: float) -> bytes:
        data = bytearray(size)
        view, at = memoryview(data), 0
        while at < size:
            with self._talking(limits, last_s):
                count = self._socket.recv_into(view[at:])
            if not count:
                raise self._died(limits)
            at += count
        return bytes(data)

    @contextlib.contextmanager
    def _talking(self, limits: Limits, last_s: float) -> Iterator[None]:
        """While the socket is used, until `last_s`."""
        left_s = last_s - time.monotonic()
        try:
            if left_s <= 0:
                raise TimeoutError
            self._socket.settimeout(left_s)
            yield
        except TimeoutError as error:
            raise Overloaded("the machine is too busy: a child process got no time to do its work") from error
        except OSError as error:
            raise self._died(limits) from error

    def _died(self, limits: Limits) -> Exception:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_S)
        code = self._process.returncode
        if code == -signal.SIGPROF:
            return _late(limits)
        if code == -signal.SIGABRT:  # how a library in Rust ends that gets no memory
            return _hungry(limits)
        how = f"by signal {-code}" if code is not None and code < 0 else f"with exit code {code}"
        return _Died(f"ended its process {how}", killed=code == -signal.SIGKILL)


def _late(limits: Limits) -> LimitPassed:
    return LimitPassed(f"did not end in time ({limits.seconds:g} s) and was stopped")


def _hungry(limits: Limits) -> LimitPassed:
    return LimitPassed(f"took more than {limits.memory_bytes >> 20} MB of memory and was stopped")


def _origin(package: str) -> str:
    """The file of a package, which is not imported."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"there is no package {package}")
    return spec.origin
