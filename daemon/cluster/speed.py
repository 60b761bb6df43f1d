"""How fast this machine is at what ranks do: reading weights from memory, multiplying, and reading from a disk.

Measured by the kernels that compute, in less than two seconds, and kept in a file. Since something else may run just
then, it is measured again in each of the first `STARTS` starts, when nobody waits for it, and the best of each figure
holds; later nothing is measured unless something has changed that speed depends on. Whoever chooses a group asks
(`partition.group_search`).
"""

from __future__ import annotations

import logging
import os
import platform
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from msgspec import Struct

from shoal import kernels
from shoal.daemon import cgroup
from shoal.daemon.installed import package_version
from shoal.daemon.memory import available_bytes
from shoal.daemon.private_files import keep, kept
from shoal.kernels import WEIGHT_TYPES, Linears, Matrix
from shoal.kernels.huge_pages import Arena
from shoal.offload.errors import OffloadError
from shoal.offload.read_speed import read_speed
from shoal.partition.amounts import format_bytes
from shoal.partition.memory_layout import BAND_ROWS

log = logging.getLogger(__name__)

TYPE = next(kind for kind in WEIGHT_TYPES if kind.name == "Q4_K")  # as most models come
COLS = 4096
MEMORY_BYTES = 64 << 20  # of weights that one token reads: beyond what most caches hold
LONG_ROWS = 256  # of a long step
LONG_MATRIX_ROWS = 8192  # of the weights that it meets, at most
FIRST_ROWS = 256  # of weights, before it is known how quick a machine is
ENOUGH_S = 0.05  # for one call
MEASURE_S = 0.4  # of each
STARTS = 5  # after so many, another measurement would hardly be better
QUOTA_USED = 0.8  # of processor time, at most
DISK_S = 0.3
DISK_FILE_BYTES = 64 << 20  # that is written where nothing can be read, at most
DISK_PIECE = 4 << 20
WRITE_S = 0.4


class NodeSpeed(Struct, frozen=True):
    """`memory_bytes_per_s`: of weights, as one token needs them. `flops`: of a long step, a multiplication and an
    addition counted as two. `disk_bytes_per_s`: 0 if it was not asked for or could not be measured. `measured`: the
    best of so many measurements."""

    memory_bytes_per_s: float
    flops: float
    disk_bytes_per_s: float = 0.0
    measured: int = 1


class _Kept(Struct, frozen=True):
    """What is in the file: the best of several measurements, and what they depend on."""

    key: str
    speed: NodeSpeed


Typical = Callable[[Sequence[float]], float]  # which of the times that calls took

_measuring = threading.Lock()  # two at a time would measure each other
_known: dict[str, NodeSpeed] = {}  # in this process
_NOTHING = NodeSpeed(0.0, 0.0, measured=0)


def node_speed(
    threads: int, file: Path | None = None, directory: Path | None = None, *, memory_bytes: int | None = None
) -> NodeSpeed:
    """The speed of this machine on so many threads, and of the disk that `directory` is on: the same as long as the
    process lives. `file`: what was measured on the same hardware with the same kernels.

    If nothing is known yet, it computes on all these threads: to be called when nothing else does. It takes
    `MEMORY_BYTES` for a moment, but at most `memory_bytes`, or a quarter of what is available. With little memory,
    caches make it look quicker than it is.
    """
    key = _key(threads, directory)
    if key in _known:  # though it may be measured again just now
        return _known[key]
    with _measuring:
        if key not in _known:
            found = _read(file, key)
            if not found.measured:
                found = _better(found, threads, file, directory, memory_bytes)
            _known[key] = found
        return _known[key]


def measure_again(threads: int, file: Path, directory: Path | None = None) -> None:
    """For later starts: something else may have been running when it was measured. Does nothing if it was measured
    `STARTS` times, or not at all. As `node_speed`, to be called when nothing else computes."""
    with _measuring:
        found = _read(file, _key(threads, directory))
        if 0 < found.measured < STARTS:
            _better(found, threads, file, directory, None)


def _better(
    found: NodeSpeed, threads: int, file: Path | None, directory: Path | None, memory_bytes: int | None
) -> NodeSpeed:
    """With another measurement, kept."""
    most = available_bytes() // 4 if memory_bytes is None else memory_bytes
    best = _best_of(found, _measure(threads, directory, most))
    if file:
        keep(file, _Kept(_key(threads, directory), best))
    return best


def _measure(threads: int, directory: Path | None, memory_bytes: int) -> NodeSpeed:
    began_s = time.monotonic()
    kernels.set_threads(threads)
    home = kernels.home_of("cpu")
    disk = disk_speed(directory) if directory else 0.0
    quota = cgroup.processors()
    typical = _within_quota if quota is not None and quota < threads else _second_least
    speed = NodeSpeed(_memory_speed(home, memory_bytes, typical), _long_speed(home, typical), disk)
    log.info(
        "measured the speed of this machine in %.1f s: %s", time.monotonic() - began_s, _described(speed)
    )
    return speed


def _described(speed: NodeSpeed) -> str:
    disk = f", {format_bytes(speed.disk_bytes_per_s)}/s from disk" * bool(speed.disk_bytes_per_s)
    return f"{format_bytes(speed.memory_bytes_per_s)}/s from memory, {speed.flops / 1e9:.3g} GFLOP/s{disk}"


def _best_of(one: NodeSpeed, other: NodeSpeed) -> NodeSpeed:
    return NodeSpeed(
        max(one.memory_bytes_per_s, other.memory_bytes_per_s),
        max(one.flops, other.flops),
        max(one.disk_bytes_per_s, other.disk_bytes_per_s),
        one.measured + other.measured,
    )


def disk_speed(directory: Path) -> float:
    """Bytes per second at which files in `directory` are read, past the page cache: of the largest one that is there,
    or of one that is written for a moment. 0, with a line in the log, if that fails."""
    try:
        largest = max(files_below(directory), default=(0, directory))
        if largest[0] >= DISK_FILE_BYTES:
            return read_speed(largest[1], DISK_S)
        with TemporaryDirectory(dir=directory, prefix=".speed-") as place:
            path = Path(place) / "read"
            _fill(path)
            return read_speed(path, DISK_S)
    except (OSError, OffloadError) as error:
        log.warning("the speed of the disk of %s is not known: %s", directory, error)
        return 0.0


def _memory_speed(home: kernels.ComputeHome, memory_bytes: int, typical: Typical) -> float:
    """Bytes per second of weights, one row of input at a time."""
    bands = min(memory_bytes, MEMORY_BYTES) // TYPE.matrix_bytes(BAND_ROWS, COLS)
    weights, seconds = _timed(home, 1, max(1, bands) * BAND_ROWS, typical)
    return weights.nbytes / seconds


def _long_speed(home: kernels.ComputeHome, typical: Typical) -> float:
    """Operations per second with many rows of input."""
    weights, seconds = _timed(home, LONG_ROWS, LONG_MATRIX_ROWS, typical)
    return 2 * LONG_ROWS * weights.rows * COLS / seconds


def _timed(home: kernels.ComputeHome, inputs: int, most_rows: int, typical: Typical) -> tuple[Matrix, float]:
    """(weights, seconds of multiplying them by so many rows of input). A quick machine gets more of them, so that
    caches do not hold them, and beginning and end of a call do not count for much."""
    x = home.place(np.ones((inputs, COLS), np.float32))
    rows = min(FIRST_ROWS, most_rows)
    while True:
        linear = _linear(rows)
        took = _calls_s(lambda linear=linear: home.linears(x, linear), 0.0)  # type: ignore[misc]
        if took[0] > ENOUGH_S or rows == most_rows:
            break
        rows = min(4 * rows, most_rows)
    took += _calls_s(lambda: home.linears(x, linear), MEASURE_S - took[0])
    return linear.matrices[0], max(1e-9, typical(took))


def _linear(rows: int) -> Linears:
    """Weights that lie in memory as those of models do. What they are does not matter."""
    data = Arena().take(TYPE.matrix_bytes(rows, COLS))
    data[:] = 0x11  # every page has to be written to, or all would be one page of zeros
    return Linears((Matrix(TYPE, data, rows, COLS),))


def _calls_s(call: Callable[[], object], seconds: float) -> list[float]:
    """What each call took in a time; of one at least."""
    took: list[float] = []
    until_s = time.monotonic() + seconds
    while not took or time.monotonic() < until_s:
        began_s = time.perf_counter()
        call()
        took.append(time.perf_counter() - began_s)
    return took


def _second_least(took: Sequence[float]) -> float:
    """Neither luck nor an interruption."""
    return sorted(took)[min(1, len(took) - 1)]


def _within_quota(took: Sequence[float]) -> float:
    """Where a quota stops the process for a part of every tenth of a second, only all calls together tell. Who uses it
    up is stopped in the middle of a step, and everybody waits, so some of it is to be left."""
    return sum(took) / len(took) / QUOTA_USED


def files_below(directory: Path) -> list[tuple[int, Path]]:
    """(bytes, path) of files in a directory and below it, some thousands at most."""
    found: list[tuple[int, Path]] = []
    for place, _, names in os.walk(directory):
        for name in names:
            path = Path(place) / name
            if path.is_file() and not path.is_symlink():
                found.append((path.stat().st_size, path))
        if len(found) > 4096:
            break
    return found


def _fill(path: Path) -> None:
    """Writes a file for as long as that may take, and waits until it is on the disk."""
    piece = os.urandom(DISK_PIECE)
    until_s = time.monotonic() + WRITE_S
    with path.open("wb", buffering=0) as file:
        for _ in range(DISK_FILE_BYTES // DISK_PIECE):
            file.write(piece)
            os.fsync(file.fileno())
            if time.monotonic() > until_s:
                break


def _key(threads: int, directory: Path | None) -> str:
    """What speed depends on, as text."""
    disk = directory.stat().st_dev if directory and directory.exists() else None
    return f"{kernels_key()} | {os.cpu_count()} | {threads} | {cgroup.processors()} | {disk}"


def kernels_key() -> str:
    """What it depends on whether kernels are right, as text."""
    return f"{platform.machine()} | {_processor()} | {kernels.home()} | {_library_version()}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return platform.processor()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model")))
    return next(named, platform.processor())


def _library_version() -> str:
    """Other kernels have another speed."""
    library = Path(kernels.__file__).with_name("libshoal.so")
    return f"{package_version()} {library.stat().st_mtime_ns if library.exists() else 0}"


def _read(file: Path | None, key: str) -> NodeSpeed:
    found = kept(file, _Kept) if file else None
    return found.speed if found is not None and found.key == key else _NOTHING
