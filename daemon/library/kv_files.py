"""Where KV is kept on disk: each model's directory, how much it may hold, and which directories are removed for it.

In a group each rank has a directory of its own, at its own machine. Knows what KV depends on, and how much room there
is. Does not know what is in the files, nor when they are written and read (`offload.kv.disk_pages`,
`offload.kv.disk_file`).
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import secrets
import shutil
import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import fields
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple, TypeVar
from weakref import WeakValueDictionary

from shoal.daemon.errors import DaemonError
from shoal.daemon.private_files import private_dir
from shoal.models.checkpoint.checkpoint import Checkpoint
from shoal.offload.errors import OffloadError
from shoal.offload.kv.disk_file import INDEX, KvFile, slots_within
from shoal.offload.kv.disk_pages import KvDisk
from shoal.offload.kv.disk_slots import KvSlots
from shoal.offload.kv.pool import KV_LAYOUT
from shoal.offload.pack.manifest import Quant
from shoal.partition.memory_layout import PAGE_TOKENS
from shoal.partition.plan import Plan
from shoal.partition.slicing import Shard
from shoal.partition.spec import ModelSpec

from .transfer import disk_bytes

log = logging.getLogger(__name__)

DEFAULT_BYTES = 4_000_000_000
DEFAULT_SHARE = 0.1  # of the free disk, at most
LATER_FIELDS = frozenset({"norm_share"})  # that `ModelSpec` got after the first KV was kept on disk
MOST_SLOTS = 1 << 16  # of one model: bounds the memory that its index takes
SECRET = "secret"  # beside the files of rank 0 of a group
_SECRET_BYTES = 32

_Kept = TypeVar("_Kept", KvDisk, KvSlots)


def fingerprint(checkpoint: Checkpoint, quant: Quant, plan: Plan) -> bytes:
    """32 bytes that differ if anything differs that a page of KV depends on: the model's files, the weights'
    quantisation, the architecture and its ropes, whether inputs are narrow, and the layout of K and V in a page. (For
    which length of text ropes are chosen is part of a page's digest.) Raises OSError."""
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
        *(["narrow inputs"] if plan.narrow_inputs else []),
    )
    return blake2b(f"({', '.join(facts)})".encode(), digest_size=32).digest()


def spelled(spec: ModelSpec) -> str:
    """A spec in words that stay the same when `ModelSpec` gets another field, or else no KV that is on disk would be
    found again: of LATER_FIELDS only those are named that differ from their default."""
    named = [field for field in fields(spec) if field.name not in LATER_FIELDS]
    named += [it for it in fields(spec) if it.name in LATER_FIELDS and getattr(spec, it.name) != it.default]
    return f"ModelSpec({', '.join(f'{field.name}={getattr(spec, field.name)!r}' for field in named)})"


def group_fingerprint(whole: bytes, shards: Sequence[Shard], computing: Collection[str]) -> bytes:
    """32 bytes that differ if anything differs that KV of a group depends on, to the bit: the `fingerprint` of the
    whole model, how it is divided, and with what it is computed (kernels of the ranks, wire), each in a word."""
    return blake2b(repr((whole, *shards, *computing)).encode(), digest_size=32).digest()


def rank_fingerprint(group: bytes, rank: int) -> bytes:
    """32 bytes for one rank of a group; none is the fingerprint of a model that a machine has alone."""
    return blake2b(group + rank.to_bytes(4, "little"), digest_size=32, person=b"shoal rank").digest()


class NotKept(NamedTuple):
    """KV is not kept on disk: why not."""

    why: str


class KvFiles:
    """The KV that one node keeps, of its models and of others' of which it computes a part, below `root`, `limit_bytes`
    in all. None = DEFAULT_BYTES, or DEFAULT_SHARE of the free disk if that is less. Thread-safe."""

    def __init__(self, root: Path, limit_bytes: int | None) -> None:
        self._root = root
        self._limit_bytes = limit_bytes
        self._opening = threading.Lock()
        self._disks: WeakValueDictionary[Path, KvDisk | KvSlots] = WeakValueDictionary()

    def open(
        self, name: str, key: bytes, page_bytes: int, *, most_slots: int = MOST_SLOTS, grouped: bool = False
    ) -> KvDisk | NotKept:
        """The pages of a model of which this machine is rank 0, in at most `most_slots` slots. `grouped`: there are
        other ranks. Logs why when they cannot be kept."""

        def made(file: KvFile, slots: int) -> KvDisk:
            return KvDisk(file, slots, _secret(file.directory) if grouped else b"")

        return self._opened(name, key, page_bytes, most_slots, made)

    def open_slots(self, name: str, key: bytes, page_bytes: int, most_slots: int) -> KvSlots | NotKept:
        """The pages of another rank of a group, in at most `most_slots` slots."""
        return self._opened(name, key, page_bytes, most_slots, KvSlots)

    def _opened(
        self, name: str, key: bytes, page_bytes: int, most_slots: int, made: Callable[[KvFile, int], _Kept]
    ) -> _Kept | NotKept:
        """All that is open gets equal shares of the room."""
        with self._opening:
            try:
                directory = private_dir(private_dir(self._root) / key.hex()[:32])
                beside: dict[Path, KvDisk | KvSlots]
                beside = {path: kept for path, kept in self._disks.items() if not kept.closed}
                share = self._room_bytes({directory, *beside}) // (len(beside) + 1)
                if not (slots := min(_slots(share, page_bytes), most_slots)):
                    return _not_kept(name, "there is no room for a page of it")
                file = KvFile(directory, key, page_bytes, PAGE_TOKENS)
                try:
                    kept = made(file, slots)
                except BaseException:
                    file.close()
                    raise
            except (OSError, OffloadError, DaemonError) as error:
                return _not_kept(name, str(error))
            for other in beside.values():
                other.resize(_slots(share, other.page_bytes))
            self._disks[directory] = kept
        log.info("KV on disk of %s: %s of %d pages in %s", name, kept.nbytes // page_bytes, slots, directory)
        return kept

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


def _not_kept(name: str, why: str) -> NotKept:
    log.warning("the KV of %s is not kept on disk: %s", name, why)
    return NotKept(why)


def _secret(directory: Path) -> bytes:
    """The secret of the directory; a new one if there is none, so that other ranks find nothing again. Raises
    OSError."""
    file = os.open(directory / SECRET, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        if len(found := os.read(file, _SECRET_BYTES + 1)) == _SECRET_BYTES:
            return found
        made = secrets.token_bytes(_SECRET_BYTES)
        os.ftruncate(file, 0)
        os.pwrite(file, made, 0)
        return made
    finally:
        os.close(file)


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
