"""Finding, building and verifying the packs of this machine's models.

Knows when a pack may be used, and what it takes to build one. Does not know where packs are kept (`pack_shelf`), nor
what is in them (`offload.pack`).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from msgspec import Struct

from shoal.comm.home import Home
from shoal.daemon.config import default_threads
from shoal.daemon.error_codes import raise_translated
from shoal.daemon.errors import NO_ROOM, DaemonError
from shoal.daemon.memory import resident_bytes
from shoal.daemon.model_name import WHOLE, ShardName
from shoal.kernels import set_threads
from shoal.models.checkpoint.checkpoint import open_checkpoint
from shoal.models.checkpoint.shard import AnyCheckpoint
from shoal.models.errors import CheckpointError
from shoal.offload.bytes_done import BytesDone, unheard
from shoal.offload.errors import PackCorrupt, PackError
from shoal.offload.pack.builder import PART_BYTES, PackBuilder, partial_of, source_of
from shoal.offload.pack.layout import part_of
from shoal.offload.pack.manifest import DAMAGED, Quant
from shoal.offload.pack.pack import Pack, open_pack
from shoal.offload.pack.writer import damaged_blocks
from shoal.partition.amounts import format_bytes, format_duration
from shoal.partition.errors import ShardError

from .pack_shelf import PackShelf
from .transfer import check_space, disk_bytes, disk_errors

LEAST_BYTES = 96 << 20  # that building takes beyond what the process has already
LEAST_PART_BYTES = 1 << 20


class Estimate(Struct, frozen=True):
    """What building a pack will take. `left_bytes`: what an attempt that was cut off did not write. `free_bytes`: free
    space on the disk that the pack will be on."""

    nbytes: int
    left_bytes: int
    seconds: float
    free_bytes: int

    def describe(self) -> str:
        """One line for people."""
        whole, time = format_bytes(self.nbytes), f"about {format_duration(max(1, self.seconds))}"
        if self.left_bytes < self.nbytes:
            return f"packing goes on: {format_bytes(self.left_bytes)} of {whole} are left, {time}"
        return f"packing takes {whole} of disk, of which {format_bytes(self.free_bytes)} are free, and {time}"


def no_estimate(estimate: Estimate) -> None:
    """For callers that do not show the estimate."""


class Packs:
    """The packs under one home. Several processes may use it at once. `begins` gets the estimate before a pack is
    built."""

    def __init__(self, home: Home, begins: Callable[[Estimate], None] = no_estimate) -> None:
        self.shelf = PackShelf(home)
        self._begins = begins

    def find(self, checkpoint: AnyCheckpoint, quant: Quant = "keep") -> Pack | None:
        """The pack of a checkpoint, or of a shard of one. None if there is none, or it is damaged or outdated."""
        source = self.shelf.claimed(source_of(checkpoint))
        directory = self.shelf.place(source.model, quant, checkpoint.shard)
        with suppress(PackError):
            pack = open_pack(directory)
            if (directory / DAMAGED).exists():
                return None
            manifest = pack.manifest
            current = manifest.source.is_still(source) and manifest.quant == quant
            if current and manifest.is_of(checkpoint.shard):
                pack.require(checkpoint.spec)
                return pack
        return None

    def get(
        self,
        checkpoint: AnyCheckpoint,
        progress: BytesDone = unheard,
        *,
        quant: Quant = "keep",
        memory_bytes: int | None = None,
    ) -> Pack:
        """The pack of a checkpoint, or of a shard of one. Builds it if there is none.

        `memory_bytes` bounds the whole process. Raises DaemonError: `resources` when disk or memory are too small,
        `busy` while another process builds it.
        """
        try:
            return self.find(checkpoint, quant) or self._build(checkpoint, quant, memory_bytes, progress)
        except Exception as error:
            raise_translated(error)

    def pack(
        self,
        path: Path,
        quant: Quant,
        *,
        shard: ShardName = WHOLE,
        memory_bytes: int | None,
        progress: BytesDone,
    ) -> Pack:
        """`get` for what a rank holds of the checkpoint at `path`, in a process that does nothing else. Raises
        DaemonError, `bad_request` when the model cannot be cut that way."""
        set_threads(default_threads())
        with self._opened(path, quant, shard) as part:
            return self.get(part, progress, quant=quant, memory_bytes=memory_bytes)

    def directory(self, path: Path, quant: Quant, shard: ShardName = WHOLE) -> Path:
        """Where the pack of what a rank holds of the checkpoint at `path` is, or would be. Raises DaemonError."""
        model = self.shelf.model_of(path)
        if shard == WHOLE:  # needs no checkpoint, so it works for a model that is gone
            return self.shelf.place(model, quant)
        with self._opened(path, quant, shard) as part:
            return self.shelf.place(model, quant, part.shard)

    def verify(self, directory: Path, progress: BytesDone = unheard) -> list[str]:
        """Read all of a pack. Returns the names of its damaged blocks; if there are any, the pack is not used again.
        Raises DaemonError when it cannot be opened."""
        try:
            pack = open_pack(directory)
            if damaged := damaged_blocks(pack, progress):
                pack.condemn()
            return [str(block) for block in damaged]
        except (PackError, OSError) as error:
            if isinstance(error, PackCorrupt):
                with suppress(OSError):  # it may be read-only
                    (directory / DAMAGED).touch()
            raise_translated(error)

    @contextmanager
    def _opened(self, path: Path, quant: Quant, shard: ShardName) -> Iterator[AnyCheckpoint]:
        """What a rank holds of the checkpoint at `path`. Raises DaemonError."""
        with ExitStack() as stack:
            try:
                checkpoint = stack.enter_context(open_checkpoint(path))
                part = part_of(checkpoint, quant, *shard)
            except (CheckpointError, ShardError) as error:
                raise_translated(error)
            yield part

    def _build(
        self, checkpoint: AnyCheckpoint, quant: Quant, memory_bytes: int | None, progress: BytesDone
    ) -> Pack:
        source = self.shelf.claimed(source_of(checkpoint))
        directory = self.shelf.place(source.model, quant, checkpoint.shard)
        builder = PackBuilder(checkpoint, quant, source, _part_bytes(memory_bytes))
        with self.shelf.alone(directory):
            if (pack := self.find(checkpoint, quant)) is not None:  # another process has just built it
                return pack
            self.shelf.discard(directory)
            partial = partial_of(directory)
            part = "" if checkpoint.shard == "whole" else f"shard {checkpoint.shard} of "
            what = f"a pack of {part}{source.model}"
            written = disk_bytes(partial) if partial.exists() else 0
            check_space(self.shelf.root, builder.nbytes - written, what)
            with disk_errors(self.shelf.root, builder.nbytes, what):
                try:
                    free = shutil.disk_usage(self.shelf.root).free
                    left, seconds = builder.left_bytes(directory), builder.seconds(directory)
                    self._begins(Estimate(builder.nbytes, left, seconds, free))
                    return builder.build(directory, progress)
                except OSError as error:
                    if error.errno in NO_ROOM:
                        shutil.rmtree(partial, ignore_errors=True)
                    raise


def _part_bytes(memory_bytes: int | None) -> int:
    """How many bytes of weights may be in memory at once. Raises DaemonError when `memory_bytes` is too small."""
    if memory_bytes is None:
        return PART_BYTES
    held = resident_bytes()
    if memory_bytes < held + LEAST_BYTES:
        raise DaemonError(
            "resources",
            f"packing needs {format_bytes(held + LEAST_BYTES)} of memory; only {format_bytes(memory_bytes)} is allowed",
            "give it more `memory_bytes`",
        )
    return max(LEAST_PART_BYTES, min(PART_BYTES, (memory_bytes - held - LEAST_BYTES) // 4))
