"""Private files, written whole or not at all: mode 0600, below a directory of mode 0700.

Knows permissions and atomic replacement. Does not know what is in the files.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import KeyFileError

MAX_KEY_FILE_BYTES = 1 << 20


@contextmanager
def written(directory: Path, text: str) -> Iterator[Path]:
    """A new private file below `directory` that holds `text`; the `with` body moves it into place."""
    fresh = directory / f".new-{secrets.token_hex(8)}"
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        yield fresh
    except OSError as error:
        raise KeyFileError(f"cannot write into {directory}: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):
            fresh.unlink()


def read(path: Path) -> str:
    """The text of a private file. KeyFileError if it is none, is open to other users, too long or not ASCII."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        with os.fdopen(descriptor, "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if not stat.S_ISREG(mode):
                raise KeyFileError(f"{path}: must be a file")
            if mode & 0o077:
                raise KeyFileError(f"{path}: open to other users (mode {mode & 0o777:o}): chmod 600 it")
            return file.read(MAX_KEY_FILE_BYTES).decode("ascii")
    except OSError as error:
        raise KeyFileError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise KeyFileError(f"{path}: must be ASCII text") from error
