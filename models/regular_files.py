"""Opening files whose paths somebody gave, or that were found beside them: only regular ones, and only so much of them.

A pipe may never say anything, a device may never end, and opening one can already do something. Knows the file system;
not what is in a file.
"""

from __future__ import annotations

import codecs
import errno
import json
import os
import stat
from io import FileIO
from pathlib import Path
from typing import Any

from shoal.models.errors import one_line

from .json_bounds import check_nesting, utf_8

_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
MAX_OBJECT_BYTES = 8 << 20  # of a configuration; as objects it may become twenty times as much in memory


class NotRegular(OSError):
    """It is no file with a beginning and an end."""


class FileTooLong(OSError):
    """It has more bytes than a file of its kind."""


def open_regular(path: Path) -> FileIO:
    """The file, open for reading and unbuffered. Never waits for another process. Raises OSError."""
    _require_regular(path.stat().st_mode)
    # Another process may have put a pipe there meanwhile. Some files of /proc would wait, too.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        _require_regular(os.fstat(descriptor).st_mode)
        return FileIO(descriptor)
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(path: Path, limit_bytes: int) -> bytes:
    """All bytes of the file. Raises OSError, also if it has more than `limit_bytes`."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit_bytes:
            raise FileTooLong(
                errno.EFBIG, f"it has {size} bytes, and a file of its kind has at most {limit_bytes}"
            )
        data = bytearray()
        while len(data) < size and (part := file.read(size - len(data))):
            data += part
        return bytes(data)


def read_object(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds. Raises OSError, and ValueError with what is wrong with it."""
    return object_of(read_regular(path, MAX_OBJECT_BYTES))


def read_advice(path: Path) -> tuple[dict[str, Any], list[str]]:
    """The object in a JSON file that only advises, and what is odd about the file, each in one line. {} if there is no
    such file or it holds none. Raises OSError."""
    if not os.path.lexists(path):
        return {}, []
    data, odd = without_mark(read_regular(path, MAX_OBJECT_BYTES), path)
    try:
        return object_of(data), odd
    except ValueError as error:
        return {}, [f"{path}: {error}; it is not used"]


def without_mark(data: bytes, path: Path) -> tuple[bytes, list[str]]:
    """JSON text without the byte order mark that some editors put before it, and what to say about that."""
    if not data.startswith(codecs.BOM_UTF8):
        return data, []
    return data[len(codecs.BOM_UTF8) :], [f"{path}: begins with a byte order mark, which is no part of JSON"]


def object_of(data: bytes) -> dict[str, Any]:
    """The object that JSON text is. Raises ValueError with what is wrong with it."""
    check_nesting(data)
    try:
        value = json.loads(utf_8(data))
    except ValueError as error:
        raise ValueError(f"is not valid JSON: {one_line(error)}") from error
    if not isinstance(value, dict):
        raise ValueError(f"must hold a JSON object, holds a {type(value).__name__}")
    return value


def _require_regular(mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = next((name for matches, name in _KINDS if matches(mode)), "something else")
        raise NotRegular(errno.EINVAL, f"it is {kind}, not a file")
