"""`Profile`: what machines can do, as data: devices with their laws, links between them, accelerators.

A profile is measured (`daemon.throughput`) or written by hand. One that is written by hand gives a few figures for each
device, and the rest follows from defaults. Figures come from files and other machines, so `profile_checks` looks at
each before anybody computes with them. Pure.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import accumulate

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
CORRECTED = (0.5, 2.0)  # the least and the most of a correction
_MOST_SWEPT, _SWEPT_POWER = 4.0, 0.75  # 18 → 68 ms: 1.15 to 1.47 → 3.3 ms; then nothing is left
_FOLLOW = 0.2  # how much of what was measured goes into it each time


@dataclass(frozen=True)
class RowsLaw:
    """What multiplying with weights of one stored type takes, by the rows that are multiplied at once. A table and no
    line, because kernels change their method at certain rows. `nbytes`: of the matrices that were measured. `byte_s`:
    seconds for each byte of weights, with so many `rows`. `input_bits`: to how many the rows are rounded. `experts`: of
    some that are called together, for which rows are gathered from a step's."""

    kind: str  # 'Q4_K', or ANY
    nbytes: float
    rows: tuple[int, ...]
    byte_s: tuple[float, ...]
    input_bits: int = 16
    experts: bool = False


@dataclass(frozen=True)
class CacheLaw:
    """What caches do for weights that come round in every step. `from_memory`: how far products with one row are on the
    way from what they take if caches hold all (0) to what they take if nothing is left there (1), by the bytes of a
    round. `products`: tables as a device's, if caches hold all."""

    nbytes: tuple[int, ...]
    from_memory: tuple[float, ...]
    products: tuple[RowsLaw, ...] = ()

    def share(self, nbytes: float) -> float:
        """`from_memory` of so many bytes, between points on a logarithmic scale."""
        place = bisect_left(self.nbytes, nbytes)
        if place in (0, len(self.nbytes)):
            return 1.0 if place else self.from_memory[0]
        low, high = self.nbytes[place - 1 : place + 1]
        part = math.log(nbytes / low) / math.log(high / low)
        return (1 - part) * self.from_memory[place - 1] + part * self.from_memory[place]

    def larger(self, times: float) -> CacheLaw:
        """If caches kept so many times as much."""
        return replace(self, nbytes=tuple(max(1, round(times * it)) for it in self.nbytes))

    def slowed(self, compute: float) -> CacheLaw:
        """If computing took so many times as long."""
        products = (replace(law, byte_s=tuple(compute * it for it in law.byte_s)) for law in self.products)
        return replace(self, products=tuple(products))


@dataclass(frozen=True)
class AttentionLaw:
    """What attention to K and V of one stored type takes: seconds for each number of a query (heads × head_dim) and
    each token that it sees, by how many it sees. `decode_s`: one token at a time, `prompt_s`: of a long chunk.
    `queries`: so many heads share one head of K and V, which is stored and read once for all of them. `head_dim`: of
    each head; a weight of softmax costs the same for few dimensions as for many."""

    kv_type: str
    context: tuple[int, ...]
    decode_s: tuple[float, ...]
    prompt_s: tuple[float, ...]
    queries: int = 4
    head_dim: int = 128


@dataclass(frozen=True)
class RingLaw:
    """How fast large blocks pass from a disk through a window, by the bytes of its ring, which caches may hold."""

    nbytes: tuple[int, ...]
    bytes_per_s: tuple[float, ...]


@dataclass(frozen=True)
class ReadLaw:
    """How fast blocks come from a disk, past the page cache, with some reads in flight, by the bytes of each, into
    memory that no cache holds. `rings`: through windows; None: as the largest blocks."""

    nbytes: tuple[int, ...]
    bytes_per_s: tuple[float, ...]
    rings: RingLaw | None = None


@dataclass(frozen=True)
class SweptLaw:
    """What a layer costs besides, by how long kernels compute in it and so leave less in the interpreter's caches."""

    passing_s: tuple[float, ...]
    layer_s: tuple[float, ...]

    def at(self, seconds: float) -> float:
        """On lines from 0 through the points, as far as they rise; beyond, up to `_MOST_SWEPT` times as much."""
        points, costs = (0.0, *self.passing_s), (0.0, *accumulate(self.layer_s, max))
        if seconds >= points[-1]:
            return costs[-1] * min(_MOST_SWEPT, math.pow(seconds / points[-1], _SWEPT_POWER))
        place = max(1, bisect_left(points, seconds))
        part = (seconds - points[place - 1]) / (points[place] - points[place - 1])
        return costs[place - 1] + part * (costs[place] - costs[place - 1])


@dataclass(frozen=True)
class Overheads:
    """Seconds that do not depend on the size of weights (`hardware_guesses`)."""

    step_s: float = STEP_S
    layer_s: float = LAYER_S
    mixture_s: float = MIXTURE_S
    logit_s: float = LOGIT_S
    expert_s: float = 0.0  # of each further expert that a layer uses than one row chooses
    stream_s: float = 0.0  # of each further stream in a step, and …
    stream_layer_s: float = 0.0  # … in each layer of it
    hidden_s: float = 0.0  # of a number of a hidden state, in each layer: what blocks give is added to it
    swept: SweptLaw | None = None  # None: a layer costs the same, however long kernels compute in it

    def swept_s(self, seconds: float) -> float:
        """Of a layer besides, in which kernels compute for so long."""
        return self.swept.at(seconds) if self.swept else 0.0


@dataclass(frozen=True)
class Contention:
    """What is left of a speed while something else goes on, from 0 (nothing) to 1 (all of it)."""

    compute_keeps: float = 0.93  # while the disk reads
    disk_keeps: float = 0.95  # while the processor computes


@dataclass(frozen=True)
class Repeats:
    """How far measurements of the same thing lay from their middle when they were made again and again, as shares of
    it; 0: they were made once."""

    memory_apart: float = 0.0
    compute_apart: float = 0.0
    disk_apart: float = 0.0

    @property
    def by_part(self) -> Mapping[Binding, float]:
        return {"memory": self.memory_apart, "compute": self.compute_apart, "disk": self.disk_apart}

    def or_more(self, other: Repeats) -> Repeats:
        """The larger of each."""
        return Repeats(*map(max, vars(self).values(), vars(other).values()))


@dataclass(frozen=True)
class Corrections:
    """How many times longer the parts of steps took while models ran than they were predicted to: within bounds, since
    what was measured by itself stays the truth to begin with."""

    memory: float = 1.0
    compute: float = 1.0
    disk: float = 1.0
    link: float = 1.0
    overhead: float = 1.0

    @property
    def learnt(self) -> dict[str, float]:
        """Those of parts that steps have taught something about."""
        return {part: times for part, times in vars(self).items() if times != 1}

    def moved(self, parts: Mapping[Binding, float], times: float, others_s: float = 0.0) -> Corrections:
        """After a step with these parts took `times` as long as predicted: a little of that, each part by its
        weight. `others_s`: what takes the step besides, and is not corrected."""
        whole = sum(parts.values()) + others_s
        low, high = CORRECTED
        moved = {
            part: min(high, max(low, getattr(self, part) * times ** (_FOLLOW * seconds / whole)))
            for part, seconds in parts.items()
            if whole
        }
        return replace(self, **moved)


@dataclass(frozen=True)
class CopyContention:
    """What is left of a speed while something else goes on, from 0 (nothing) to 1 (all of it), where weights come to a
    device."""

    host_keeps: float = 1.0  # of what the processor computes, while they come
    device_keeps: float = 1.0  # of what the device computes, while they come
    link_keeps: float = 1.0  # of copies, while either computes


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
    contention: CopyContention = CopyContention()
    measured: bool = False
    locked_bytes_per_s: float = 0.0  # of weights that pass, page-locked where they lie; 0: as of all else

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
    caches: CacheLaw | None = None  # None: weights always come from memory
    overheads: Overheads = Overheads()
    contention: Contention = Contention()
    repeats: Repeats = Repeats()
    corrections: Corrections = Corrections()
    touch_bytes_per_s: float = 0.0  # memory is used for the first time; 0 = a quarter of memory_bytes_per_s
    write_bytes_per_s: float = 0.0  # of the disk; 0 = half of disk_bytes_per_s
    band_bytes_per_s: float = 0.0  # rows are laid out for kernels; 0 = an eighth of memory_bytes_per_s
    port_bytes_per_s: float = 0.0  # of all links together; 0 = as the fastest link
    measured: bool = False
    guessed: bool = False  # nobody has said anything of it

    @property
    def first_touch_bytes_per_s(self) -> float:
        return self.touch_bytes_per_s or self.memory_bytes_per_s / 4

    @property
    def pack_write_bytes_per_s(self) -> float:
        return self.write_bytes_per_s or self.disk_bytes_per_s / 2

    @property
    def laid_out_bytes_per_s(self) -> float:
        return self.band_bytes_per_s or self.memory_bytes_per_s / 8

    def going_round(self, nbytes: float) -> Device:
        """If so many bytes come round in every step, of which caches keep some: its memory is as quick then as both are
        together."""
        share = self.caches.share(nbytes) if self.caches else 1.0
        if self.caches is None or share >= 1:
            return self
        kept = {replace(law, byte_s=()): law.byte_s for law in self.caches.products}
        products, far_s, near_s = [], 0.0, 0.0
        for law in self.products:
            near = kept.get(replace(law, byte_s=()), law.byte_s)
            both = zip(near, law.byte_s, strict=True)
            made = replace(law, byte_s=tuple(min(far, it + share * (far - it)) for it, far in both))
            products.append(made)
            far_s, near_s = far_s + law.byte_s[0], near_s + made.byte_s[0]
        quicker = far_s / near_s if products else 1.0
        speed = quicker * self.memory_bytes_per_s
        return replace(self, memory_bytes_per_s=speed, products=tuple(products), caches=None)

    def on(self, threads: int | None) -> Device:
        """The device with other threads than it was measured with. Half of its threads are taken to use all of its
        memory's speed; what is computed goes with the threads. More threads do nothing that was not measured."""
        if threads is None or threads >= self.threads:
            return self
        part = threads / self.threads
        return replace(self.slowed(1 / min(1.0, 2 * part), 1 / part), threads=threads)

    def like(self, name: str, memory_bytes_per_s: float, flops: float, disk_bytes_per_s: float) -> Device:
        """A machine of which only so much is known: kernels are much the same, and no two speeds tell how few rows or
        small matrices slow them. Its disk is its own."""
        found = self.slowed(self.memory_bytes_per_s / memory_bytes_per_s, self.flops / flops)
        return replace(
            found,
            name=name,
            disk_bytes_per_s=disk_bytes_per_s,
            reads=None,
            caches=None,
            port_bytes_per_s=0.0,
            repeats=Repeats(),
            corrections=Corrections(),
            measured=False,
        )

    def slowed(self, memory: float, compute: float) -> Device:
        """If reading memory took so many times as long, and computing; with 1 and 1 it is the same device, to the
        bit. Of what a product takes for a byte, that is reading which memory's speed says."""
        read_s = 1 / self.memory_bytes_per_s

        def longer(byte_s: float) -> float:
            return compute * byte_s + (memory - compute) * min(byte_s, read_s)

        attention = tuple(
            replace(
                law,
                decode_s=tuple(compute * it for it in law.decode_s),
                prompt_s=tuple(compute * it for it in law.prompt_s),
            )
            for law in self.attention
        )
        return replace(
            self,
            memory_bytes_per_s=self.memory_bytes_per_s / memory,
            flops=self.flops / compute,
            products=tuple(replace(law, byte_s=tuple(map(longer, law.byte_s))) for law in self.products),
            caches=self.caches and self.caches.slowed(compute),
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
        guessed=True,
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
