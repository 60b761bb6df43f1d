"""A worker's shard of a checkpoint that another machine has. It reads like a shard of one's own.

Whatever is read in the order that `expect` was told, or within one call, travels ahead of the reader. Matrices have
the types that the head keeps, so nothing is rounded here.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import numpy as np
from msgspec import Struct

from shoal.comm.group.channel import Channel
from shoal.daemon.errors import DaemonError
from shoal.kernels import Matrix, WeightType
from shoal.kernels.arrays import Bytes, Floats
from shoal.kernels.huge_pages import Arena
from shoal.models.checkpoint.identity import Stamps
from shoal.models.checkpoint.weight_source import Piece, read_in_turn, read_whole
from shoal.models.weights import Weights
from shoal.offload.pack.manifest import KERNEL_LAYOUT, PACK_FORMAT
from shoal.partition.errors import PartitionError
from shoal.partition.slicing import Shard
from shoal.partition.spec import BlockId

from .earlier_shards import EarlierShard
from .piece_sources import FellowPieces, HeadPieces
from .piece_stream import PieceStream
from .shard_facts import ShardFacts
from .weight_messages import (
    ANSWER_BYTES,
    ANSWER_S,
    DESCRIPTION_BYTES,
    BlockChecksum,
    Describe,
    Description,
    Refused,
    WantChecksum,
)

T = TypeVar("T", bound=Struct)

log = logging.getLogger("shoal.cluster")


class _Part(NamedTuple):
    """A part of a larger piece, and which earlier shard has it, if one has."""

    whole: Piece
    part: Piece
    here: EarlierShard | None


class RemoteShard:
    """See `WeightSource`. One thread reads at a time. `close` it when everything is read.

    What is read raises ChannelError where a channel fails, and DaemonError where the head refuses.
    """

    kind: Literal["gguf"] = "gguf"
    files: tuple[Path, ...] = ()

    def __init__(self, channels: Sequence[Channel]) -> None:
        """Asks the head what the shard is. Raises ChannelError, and DaemonError if that cannot be."""
        self._channels = channels
        asked = Describe(PACK_FORMAT, KERNEL_LAYOUT)
        try:
            self.facts = facts = ShardFacts(self._ask(asked, Description, DESCRIPTION_BYTES))
        except PartitionError as error:  # a spec that cannot be is noticed while it is decoded
            raise DaemonError("corrupt", f"the head described a shard that cannot be: {error}") from error
        self.spec, self.name, self.path = facts.spec, facts.name, Path(facts.name)
        self.shard: Literal["whole"] | Shard = facts.shard
        self.stamps: Stamps = {}
        self.kept_bytes = 0  # that were read from there
        self.earlier: Sequence[EarlierShard] = ()  # what this machine has already of what is read
        self._stream: PieceStream | None = None
        self._parts: deque[_Part] = deque()  # of what is expected, as far as was looked at and not read yet
        self._lenders: list[FellowPieces] = []
        self._lending = threading.Lock()
        self._closed = False
        self._memory = Arena()

    def close(self) -> None:
        """Ends the reading. Idempotent."""
        with self._lending:
            self._closed = True
            stream, self._stream = self._stream, None
            idle = [] if stream is not None else self._lenders
        if stream is not None:
            stream.close()
        for source in idle:
            source.close()

    def lend(self, source: FellowPieces) -> None:
        """Pieces come from there, too, from now on. From any thread. The source is closed with this shard."""
        with self._lending:
            if not self._closed:
                self._lenders.append(source)
                if self._stream is not None:
                    self._stream.lend(source)
                return
        source.close()

    @property
    def lent_bytes(self) -> int:
        """That came from there."""
        return self._stream.lent_bytes if self._stream is not None else 0

    def bypass_cache(self) -> None:
        """Nothing of it is in this machine's page cache."""

    def matrices(self, block: BlockId) -> dict[str, tuple[WeightType, int, int]]:
        return self.facts.matrices(block)

    def vector_lengths(self, block: BlockId) -> dict[str, int]:
        return self.facts.vector_lengths(block)

    def expect(self, pieces: Iterable[Piece]) -> None:
        self._ahead(pieces)

    def reserve(self, nbytes: int) -> None:
        self._memory.reserve(nbytes)

    def _ahead(self, pieces: Iterable[Piece]) -> PieceStream:
        with self._lending:
            if (stream := self._stream) is None:
                head = [HeadPieces(channel, self.facts.content) for channel in self._channels]
                stream = self._stream = PieceStream(head, self.facts.piece_bytes)
                for source in self._lenders:
                    stream.lend(source)
        self._parts = deque()
        stream.expect(self._lacking(pieces, self._parts))
        return stream

    def _lacking(self, pieces: Iterable[Piece], parts: deque[_Part]) -> Iterator[Piece]:
        """What is not here of these, in parts that are small enough to be asked for, and that nobody has only half of.
        All parts are noted in `parts` as one comes to them."""
        for piece in pieces:
            key = piece.block, piece.role
            known = [*(it.held for it in self.earlier), *(it.held for it in self._lenders)]
            held = [rows for it in known if (rows := it.get(key)) is not None]
            for part in self.facts.cut(piece, [bound for rows in held for bound in rows]):
                here = self._here(part)
                parts.append(_Part(piece, part, here))
                if here is None:
                    yield part

    def _here(self, piece: Piece) -> EarlierShard | None:
        return next((shard for shard in self.earlier if shard.has(piece)), None)

    def read_rows(
        self, block: BlockId, role: str, start: int, stop: int, into: Bytes | None = None
    ) -> Matrix:
        kind, _, cols = self.facts.matrices(block)[role]
        nbytes = kind.matrix_bytes(stop - start, cols)
        memory = self._memory.take(nbytes) if into is None else into
        self._fill(Piece(block, role, start, stop), memory)
        return Matrix(kind, memory, stop - start, cols)

    def read_vectors(self, block: BlockId) -> dict[str, Floats]:
        found = {role: np.empty(length, np.float32) for role, length in self.vector_lengths(block).items()}
        for role, vector in found.items():
            self._fill(Piece(block, role, 0, len(vector)), vector.view(np.uint8))
        return found

    def read_block(self, block: BlockId) -> Weights:
        return read_whole(self, block)

    def read_blocks(self, blocks: Iterable[BlockId]) -> Generator[tuple[BlockId, Weights], None, None]:
        order = list(blocks)
        self.expect(piece for block in order for piece in self._pieces(block))
        return read_in_turn(self, order)

    def checksum(self, block: BlockId | None) -> str:
        """What the head says is the checksum of a packed block, or (None) of all vectors; not to be called while
        something is expected."""
        assert self._stream is None
        return self._ask(WantChecksum(self.facts.content, block), BlockChecksum, ANSWER_BYTES).checksum

    def _ask(self, question: Struct, type: type[T], limit_bytes: int) -> T:
        channel = self._channels[0]
        channel.send_message(question)
        answer: T | Refused = channel.receive_message(type | Refused, ANSWER_S, limit_bytes)
        if isinstance(answer, Refused):
            raise DaemonError(answer.code, f"the head cannot send its model: {answer.reason}")
        return answer

    def _pieces(self, block: BlockId) -> Iterable[Piece]:
        """In the order in which `read_block` reads them."""
        yield from (Piece(block, role, 0, rows) for role, (_, rows, _) in self.matrices(block).items())
        yield from (Piece(block, role, 0, length) for role, length in self.vector_lengths(block).items())

    def _fill(self, piece: Piece, memory: Bytes) -> None:
        stream = self._stream
        if stream is None or self._next(stream) != (piece, piece.start):
            stream = self._ahead([piece])
        at = 0
        while at < len(memory):
            self._next(stream)
            _, part, here = self._parts.popleft()
            into = memory[at : at + self.facts.piece_bytes(part)]
            if here is not None:
                try:
                    here.read(part, into)
                except OSError as error:  # the head has it, too
                    log.warning("%s: %s", self.name, error)
                    self.earlier = [shard for shard in self.earlier if shard is not here]
                    stream = self._ahead([Piece(piece.block, piece.role, part.start, piece.stop)])
                    continue
                self.kept_bytes += len(into)
            else:
                stream.take(part, into)
            at += len(into)

    def _next(self, stream: PieceStream) -> tuple[Piece, int] | None:
        """Of which larger piece the next part is, and where it begins; None if nothing is expected."""
        if not self._parts:
            stream.look()
        return (self._parts[0].whole, self._parts[0].part.start) if self._parts else None
