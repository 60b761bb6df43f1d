"""Where KV is kept on disk: a directory for each model, how much it may hold, and which of other models have to go.

Knows what KV depends on and what room there is. What is in the files, and when they are written and read, is
`offload.kv_disk*`.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
from hashlib import blake2b
from pathlib import Path

from shoal.models.checkpoint import Checkpoint
from shoal.offload.errors import OffloadError
from shoal.offload.kv import KV_LAYOUT, KvPool
from shoal.offload.kv_disk import KvDisk
from shoal.offload.kv_disk_file import INDEX, KvFile
from shoal.offload.pack_format import Quant
from shoal.partition.plan import Plan

from .config import NodeConfig
from .errors import DaemonError
from .home import private_dir

log = logging.getLogger(__name__)

DEFAULT_BYTES = 4_000_000_000
DEFAULT_SHARE = 0.1  # of the free disk, at most
MOST_SLOTS = 1 << 16  # of one model: bounds what is remembered of them


def fingerprint(checkpoint: Checkpoint, quant: Quant, plan: Plan) -> bytes:
    """Names everything that a page of KV depends on: the model's files, the bits of its weights, the architecture and
    how it turns positions in this context, and how K and V lie in a page. 32 bytes. Raises OSError."""
    files = [(str(path.resolve()), path.stat()) for path in checkpoint.files]
    facts = (
        KV_LAYOUT,
        quant,
        plan.kv.dtype,
        plan.kv.page_tokens,
        [(name, info.st_size, info.st_mtime_ns) for name, info in files],
        checkpoint.spec,
        [rope.for_context(plan.context_tokens) for rope in checkpoint.spec.ropes],
    )
    return blake2b(repr(facts).encode(), digest_size=32).digest()


def open_kv_disk(
    root: Path, config: NodeConfig, name: str, checkpoint: Checkpoint, plan: Plan, pool: KvPool
) -> KvDisk | None:
    """The pages of this model below `root`, or None, with a line in the log, when they cannot be had.

    `config.kv_disk_bytes` bounds those of all models together; None = DEFAULT_BYTES, or DEFAULT_SHARE of the free disk
    where that is less.
    """
    try:
        key = fingerprint(checkpoint, config.quant, plan)
        directory = private_dir(private_dir(root) / key.hex()[:32])
        slots = min(_room_bytes(root, directory, config.kv_disk_bytes) // pool.page_bytes, MOST_SLOTS)
        if not slots:
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
    log.info("KV on disk of %s: %d of %d pages in %s", name, len(disk.index), slots, directory)
    return disk


def _room_bytes(root: Path, mine: Path, limit_bytes: int | None) -> int:
    """What the directory `mine` may hold: what others leave of the limit, but at least half. Of these, the least
    recently used are removed as far as that takes it, but for those in use."""
    others = sorted((path for path in root.iterdir() if path != mine), key=_used_s)
    sizes = {path: _size_bytes(path) for path in others}
    if limit_bytes is None:
        held = sum(sizes.values()) + _size_bytes(mine)
        limit_bytes = min(DEFAULT_BYTES, int((shutil.disk_usage(root).free + held) * DEFAULT_SHARE))
    for path in others:
        if sum(sizes.values()) > limit_bytes // 2 and _remove(path):
            del sizes[path]
    return max(limit_bytes - sum(sizes.values()), limit_bytes // 2)


def _used_s(directory: Path) -> float:
    try:
        return (directory / INDEX).stat().st_mtime
    except OSError:  # not one of ours, or half removed
        return 0.0


def _size_bytes(directory: Path) -> int:
    with contextlib.suppress(OSError):
        return sum(path.stat().st_blocks * 512 for path in directory.iterdir())
    return 0


def _remove(directory: Path) -> bool:
    """Unless it is in use."""
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
