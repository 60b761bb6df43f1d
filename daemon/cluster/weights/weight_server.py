"""The head's side: describes a worker's shard and sends pieces of it, straight out of the open checkpoint.

Nothing of the model is kept here but the piece that is being sent: a buffer for each channel. Several channels are
served at once, each by the thread that calls `serve`; a semaphore bounds how many read and round at a time.
"""

from __future__ import annotations

import hashlib
import threading
from contextlib import suppress

import msgspec
import numpy as np

from shoal.comm.group.channel import Channel
from shoal.comm.group.errors import ChannelTimeout, GroupError
from shoal.daemon.config import default_threads
from shoal.daemon.error_codes import translated
from shoal.daemon.errors import DaemonError
from shoal.kernels.arrays import Bytes, Floats
from shoal.models.checkpoint.checkpoint import Checkpoint
from shoal.models.checkpoint.identity import stamped
from shoal.models.checkpoint.shard import CheckpointShard
from shoal.models.checkpoint.weight_source import Piece
from shoal.models.errors import CheckpointError
from shoal.offload.errors import OffloadError
from shoal.offload.pack.builder import PackBuilder, files_of, source_of
from shoal.offload.pack.kept import KeptMatrices
from shoal.offload.pack.manifest import KERNEL_LAYOUT, PACK_FORMAT, Quant, Source
from shoal.offload.pack.pack import checksum
from shoal.partition.slicing import Shard
from shoal.partition.spec import BlockId

from .shard_facts import ShardFacts, described
from .weight_messages import (
    ANSWER_S,
    CHANNEL_IDLE_S,
    QUESTION_BYTES,
    BlockChecksum,
    Describe,
    PieceDigest,
    PieceFollows,
    Refused,
    WantChecksum,
    WantDigest,
    WeightAnswer,
    WeightQuestion,
    digest_of,
)


class WeightServer:
    """Sends shards of an open checkpoint, in the types that `quant` keeps. It stays open as long as anything is served.

    source: what identifies the checkpoint's files, if they have a name in the store.  bounded: memory is limited, so
    reading must leave nothing behind in it.  key: names these files; see `Description`.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        quant: Quant = "keep",
        source: Source | None = None,
        *,
        bounded: bool = False,
    ) -> None:
        self._checkpoint = checkpoint
        self._quant: Quant = quant
        self._source = source or source_of(checkpoint)
        self.key = _key(self._source)
        self._working = threading.BoundedSemaphore(default_threads())
        # Why it could not send: nothing that a worker can bring about.
        self.trouble: DaemonError | None = None
        if bounded:
            checkpoint.bypass_cache()

    def serve(self, channel: Channel, shard: Shard) -> None:
        """Answers the questions of the worker that has this shard, until either side closes the channel. Raises
        DaemonError if the shard is none of this model."""
        try:
            serving = _Serving(self._checkpoint, self._quant, self._source, shard)
            while not channel.closed:
                with suppress(ChannelTimeout):  # it is idle
                    question = channel.receive_message(WeightQuestion, CHANNEL_IDLE_S, QUESTION_BYTES)
                    answer, piece = self._answered(serving, question)
                    channel.send_message(answer, ANSWER_S)
                    if piece is not None:
                        channel.send(piece, timeout_s=ANSWER_S)
        except GroupError:
            pass
        finally:
            channel.close()

    def _answered(self, serving: _Serving, question: WeightQuestion) -> tuple[WeightAnswer, Bytes | None]:
        try:
            with self._working:
                return serving.answer(question)
        except (DaemonError, CheckpointError, OffloadError) as error:
            failed = translated(error)
            if failed.code == "corrupt":
                self.trouble = failed
            return Refused(failed.code, str(failed)[:1000]), None


class _Serving:
    """What is kept for one channel: the shard's description, a buffer, and the vectors of one block."""

    def __init__(self, checkpoint: Checkpoint, quant: Quant, source: Source, shard: Shard) -> None:
        self._part = CheckpointShard(checkpoint, shard)
        self._kept = KeptMatrices(self._part, quant)
        self._quant: Quant = quant
        self._source = source
        self._description = described(self._part, checkpoint.spec, shard, quant, _key(source))
        self._facts = ShardFacts(self._description)
        self._files = files_of(self._part)
        self._buffer = np.empty(0, np.uint8)
        self._vectors: tuple[BlockId, dict[str, Floats]] | None = None
        self._builder: PackBuilder | None = None

    def answer(self, question: WeightQuestion) -> tuple[WeightAnswer, Bytes | None]:
        """The answer and the bytes that follow it. Raises DaemonError, CheckpointError or OffloadError."""
        if isinstance(question, Describe):
            self._require_versions(question)
            return self._description, None
        if question.content != self._facts.content:
            raise DaemonError(
                "version",
                f"the worker asks for {question.content}, its shard is {self._facts.content}",
                "both must run the same version of Shoal",
            )
        if isinstance(question, WantChecksum):
            found: WeightAnswer = BlockChecksum(self._checksum(question.block))
            self._require_unchanged()
            return found, None
        piece = Piece(question.block, question.role, question.start, question.stop)
        data = self._read(piece, self._facts.piece_bytes(piece))
        self._require_unchanged()
        if isinstance(question, WantDigest):
            return PieceDigest(digest_of(data)), None
        return PieceFollows(checksum(data)), data

    def _read(self, piece: Piece, nbytes: int) -> Bytes:
        """The bytes of a piece, uint8 (n,), valid until the next call."""
        block, role, start, stop = piece
        if role in self._facts.vector_lengths(block):
            if self._vectors is None or self._vectors[0] != block:
                self._vectors = block, self._part.read_vectors(block)
            return self._vectors[1][role][start:stop].view(np.uint8)
        if nbytes > len(self._buffer):
            self._buffer = np.empty(nbytes, np.uint8)
        return self._kept.read_rows(block, role, start, stop, self._buffer[:nbytes]).data

    def _checksum(self, block: BlockId | None) -> str:
        if self._builder is None:
            self._builder = PackBuilder(self._part, self._quant, self._source)
        return self._builder.checksum(block)

    def _require_versions(self, question: Describe) -> None:
        mine, theirs = (PACK_FORMAT, KERNEL_LAYOUT), (question.pack_format, question.kernel_layout)
        if mine != theirs:
            raise DaemonError(
                "version",
                f"the worker keeps packs of format {theirs[0]}.{theirs[1]}, the head sends {mine[0]}.{mine[1]}",
                "run the same version of Shoal on both",
            )

    def _require_unchanged(self) -> None:
        """What was read so far is of the files that the description is about, unless this raises DaemonError."""
        if stamped(self._files).items() - self._part.stamps.items():
            raise DaemonError("corrupt", f"{self._part.path}: was changed while it was sent", "load it again")


def _key(source: Source) -> str:
    """Which files: 32 hex digits. Of a model in the store, whose content is known, it depends on the content alone."""
    files = [
        (file.name, file.size) if source.store else (file.size, file.mtime_ns, file.ctime_ns)
        for file in source.files
    ]
    return hashlib.sha256(msgspec.msgpack.encode((source.store, files))).hexdigest()[:32]
