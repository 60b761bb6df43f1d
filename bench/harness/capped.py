"""An engine as a fresh process in a memory cgroup, with a cold page cache, and what it used.

Knows the order: page cache emptied, disk measured, process started inside the group. Does not know what is asked of
the engine (`offload_scenarios`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import disk
import synthetic
from engines.engine_process import EngineFailed, EngineProcess, kinds
from harness import machine
from harness.cgroup import Cgroup, limited
from harness.run import Run
from inputs import hollow

from shoal.comm.home import Home
from shoal.daemon.library.packs import Packs
from shoal.models.checkpoint.checkpoint import open_checkpoint

SWEEPS = 2  # over a part of the file, to learn how fast the disk is
SLACK = 1.05  # the group's limit over the budget that its engine is given


@dataclass
class Capped:
    """A loaded engine in its group. `facts` is the answer of its `load`."""

    process: EngineProcess
    group: Cgroup
    facts: dict[str, Any]
    file: Path  # that the engine reads
    disk_gb_per_s: float  # the fastest direct reads of the file around the run

    @property
    def name(self) -> str:
        return self.process.name

    def call(self, name: str, **arguments: Any) -> Any:
        """As `EngineProcess.call`, but the error says if the kernel ended the process because of its memory."""
        try:
            return self.process.call(name, **arguments)
        except EngineFailed as error:
            if self.group.oom_kills:
                raise EngineFailed(f"{self.name} was killed for its memory while asked to {name}") from error
            raise

    def look_again(self) -> None:
        """Read the file directly once more, because others may have slowed the first sweeps."""
        self.disk_gb_per_s = max(self.disk_gb_per_s, _best(self.file))

    def bytes_read(self) -> int:
        return disk.bytes_read(self.process.pid)

    def peak_bytes(self) -> int:
        """The peak of the group, and the mapped pages of files (libraries) for which another group is charged."""
        mapped = machine.memory_of(self.process.pid)["file"]
        return self.group.peak_bytes + max(0, mapped - self.group.mapped_bytes)


def budget_of(cap_bytes: int) -> int:
    """The budget to give an engine, so that the group's limit leaves it the slack."""
    return int(cap_bytes / SLACK)


@contextmanager
def capped(
    run: Run, name: str, cap_bytes: int, *, context: int, streams: int = 1, **more: Any
) -> Iterator[Capped]:
    """The engine, loaded within `cap_bytes`; `more` goes to its `load`. Raises CgroupError, EngineFailed, OSError."""
    file = packed(run.model) if name == "shoal" else largest_file(run.model)
    run.look()
    disk.forget_pages()
    speed = _best(file)
    with limited(cap_bytes) as group, kinds(run.peer_python)[name].start(group.enter) as process:
        engine = Capped(process, group, {}, file, speed)
        engine.facts = engine.call(
            "load",
            model=str(run.model),
            context=context,
            streams=streams,
            threads=run.threads,
            memory=budget_of(cap_bytes),
            **more,
        )
        run.facts[name] = engine.facts
        yield engine
        run.disk_gb_per_s.append(round(engine.disk_gb_per_s, 3))


def _best(file: Path) -> float:
    return max(disk.read_gb_per_s(file, seed=seed) for seed in range(SWEEPS))


def packed(model: Path) -> Path:
    """The file that Shoal streams the model from, made if it is not there. Raises DaemonError, CheckpointError."""
    is_hollow = model.name.endswith(hollow.SUFFIX)
    with hollow.filled(model) if is_hollow else open_checkpoint(model) as checkpoint:
        return Packs(Home.from_env()).get(checkpoint, synthetic.bar(f"packing {model.name}")).path


def largest_file(model: Path) -> Path:
    """The model's file; of a directory the largest one."""
    files = [model] if model.is_file() else [path for path in model.iterdir() if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)
