"""Where KV is kept on disk: each model's directory, how much it may hold, and which directories are removed for it.

Knows what KV depends on, and how much room there is. Does not know what is in the files, nor when they are written and
read (`offload.kv.disk_pages`, `offload.kv.disk_file`).
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
from collections.abc import Collection
from dataclasses import fields
from hashlib import blake2b
from pathlib import Path
from weakref import WeakValueDictionary

from shoal.daemon.errors import DaemonError
from shoal.daemon.private_files import private_dir
from shoal.models.checkpoint.checkpoint import Checkpoint
from shoal.offload.errors import OffloadError
from shoal.offload.kv.disk_file import INDEX, KvFile, slots_within
from shoal.offload.kv.disk_pages import KvDisk
from shoal.offload.kv.pool import KV_LAYOUT, KvPool
from shoal.offload.pack.manifest import Quant
from shoal.partition.memory_layout import PAGE_TOKENS
from shoal.partition.plan import Plan
from shoal.partition.spec import ModelSpec

from .transfer import disk_bytes

log = logging.getLogger(__name__)

DEFAULT_BYTES = 4_000_000_000
DEFAULT_SHARE = 0.1  # of the free disk, at most
LATER_FIELDS = frozenset({"norm_share"})  # that `ModelSpec` got after the first KV was kept on disk
MOST_SLOTS = 1 << 16  # of one model: bounds the memory that its index takes


def fingerprint(checkpoint: Checkpoint, quant: Quant, plan: Plan) -> bytes:
    """32 bytes that differ if anything differs that a page of KV depends on: the model's files, the weights'
    quantisation, the architecture and its ropes, and the layout of K and V in a page. (For which length of text ropes
    are chosen is part of a page's digest.) Raises OSError."""
    ropes = checkpoint.spec.ropes
    files = [(str(path.resolve()), checkpoint.stamps[path]) for path in checkpoint.files]
    facts = (
        repr(KV_LAYOUT),
        repr(quant),
        repr(plan.kv.dtype),
        repr(plan.kv.page_tokens),
        repr(
            [(name, stamp and stamp[2:]) for name, stamp in files]
        ),  # devices get other numbers at each start
        spelled(checkpoint.spec),
        repr([(rope.divisors, rope.magnitude) for rope in ropes]),
        *(
            f"dynamic {rope.dynamic_factor!r} {rope.dynamic_from_tokens}"
            for rope in ropes
            if rope.dynamic_factor
        ),
    )
    return blake2b(f"({', '.join(facts)})".encode(), digest_size=32).digest()


def spelled(spec: ModelSpec) -> str:
    """A spec in words that stay the same when `ModelSpec` gets another field, or else no KV that is on disk would be
    found again: of LATER_FIELDS only those are named that differ from their default."""
    named = [field for field in fields(spec) if field.name not in LATER_FIELDS]
    named += [it for it in fields(spec) if it.name in LATER_FIELDS and getattr(spec, it.name) != it.default]
    return f"ModelSpec({', '.join(f'{field.name}={getattr(spec, field.name)!r}' for field in named)})"


class KvFiles:
    """The KV that one node keeps of its models, below `root`, `limit_bytes` in all. None = DEFAULT_BYTES, or
    DEFAULT_SHARE of the free disk if that is less. Not thread-safe: one model is opened at a time."""

    def __init__(self, root: Path, limit_bytes: int | None) -> None:
        self._root = root
        self._limit_bytes = limit_bytes
        self._disks: WeakValueDictionary[Path, KvDisk] = WeakValueDictionary()

    def open(
        self, name: str, checkpoint: Checkpoint, quant: Quant, plan: Plan, pool: KvPool
    ) -> KvDisk | None:
        """The pages of a model. Logs why and returns None when they cannot be kept. All open models get equal shares
        of the room."""
        try:
            key = fingerprint(checkpoint, quant, plan)
            directory = private_dir(private_dir(self._root) / key.hex()[:32])
            beside = {path: disk for path, disk in self._disks.items() if not disk.closed}
            share = self._room_bytes({directory, *beside}) // (len(beside) + 1)
            if not (slots := _slots(share, pool.page_bytes)):
                log.warning("the KV of %s is not kept on disk: there is no room for a page of it", name)
                return None
            file = KvFile(directory, key, pool.page_bytes, pool.page_tokens)
            try:
                disk = KvDisk(file, slots)
            except BaseException:
                file.close()
                raise
        except (OSError, OffloadError, DaemonError) as error:
            log.warning("the KV of %s is not kept on disk: %s", name, error)
            return None
        for other in beside.values():
            other.resize(_slots(share, other.page_bytes))
        self._disks[directory] = disk
        log.info("KV on disk of %s: %d of %d pages in %s", name, len(disk.index), slots, directory)
        return disk

    def _room_bytes(self, open_: Collection[Path]) -> int:
        """What the directories `open_` may hold together: what the others leave of the limit. The least recently used
        of the others are removed until they leave half of it; those in use stay."""
        others = sorted((path for path in self._root.iterdir() if path not in open_), key=_used_s)
        sizes = {path: _size_bytes(path) for path in others}
        limit = self._limit_bytes
        if limit is None:
            held = sum(sizes.values()) + sum(map(_size_bytes, open_))
            limit = min(DEFAULT_BYTES, int((shutil.disk_usage(self._root).free + held) * DEFAULT_SHARE))
        for path in others:
            if sum(sizes.values()) > limit // 2 and _remove(path):
                del sizes[path]
        return limit - sum(sizes.values())


def _slots(nbytes: int, page_bytes: int) -> int:
    return min(slots_within(nbytes, page_bytes, PAGE_TOKENS), MOST_SLOTS)


def _used_s(directory: Path) -> float:
    try:
        return (directory / INDEX).stat().st_mtime
    except OSError:  # half removed, or something else's
        return 0.0


def _size_bytes(directory: Path) -> int:
    with contextlib.suppress(OSError):
        return disk_bytes(directory)
    return 0


def _remove(directory: Path) -> bool:
    """Remove it unless it is in use. Returns whether it is gone."""
    with contextlib.ExitStack() as stack:
        try:
            index = os.open(directory / INDEX, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            stack.callback(os.close, index)
            fcntl.flock(index, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # without an index nobody can use it
            pass
        shutil.rmtree(directory, ignore_errors=True)
    return not directory.exists()
