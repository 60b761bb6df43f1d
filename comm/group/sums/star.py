"""The ranks of a group: rank 0, the hub, has a stream to every other rank, a spoke each; spokes may have some, too.

Orders and giving them up travel in a star. The hub alone begins and ends an order. A rank that fails says so to all.
Sums are made as `Manners` say, which the hub decides: in a star, where the hub adds and sends the sum to all; by
exchange, where each rank adds the parts of all; or sliced, where each adds some of the rows. In any case parts are
added in the order of ranks, and all ranks get the same bits.

Knows arrays of f32 and frames; not what is computed, nor who is at the other end. One thread uses a hub or a spoke.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np

from ..errors import ChannelError, ChannelTimeout
from .framed import Framed, FrameStream
from .frames import MAX_REASON_BYTES, WRAP, FrameKind, Header
from .manners import MANNERS_BYTES, Manner, Manners
from .one_swap import RankFrames
from .part_waits import PartWaits
from .star_errors import Departed
from .swapping import Swapper
from .wire_types import F32Rows, Octets, WireType, decode, encode, wire_bytes

MAX_COLUMNS = 1 << 22


class _Room:
    """Memory for the payload of one frame, which grows to the largest that came."""

    def __init__(self) -> None:
        self._bytes: Octets = np.empty(0, np.uint8)

    def take(self, nbytes: int) -> Octets:
        if len(self._bytes) < nbytes:
            self._bytes = np.empty(nbytes, np.uint8)
        return self._bytes[:nbytes]


class _Adder(ABC):
    """What hub and spokes have in common: their place in an order, and sums to which all contribute alike."""

    def __init__(self, swapper: Swapper, ranks: int, wire: WireType) -> None:
        self._swapper = swapper
        self._ranks = ranks
        self._number = 0
        self._place = 0
        self._rooms = [_Room() for _ in range(ranks)]  # for the parts of each rank, this one's too
        self.manners = Manners(Manner("star", wire), Manner("star", wire))

    def watch(self) -> None:
        """From now on, whoever waits for others looks for their bytes for a while before it sleeps."""
        self._swapper.watch()

    def allreduce(self, partial: F32Rows) -> F32Rows:
        """The sum (T, n) of all partials. Raises Departed, and GivenUp at a spoke."""
        topology, wire = self.manners.of(partial.shape)
        if topology == "star":
            return self._star(partial, wire)
        return self._exchange(partial, wire) if topology == "exchange" else self._sliced(partial, wire)

    @abstractmethod
    def _star(self, partial: F32Rows, wire: WireType) -> F32Rows:
        """The sum by way of rank 0: the one way in which hub and spokes differ."""

    def _foresee(self, shape: tuple[int, int]) -> None:
        """Others may bring partials of as many numbers before this rank does, and the order be given up until then."""
        self._swapper.largest = max(self._swapper.largest, 4 * shape[0] * shape[1])

    def _swap(self, out: RankFrames, into: RankFrames) -> None:
        """The next exchange of this order."""
        self._swapped(out, into)
        self._place += 1

    def _swapped(self, out: RankFrames, into: RankFrames) -> None:
        self._swapper.swap(self._number, self._place, out, into)

    def _exchange(self, partial: F32Rows, wire: WireType) -> F32Rows:
        """Parts go to everybody, and everybody adds all of them: its own, too, as the wire rounded it."""
        own = self._swapper.rank
        parts = [room.take(wire_bytes(wire, partial.shape)) for room in self._rooms]
        encode(wire, partial, parts[own])
        others = [rank for rank in range(self._ranks) if rank != own]
        self._swap(
            dict.fromkeys(others, (FrameKind.PART, parts[own])),
            {rank: (FrameKind.PART, parts[rank]) for rank in others},
        )
        total = np.empty(partial.shape, np.float32)
        decode(wire, parts[0], total)
        for part in parts[1:]:
            _add(wire, part, total)
        return total

    def _sliced(self, partial: F32Rows, wire: WireType) -> F32Rows:
        """Each rank gets all parts of some of the rows, adds them, and sends their sum to everybody."""
        own, rows = self._swapper.rank, len(partial)
        slices = [
            slice(rows * rank // self._ranks, rows * (rank + 1) // self._ranks) for rank in range(self._ranks)
        ]
        sizes = [wire_bytes(wire, partial[it].shape) for it in slices]
        others = [rank for rank in range(self._ranks) if rank != own]
        parts = [room.take(size) for room, size in zip(self._rooms, sizes, strict=True)]
        for rank in others:
            if sizes[rank]:
                encode(wire, partial[slices[rank]], parts[rank])
        theirs = np.empty((self._ranks, sizes[own]), np.uint8)
        self._swap(
            {rank: (FrameKind.PART, parts[rank]) for rank in others if sizes[rank]},
            {rank: (FrameKind.PART, theirs[rank]) for rank in others if sizes[own]},
        )
        total = np.empty(partial.shape, np.float32)
        if sizes[own]:
            mine = total[slices[own]]
            if own:
                decode(wire, theirs[0], mine)
            else:
                mine[...] = partial[slices[own]]
            for rank in range(1, self._ranks):
                if rank == own:
                    mine += partial[slices[own]]
                else:
                    _add(wire, theirs[rank], mine)
            encode(wire, mine, parts[own])
        self._swap(
            {rank: (FrameKind.PART, parts[own]) for rank in others if sizes[own]},
            {rank: (FrameKind.PART, parts[rank]) for rank in others if sizes[rank]},
        )
        for rank in others if wire == "f32" else range(self._ranks):
            if sizes[rank]:
                decode(wire, parts[rank], total[slices[rank]])
        return total


def _add(wire: WireType, data: Octets, total: F32Rows) -> None:
    """Adds what `encode` wrote to total (T, n)."""
    if wire == "f32":
        total += data.view(np.float32).reshape(total.shape)
        return
    part = np.empty(total.shape, np.float32)
    decode(wire, data, part)
    total += part


class Hub(_Adder):
    """Rank 0's side. `streams` lead to ranks 1, 2, …; a rank that does not answer within `patience_s` has departed.

    `most_collected`: bytes that a rank brings at once besides partials. `columns`: how many ranks 1, 2, … have of what
    is gathered, if this one has more than one; if it has one, all have. By default whatever they say.

    Raises Departed, with the rank, when a spoke failed or its stream ended; the hub can be used no more after that.
    """

    def __init__(
        self,
        streams: Sequence[FrameStream],
        epoch: int,
        wire: WireType = "f32",
        patience_s: float = 60.0,
        most_collected: int = 0,
        columns: Sequence[int] = (),
    ) -> None:
        self._columns = columns
        self.waits = [PartWaits() for _ in streams]  # for parts of ranks 1, 2, …, in this order
        links = {rank: Framed(stream, epoch) for rank, stream in enumerate(streams, 1)}
        super().__init__(Swapper(0, links, epoch, patience_s, heard=self._heard), len(streams) + 1, wire)
        self._foresee((1, -(-most_collected // 4)))
        self.unheard: dict[int, int] = {}  # ranks that another one does not hear, and which
        self._open = False

    def decide(self, manners: Manners) -> None:
        """How sums are made from now on. Spokes must have streams to each other if they are to exchange parts."""
        self._tell(FrameKind.MANNERS, manners.packed())
        self.manners = manners

    @property
    def awaited(self) -> dict[int, float]:
        """Ranks that this one waits for just now, and since when (`time.monotonic`)."""
        return self._swapper.awaited

    def begin(self, order: bytes) -> None:
        """Hands an order to all others."""
        self._number = (self._number + 1) % WRAP
        self._place = 0
        self._open = True
        self._tell(FrameKind.ORDER, order)

    def end(self) -> None:
        """The order is carried out."""
        self._open = False

    def give_up(self) -> None:
        """Nobody goes on with the order. Does nothing if none is under way; a spoke that departed is found later."""
        if self._open:
            self._open = False
            self._swapper.tell(self._number, self._place, FrameKind.GIVE_UP)

    def broadcast(self, rows: F32Rows | None, shape: tuple[int, int]) -> F32Rows:
        """Rows (T, n) that only this rank has; all get the same bits, exactly."""
        assert rows is not None
        self._foresee(shape)
        self._tell(FrameKind.ROWS, np.ascontiguousarray(rows).reshape(-1).view(np.uint8))
        self._place += 1
        return rows

    def _star(self, partial: F32Rows, wire: WireType) -> F32Rows:
        shape = partial.shape
        nbytes = wire_bytes(wire, shape)
        total = partial.astype(np.float32, copy=True)
        for rank in range(1, self._ranks):
            data = self._rooms[rank].take(nbytes)
            self._swapped({}, {rank: (FrameKind.PART, data)})
            _add(wire, data, total)
        data = self._rooms[0].take(nbytes)
        encode(wire, total, data)
        self._tell(FrameKind.SUM, data)
        self._place += 1
        if wire != "f32":
            decode(wire, data, total)
        return total

    def gather(self, columns: F32Rows) -> F32Rows:
        """Columns (R, n) of all ranks side by side. Every rank has its own number of them, which it says."""
        rows, brought = len(columns), [columns]
        widths = {rank: np.empty(1, np.uint32) for rank in range(1, self._ranks)}
        self._swap({}, {rank: (FrameKind.PART, it.view(np.uint8)) for rank, it in widths.items()})
        for rank, (width,) in widths.items():
            if width > MAX_COLUMNS:
                raise Departed(rank, f"{width} columns: at most {MAX_COLUMNS} were to come")
            if self._columns and width != (due := self._columns[rank - 1] if columns.shape[1] > 1 else 1):
                raise Departed(rank, f"{width} columns: {due} were to come")
            brought.append(np.empty((rows, int(width)), np.float32))
        self._swap({}, {rank: (FrameKind.PART, brought[rank].reshape(-1).view(np.uint8)) for rank in widths})
        return np.concatenate(brought, axis=1)

    def deal(self, parts: Sequence[Octets], into: Octets | None = None) -> None:
        """Bytes for ranks 1, 2, …, each its own."""
        self._swap({rank: (FrameKind.ROWS, part) for rank, part in enumerate(parts, 1)}, {})

    def collect(self, own: Octets | None, into: Sequence[Octets]) -> None:
        """Bytes of ranks 1, 2, …, which bring as many as there is room for."""
        self._swap({}, {rank: (FrameKind.PART, part) for rank, part in enumerate(into, 1)})

    def _tell(self, kind: FrameKind, payload: Octets | bytes) -> None:
        data = np.frombuffer(payload, np.uint8) if isinstance(payload, bytes) else payload
        frames = dict.fromkeys(range(1, self._ranks), (kind, data))
        self._swapped(frames, {})

    def _swapped(self, frames: RankFrames, into: RankFrames) -> None:
        """One exchange, at the same place as before."""
        try:
            self._swapper.swap(self._number, self._place, frames, into)
        except Departed as error:
            if error.unheard_by:
                self.unheard[error.rank] = error.unheard_by
            raise

    def _heard(self, rank: int, seconds: float, nbytes: int) -> None:
        self.waits[rank - 1].note(seconds, nbytes)


class Spoke(_Adder):
    """The side of rank `rank` of `ranks`. Raises GivenUp when the hub gives the order up, and Departed
    when the hub is gone.

    `fellows`: streams to other spokes, by rank; needed, and looked for, when the hub decides that parts are exchanged.
    `most_bytes`: of one frame.
    """

    def __init__(
        self,
        stream: FrameStream,
        epoch: int,
        wire: WireType = "f32",
        patience_s: float = 600.0,
        *,
        rank: int = 1,
        ranks: int = 2,
        fellows: Mapping[int, FrameStream] = {},
        most_bytes: int = 0,
    ) -> None:
        links = {0: Framed(stream, epoch)}
        super().__init__(Swapper(rank, links, epoch, patience_s, most_bytes), ranks, wire)
        self._fellows = fellows

    def next(self) -> bytes:
        """Waits for the next order."""
        try:
            while True:
                header, payload = self._awaited()
                if header.kind == FrameKind.GIVE_UP and not header.nbytes:
                    continue  # it came after this rank was done with the order
                if header.kind == FrameKind.MANNERS and header.nbytes == MANNERS_BYTES:
                    self._follow(Manners.of_bytes(payload.tobytes()))
                    continue
                if header.kind != FrameKind.ORDER:
                    raise ChannelError(f"a frame {header}: an order was to come")
                self._number, self._place = header.number, 0
                return payload.tobytes()
        except (OSError, ChannelError) as error:
            raise Departed(0, str(error)) from error

    def broadcast(self, rows: F32Rows | None, shape: tuple[int, int]) -> F32Rows:
        """The rows (T, n) of rank 0."""
        self._foresee(shape)
        result = np.empty(shape, np.float32)
        self._swap({}, {0: (FrameKind.ROWS, result.reshape(-1).view(np.uint8))})
        return result

    def gather(self, columns: F32Rows) -> F32Rows:
        """Sends the columns (R, n). → (R, 0)"""
        for part in (np.array([columns.shape[1]], np.uint32), np.ascontiguousarray(columns)):
            self._swap({0: (FrameKind.PART, part.reshape(-1).view(np.uint8))}, {})
        return columns[:, :0]

    def deal(self, parts: Sequence[Octets], into: Octets | None) -> None:
        """The bytes that rank 0 has for this rank: as many as there is room for."""
        assert into is not None
        self._swap({}, {0: (FrameKind.ROWS, into)})

    def collect(self, own: Octets | None, into: Sequence[Octets] = ()) -> None:
        """Sends this rank's bytes to rank 0."""
        assert own is not None
        self._swap({0: (FrameKind.PART, own)}, {})

    def fail(self, reason: str) -> None:
        """This rank cannot go on with the order."""
        self._swapper.tell(self._number, self._place, FrameKind.FAILED, reason.encode()[:MAX_REASON_BYTES])

    def _star(self, partial: F32Rows, wire: WireType) -> F32Rows:
        data = self._rooms[0].take(wire_bytes(wire, partial.shape))
        into = self._rooms[1].take(len(data))
        encode(wire, partial, data)
        self._swap({0: (FrameKind.PART, data)}, {0: (FrameKind.SUM, into)})
        total = np.empty(partial.shape, np.float32)
        decode(wire, into, total)
        return total

    def _awaited(self) -> tuple[Header, Octets]:
        """The next frame, however long the hub has nothing to do."""
        while True:
            try:
                return self._swapper.next()
            except ChannelTimeout:  # nothing has come; whether the hub is alive is somebody else's concern
                continue

    def _follow(self, manners: Manners) -> None:
        links = self._swapper.links
        if manners.among_all:
            for rank in range(1, self._ranks):
                if rank == self._swapper.rank or rank in links:
                    continue
                if (stream := self._fellows.get(rank)) is None:
                    raise ChannelError(
                        f"sums are to be exchanged with rank {rank}, to which there is no channel"
                    )
                self._swapper.add(rank, Framed(stream, self._swapper.epoch))
        self.manners = manners
