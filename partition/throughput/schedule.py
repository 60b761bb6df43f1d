"""How long a step takes whose blocks come from disk: the schedules of the window and of the cache of experts, with
seconds instead of threads.

Blocks are used in order. A streamed one is read piece by piece, one read after the other, as soon as what lies in its
place has left (several in flight are as one at the disk's full speed, but for the last of a block, which others go on
beside); reading goes on from the last block of a step to the first of the next. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from .contention import Slower, settled, shares, together
from .laws import READ_PIECE_BYTES, block_bytes_per_s, ring_bytes_per_s
from .profile import Device
from .ring import waits_for

_LAPS = 3  # the first fill the ring
_BESIDE_BYTES = READ_PIECE_BYTES  # of two reads at a time, which begin together and end together
GUESSED_RIGHT = 0.85  # of guesses which experts the next layer will choose (0.85 to 0.9: docs/LOG.md)
_GUESSING = 8  # rounds: what is guessed depends on the time that it leaves
_PIECES = 1000  # of a lap, about, at most: larger pieces tell as much


class Use(NamedTuple):
    """A block of a step: what computing it takes, and how many bytes of it pass through the window (0: it stays)."""

    compute_s: float
    nbytes: int = 0


class Lap(NamedTuple):
    """A step among many. `stall_s`: of it the processor waits for the disk, `disk_s`: the disk reads."""

    step_s: float
    stall_s: float
    disk_s: float


def lap(
    uses: Sequence[Use],
    window_bytes: int,
    bytes_per_s: float,
    between_s: float = 0.0,
    beside_bytes: int = 0,
) -> Lap:
    """A step in the long run. `between_s`: from the last block of a step to the first of the next. `beside_bytes`: what
    has come of the reads behind a block's last one when that ends, as several go on at a time, if their places are
    free: a block is here so much later, and less is left to be read while it is computed."""
    compute_s = sum(use.compute_s for use in uses) + between_s
    cycle = tuple(use.nbytes for use in uses if use.nbytes)
    if not cycle:
        return Lap(compute_s, 0.0, 0.0)
    whole = sum(cycle)
    pieces = waits_for(window_bytes, cycle, max(READ_PIECE_BYTES, whole // _PIECES))
    now = disk = 0.0
    left: list[float] = []  # when each passage left the ring, from the first on
    ends: list[float] = []
    for _ in range(_LAPS):
        streamed = 0
        for use in uses:
            if use.nbytes:
                passage = len(left)
                for nbytes, back in pieces[streamed]:
                    free = left[passage - back] if passage >= back else 0.0
                    disk = max(disk, free) + nbytes / bytes_per_s
                here = disk + _beside_s(pieces, passage, left, disk, bytes_per_s, beside_bytes)
                now = max(now, here) + use.compute_s
                left.append(now)
                streamed += 1
            else:
                now += use.compute_s
        now += between_s
        ends.append(now)
    step_s = (ends[-1] - ends[0]) / (_LAPS - 1)
    return Lap(step_s, max(0.0, step_s - compute_s), whole / bytes_per_s)


def _beside_s(
    pieces: Sequence[Sequence[tuple[int, int]]],
    passage: int,
    left: Sequence[float],
    disk: float,
    bytes_per_s: float,
    most_bytes: int,
) -> float:
    """How long reads behind a passage keep the disk, which its last read shares with them. `disk`: when that would
    end."""
    came, after = 0, passage
    while came < most_bytes:
        after += 1
        for nbytes, back in pieces[after % len(pieces)]:
            place = after - back
            if place >= passage or (place >= 0 and left[place] > disk + came / bytes_per_s):
                return came / bytes_per_s  # its place is taken
            came = min(most_bytes, came + nbytes)
    return came / bytes_per_s


def ring_s(
    streamed_bytes: float, block_bytes: float, window_bytes: float, block_s: float, bytes_per_s: float
) -> float:
    """What a step takes at least if so many bytes pass in blocks of `block_bytes`, spread evenly, each of which is
    computed for `block_s`: a window that holds two reads one while the other is computed; in a smaller one, where a
    block lies in one piece as well, nothing is read meanwhile. About what `lap` says, for who asks often."""
    read_s = streamed_bytes / bytes_per_s
    waiting_s = 0.0 if window_bytes >= 2 * block_bytes else streamed_bytes / max(1.0, block_bytes) * block_s
    return read_s + waiting_s


class Experts(NamedTuple):
    """The experts that one layer of a step uses, while not all of them are in memory. `together`: so many are computed
    in one go, as soon as all of these are there. `compute_s`: of all of them; `before_s`: of the attention before the
    router speaks. A guess comes true with a chance of `right`; 0: nothing is
    guessed."""

    used: float
    missing: float  # of those used
    nbytes: int  # of each
    together: int
    compute_s: float
    before_s: float
    right: float

    @property
    def goes(self) -> float:
        """In how many goes they are computed."""
        return max(1.0, self.used / self.together)

    def slower(self, times: float) -> Experts:
        """If computing takes so many times as long."""
        return self._replace(compute_s=times * self.compute_s, before_s=times * self.before_s)


def guessed_right(used: float, experts: int) -> float:
    """How many guesses come true where a step uses so many of a layer's experts: any of these may be chosen."""
    return GUESSED_RIGHT + (1 - GUESSED_RIGHT) * used / experts


class Waits(NamedTuple):
    """Of one layer: the processor waits for so long, the disk reads for so long."""

    stall_s: float
    disk_s: float


def expert_waits(its: Experts, bytes_per_s: float) -> Waits:
    """Of a layer between others like it.

    What is missing is read in the order in which it is computed, so the first that go together are waited for, and
    computing the last ones hides nothing. From then on until the next router has spoken, guesses are read, as long as
    there are any."""
    one_s, runs = its.nbytes / bytes_per_s, its.goes
    last_s = its.compute_s / runs
    guessed = stall_s = 0.0
    for _ in range(_GUESSING if its.right else 1):
        left_s = (its.missing - its.right * guessed) * one_s
        stall_s = max(left_s / runs, left_s - (its.compute_s - last_s))
        disk_s = (its.missing + (1 - its.right) * guessed) * one_s
        guessed = min(its.missing, (its.before_s + its.compute_s + stall_s - left_s) / one_s)
    return Waits(stall_s, disk_s)


def contended(
    device: Device,
    window_bytes: int,
    uses: Sequence[Use],
    mixtures: Mapping[int, Experts],
    between_s: float,
    disk: float = 1.0,
) -> Lap:
    """The step as the window and the cache of experts make it, while disk and processor take speed from each other as
    long as both work. `mixtures`: experts on disk, by the place of the use that waits for them;
    `disk`: how many times longer that takes than it was measured to."""
    if not (mixtures or any(use.nbytes for use in uses)):
        return Lap(sum(use.compute_s for use in uses) + between_s, 0.0, 0.0)

    def gone_through(slower: Slower) -> tuple[Lap, Slower]:
        computed, read = slower
        slowed, experts_disk_s, experts_stall_s = [], 0.0, 0.0
        for place, use in enumerate(uses):
            waited_s = 0.0
            if (its := mixtures.get(place)) is not None:
                speed = block_bytes_per_s(device, its.nbytes) / (disk * read)
                waited_s, disk_s = expert_waits(its.slower(computed), speed)
                experts_disk_s += disk_s
                experts_stall_s += waited_s
            slowed.append(use._replace(compute_s=use.compute_s * computed + waited_s))
        speed = ring_bytes_per_s(device, window_bytes) / (disk * read)
        passing = lap(slowed, window_bytes, speed, between_s, _BESIDE_BYTES)
        found = passing._replace(disk_s=passing.disk_s + experts_disk_s)
        waiting_s = passing.stall_s + experts_stall_s
        return found, together(device, *shares(found.step_s, waiting_s, found.disk_s))

    return settled(gone_through, 2)
