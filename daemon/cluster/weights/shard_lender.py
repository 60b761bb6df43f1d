"""A worker's side towards the others of its group: lends them what it has of their shards, straight out of its packs.

Claims no pack: one that is removed meanwhile is lent no more, since nobody's room on the disk is to depend on others.
Nothing is checked here either, because who asks has the digests.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from contextlib import suppress
from itertools import islice

import numpy as np

from shoal.comm.group.channel import Channel
from shoal.comm.group.errors import ChannelTimeout, GroupError
from shoal.daemon.errors import DaemonError
from shoal.models.checkpoint.weight_source import Piece
from shoal.offload.errors import PackError
from shoal.offload.pack.manifest import DAMAGED
from shoal.offload.pack.pack import open_pack
from shoal.partition.slicing import Range, Shard
from shoal.partition.spec import BlockId

from .earlier_shards import EarlierShard
from .piece_sources import holds
from .shard_cache import ShardCache
from .shard_facts import RowsHeld, ShardFacts
from .weight_messages import (
    ANSWER_S,
    CHANNEL_IDLE_S,
    DESCRIPTION_BYTES,
    LENT_S,
    QUESTION_BYTES,
    Lacks,
    PieceLent,
    Refused,
    WantPiece,
)

MOST_LENT_FROM = 4  # packs that are looked at for what another worker lacks
LENDING = 2  # pieces that are read at a time

log = logging.getLogger("shoal.cluster")


class ShardLender:
    """Lends from `cache` what it has of the model's files that `key` names, to each other worker on one channel."""

    def __init__(self, cache: ShardCache, key: str) -> None:
        self._cache = cache
        self._key = key
        self._lock = threading.Lock()
        self._served: set[int] = set()  # ranks
        self._reading = threading.BoundedSemaphore(LENDING)

    def serve(self, rank: int, channel: Channel) -> None:
        """Answers the questions of the worker that is `rank` until either side closes the channel."""
        with channel, suppress(GroupError):
            with self._lock:
                if rank in self._served:
                    return
                self._served.add(rank)
            try:
                self._lend(channel)
            finally:
                self._served.discard(rank)

    def _lend(self, channel: Channel) -> None:
        """Raises GroupError when the channel ends."""
        asked: Lacks = channel.receive_message(Lacks, LENT_S, DESCRIPTION_BYTES)
        try:
            facts = ShardFacts(asked.description)
            if facts.description.key != self._key:
                raise DaemonError("bad_request", "only what the group computes is lent")
        except DaemonError as error:
            channel.send_message(Refused(error.code, str(error)[:1000]), LENT_S)
            return
        shards = self._found(facts)
        channel.send_message(holds(_widest(shards), facts.blocks), LENT_S)
        while shards and not channel.closed:
            with suppress(ChannelTimeout):  # it is idle
                question: WantPiece = channel.receive_message(WantPiece, CHANNEL_IDLE_S, QUESTION_BYTES)
                self._answer(channel, facts, shards, question)

    def _found(self, facts: ShardFacts) -> Sequence[EarlierShard]:
        found = []
        for place in islice(self._cache.all_of(self._key), MOST_LENT_FROM):
            with suppress(DaemonError, PackError, OSError):
                pack = open_pack(place)
                if isinstance(pack.manifest.shard, Shard) and not (place / DAMAGED).exists():
                    found.append(EarlierShard(pack, facts))
        return found

    def _answer(
        self, channel: Channel, facts: ShardFacts, shards: Sequence[EarlierShard], question: WantPiece
    ) -> None:
        piece = Piece(question.block, question.role, question.start, question.stop)
        try:
            if question.content != facts.content:
                raise DaemonError("bad_request", f"{question.content} was not asked for before")
            data = np.empty(facts.piece_bytes(piece), np.uint8)
            shard = next((it for it in shards if it.has(piece)), None)
            if shard is None:
                raise DaemonError("not_found", f"it has no such piece of {piece.block}")
            with self._reading:
                shard.read(piece, data)
        except (DaemonError, OSError) as error:
            code = error.code if isinstance(error, DaemonError) else "not_found"
            channel.send_message(Refused(code, str(error)[:1000]), LENT_S)
            return
        channel.send_message(PieceLent(), LENT_S)
        channel.send(data, timeout_s=ANSWER_S)  # who asked waits for the head's digests, too


def _widest(shards: Sequence[EarlierShard]) -> RowsHeld:
    """Of each matrix the most rows that one of the shards has."""
    found: dict[tuple[BlockId, str], Range] = {}
    for shard in shards:
        for key, rows in shard.held.items():
            if key not in found or rows.size > found[key].size:
                found[key] = rows
    return found
