"""The file of requests: read line by line, however large, and again at any place.

Knows bytes and lines. Does not know what is in a line.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

from shoal.daemon.errors import DaemonError
from shoal.partition.amounts import format_bytes

REQUEST_BYTES = 16 << 20  # as much as a request to the daemon may have
_PIECE_BYTES = 1 << 20
_BOM = b"\xef\xbb\xbf"
_NO_TEXT = {  # what a file is that begins so
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
    b"\x1f\x8b": "compressed (gzip)",
    b"\x28\xb5\x2f\xfd": "compressed (zstd)",
    b"\xfd7zXZ\0": "compressed (xz)",
    b"BZh": "compressed (bzip2)",
    b"PK\x03\x04": "compressed (zip)",
}


class RequestLine(NamedTuple):
    """A line that is not empty. `number` counts from 1; `digest` names what it says. `text`: without its end, None if
    it is too long to be read; `nbytes`: how long it is."""

    number: int
    offset: int
    nbytes: int
    digest: int
    text: bytes | None


class RequestLines:
    """A file of requests, open. `salt`: what else decides about the answers; it becomes part of the lines' digests."""

    def __init__(self, path: Path, salt: str = "") -> None:
        """Raises DaemonError."""
        self.path = path
        self._salt = salt.encode()
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise DaemonError("not_found", f"no such file: {path}") from error
        except OSError as error:
            raise DaemonError("bad_request", f"{path} cannot be read: {error.strerror}") from error
        self.stat = os.fstat(descriptor)
        if not stat.S_ISREG(self.stat.st_mode):
            os.close(descriptor)
            kind = "a directory" if stat.S_ISDIR(self.stat.st_mode) else "a pipe or a device"
            raise DaemonError(
                "bad_request", f"{path} is {kind}: requests must be in a file, to be read again"
            )
        self._file = os.fdopen(descriptor, "rb", buffering=_PIECE_BYTES)

    def __enter__(self) -> RequestLines:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    def __iter__(self) -> Iterator[RequestLine]:
        """All lines that are not empty. Raises DaemonError."""
        self._file.seek(0)
        offset = number = 0
        while piece := self._read():
            number += 1
            start, offset = offset, offset + len(piece)
            if number == 1:
                if kind := next((kind for begun, kind in _NO_TEXT.items() if piece.startswith(begun)), None):
                    raise DaemonError("bad_request", f"{self.path} is {kind}: it must be UTF-8")
                if piece.startswith(_BOM):
                    piece, start = piece[len(_BOM) :], start + len(_BOM)
            if len(piece) > REQUEST_BYTES:
                digest, nbytes, offset = self._skip(piece, start)
                yield RequestLine(number, start, nbytes, digest, None)
            elif text := piece.strip(b" \t\r\n"):
                start += piece.index(text[:1])
                del piece  # whoever asks for lines should have but one copy
                yield RequestLine(number, start, len(text), self._digest(text), text)

    def again(self, offset: int, nbytes: int, digest: int) -> bytes:
        """A line that was read before. Raises DaemonError if it says something else now."""
        try:
            text = os.pread(self._file.fileno(), nbytes, offset)
        except OSError as error:
            raise self._unreadable(error) from error
        if self._digest(text) != digest:
            raise DaemonError("bad_request", f"{self.path} was changed while it was answered")
        return text

    def _read(self, limit: int = REQUEST_BYTES + 1) -> bytes:
        try:
            return self._file.readline(limit)
        except OSError as error:
            raise self._unreadable(error) from error

    def _skip(self, begun: bytes, start: int) -> tuple[int, int, int]:
        """Read over the rest of a long line. → its digest, its length, where the next one begins"""
        seen, nbytes, piece = self._hash(begun), len(begun), begun
        while not piece.endswith(b"\n") and (piece := self._read(_PIECE_BYTES)):
            seen.update(piece)
            nbytes += len(piece)
        return int.from_bytes(seen.digest(), "big"), nbytes, start + nbytes

    def _digest(self, text: bytes) -> int:
        return int.from_bytes(self._hash(text).digest(), "big")

    def _hash(self, begun: bytes) -> blake2b:
        return blake2b(begun, digest_size=8, key=blake2b(self._salt, digest_size=16).digest())

    def _unreadable(self, error: OSError) -> DaemonError:
        return DaemonError("bad_request", f"{self.path} cannot be read: {error.strerror}")


def too_long(line: RequestLine) -> str:
    return f"the line has {format_bytes(line.nbytes)}: must be at most {format_bytes(REQUEST_BYTES)}"
