"""Where packs are kept, which model each belongs to, and whether it is still of that model.

    packs/STEM.DIGEST.QUANT/             complete, always
    packs/STEM.DIGEST.SHARD.QUANT/       of a shard of the model
    packs/STEM.DIGEST.QUANT.partial/     being built, or left by an attempt that was cut off
    packs/.locks/STEM.DIGEST.QUANT       held while it is built or removed

DIGEST is of the model's name in the store or its path, so a model that has changed gets its new pack in the place of
the old one; SHARD is of the shard's ranges, so groups of different sizes share packs whose bytes are equal. Knows
names, sizes and states; how a pack is built is `packs`. Does not import what computes.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

from shoal.comm.home import Home
from shoal.daemon.errors import DaemonError
from shoal.daemon.private_files import alone, private_dir
from shoal.offload.errors import PackError
from shoal.offload.pack.manifest import (
    BLOCKS,
    DAMAGED,
    DRAFT,
    PARTIAL,
    Manifest,
    Quant,
    Source,
    read_manifest,
)
from shoal.partition.slicing import Shard

from .library import MODEL_MANIFEST, Library
from .transfer import disk_errors

PackState = Literal["ready", "outdated", "unfinished", "damaged"]


class PackEntry(NamedTuple):
    """One pack. `model` is a name in the store or a path, "" where its manifest is damaged."""

    directory: Path
    model: str
    quant: str
    shard: str  # "whole", 2/3 of a rank, "" where its manifest is damaged
    size_bytes: int  # on the disk
    state: PackState


class PackShelf:
    """The packs under one home. Several processes may use it at once."""

    def __init__(self, home: Home) -> None:
        self.root = home.packs
        self._library = Library(home)

    def list(self) -> tuple[PackEntry, ...]:
        """All packs, by model, bits and shard."""
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
        """What the model at `path` is called here: its name in the store, or its path."""
        models = self._library.root
        absolute = path.absolute()
        return absolute.relative_to(models).parts[0] if absolute.is_relative_to(models) else str(absolute)

    def claimed(self, source: Source) -> Source:
        """`source` under the model's name, if it is in the store, with the hash of its manifest there."""
        name = self.model_of(Path(source.model))
        if name == source.model:
            return source
        try:
            manifest = (self._library.root / name / MODEL_MANIFEST).read_bytes()
        except OSError as error:
            raise DaemonError(
                "corrupt", f"the store's copy of {name} is damaged: {error.strerror}"
            ) from error
        return Source(name, source.files, hashlib.sha256(manifest).hexdigest())

    def place(self, model: str, quant: Quant, shard: Literal["whole"] | Shard = "whole") -> Path:
        """The directory of a model's pack, or of a shard of it, whether there is one or not."""
        part = "" if shard == "whole" else f".{_shard_digest(shard)}"
        return private_dir(self.root) / f"{_prefix(model)}{part}.{quant}"

    def of(self, model: str) -> tuple[PackEntry, ...]:
        """Everything that is kept for a model."""
        return tuple(entry for entry in self.list() if entry.directory.name.startswith(f"{_prefix(model)}."))

    @contextmanager
    def alone(self, directory: Path) -> Iterator[None]:
        """Only this process builds or removes the pack at `directory`. Raises DaemonError `busy`."""
        name = directory.name.removesuffix(PARTIAL)
        with alone(private_dir(self.root / ".locks") / name, f"packing {name} or removing its pack"):
            yield

    def remove(self, model: str) -> int:
        """Removes all packs of a model, also unfinished ones. → bytes that were freed. Raises DaemonError."""
        entries = self.of(model)
        for entry in entries:
            with self.alone(entry.directory):
                self.discard(entry.directory)
        return sum(entry.size_bytes for entry in entries)

    def discard(self, directory: Path) -> None:
        """Takes a pack away, in one step for others; whoever has it open goes on with it. Raises DaemonError."""
        trash = directory.with_name(f".{directory.name}.removed")
        with disk_errors(self.root, 0, directory.name):
            shutil.rmtree(trash, ignore_errors=True)
            if directory.exists():
                directory.rename(trash)
                shutil.rmtree(trash)

    def _entry(self, directory: Path) -> PackEntry:
        partial = directory.name.endswith(PARTIAL)
        quant = directory.name.removesuffix(PARTIAL).rpartition(".")[2]
        size = sum(file.stat().st_blocks * 512 for file in directory.iterdir() if file.is_file())
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
        """Whether the model's files are those that the pack was made from."""
        path = self._library.root / source.model if source.store else Path(source.model)
        directory = path if path.is_dir() else path.parent
        try:
            if source.store:
                manifest = (path / MODEL_MANIFEST).read_bytes()
                if hashlib.sha256(manifest).hexdigest() != source.store:
                    return False
            for file in source.files:
                stat = (directory / file.name).stat()
                if (stat.st_size, stat.st_mtime_ns) != (file.size, file.mtime_ns):
                    return False
        except (OSError, ValueError):  # also names that no file can have
            return False
        return True


def _shard_digest(shard: Shard) -> str:
    return hashlib.sha256(msgspec.json.encode((shard.has_sum_biases, shard.ranges))).hexdigest()[:12]


def _prefix(model: str) -> str:
    name = Path(model).name.removesuffix(".gguf")[:40]
    stem = "".join(letter if letter.isalnum() else "-" for letter in name)
    return f"{stem}.{hashlib.sha256(model.encode(errors='surrogateescape')).hexdigest()[:12]}"
