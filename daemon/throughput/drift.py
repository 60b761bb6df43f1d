"""Looks again at a machine that was measured long ago: whether memory, processor and disk are as quick as then.

Takes a few seconds between requests, three rounds of each. What differs by more than its rounds do from each other, and
by more than machines do from minute to minute, has changed; whoever asks takes what a second look says, too.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import NamedTuple

from shoal import kernels
from shoal.daemon.cluster.speed import files_below
from shoal.kernels import NARROW_INPUTS, WEIGHT_TYPES
from shoal.offload.errors import OffloadError
from shoal.partition.throughput.laws import block_bytes_per_s, product
from shoal.partition.throughput.prediction import Binding
from shoal.partition.throughput.profile import Corrections, Device, ReadLaw, RowsLaw
from shoal.partition.throughput.weights_of import Product

from .brief_profile import BRIEF_READ_S, Interrupted, enough_is_free
from .disk_laws import READS, read_law, read_once, reread_speed
from .kernel_laws import ROUNDS, Pool, middle, table_rounds
from .profiling import LEAST_FILE_BYTES, others_compute

log = logging.getLogger(__name__)

LEAST_CHANGE = 1.2  # times: a machine that others share differs by so much from one minute to the next


class Looked(NamedTuple):
    """How many times as long parts take as when they were measured, of those that have changed; the tables of the type
    that was looked at, and the disk's, as they are now."""

    changed: Mapping[Binding, float]
    products: tuple[RowsLaw, ...] = ()
    reads: ReadLaw | None = None

    def applied(self, device: Device) -> Device:
        """The device as it is now: tables of other types have changed as that one did. What running taught of a part
        that has changed was about another one."""
        memory, compute = (self.changed.get(part, 1.0) for part in ("memory", "compute"))
        kinds = {law.kind for law in self.products}
        moved = device.slowed(memory, compute)
        kept = tuple(law for law in moved.products if law.kind not in kinds)
        forgotten = {part: getattr(Corrections(), part) for part in self.changed}
        found = replace(
            moved, products=(*kept, *self.products), corrections=replace(device.corrections, **forgotten)
        )
        if self.reads is None:
            return found
        return replace(found, reads=self.reads, disk_bytes_per_s=max(self.reads.bytes_per_s))

    def also_in(self, before: Looked) -> Looked:
        """What an earlier look saw as well: in the same direction, and as far as both did."""
        changed: dict[Binding, float] = {}
        for part, times in self.changed.items():
            then = before.changed.get(part, 1.0)
            if (times > 1) == (then > 1) and then != 1:
                changed[part] = min(times, then) if times > 1 else max(times, then)
        tables = self.products if changed.keys() & {"memory", "compute"} else ()
        return Looked(changed, tables, self.reads if "disk" in changed else None)

    def describe(self) -> str:
        """In words; "" if all is as it was."""
        said = (f"{part} takes {times:.2g} times as long" for part, times in self.changed.items())
        return ", ".join(said)


def look_again(device: Device, place: Path, kinds: Sequence[str], idle: Callable[[], bool]) -> Looked | None:
    """What has changed. None where memory is short, where others compute, before or afterwards, and when something is
    to be done, which is asked for between any two points of a table and any two reads. Of stored types, the first of
    `kinds` that has tables is looked at: others change about as much, since what changes is memory's speed or the
    clock's (medians of 14 types, of two profiles: 1.02 to 1.10 times with one row, 1.01 to 1.25 with 256)."""
    if not enough_is_free() or others_compute(device.threads):
        return None
    try:
        found = _looked(device, place, kinds, idle)
    except Interrupted:
        return None
    return None if others_compute(device.threads) else found


def _looked(device: Device, place: Path, kinds: Sequence[str], idle: Callable[[], bool]) -> Looked:
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
    if path is None:
        return Looked(changed, products)
    if slower := _slower_disk(_disk_times(device, path, going)):
        reads, _ = read_law(path, going)
        return Looked(changed | slower, products, reads)
    return Looked(changed, products)


def _changed(part: Binding, times: Sequence[float]) -> dict[Binding, float]:
    """{part: how many times as long it takes}, if rounds that differ so much can tell; else {}."""
    if not times:
        return {}
    spread, usual = max(times) / min(times), median(times)
    least = max(LEAST_CHANGE, spread)
    return {part: usual} if usual > least or usual < 1 / least else {}


def _slower_disk(times: Sequence[float]) -> dict[Binding, float]:
    """As `_changed`. A disk that seems quicker is not believed: what lies behind it may have kept what was read."""
    return {part: usual for part, usual in _changed("disk", times).items() if usual > 1}


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
