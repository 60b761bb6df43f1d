"""A memory cgroup around a process: a limit that the kernel enforces, and what the process used.

Knows version 1 (the memory controller's own tree) and version 2; both want root. All memory that the kernel charges
counts, the page cache and the kernel's own structures included. Does not know what runs inside.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

V1_ROOT, V2_ROOT = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
END_S = 10.0  # until killed processes must be gone


class CgroupError(Exception):
    """A memory cgroup cannot be made here."""


@dataclass(frozen=True)
class _Files:
    """The names that one of the two versions uses."""

    limit: str
    usage: str
    peak: str
    oom: str  # has a line "oom_kill N"
    mapped: str  # the line of memory.stat with mapped pages of files
    swap: str  # is limited as well if there is swap
    swap_extra: bool  # whether that limit is for swap alone, not for memory and swap


_V1 = _Files(
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    "memory.max_usage_in_bytes",
    "memory.oom_control",
    "mapped_file",
    "memory.memsw.limit_in_bytes",
    False,
)
_V2 = _Files(
    "memory.max", "memory.current", "memory.peak", "memory.events", "file_mapped", "memory.swap.max", True
)


class Cgroup:
    """One group. A new process calls `enter` before it becomes what is measured."""

    def __init__(self, path: Path, files: _Files) -> None:
        self.path = path
        self._files = files

    def enter(self) -> None:
        """Move the calling process into the group."""
        (self.path / "cgroup.procs").write_text(str(os.getpid()))

    @property
    def usage_bytes(self) -> int:
        return self._number(self._files.usage)

    @property
    def peak_bytes(self) -> int:
        """The most bytes that were charged so far."""
        return self._number(self._files.peak)

    @property
    def oom_kills(self) -> int:
        return self._line(self._files.oom, "oom_kill")

    @property
    def mapped_bytes(self) -> int:
        """Bytes of mapped pages of files that this group is charged for: not of pages that were in memory before."""
        return self._line("memory.stat", self._files.mapped)

    def limit(self, nbytes: int) -> None:
        (self.path / self._files.limit).write_text(str(nbytes))
        swap = self.path / self._files.swap
        if swap.exists():
            swap.write_text("0" if self._files.swap_extra else str(nbytes))

    def remove(self) -> None:
        """End the processes in the group, and the group."""
        deadline_s = time.monotonic() + END_S
        while time.monotonic() < deadline_s:
            for pid in (self.path / "cgroup.procs").read_text().split():
                os.kill(int(pid), signal.SIGKILL)
            try:
                self.path.rmdir()
                return
            except OSError:
                time.sleep(0.05)
        raise CgroupError(f"{self.path} still has processes after {END_S:.0f} s")

    def _number(self, name: str) -> int:
        return int((self.path / name).read_text())

    def _line(self, name: str, key: str) -> int:
        lines = (line.split() for line in (self.path / name).read_text().splitlines())
        return next((int(value) for head, value in lines if head == key), 0)


@contextmanager
def limited(nbytes: int, root: Path | None = None) -> Iterator[Cgroup]:
    """A new group with this limit. Afterwards it is gone, with all processes in it. Raises CgroupError.

    `root` is the memory controller's tree, by default the one mounted.
    """
    tree, files = _tree(root)
    path = tree / f"shoal-bench-{os.getpid()}-{time.monotonic_ns()}"
    try:
        path.mkdir()
    except OSError as error:
        raise CgroupError(
            f"{path}: {error.strerror}; a memory cgroup wants root, and cgroups that may be written to "
            "(in a container: --privileged)"
        ) from error
    group = Cgroup(path, files)
    try:
        group.limit(nbytes)
        yield group
    except PermissionError as error:
        raise CgroupError(f"{error.filename}: {error.strerror}") from error
    finally:
        group.remove()


def _tree(root: Path | None) -> tuple[Path, _Files]:
    """Where groups are made, and the names of their files."""
    for tree, files in ((root or V1_ROOT, _V1), (root or V2_ROOT, _V2)):
        if files is _V1 and (tree / files.limit).exists():
            return tree, files
        if files is _V2 and (tree / "cgroup.subtree_control").exists():
            return _with_memory(tree), files
    raise CgroupError("neither a version 1 nor a version 2 memory cgroup is mounted under /sys/fs/cgroup")


def _with_memory(tree: Path) -> Path:
    control = tree / "cgroup.subtree_control"
    if "memory" not in control.read_text().split():
        try:
            control.write_text("+memory")
        except OSError as error:
            raise CgroupError(
                f"{control}: the memory controller cannot be turned on: {error.strerror}"
            ) from error
    return tree
