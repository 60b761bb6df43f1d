"""Looks again at a machine that was measured before: whether memory, processor and disk are as quick as then.

Takes a few seconds between requests, three rounds of each. What differs by more than its rounds do from each other, and
by more than machines do from minute to minute, has changed; whoever asks takes what a second look says, too.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from types import MappingProxyType
from typing import NamedTuple

from shoal import kernels
from shoal.daemon.cluster.speed import files_below
from shoal.kernels import NARROW_INPUTS, WEIGHT_TYPES
from shoal.offload.errors import OffloadError
from shoal.partition.throughput.explain import with_faster_disk
from shoal.partition.throughput.laws import block_bytes_per_s, product
from shoal.partition.throughput.prediction import Binding
from shoal.partition.throughput.profile import Corrections, Device, RowsLaw
from shoal.partition.throughput.weights_of import Product

from .brief_profile import BRIEF_READ_S, Interrupted, enough_is_free
from .disk_laws import READS, read_once, reread_speed
from .kept_profile import LEAST_CHANGE
from .kernel_laws import ROUNDS, Pool, middle, table_rounds
from .profiling import LEAST_FILE_BYTES, others_compute

log = logging.getLogger(__name__)

_SAME = 1e-6  # of a factor: rounding


class Looked(NamedTuple):
    """How many times as long parts take as the profile says, of those that have changed; and the tables of the type
    that was looked at, as they are now."""

    changed: Mapping[Binding, float]
    products: tuple[RowsLaw, ...] = ()

    def applied(self, device: Device) -> Device:
        """The device as it is now: tables of other types have changed as that one did, and a disk with blocks of all
        sizes as with the largest. What running taught of a part that has changed was about another one."""
        memory, compute, disk = (self.changed.get(part, 1.0) for part in ("memory", "compute", "disk"))
        kinds = {law.kind for law in self.products}
        moved = device.slowed(memory, compute)
        kept = tuple(law for law in moved.products if law.kind not in kinds)
        forgotten = {part: getattr(Corrections(), part) for part in self.changed}
        corrections = replace(device.corrections, **forgotten)
        found = replace(moved, products=(*kept, *self.products), corrections=corrections)
        return with_faster_disk(found, 1 / disk)

    def also_in(self, before: Looked) -> Looked:
        """What an earlier look saw as well: in the same direction, and as far as both did."""
        changed: dict[Binding, float] = {}
        for part, times in self.changed.items():
            then = before.changed.get(part, 1.0)
            if (times > 1) == (then > 1) and then != 1:
                changed[part] = min(times, then) if times > 1 else max(times, then)
        tables = self.products if changed.keys() & {"memory", "compute"} else ()
        return Looked(changed, tables)

    def since_measured(self, drift: Mapping[Binding, float]) -> dict[Binding, float]:
        """How far the machine has drifted since it was measured, if it had drifted so far before: all of that stands in
        its figures, however little it is."""
        both = {
            part: drift.get(part, 1.0) * self.changed.get(part, 1.0) for part in {**drift, **self.changed}
        }
        return {part: times for part, times in both.items() if abs(times - 1) > _SAME}


def look_again(
    device: Device,
    place: Path,
    kinds: Sequence[str],
    idle: Callable[[], bool],
    drift: Mapping[Binding, float] = MappingProxyType({}),
) -> Looked | None:
    """What has changed; `drift`: what had before, of the device as it is. None where memory is short, where others
    compute, before or afterwards, and when something is to be done, which is asked for between any two points of a
    table and any two reads. Of stored types, the first of `kinds` that has tables is looked at: others change about as
    much, since what changes is memory's speed or the clock's (medians of 14 types, of two profiles: 1.02 to 1.10 times
    with one row, 1.01 to 1.25 with 256)."""
    if not enough_is_free() or others_compute(device.threads):
        return None
    try:
        found = _looked(device, place, kinds, idle, drift)
    except Interrupted:
        return None
    return None if others_compute(device.threads) else found


def _looked(
    device: Device,
    place: Path,
    kinds: Sequence[str],
    idle: Callable[[], bool],
    drift: Mapping[Binding, float],
) -> Looked:
    def going(_: str) -> None:
        if not idle():
            raise Interrupted

    tables = {law.kind for law in device.products}
    known = {kind.name: kind for kind in WEIGHT_TYPES}
    kind = next((known[name] for name in (*kinds, *known) if name in tables and name in known), None)
    changed: dict[Binding, float] = {}
    products: tuple[RowsLaw, ...] = ()
    if kind is not None:
        kernels.set_threads(device.threads)
        rounds = table_rounds(kernels.home_of("cpu"), Pool(), [kind], going)
        parts: tuple[tuple[Binding, int], ...] = (("memory", 0), ("compute", -1))
        for part, point in parts:
            changed |= _changed(part, [median(_times(device, it, point) for it in laws) for laws in rounds])
        if changed:
            products = middle(rounds)
    path = _largest(place)
    if path is not None:
        changed |= _changed_disk(_disk_times(device, path, going), drift.get("disk", 1.0))
    return Looked(changed, products)


def _changed(part: Binding, times: Sequence[float]) -> dict[Binding, float]:
    """{part: how many times as long it takes}, if rounds that differ so much can tell; else {}."""
    if not times:
        return {}
    spread, usual = max(times) / min(times), median(times)
    least = max(LEAST_CHANGE, spread)
    return {part: usual} if usual > least or usual < 1 / least else {}


def _changed_disk(times: Sequence[float], drift: float) -> dict[Binding, float]:
    """As `_changed`, of a disk that takes `drift` times as long as when it was measured. That it is quicker than then
    is not believed: what lies behind it may have kept what was read."""
    changed = {part: max(usual, 1 / drift) for part, usual in _changed("disk", times).items()}
    return {part: usual for part, usual in changed.items() if usual != 1}


def _times(device: Device, law: RowsLaw, point: int) -> float:
    """How many times as long a product takes as by the device's own tables of inputs with as many bits."""
    matrix = Product(law.kind, 1, 1, round(law.nbytes), narrow=True, expert=law.experts)
    known = product(device, matrix, law.rows[point], narrow=law.input_bits == NARROW_INPUTS)
    return matrix.nbytes * law.byte_s[point] / known.seconds


def _disk_times(device: Device, path: Path, going: Callable[[str], None]) -> list[float]:
    """How many times as long reading takes, each time. [] if the disk was not measured."""
    if device.reads is None:
        return []
    before = block_bytes_per_s(device, READS[-1])
    try:
        going("")
        read_once(path)
        times = []
        for _ in range(ROUNDS):
            going("")
            times.append(before / reread_speed(path, BRIEF_READ_S))
        return times
    except OffloadError as error:
        log.info("the disk could not be looked at: %s", error)
        return []


def _largest(place: Path) -> Path | None:
    """None if nothing large is there: nothing is written for that."""
    nbytes, path = max(files_below(place), default=(0, place))
    return path if nbytes >= LEAST_FILE_BYTES else None
