"""The packs of shards that this machine keeps for others' models: bounded, the least recently used go first.

    shards/STEM.FORM.KEY/             always complete
    shards/STEM.FORM.KEY.partial/     being fetched, or left by an attempt that was cut off
    shards/.locks/STEM.FORM.KEY       held shared while the pack is used, alone while it is made or removed

FORM names all that decides about a shard's bytes except the model's files, and KEY the files. Knows names, sizes and
locks. Does not know where bytes come from.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from shoal.daemon.errors import DaemonError
from shoal.daemon.private_files import private_dir
from shoal.offload.errors import PackError
from shoal.offload.pack.builder import partial_of
from shoal.offload.pack.manifest import BLOCKS, DAMAGED, MANIFEST, PARTIAL, Manifest, read_manifest
from shoal.offload.pack.pack import Pack, open_pack
from shoal.partition.amounts import format_bytes

from .shard_facts import ShardFacts

FREE_SHARE = 4  # the cache takes at most one part in so many of what is free without it
STEM_CHARS = 40
CLAIM_TRIES, CLAIM_PAUSE_S = 5, 0.02  # a command that looks at the cache has a lock for a moment


class ShardLock:
    """A claim on one place in the cache. It ends with `release`, with this object, or with the process."""

    def __init__(self, path: Path) -> None:
        self.name = path.name
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def share(self) -> None:
        """From now on nobody removes it. Raises DaemonError `busy` while somebody makes or removes it."""
        self._claim(fcntl.LOCK_SH)

    def exclude(self) -> None:
        """From now on nobody else uses it. Raises DaemonError `busy` while somebody does."""
        self._claim(fcntl.LOCK_EX)

    def release(self) -> None:
        """Idempotent."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __del__(self) -> None:
        self.release()

    def _claim(self, kind: int) -> None:
        for left in reversed(range(CLAIM_TRIES)):
            try:
                fcntl.flock(self._file, kind | fcntl.LOCK_NB)
                return
            except OSError as error:
                if left:
                    time.sleep(CLAIM_PAUSE_S)
                    continue
                busy = f"another process fetches, uses or removes {self.name}"
                raise DaemonError("busy", busy, "try again when it is done") from error


class CachedShard(NamedTuple):
    """One place in the cache. `used_ns`: when it was last taken. `model` and `part` are for people."""

    directory: Path
    nbytes: int  # on the disk
    used_ns: int
    complete: bool

    @property
    def model(self) -> str:
        manifest = self._manifest()
        return manifest.source.model if manifest is not None else self.directory.name.split(".")[0]

    @property
    def part(self) -> str:
        """As 2/3, "" if it is not known."""
        manifest = self._manifest()
        if manifest is None or manifest.shard == "whole":
            return ""
        return f"{manifest.shard.rank + 1}/{manifest.shard.ranks}"

    def _manifest(self) -> Manifest | None:
        with suppress(PackError):
            return read_manifest(self.directory)
        return None


class ShardCache:
    """The packs of shards below `root`. Several processes may use it at once. limit_bytes: of all together; None is a
    quarter of what the disk has free without them."""

    def __init__(self, root: Path, limit_bytes: int | None = None) -> None:
        self.root = root
        self._limit_bytes = limit_bytes

    def list(self) -> tuple[CachedShard, ...]:
        """What there is, the least recently used first."""
        found = []
        with suppress(FileNotFoundError):
            for path in self.root.iterdir():
                with suppress(OSError):  # another process has just removed it
                    if path.is_dir() and path.name[0] != ".":
                        complete = not path.name.endswith(PARTIAL)
                        found.append(CachedShard(path, _disk_bytes(path), path.stat().st_mtime_ns, complete))
        return tuple(sorted(found, key=lambda shard: shard.used_ns))

    def used(self, shard: CachedShard) -> bool:
        """Whether a process uses it, or fetches it."""
        lock = self.lock(shard.directory)
        try:
            lock.exclude()
        except DaemonError:
            return True
        finally:
            lock.release()
        return False

    def clear(self) -> tuple[Sequence[CachedShard], Sequence[CachedShard]]:
        """Removes all that is not in use. → what was removed, and what is in use. Raises OSError."""
        gone, kept = [], []
        for shard in self.list():
            lock = self.lock(shard.directory)
            try:
                lock.exclude()
                self.discard(shard.directory)
                gone.append(shard)
            except DaemonError:
                kept.append(shard)
            finally:
                lock.release()
        return gone, kept

    def place(self, facts: ShardFacts) -> Path:
        """Where the pack of a shard is, or would be."""
        stem = "".join(letter if letter.isalnum() else "-" for letter in facts.name[:STEM_CHARS])
        return private_dir(self.root) / f"{stem}.{facts.content}"

    def relatives(self, facts: ShardFacts) -> Iterator[Path]:
        """Packs that differ from the shard's in nothing but the files that they were made of, latest first."""
        for shard in reversed(self.list()):
            if shard.complete and shard.directory.name.split(".")[-2:-1] == [facts.form]:
                yield shard.directory

    def siblings(self, facts: ShardFacts) -> Iterator[Path]:
        """Packs of other shards of the same files, latest first."""
        for directory in self.all_of(facts.description.key):
            if directory.name.split(".")[-2:-1] != [facts.form]:
                yield directory

    def all_of(self, key: str) -> Iterator[Path]:
        """Packs of shards of the files that KEY names, latest first."""
        for shard in reversed(self.list()):
            if shard.complete and shard.directory.name.split(".")[-1] == key:
                yield shard.directory

    def lock(self, place: Path) -> ShardLock:
        """A lock on a place, not yet claimed."""
        return ShardLock(private_dir(self.root / ".locks") / place.name.removesuffix(PARTIAL))

    def find(self, place: Path, facts: ShardFacts) -> Pack | None:
        """The pack there, from now on the most recently used; None if there is none or it is damaged."""
        with suppress(PackError):
            if not (place / DAMAGED).exists():
                pack = open_pack(place)
                if pack.manifest.is_of(facts.shard):
                    pack.require(facts.spec)
                    os.utime(place)
                    return pack
        return None

    def link(self, found: Path, place: Path) -> None:
        """Has the pack at `found` at `place`, too. They share their bytes. Raises OSError."""
        partial = partial_of(place)
        self.discard(partial)
        partial.mkdir(mode=0o700)
        for name in (BLOCKS, MANIFEST):
            os.link(found / name, partial / name)
        partial.rename(place)

    def make_room(self, place: Path, nbytes: int) -> str:
        """Removes what was not used for longest and is not in use, until `nbytes` fit at `place`. → "", or why they do
        not fit; then nothing was removed. Raises OSError."""
        for trash in self.root.glob(".*.removed"):
            shutil.rmtree(trash, ignore_errors=True)
        shards = self.list()
        mine = sum(it.nbytes for it in shards if it.directory in (place, partial_of(place)))
        others = [it for it in shards if it.directory not in (place, partial_of(place))]
        free = shutil.disk_usage(self.root).free
        held = sum(it.nbytes for it in others)
        limit = self._limit_bytes
        if limit is None:
            limit = (free + mine + held) // FREE_SHARE
        if nbytes > limit:
            return f"the cache of shards may hold {format_bytes(limit)}, and it takes {format_bytes(nbytes)}"
        excess = max(held + nbytes - limit, nbytes - mine - free)
        going: list[tuple[ShardLock, Path]] = []
        try:
            for shard in others:
                lock = self.lock(shard.directory)
                if excess > 0:
                    with suppress(DaemonError):
                        lock.exclude()
                        going.append((lock, shard.directory))
                        excess -= shard.nbytes
                        continue
                lock.release()
            if excess > 0:
                return (
                    f"it takes {format_bytes(nbytes)}, the disk of {self.root} has {format_bytes(free)} free, and the "
                    "cache of shards has not enough that is not in use"
                )
            for _, directory in going:
                self.discard(directory)
        finally:
            for lock, _ in going:
                lock.release()
        return ""

    def discard(self, directory: Path) -> None:
        """Removes a pack or what an attempt has left, in one step for other processes. The caller holds its lock
        alone. Raises OSError."""
        trash = directory.with_name(f".{directory.name}.removed")
        shutil.rmtree(trash, ignore_errors=True)
        with suppress(FileNotFoundError):
            directory.rename(trash)
        shutil.rmtree(trash, ignore_errors=True)


def _disk_bytes(directory: Path) -> int:
    """What a directory takes on the disk, of files that are in several its part."""
    infos = [file.stat() for file in directory.iterdir() if file.is_file()]
    return sum(info.st_blocks * 512 // max(1, info.st_nlink) for info in infos)
