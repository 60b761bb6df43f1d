"""The process's standard output, whose errors are told from those of other files, and its standard error, which has
none.

Imports nothing of Shoal.
"""

from __future__ import annotations

from io import BufferedWriter, FileIO, TextIOWrapper
from typing import Any, TextIO


class OutputFailed(OSError):
    """Standard output could not be written, and not because its reader has gone."""


class _Stdout(FileIO):
    """Says whose error it is: the same one of another file is none of the output's."""

    def __init__(self, stdout: TextIO) -> None:
        super().__init__(stdout.fileno(), "w", closefd=False)
        self._stdout = stdout  # the descriptor may be closed with it

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise OutputFailed(error.errno, error.strerror) from error


class _Stderr(FileIO):
    """Takes what cannot be written, too: what is said beside a result never decides whether there is one."""

    def __init__(self, stderr: TextIO) -> None:
        super().__init__(stderr.fileno(), "w", closefd=False)
        self._stderr = stderr

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes


def unfailing_stderr(stderr: TextIO) -> TextIO:
    """A stream in place of `stderr` whose writing never fails."""
    return TextIOWrapper(BufferedWriter(_Stderr(stderr)), stderr.encoding, "replace", line_buffering=True)


def named_stdout(stdout: TextIO) -> TextIO:
    """A stream in place of `stdout` whose errors are told from those of other files."""
    buffer = BufferedWriter(_Stdout(stdout))
    return TextIOWrapper(buffer, stdout.encoding, "replace", line_buffering=stdout.isatty())
