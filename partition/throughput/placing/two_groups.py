"""How long a step takes whose weights pass through a device while the CPU attends, for one group of rows or for several
that take turns: the schedule of `engine.passing`, with seconds instead of arrays.

Six things go on beside each other: a disk reads weights into a window; from there, or from memory, they come to the
device; this computes; hidden states come, others leave, and the host attends and waits. Each does one thing after the
other. Pure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Literal, NamedTuple

from ..ring import waits_for

PassingPiece = Literal["attn", "ffn", "router", "experts"]

PLACES = 2  # on the device, for each piece
_LAPS = 4  # until a step begins as the one before did


class Feeding(NamedTuple):
    """The feed-forward part of a layer for some rows, in seconds. Of a layer without experts `mixed_s` is all but what
    is added.

    The device is busy for `normed_s` before it needs the router. What that scored leaves, and meanwhile a shared expert
    takes `shared_s`. When the host has heard the scores, routes come, and experts are computed; then all is added."""

    normed_s: float
    scored_s: float
    leaves_s: float
    shared_s: float
    routes_s: float
    mixed_s: float
    added_s: float

    def slower(self, device: float) -> Feeding:
        """If computing takes so many times as long."""
        return self._replace(
            normed_s=device * self.normed_s,
            scored_s=device * self.scored_s,
            shared_s=device * self.shared_s,
            mixed_s=device * self.mixed_s,
            added_s=device * self.added_s,
        )


class LookingThere(NamedTuple):
    """The device attends for some texts of a group, in seconds: what they have of K and V comes, and once the host has
    attended for others, where it lies there (`told_s`, in a step's first layer); then the device looks, and what has
    been added leaves and is put where it belongs. `joined_s`: what it found is put together with what the host has
    found; `alone`: there are no others."""

    comes_s: float
    looks_s: float
    leaves_s: float
    stored_s: float
    told_s: float = 0.0
    joined_s: float = 0.0
    alone: bool = False

    def slower(self, host: float, device: float) -> LookingThere:
        """If what the host does takes so many times as long, and computing on the device so many."""
        return self._replace(
            looks_s=device * self.looks_s,
            stored_s=host * self.stored_s,
            joined_s=device * self.joined_s,
        )


class LayerTurn(NamedTuple):
    """One layer for one group, in seconds: the device asks (q, k and v), which leave; the host attends; what it found
    comes back, is multiplied by the layer's last matrix (`attended_s`) and added. `feeding`: of all layers but the
    last, where all groups are fed together. `looking`: for some of the rows the device attends."""

    asked_s: float
    leaves_s: float
    attends_s: float
    back_s: float
    attended_s: float
    added_s: float
    feeding: Feeding | None = None
    looking: LookingThere | None = None

    def slower(self, host: float, device: float) -> LayerTurn:
        """If attending takes so many times as long, and computing on the device so many."""
        return self._replace(
            asked_s=device * self.asked_s,
            attends_s=host * self.attends_s,
            attended_s=device * self.attended_s,
            added_s=device * self.added_s,
            feeding=self.feeding and self.feeding.slower(device),
            looking=self.looking and self.looking.slower(host, device),
        )


class ComingBlock(NamedTuple):
    """A block on its way to the device: seconds of its copy, and how many bytes of it pass through the window first (0:
    it is in memory)."""

    copy_s: float
    disk_bytes: int = 0


class Layer(NamedTuple):
    """`comes`: what comes of each piece of its weights, in this order; pieces that stay are not there. `turns`: of each
    group."""

    comes: Mapping[PassingPiece, Sequence[ComingBlock]]
    turns: tuple[LayerTurn, ...]


class Disk(NamedTuple):
    """Reads into a window of so many bytes."""

    bytes_per_s: float = 1.0
    window_bytes: int = 0
    piece_bytes: int = 4 << 20  # a block is read in pieces, each when its place is free


class Tail(NamedTuple):
    """What comes after the last attention of all groups: ids of the rows that are wanted come, these are picked, fed,
    go through the head, and logits leave. `between_s`: the host, until the next step begins."""

    ids_s: float
    picked_s: float
    fed: Feeding | None
    head_s: float
    leaves_s: float
    between_s: float


class Alternation(NamedTuple):
    """A step among many, and for how long of it each was at work."""

    step_s: float
    device_s: float
    weights_s: float
    host_s: float
    disk_s: float = 0.0


_NO_DISK = Disk()


def alternate(
    layers: Sequence[Layer], tail: Tail, enters_s: float = 0.0, disk: Disk = _NO_DISK
) -> Alternation:
    """A step in the long run. `enters_s`: until its rows have come to the device."""
    clock = _Clock(layers, disk)
    ends = [clock.step(tail, enters_s) for _ in range(_LAPS)]
    device_s, weights_s, host_s = (clock.busy[it] / _LAPS for it in ("device", "weights", "host"))
    read_bytes = sum(it.disk_bytes for layer in layers for its in layer.comes.values() for it in its)
    return Alternation(ends[-1] - ends[-2], device_s, weights_s, host_s, read_bytes / disk.bytes_per_s)


def step_ends(
    layers: Sequence[Layer], tail: Tail, enters_s: float, steps: int, disk: Disk = _NO_DISK
) -> list[float]:
    """When each of so many steps ends, before the first of which nothing has come."""
    clock = _Clock(layers, disk)
    return [clock.step(tail, enters_s) for _ in range(steps)]


class _Ring:
    """When blocks that come from disk are in the window: each is read in pieces, as soon as what lay there has been
    copied."""

    def __init__(self, disk: Disk, cycle: Sequence[int]) -> None:
        self._pieces = waits_for(disk.window_bytes, tuple(cycle), disk.piece_bytes) if cycle else []
        self._bytes_per_s = disk.bytes_per_s
        self._now_s = 0.0
        self._left: list[float] = []  # when each was copied, from the first on

    def arrival(self) -> float:
        """Of the next one."""
        passage = len(self._left)
        for nbytes, back in self._pieces[passage % len(self._pieces)]:
            free_s = self._left[passage - back] if passage >= back else 0.0
            self._now_s = max(self._now_s, free_s) + nbytes / self._bytes_per_s
        return self._now_s

    def left(self, at_s: float) -> None:
        """It has been copied."""
        self._left.append(at_s)


class _Clock:
    """When each is free again, in seconds."""

    def __init__(self, layers: Sequence[Layer], disk: Disk) -> None:
        self.host_s = self.device_s = self.weights_s = self.in_s = self.out_s = 0.0
        self.busy = dict.fromkeys(("device", "weights", "host"), 0.0)
        self._layers = layers
        # Of each layer: the how manieth of its kind each piece is.
        self._numbers: list[dict[PassingPiece, int]] = []
        counts: Counter[PassingPiece] = Counter()
        for layer in layers:
            self._numbers.append({piece: counts[piece] for piece in layer.comes})
            counts.update(layer.comes.keys())
        all = (it.disk_bytes for layer in layers for its in layer.comes.values() for it in its)
        self._ring = _Ring(disk, [nbytes for nbytes in all if nbytes])
        self._counts = counts
        self._came: dict[PassingPiece, list[float]] = {piece: [] for piece in counts}
        self._used: dict[PassingPiece, list[float]] = {piece: [] for piece in counts}
        self._coming = self._come()
        self._laps = 0
        self._entered_s = 0.0

    def step(self, tail: Tail, enters_s: float) -> float:
        """→ when the host goes on to the next one"""
        self._entered_s = self._enter(enters_s)
        groups = [self._group(number) for number in range(len(self._layers[0].turns))]
        for _ in zip_longest(*groups):
            pass
        self._compute(tail.picked_s, self._enter(tail.ids_s))
        if tail.fed is not None:
            self._feed(len(self._layers) - 1, tail.fed, last=True)
        else:  # nobody needs what has come for that
            for piece in self._layers[-1].comes.keys() - {"attn"}:
                self._used[piece].append(self.device_s)
        self._compute(tail.head_s)
        self._wait(self._leave(tail.leaves_s))
        self._host(tail.between_s)
        self._laps += 1
        return self.host_s

    def _group(self, number: int) -> Iterator[None]:
        last = number == len(self._layers[0].turns) - 1
        for place, layer in enumerate(self._layers):
            turn = layer.turns[number]
            looking, kept_s, back_s = turn.looking, 0.0, 0.0
            attends = looking is None or not looking.alone
            self._compute(turn.asked_s, max(self._entered_s, self._arrival(place, "attn")))
            left_s = self._leave(turn.leaves_s) if attends else 0.0
            yield
            came_s = self._enter(looking.comes_s) if looking is not None and looking.comes_s else 0.0
            if attends:
                self._wait(left_s)
                self._host(turn.attends_s)
                back_s = self._enter(turn.back_s)
            if looking is not None:
                told_s = self._enter(looking.told_s) if looking.told_s else 0.0
                self._compute(looking.looks_s, max(came_s, told_s))
                kept_s = self._leave(looking.leaves_s)
                self._compute(looking.joined_s)
            self._compute(turn.attended_s, back_s)
            self._note_used(place, "attn", last=last)
            self._compute(turn.added_s)
            if looking is not None:
                self._wait(kept_s)
                self._host(looking.stored_s)
            if turn.feeding is not None:
                self._feed(place, turn.feeding, last=last)

    def _feed(self, place: int, its: Feeding, *, last: bool) -> None:
        """`last`: no other group needs these weights in this step."""
        self._compute(its.normed_s)
        piece: PassingPiece = "ffn"
        routed_s = 0.0
        if "router" in self._layers[place].comes:
            self._compute(its.scored_s, self._arrival(place, "router"))
            left_s = self._leave(its.leaves_s)
            self._compute(its.shared_s)
            self._note_used(place, "router", last=last)
            self._wait(left_s)
            routed_s = self._enter(its.routes_s)
            piece = "experts"
        self._compute(its.mixed_s, max(routed_s, self._arrival(place, piece)))
        self._note_used(place, piece, last=last)
        self._compute(its.added_s)

    def _note_used(self, place: int, piece: PassingPiece, *, last: bool) -> None:
        if last and piece in self._layers[place].comes:
            self._used[piece].append(self.device_s)

    def _arrival(self, place: int, piece: PassingPiece) -> float:
        """When this step's piece of a layer has come; one that stays has always been there."""
        if piece not in self._layers[place].comes:
            return 0.0
        number = self._laps * self._counts[piece] + self._numbers[place][piece]
        while len(self._came[piece]) <= number:
            next(self._coming)
        return self._came[piece][number]

    def _come(self) -> Iterator[None]:
        """Pieces come one after the other, over and over, each when the one before the last of its kind has been used:
        its place is free then."""
        while True:
            for layer in self._layers:
                for piece, its in layer.comes.items():
                    number = len(self._came[piece])
                    free_s = self._used[piece][number - PLACES] if number >= PLACES else 0.0
                    for seconds, disk_bytes in its:
                        here_s = self._ring.arrival() if disk_bytes else 0.0
                        self.weights_s = max(self.weights_s, free_s, here_s) + seconds
                        self.busy["weights"] += seconds
                        if disk_bytes:
                            self._ring.left(self.weights_s)
                    self._came[piece].append(self.weights_s)
                    yield

    def _compute(self, seconds: float, after_s: float = 0.0) -> None:
        if seconds:
            self.device_s = max(self.device_s, self.host_s, after_s) + seconds
            self.busy["device"] += seconds

    def _leave(self, seconds: float) -> float:
        self.out_s = max(self.out_s, self.host_s, self.device_s) + seconds
        return self.out_s

    def _enter(self, seconds: float) -> float:
        self.in_s = max(self.in_s, self.host_s) + seconds
        return self.in_s

    def _wait(self, until_s: float) -> None:
        self.host_s = max(self.host_s, until_s)

    def _host(self, seconds: float) -> None:
        self.host_s += seconds
        self.busy["host"] += seconds
