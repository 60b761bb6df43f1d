"""What a host may use: processors, memory, and how fast it reads from the disk; in cgroups of its own.

Knows versions 1 (a tree for each controller) and 2 (one tree); both want root. Does not know what runs inside.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

TREE = Path("/sys/fs/cgroup")
# Of a limit of processor time: short, so that a slow host is slow and does not stand still.
PERIOD_US = 10_000
END_S = 10.0  # until killed processes must be gone
_WEIGHT = {"cpu.shares": 1024, "cpu.weight": 100}  # what one has that was given none


@dataclass(frozen=True)
class Limits:
    """0 and "" limit nothing."""

    processors: str = ""  # which: "0", "0-1"
    processor_time: float = 0.0  # of so many processors
    memory_bytes: int = 0
    read_bytes_per_s: int = 0  # from the disk that has the host's files
    weight: int = 1  # of its processor time against others'


UNLIMITED = Limits()


class HostCgroup:
    """The cgroups of one host, all of one name. `tree` is where cgroups are mounted."""

    def __init__(self, name: str, tree: Path = TREE) -> None:
        self._name = name
        self._tree = tree
        self._two = (tree / "cgroup.controllers").exists()

    @property
    def paths(self) -> list[Path]:
        """Directories whose `cgroup.procs` a process of the host writes itself into."""
        controllers = [""] if self._two else ["cpu", "cpuset", "memory", "blkio", "freezer"]
        return [self._tree / controller / self._name for controller in controllers]

    def make(self, limits: Limits, disk: str) -> None:
        """`disk` is the number of the device as MAJOR:MINOR. Raises OSError if the kernel cannot do it."""
        if self._two:
            (self._tree / "cgroup.subtree_control").write_text("+cpu +cpuset +memory +io")
        for path in self.paths:
            path.mkdir()
        for file, value in self._files(limits, disk).items():
            (self._tree / file).write_text(value)

    def _files(self, limits: Limits, disk: str) -> dict[str, str]:
        """What is written where, below the tree."""
        name, quota = self._name, f"{int(limits.processor_time * PERIOD_US)}"
        rate, memory = limits.read_bytes_per_s, limits.memory_bytes
        if self._two:
            files = {"cpu.weight": f"{min(10_000, _WEIGHT['cpu.weight'] * limits.weight)}"}
            files |= {"cpuset.cpus": limits.processors} if limits.processors else {}
            files |= {"cpu.max": f"{quota} {PERIOD_US}"} if limits.processor_time else {}
            files |= {"memory.max": f"{memory}"} if memory else {}
            files |= {"io.max": f"{disk} rbps={rate}"} if rate else {}
            return {f"{name}/{file}": value for file, value in files.items()}
        everything = (self._tree / "cpuset" / "cpuset.cpus").read_text().strip()
        files = {
            f"cpuset/{name}/cpuset.mems": (self._tree / "cpuset" / "cpuset.mems").read_text().strip(),
            f"cpuset/{name}/cpuset.cpus": limits.processors or everything,
            f"cpu/{name}/cpu.shares": f"{_WEIGHT['cpu.shares'] * limits.weight}",
        }
        if limits.processor_time:
            files |= {f"cpu/{name}/cpu.cfs_period_us": f"{PERIOD_US}", f"cpu/{name}/cpu.cfs_quota_us": quota}
        if memory:
            files |= {f"memory/{name}/memory.limit_in_bytes": f"{memory}"}
        if rate:
            files |= {f"blkio/{name}/blkio.throttle.read_bps_device": f"{disk} {rate}"}
        return files

    @property
    def peak_bytes(self) -> int:
        """The most memory that was charged so far, the page cache included."""
        file = "memory.peak" if self._two else "memory.max_usage_in_bytes"
        return int((self._memory / file).read_text())

    def forget_peak(self) -> None:
        """Count the peak from now on; version 1 only."""
        if not self._two:
            (self._memory / "memory.max_usage_in_bytes").write_text("0")

    @property
    def oom_kills(self) -> int:
        lines = (self._memory / ("memory.events" if self._two else "memory.oom_control")).read_text()
        found = (line.split() for line in lines.splitlines())
        return next((int(value) for key, value in found if key == "oom_kill"), 0)

    @property
    def _memory(self) -> Path:
        return self._tree / ("" if self._two else "memory") / self._name

    def freeze_thread(self, thread: int) -> None:
        """Let one thread stand still; the others of its process go on. Version 1 only, whose freezer takes threads."""
        apart = self._tree / "freezer" / self._name / "frozen"
        apart.mkdir(exist_ok=True)
        (apart / "tasks").write_text(str(thread))
        (apart / "freezer.state").write_text("FROZEN")

    def thaw(self) -> None:
        """All threads go on."""
        apart = self._tree / "freezer" / self._name / "frozen"
        if apart.exists():
            (apart / "freezer.state").write_text("THAWED")
            for thread in (apart / "tasks").read_text().split():
                with suppress(ProcessLookupError):
                    (apart.parent / "tasks").write_text(thread)

    def processes(self) -> set[int]:
        found: set[int] = set()
        for path in self._with_children():
            with suppress(OSError):
                found |= {int(pid) for pid in (path / "cgroup.procs").read_text().split()}
        return found

    def remove(self) -> None:
        """End all processes inside, and the cgroups."""
        with suppress(OSError):
            self.thaw()
        deadline_s = time.monotonic() + END_S
        while time.monotonic() < deadline_s:
            for pid in self.processes():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            for path in reversed(list(self._with_children())):
                with suppress(OSError):
                    path.rmdir()
            if not any(path.exists() for path in self.paths):
                return
            time.sleep(0.05)

    def _with_children(self) -> Iterator[Path]:
        for path in self.paths:
            if path.exists():
                yield path
                yield from (child for child in path.iterdir() if child.is_dir())


def names(begin: str, tree: Path = TREE) -> set[str]:
    """The names of all cgroups that begin so."""
    return {
        path.name for level in (tree, *tree.iterdir()) for path in level.glob(f"{begin}*") if path.is_dir()
    }


def disk_of(path: Path) -> str:
    """MAJOR:MINOR of the whole disk that has the file."""
    device = path.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    entry = Path("/sys/dev/block") / number
    return (entry.resolve().parent / "dev").read_text().strip() if (entry / "partition").exists() else number
