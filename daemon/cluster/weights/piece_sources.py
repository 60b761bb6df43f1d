"""Where pieces of a shard come from: the head, which has all of them, or another worker, which has some.

Each is asked several questions ahead and answers in their order. What another worker sends has to have the digest that
the head says, so that one that lies or errs costs time and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from shoal.comm.group.channel import Channel
from shoal.comm.group.errors import ChannelError
from shoal.daemon.errors import DaemonError
from shoal.kernels.arrays import Bytes
from shoal.models.checkpoint.weight_source import Piece
from shoal.offload.pack.pack import checksum
from shoal.partition.slicing import NONE, Range
from shoal.partition.spec import BlockId

from .shard_facts import RowsHeld, ShardFacts
from .weight_messages import (
    ANSWER_BYTES,
    ANSWER_S,
    HOLDS_BYTES,
    LENT_S,
    MOST_HELD,
    HeldRows,
    Holds,
    Lacks,
    PieceDigest,
    PieceFollows,
    PieceLent,
    Refused,
    WantDigest,
    WantPiece,
    digest_of,
)


class PieceSource(Protocol):
    """What fails raises GroupError or DaemonError, and the source is of no further use."""

    def has(self, piece: Piece) -> bool: ...

    def ask(self, piece: Piece) -> None: ...

    def receive(self, piece: Piece, into: Bytes) -> None:
        """The piece that was asked for first and has not been received yet, into uint8 (n,)."""
        ...

    def close(self) -> None:
        """Idempotent, from any thread: who waits for it gets an error."""
        ...


class HeadPieces:
    """Pieces of `content`, over a channel to the head."""

    def __init__(self, channel: Channel, content: str) -> None:
        self._channel = channel
        self._content = content

    def has(self, piece: Piece) -> bool:
        return True

    def ask(self, piece: Piece) -> None:
        self._channel.send_message(WantPiece(self._content, *piece))

    def receive(self, piece: Piece, into: Bytes) -> None:
        answer: PieceFollows | Refused = self._channel.receive_message(
            PieceFollows | Refused, ANSWER_S, ANSWER_BYTES
        )
        if isinstance(answer, Refused):
            raise DaemonError(answer.code, f"the head cannot send {piece.block}: {answer.reason}")
        self._channel.receive_into(into.data, ANSWER_S)
        if checksum(into) != answer.checksum:
            raise ChannelError(f"{_said(piece)} was altered on its way: its checksum is wrong")

    def close(self) -> None:
        self._channel.close()


class FellowPieces:
    """Pieces of `content` that another worker holds, over a channel to it; digests come over one to the head."""

    def __init__(self, channel: Channel, digests: Channel, content: str, held: RowsHeld) -> None:
        self._channel, self._digests = channel, digests
        self._content = content
        self.held = held

    def has(self, piece: Piece) -> bool:
        held = self.held.get((piece.block, piece.role), NONE)
        return held.start <= piece.start and piece.stop <= held.stop

    def ask(self, piece: Piece) -> None:
        self._channel.send_message(WantPiece(self._content, *piece), LENT_S)
        self._digests.send_message(WantDigest(self._content, *piece))

    def receive(self, piece: Piece, into: Bytes) -> None:
        answer: PieceLent | Refused = self._channel.receive_message(PieceLent | Refused, LENT_S, ANSWER_BYTES)
        if isinstance(answer, Refused):
            raise DaemonError(answer.code, answer.reason)
        self._channel.receive_into(into.data, LENT_S)
        stated: PieceDigest | Refused = self._digests.receive_message(
            PieceDigest | Refused, ANSWER_S, ANSWER_BYTES
        )
        if isinstance(stated, Refused):
            raise DaemonError(stated.code, f"the head says no digest: {stated.reason}")
        if digest_of(into) != stated.digest:
            raise ChannelError(f"{_said(piece)} is not what the head has")

    def close(self) -> None:
        self._channel.close()
        self._digests.close()


def lent_by(channel: Channel, dial_head: Callable[[], Channel], facts: ShardFacts) -> FellowPieces | None:
    """What the worker at the other end of `channel` lends of a shard; None, and the channel is closed, if that is
    nothing. Raises CommError and OSError."""
    try:
        channel.send_message(Lacks(facts.description), LENT_S)
        answer: Holds | Refused = channel.receive_message(Holds | Refused, LENT_S, HOLDS_BYTES)
        if isinstance(answer, Holds) and (held := _held(answer, facts)):
            return FellowPieces(channel, dial_head(), facts.content, held)
    except BaseException:
        channel.close()
        raise
    channel.close()
    return None


def holds(held: RowsHeld, blocks: Sequence[BlockId]) -> Holds:
    """What to say of `held`; `blocks`: those of the asking worker's shard, in the order of a step."""
    number = {block: at for at, block in enumerate(blocks)}
    alike: dict[tuple[str, Range], list[int]] = {}
    for (block, role), rows in held.items():
        alike.setdefault((role, rows), []).append(number[block])
    said = [HeldRows(role, rows.start, rows.stop, found) for (role, rows), found in alike.items()]
    return Holds(said[:MOST_HELD])


def _held(said: Holds, facts: ShardFacts) -> RowsHeld:
    """It decides only about who is asked, so all that cannot be is passed over."""
    blocks = facts.blocks
    return {
        (blocks[at], it.role): Range(it.start, it.stop)
        for it in said.rows
        for at in it.blocks
        if 0 <= at < len(blocks) and it.role in facts.matrices(blocks[at])
    }


def _said(piece: Piece) -> str:
    return f"{piece.role}[{piece.start}:{piece.stop}] of {piece.block}"
