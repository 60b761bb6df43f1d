"""The file of answers: whole lines at its end, one for each request, and what it already has.

Knows the file, its lock, and which line of the requests each of its lines answers. Does not know how answers look.
"""

from __future__ import annotations

import fcntl
import os
import re
import stat
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NamedTuple

import msgspec

from shoal.daemon.errors import NO_ROOM, DaemonError, more_room

SYNC_S = 2.0  # how often lines are brought to the disk
ANSWER_LINE_BYTES = 1 << 28  # of an answer, at most
_ID = re.compile(r"batch_req_(\d{1,10})_([0-9a-f]{16})")
_BEGINNING = b'{"id":"batch_req_'


def line_id(number: int, digest: int) -> str:
    """The id of the answer to line `number` of the requests, whose content has that digest."""
    return f"batch_req_{number}_{digest:016x}"


class Had(NamedTuple):
    """An answer that is there already."""

    digest: int  # of its request
    failed: bool


class _Known(msgspec.Struct):
    id: str
    error: msgspec.Raw = msgspec.Raw(b"null")

    @property
    def failed(self) -> bool:
        return bytes(self.error) != b"null"


class AnswerFile:
    """The answers, open and locked. `had`: by number of the request's line. `cut`: whether the last line was torn, and
    taken off."""

    def __init__(self, path: Path, requests: os.stat_result, *, retry: bool = False) -> None:
        """`requests`: that file, which must be another. `retry`: failed lines count as not there, and `take_off_failed`
        is to be called when it is known that the others belong to the requests. Raises DaemonError."""
        self.path = path
        self.had: dict[int, Had] = {}
        self.cut = False
        self._failed = 0  # lines that count as not there
        # When a line was brought to the disk last; None = all of them were.
        self._synced_s: float | None = None
        self._made = not os.path.lexists(path)
        self._kept = False  # it is known to its directory for good
        self._file = self._opened(path)
        try:
            if what := _taken(os.fstat(self._file), requests):
                raise DaemonError("bad_request", f"{path} is {what}: answers must go into another")
            self._size = self._look()
            if retry:
                there = len(self.had)
                self.had = {number: had for number, had in self.had.items() if not had.failed}
                self._failed = there - len(self.had)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> AnswerFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add(self, line: bytes) -> None:
        """Append a line, whole or not at all. Raises DaemonError."""
        left = memoryview(line + b"\n")
        try:
            while left:
                left = left[os.write(self._file, left) :]
        except OSError as error:
            with suppress(OSError):  # then its beginning stays, and is cut off the next time
                os.ftruncate(self._file, self._size)
            raise self._unwritten(error) from error
        self._size += len(line) + 1
        if self._synced_s is None:
            self._synced_s = time.monotonic()
        self.settle()

    def settle(self) -> None:
        """Bring lines to the disk if any has waited for it long enough. To be called often. Raises DaemonError."""
        if self._synced_s is not None and time.monotonic() - self._synced_s > SYNC_S:
            self._sync()

    def take_off_failed(self) -> None:
        """Replace the file by one without the lines that count as not there, if there are any. Raises DaemonError."""
        if not self._failed:
            return
        there = self.path.resolve()
        beside = there.with_name(f".{there.name}.partial")
        try:
            beside.unlink(missing_ok=True)
        except OSError as error:
            raise self._unwritten(error) from error
        kept = self._opened(beside)
        try:
            os.fchmod(kept, stat.S_IMODE(os.fstat(self._file).st_mode))
            with os.fdopen(os.dup(kept), "wb") as file:
                for line in self._lines():
                    if not msgspec.json.decode(line, type=_Known).failed:
                        file.write(line)
            os.fsync(kept)
            beside.replace(there)
        except OSError as error:
            os.close(kept)
            beside.unlink(missing_ok=True)
            raise self._unwritten(error) from error
        _sync_directory(there)
        before, self._file = self._file, kept
        os.close(before)
        self._size = os.fstat(kept).st_size
        self._failed = 0

    def close(self) -> None:
        """Idempotent. A file that was made and stayed empty is removed."""
        if self._file < 0:
            return
        try:
            if not (self._made and not os.fstat(self._file).st_size):
                self._sync()
            elif _is_at(self._file, self.path):
                self.path.unlink()
        except OSError as error:
            raise self._unwritten(error) from error
        finally:
            descriptor, self._file = self._file, -1
            os.close(descriptor)

    def _sync(self) -> None:
        try:
            os.fsync(self._file)
            there = _is_at(self._file, self.path)
        except OSError as error:
            raise self._unwritten(error) from error
        if not there:
            raise DaemonError("bad_request", f"{self.path} was moved or removed while it was written")
        if self._made and not self._kept:
            _sync_directory(self.path.resolve())
            self._kept = True
        self._synced_s = None

    def _opened(self, path: Path) -> int:
        """A descriptor of the file, which is locked."""
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC
        with ExitStack() as opened:
            try:
                descriptor = os.open(path, flags, 0o666)
                opened.callback(os.close, descriptor)
                if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                    raise DaemonError(
                        "bad_request", f"{path} is no file: answers must go into one, to be found again"
                    )
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                free = _is_at(descriptor, path)  # or who had the lock took the file away meanwhile
            except BlockingIOError:
                free = False
            except OSError as error:
                raise self._unwritten(error) from error
            if not free:
                raise DaemonError("busy", f"another process writes {path} just now")
            opened.pop_all()
            return descriptor

    def _look(self) -> int:
        """Find out what is there, and take off a torn last line. → the size"""
        size = 0
        for number, line in enumerate(self._lines(), 1):
            if not line.endswith(b"\n"):
                if not (line.startswith(_BEGINNING[: len(line)]) or not line.strip(b"\0")):
                    raise self._foreign(number)
                os.ftruncate(self._file, size)
                self.cut = True
                return size
            size += len(line)
            try:
                known = msgspec.json.decode(line, type=_Known)
                named = _ID.fullmatch(known.id)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                named = None
            if named is None:
                raise self._foreign(number)
            if self.had.setdefault(int(named[1]), one := Had(int(named[2], 16), known.failed)) is not one:
                raise DaemonError(
                    "bad_request", f"{self.path}: line {number} answers a request for the second time"
                )
        return size

    def _lines(self) -> Iterator[bytes]:
        """All lines with their ends; the last one may have none."""
        with os.fdopen(os.dup(self._file), "rb", buffering=1 << 20) as file:
            file.seek(0)
            while line := file.readline(ANSWER_LINE_BYTES):
                yield line

    def _foreign(self, number: int) -> DaemonError:
        said = f"{self.path}: line {number} is no answer of shoal batch"
        return DaemonError("bad_request", said, "give another file for the answers, or remove this one")

    def _unwritten(self, error: OSError) -> DaemonError:
        said = f"{self.path} cannot be written: {error.strerror}"
        if error.errno in NO_ROOM:
            return DaemonError("resources", said, f"{more_room(error.errno)}; the same command then goes on")
        return DaemonError("bad_request", said)


def _taken(answers: os.stat_result, requests: os.stat_result) -> str:
    """What a file is already, so that no answers may go into it; "" = nothing."""
    if os.path.samestat(answers, requests):
        return "the file of requests"
    for descriptor, what in ((1, "stdout"), (2, "stderr")):
        with suppress(OSError):  # it may be closed
            if os.path.samestat(answers, os.fstat(descriptor)):
                return f"the file that {what} goes to, where a summary or complaints may be written"
    return ""


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether it is the file that `path` names now."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _sync_directory(path: Path) -> None:
    """Bring a file's name to the disk, where a file system can do that."""
    with suppress(OSError):
        directory = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
