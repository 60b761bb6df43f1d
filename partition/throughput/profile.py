"""`Profile`: what machines can do, as data: devices with their laws, links between them, accelerators.

A profile is measured (`daemon.throughput`) or written by hand. One that is written by hand gives a few figures for each
device, and the rest follows from the defaults of this module. Figures come from files and from other machines, so
`check_profile` looks at each before anybody computes with them. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from ..errors import ProfileError
from ..hardware_guesses import (
    COPY_S,
    DEVICE_LAYER_S,
    DEVICE_SCRATCH_BYTES,
    DISK_BYTES_PER_S,
    FLOPS,
    LAYER_S,
    LOGIT_S,
    MEMORY_BYTES_PER_S,
    MIXTURE_S,
    ROW_SHARE,
    STEP_S,
)
from .prediction import Binding

ANY = "*"  # in a link: every device that no other link names; in a table: every type that has none
MAX_DEVICES = 64
MAX_POINTS = 256  # of a table
MAX_LAWS = 256

CORRECTED = (0.5, 2.0)  # the least and the most of a correction
_FOLLOW = 0.2  # how much of what was measured goes into it each time


@dataclass(frozen=True)
class RowsLaw:
    """What multiplying with weights of one stored type takes, by the rows that are multiplied at once. A table and no
    line, because kernels change their method at certain rows. `nbytes`: of the matrices that were measured. `byte_s`:
    seconds for each byte of weights, with so many `rows`."""

    kind: str  # 'Q4_K', or ANY
    nbytes: float
    rows: tuple[int, ...]
    byte_s: tuple[float, ...]


@dataclass(frozen=True)
class AttentionLaw:
    """What attention to K and V of one stored type takes: seconds for each number of a query (heads × head_dim) and
    each token that it sees, by how many it sees. `decode_s`: one token at a time, `prompt_s`: of a long chunk."""

    kv_type: str
    context: tuple[int, ...]
    decode_s: tuple[float, ...]
    prompt_s: tuple[float, ...]


@dataclass(frozen=True)
class ReadLaw:
    """How fast a disk reads past the page cache with some reads in flight, by the bytes of each read."""

    nbytes: tuple[int, ...]
    bytes_per_s: tuple[float, ...]


@dataclass(frozen=True)
class Overheads:
    """Seconds that do not depend on the size of weights (`hardware_guesses`)."""

    step_s: float = STEP_S
    layer_s: float = LAYER_S
    mixture_s: float = MIXTURE_S
    logit_s: float = LOGIT_S


@dataclass(frozen=True)
class Contention:
    """What is left of a speed while something else goes on, from 0 (nothing) to 1 (all of it)."""

    compute_keeps: float = 0.93  # while the disk reads
    disk_keeps: float = 0.95  # while the processor computes


@dataclass(frozen=True)
class Corrections:
    """How many times longer the parts of steps took while models ran than they were predicted to: within bounds, since
    what was measured by itself stays the truth to begin with."""

    memory: float = 1.0
    compute: float = 1.0
    disk: float = 1.0
    network: float = 1.0
    link: float = 1.0
    overhead: float = 1.0

    @property
    def learnt(self) -> dict[str, float]:
        """Those of parts that steps have taught something about."""
        return {part: times for part, times in vars(self).items() if times != 1}

    def times(self, parts: Mapping[Binding, float]) -> float:
        """Of a step whose parts take so many seconds."""
        whole = sum(parts.values())
        return sum(getattr(self, part) * seconds for part, seconds in parts.items()) / whole if whole else 1.0

    def moved(self, parts: Mapping[Binding, float], times: float) -> Corrections:
        """After a step with these parts took `times` as long as predicted: a little of that, each part by its
        weight."""
        whole = sum(parts.values())
        low, high = CORRECTED
        moved = {
            part: min(high, max(low, getattr(self, part) * times ** (_FOLLOW * seconds / whole)))
            for part, seconds in parts.items()
            if whole
        }
        return replace(self, **moved)


@dataclass(frozen=True)
class Accelerator:
    """A device with memory of its own behind a link to its host. `step_s`, `layer_s`, `mixture_s`: as `Overheads`, of
    what it computes. `copy_s`: until a small copy has come to one side, as the other knows. `scratch_bytes`: of
    its kernels."""

    name: str
    memory_bytes: float
    memory_bytes_per_s: float
    flops: float
    host_bytes_per_s: float
    products: tuple[RowsLaw, ...] = ()
    step_s: float = STEP_S
    layer_s: float = DEVICE_LAYER_S
    mixture_s: float = MIXTURE_S
    copy_s: float = COPY_S
    scratch_bytes: float = DEVICE_SCRATCH_BYTES
    measured: bool = False

    @property
    def computing(self) -> Device:
        """As a machine whose memory and processor it is."""
        overheads = Overheads(self.step_s, self.layer_s, self.mixture_s, 0.0)
        speeds = self.memory_bytes, self.memory_bytes_per_s, self.flops
        return Device(self.name, *speeds, products=self.products, overheads=overheads, measured=self.measured)


@dataclass(frozen=True)
class Device:
    """One machine. `memory_bytes`: what Shoal may use of it, all in all. `memory_bytes_per_s`, `flops` (a
    multiplication and an addition count as two), `disk_bytes_per_s`: what programs reach on `threads` threads, not what
    makers print. Where a law is missing, those figures are used instead."""

    name: str
    memory_bytes: float
    memory_bytes_per_s: float
    flops: float
    disk_bytes_per_s: float = 0.0  # 0 = there is no place for weights on it
    threads: int = 1
    accelerators: tuple[Accelerator, ...] = ()
    products: tuple[RowsLaw, ...] = ()
    attention: tuple[AttentionLaw, ...] = ()
    reads: ReadLaw | None = None
    overheads: Overheads = Overheads()
    contention: Contention = Contention()
    corrections: Corrections = Corrections()
    touch_bytes_per_s: float = 0.0  # memory is used for the first time; 0 = a quarter of memory_bytes_per_s
    write_bytes_per_s: float = 0.0  # of the disk; 0 = half of disk_bytes_per_s
    band_bytes_per_s: float = 0.0  # rows are laid out for kernels; 0 = an eighth of memory_bytes_per_s
    port_bytes_per_s: float = 0.0  # of all links together; 0 = as the fastest link
    measured: bool = False

    @property
    def first_touch_bytes_per_s(self) -> float:
        return self.touch_bytes_per_s or self.memory_bytes_per_s / 4

    @property
    def pack_write_bytes_per_s(self) -> float:
        return self.write_bytes_per_s or self.disk_bytes_per_s / 2

    @property
    def laid_out_bytes_per_s(self) -> float:
        return self.band_bytes_per_s or self.memory_bytes_per_s / 8

    def on(self, threads: int | None) -> Device:
        """The device with other threads than it was measured with. Half of its threads are taken to use all of its
        memory's speed; what is computed goes with the threads. More threads do nothing that was not measured."""
        if threads is None or threads >= self.threads:
            return self
        part = threads / self.threads
        read_s = 1 / self.memory_bytes_per_s  # of a byte, of what a product takes

        def alone(byte_s: float) -> float:
            reading = min(byte_s, read_s)
            return reading / min(1.0, 2 * part) + (byte_s - reading) / part

        slower = tuple(replace(law, byte_s=tuple(map(alone, law.byte_s))) for law in self.products)
        attention = tuple(
            replace(
                law,
                decode_s=tuple(it / part for it in law.decode_s),
                prompt_s=tuple(it / part for it in law.prompt_s),
            )
            for law in self.attention
        )
        return replace(
            self,
            threads=threads,
            memory_bytes_per_s=self.memory_bytes_per_s * min(1.0, 2 * part),
            flops=self.flops * part,
            products=slower,
            attention=attention,
        )


def unmeasured(threads: int, memory_bytes: float = 0.0) -> Device:
    """This machine, as long as nobody has measured it (`hardware_guesses`)."""
    rows = (1, 256)
    byte_s = tuple((1 + ROW_SHARE * (count - 1)) / MEMORY_BYTES_PER_S for count in rows)
    return Device(
        "this machine",
        memory_bytes,
        MEMORY_BYTES_PER_S,
        FLOPS,
        DISK_BYTES_PER_S,
        threads,
        products=(RowsLaw(ANY, 1.0, rows, byte_s),),
    )


@dataclass(frozen=True)
class ProfileLink:
    """Between two devices, or one and all others (`ANY`). `latency_s`: of a small message, one way."""

    between: tuple[str, str]
    latency_s: float
    bytes_per_s: float


@dataclass(frozen=True)
class Profile:
    """All machines that a model may run on. The first is the head."""

    devices: tuple[Device, ...]
    links: tuple[ProfileLink, ...] = ()

    @property
    def head(self) -> Device:
        return self.devices[0]

    def link(self, one: str, other: str) -> ProfileLink | None:
        """The link between two devices; one that names both counts before one that names one, and that before one that
        names none."""
        ways = ((one, other), (one, ANY), (ANY, other), (ANY, ANY))
        for way in ways:
            for link in self.links:
                if link.between in (way, way[::-1]):
                    return link
        return None


Law = RowsLaw | AttentionLaw | ReadLaw

_LIMITS: Mapping[str, tuple[float, float]] = {
    "memory_bytes": (1e6, 2.0**60),
    "memory_bytes_per_s": (1e6, 1e16),
    "flops": (1e6, 1e20),
    "disk_bytes_per_s": (0, 1e14),
    "host_bytes_per_s": (1e3, 1e14),
    "threads": (1, 1 << 16),
    "touch_bytes_per_s": (0, 1e16),
    "write_bytes_per_s": (0, 1e14),
    "band_bytes_per_s": (0, 1e16),
    "port_bytes_per_s": (0, 1e14),
    "latency_s": (0, 3600),
    "bytes_per_s": (1, 1e14),
    "step_s": (0, 10),
    "layer_s": (0, 1),
    "mixture_s": (0, 1),
    "logit_s": (0, 1e-3),
    "copy_s": (0, 1),
    "scratch_bytes": (0, 2.0**50),
    "compute_keeps": (0.01, 1),
    "disk_keeps": (0.01, 1),
    **dict.fromkeys(("memory", "compute", "disk", "network", "link", "overhead"), CORRECTED),
}
_LEAST_PER_S = 1e3  # of speeds that may also be 0, which means that there is none
_POINTS: Mapping[str, tuple[float, float]] = {
    "rows": (1, 1 << 24),
    "byte_s": (1e-16, 1.0),
    "context": (1, 1 << 26),
    "decode_s": (1e-18, 1.0),
    "prompt_s": (1e-18, 1.0),
    "nbytes": (1, 1 << 40),
    "bytes_per_s": (1, 1e14),
}


def check_profile(profile: Profile) -> Profile:
    """The profile itself. Raises ProfileError with field, value and limit of the first figure that cannot be true."""
    if not 1 <= len(profile.devices) <= MAX_DEVICES:
        raise ProfileError(f"devices: there are {len(profile.devices)}, must be from 1 to {MAX_DEVICES}")
    names: set[str] = set()
    for place, device in enumerate(profile.devices):
        where = f"devices[{place}]"
        _check_name(f"{where}.name", device.name, names)
        names.add(device.name)
        _check_figures(where, vars(device))
        _check_figures(f"{where}.overheads", vars(device.overheads))
        _check_figures(f"{where}.contention", vars(device.contention))
        _check_figures(f"{where}.corrections", vars(device.corrections))
        within: set[str] = set()
        for number, accelerator in enumerate(device.accelerators):
            _check_name(f"{where}.accelerators[{number}].name", accelerator.name, within)
            within.add(accelerator.name)
            path = f"{where}.accelerators[{number}]"
            _check_figures(path, vars(accelerator))
            for spot, table in enumerate(accelerator.products):
                _check_law(f"{path}.products[{spot}]", table)
        for path, law in _laws(where, device):
            _check_law(path, law)
    for number, link in enumerate(profile.links):
        where = f"links[{number}]"
        for end in link.between:
            if end != ANY and end not in names:
                known = ", ".join(sorted(names))
                raise ProfileError(
                    f"{where}.between has {end[:80]!r}: no device has this name (there are {known})"
                )
        if link.between[0] == link.between[1] != ANY:
            raise ProfileError(f"{where}.between={list(link.between)}: must be two devices")
        for before, other in enumerate(profile.links[:number]):
            if other.between in (link.between, link.between[::-1]):
                raise ProfileError(
                    f"{where}.between={list(link.between)}: as links[{before}]; must be named once"
                )
        _check_figures(where, vars(link))
    return profile


def _laws(where: str, device: Device) -> Iterator[tuple[str, Law]]:
    both: tuple[tuple[str, tuple[Law, ...]], ...] = (
        ("products", device.products),
        ("attention", device.attention),
    )
    for name, laws in both:
        if len(laws) > MAX_LAWS:
            raise ProfileError(f"{where}.{name} has {len(laws)} laws: must be at most {MAX_LAWS}")
        yield from ((f"{where}.{name}[{number}]", law) for number, law in enumerate(laws))
    if device.reads is not None:
        yield f"{where}.reads", device.reads


def _check_name(field: str, name: str, taken: Iterable[str]) -> None:
    if not name or name == ANY or len(name) > 200 or not name.isprintable():
        raise ProfileError(f"{field}={name[:80]!r}: must be 1 to 200 printable characters other than '*'")
    if name in taken:
        raise ProfileError(f"{field}={name[:80]!r}: another one has this name")


def _check_figures(where: str, figures: Mapping[str, object]) -> None:
    for field, value in figures.items():
        if field in _LIMITS and not isinstance(value, tuple):
            low, high = _LIMITS[field]
            check_figure(f"{where}.{field}", value, low, high)
            if field.endswith("per_s") and low == 0 < value < _LEAST_PER_S:  # type: ignore[operator]
                raise ProfileError(f"{where}.{field}={value:g}: must be 0, or at least {_LEAST_PER_S:g}")


def check_figure(field: str, value: object, low: float, high: float) -> None:
    """Raises ProfileError unless the value is a number within the limits."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not low <= value <= high:  # type: ignore[operator]
        said = f"{value:g}" if isinstance(value, float) else f"{value!s:.40}"
        raise ProfileError(f"{field}={said}: must be a number from {low:g} to {high:g}")


def _check_law(where: str, law: Law) -> None:
    tables = {field: value for field, value in vars(law).items() if isinstance(value, tuple)}
    for field, value in vars(law).items():
        if field in ("kind", "kv_type") and not (value and value.isprintable() and len(value) <= 40):
            raise ProfileError(f"{where}.{field}={value[:80]!r}: must be the name of a stored type")
        for number, point in enumerate(value if isinstance(value, tuple) else ()):
            check_figure(f"{where}.{field}[{number}]", point, *_POINTS[field])
        if field == "nbytes" and not isinstance(value, tuple):
            check_figure(f"{where}.nbytes", value, *_POINTS["nbytes"])
    (first, points), *others = tables.items()
    if not 1 <= len(points) <= MAX_POINTS:
        raise ProfileError(f"{where}.{first} has {len(points)} points: must have from 1 to {MAX_POINTS}")
    if list(points) != sorted(set(points)):
        raise ProfileError(f"{where}.{first} must rise from point to point")
    for field, value in others:
        if len(value) != len(points):
            raise ProfileError(
                f"{where}.{field} has {len(value)} points: must have {len(points)}, as {first}"
            )
