"""Looks again at a machine that was measured long ago: whether memory, processor and disk are as quick as then.

Takes a few seconds between requests, three rounds of each. What differs by more than its rounds do from each other, and
by more than predictions may be off anyhow, is taken as it is now.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import NamedTuple

from shoal import kernels
from shoal.daemon.cluster.speed import files_below
from shoal.kernels import WEIGHT_TYPES
from shoal.offload.errors import OffloadError
from shoal.offload.read_speed import read_speed
from shoal.partition.throughput.laws import product, read_bytes_per_s
from shoal.partition.throughput.prediction import MEASURED, Binding
from shoal.partition.throughput.profile import Corrections, Device, ReadLaw, RowsLaw
from shoal.partition.throughput.weights_of import Product

from .brief_profile import BRIEF_READ_S, Interrupted, enough_is_free
from .disk_laws import READS, read_law
from .kernel_laws import Pool, call_s, rows_laws
from .profiling import LEAST_FILE_BYTES, others_compute

log = logging.getLogger(__name__)

ROUNDS = 3


class Looked(NamedTuple):
    """How many times as long parts take as when they were measured, of those that have changed; and what they take."""

    changed: Mapping[Binding, float]
    products: tuple[RowsLaw, ...] = ()
    reads: ReadLaw | None = None

    def applied(self, device: Device) -> Device:
        """The device as it is now. What running taught of a part that has changed was about another one."""
        memory, compute = (self.changed.get(part, 1.0) for part in ("memory", "compute"))
        kinds = {law.kind for law in self.products}
        kept = tuple(law for law in device.products if law.kind not in kinds)
        forgotten = {part: getattr(Corrections(), part) for part in self.changed}
        found = replace(
            device,
            memory_bytes_per_s=device.memory_bytes_per_s / memory,
            flops=device.flops / compute,
            products=(*kept, *self.products),
            corrections=replace(device.corrections, **forgotten),
        )
        if self.reads is None:
            return found
        return replace(found, reads=self.reads, disk_bytes_per_s=max(self.reads.bytes_per_s))

    def describe(self) -> str:
        """In words; "" if all is as it was."""
        said = (f"{part} takes {times:.2g} times as long" for part, times in self.changed.items())
        return ", ".join(said)


def look_again(device: Device, place: Path, kinds: Sequence[str], idle: Callable[[], bool]) -> Looked | None:
    """What has changed. None where memory is short, where others compute, and when something is to be done. Of stored
    types, the first of `kinds` that has a table is looked at."""
    if not enough_is_free() or others_compute(device.threads):
        return None
    try:
        return _looked(device, place, kinds, idle)
    except Interrupted:
        return None


def _looked(device: Device, place: Path, kinds: Sequence[str], idle: Callable[[], bool]) -> Looked:
    def going(_: str) -> None:
        if not idle():
            raise Interrupted

    tables = {law.kind for law in device.products}
    kind = next((it for it in WEIGHT_TYPES if it.name in tables and it.name in kinds), None)
    kind = kind or next((it for it in WEIGHT_TYPES if it.name in tables), None)
    changed: dict[Binding, float] = {}
    products: tuple[RowsLaw, ...] = ()
    if kind is not None:
        kernels.set_threads(device.threads)
        home, pool = kernels.home_of("cpu"), Pool()
        rounds = [tuple(rows_laws(home, pool, [kind], call_s(home), math.inf, going)) for _ in range(ROUNDS)]
        parts: tuple[tuple[Binding, int], ...] = (("memory", 0), ("compute", -1))
        for part, point in parts:
            changed |= _changed(part, [_times(device, laws[-1], point) for laws in rounds])
        if changed:
            products = tuple(map(_middle, *rounds))
    going("")
    disk = _disk_times(device, place, going)
    if changed_disk := _changed("disk", disk):
        path = _largest(place)
        assert path is not None
        return Looked(changed | changed_disk, products, read_law(path, going))
    return Looked(changed, products)


def _changed(part: Binding, times: Sequence[float]) -> dict[Binding, float]:
    """{part: how many times as long it takes}, if rounds that differ so much can tell; else {}."""
    if not times:
        return {}
    spread, usual = max(times) / min(times), median(times)
    least = max(1 + MEASURED[part], spread)
    return {part: usual} if usual > least or usual < 1 / least else {}


def _times(device: Device, law: RowsLaw, point: int) -> float:
    """How many times as long a product takes as by the device's own tables."""
    matrix = Product(law.kind, 1, 1, round(law.nbytes))
    return matrix.nbytes * law.byte_s[point] / product(device, matrix, law.rows[point]).seconds


def _middle(*laws: RowsLaw) -> RowsLaw:
    """The medians of tables of one type and size."""
    return replace(laws[0], byte_s=tuple(map(median, zip(*(law.byte_s for law in laws), strict=True))))


def _disk_times(device: Device, place: Path, going: Callable[[str], None]) -> list[float]:
    """How many times as long reading takes, each time. [] if nothing large is there, as nothing is written for that, or
    if the disk was not measured."""
    path, before = _largest(place), read_bytes_per_s(device, READS[-1])
    if path is None or not before or device.reads is None:
        return []
    try:
        times = []
        for _ in range(ROUNDS):
            going("")
            times.append(before / max(1.0, read_speed(path, BRIEF_READ_S, READS[-1])))
        return times
    except OffloadError as error:
        log.info("the disk could not be looked at: %s", error)
        return []


def _largest(place: Path) -> Path | None:
    nbytes, path = max(files_below(place), default=(0, place))
    return path if nbytes >= LEAST_FILE_BYTES else None
