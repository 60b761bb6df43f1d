"""Where packs are kept, which model each belongs to, and whether the model has changed since.

    packs/STEM.DIGEST.QUANT/             always complete
    packs/STEM.DIGEST.SHARD.QUANT/       a pack of a shard of the model
    packs/STEM.DIGEST.QUANT.partial/     being built, or left by an attempt that was cut off
    packs/.locks/STEM.DIGEST.QUANT       held while the pack is built or removed

DIGEST is a hash of the model's name in the store or of its path, so the new pack of a model that has changed replaces
the old one. SHARD is a hash of the shard's ranges, so groups of different sizes share packs whose bytes are equal.
Knows names, sizes and states. Does not know how a pack is built (`packs`), and imports nothing that computes.
"""

from __future__ import annotations

import hashlib
import shutil
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

from shoal.comm.home import Home
from shoal.daemon.errors import DaemonError
from shoal.daemon.private_files import alone, private_dir
from shoal.models.regular_files import read_regular
from shoal.offload.errors import PackError
from shoal.offload.pack.manifest import (
    BLOCKS,
    DAMAGED,
    DRAFT,
    PARTIAL,
    Manifest,
    Quant,
    Source,
    SourceFile,
    read_manifest,
)
from shoal.partition.slicing import Shard

from .library import MODEL_MANIFEST, MODEL_MANIFEST_BYTES, Library
from .transfer import disk_bytes, disk_errors

PackState = Literal["ready", "outdated", "unfinished", "damaged"]


class PackEntry(NamedTuple):
    """One pack. `model` is a name in the store or a path, "" when the pack's manifest is damaged."""

    directory: Path
    model: str
    quant: str
    shard: str  # "whole", "2/3" for rank 2 of 3, "" when the manifest is damaged
    size_bytes: int  # on the disk
    state: PackState


class PackShelf:
    """The packs under one home. Several processes may use it at once."""

    def __init__(self, home: Home) -> None:
        self.root = home.packs
        self._library = Library(home)

    def list(self) -> tuple[PackEntry, ...]:
        """All packs, sorted by model, quantisation and shard."""
        try:
            found = [path for path in self.root.iterdir() if path.is_dir() and path.name[0] != "."]
        except FileNotFoundError:
            return ()
        entries = []
        for path in found:
            with suppress(FileNotFoundError):  # another process has just finished or removed it
                entries.append(self._entry(path))
        return tuple(
            sorted(entries, key=lambda entry: (entry.model, entry.quant, entry.shard, entry.directory))
        )

    def model_of(self, path: Path) -> str:
        """What packs call the model at `path`: its name in the store, or its absolute path."""
        models = self._library.root
        absolute = path.absolute()
        return absolute.relative_to(models).parts[0] if absolute.is_relative_to(models) else str(absolute)

    def claimed(self, source: Source) -> Source:
        """`source` with the model's name and the hash of its manifest, if the model is in the store."""
        name = self.model_of(Path(source.model))
        if name == source.model:
            return source
        files = [SourceFile(file.name, file.size, file.mtime_ns) for file in source.files]
        try:
            return Source(name, files, _store_digest(self._library.root / name))
        except OSError as error:
            raise DaemonError(
                "corrupt", f"the store's copy of {name} is damaged: {error.strerror}"
            ) from error

    def place(self, model: str, quant: Quant, shard: Literal["whole"] | Shard = "whole") -> Path:
        """The directory of a model's pack, or of a shard's. There need not be one."""
        part = "" if shard == "whole" else f".{_shard_digest(shard)}"
        return private_dir(self.root) / f"{_prefix(model)}{part}.{quant}"

    def of(self, model: str) -> tuple[PackEntry, ...]:
        """All packs of a model, unfinished ones too."""
        return tuple(entry for entry in self.list() if entry.directory.name.startswith(f"{_prefix(model)}."))

    def alone(self, directory: Path) -> AbstractContextManager[None]:
        """Within it, only this process builds or removes the pack at `directory`. Raises DaemonError `busy`."""
        name = directory.name.removesuffix(PARTIAL)
        return alone(private_dir(self.root / ".locks") / name, f"packing {name} or removing its pack")

    def remove(self, model: str) -> int:
        """Remove all packs of a model, unfinished ones too. Returns how many bytes were freed. Raises DaemonError."""
        entries = self.of(model)
        for entry in entries:
            with self.alone(entry.directory):
                self.discard(entry.directory)
        return sum(entry.size_bytes for entry in entries)

    def discard(self, directory: Path) -> None:
        """Remove a pack, in one step for other processes. One that has it open can read on. Raises DaemonError."""
        trash = directory.with_name(f".{directory.name}.removed")
        with disk_errors(self.root, 0, directory.name):
            shutil.rmtree(trash, ignore_errors=True)
            if directory.exists():
                directory.rename(trash)
                shutil.rmtree(trash)

    def _entry(self, directory: Path) -> PackEntry:
        partial = directory.name.endswith(PARTIAL)
        quant = directory.name.removesuffix(PARTIAL).rpartition(".")[2]
        size = disk_bytes(directory)
        try:
            manifest = read_manifest(directory, DRAFT) if partial else read_manifest(directory)
        except PackError:
            return PackEntry(directory, "", quant, "", size, "damaged")
        state = self._state(directory, manifest, partial)
        return PackEntry(directory, manifest.source.model, quant, str(manifest.shard), size, state)

    def _state(self, directory: Path, manifest: Manifest, partial: bool) -> PackState:
        if not self._is_current(manifest.source):
            return "outdated"
        if partial:
            return "unfinished"
        try:
            whole = (directory / BLOCKS).stat().st_size == manifest.nbytes
        except OSError:
            whole = False
        return "ready" if whole and not (directory / DAMAGED).exists() else "damaged"

    def _is_current(self, source: Source) -> bool:
        """Whether the model's files are still those that the pack was made from."""
        path = self._library.root / source.model if source.store else Path(source.model)
        directory = path if path.is_dir() else path.parent
        try:
            if source.store and _store_digest(path) != source.store:
                return False
            for file in source.files:
                where = directory / file.name
                info = where.stat()
                now = SourceFile(
                    file.name, info.st_size, info.st_mtime_ns, info.st_ctime_ns, str(where.resolve())
                )
                if not file.is_still(now):
                    return False
        except (OSError, ValueError):  # ValueError: a name that no file can have
            return False
        return True


def _store_digest(model: Path) -> str:
    """The hash of a model's manifest in the store. Raises OSError."""
    return hashlib.sha256(read_regular(model / MODEL_MANIFEST, MODEL_MANIFEST_BYTES)).hexdigest()


def _shard_digest(shard: Shard) -> str:
    return hashlib.sha256(msgspec.json.encode((shard.has_sum_biases, shard.ranges))).hexdigest()[:12]


def _prefix(model: str) -> str:
    name = Path(model).name.removesuffix(".gguf")[:40]
    stem = "".join(letter if letter.isalnum() else "-" for letter in name)
    return f"{stem}.{hashlib.sha256(model.encode(errors='surrogateescape')).hexdigest()[:12]}"
