"""The profile of this machine in a file, and what it depends on: hardware, kernels, threads, the disk.

Knows the file. `profiling` measures; `own_machine` is what the daemon makes of it.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

import msgspec
from msgspec import Struct

from shoal.daemon.cluster.speed import kernels_key
from shoal.daemon.errors import DaemonError
from shoal.partition.throughput.profile import Profile

from .profile_files import parse_profile, profile_text

log = logging.getLogger(__name__)

FORM = 14  # of what is measured: a later one is measured anew


class _File(Struct, frozen=True):
    key: str
    profile: msgspec.Raw
    disturbed: bool = False
    brief: bool = False
    looked_s: float = 0.0
    changed: str = ""


@dataclass(frozen=True)
class Kept:
    """A profile as it is kept. `disturbed`: others computed meanwhile, so it is measured again when they do not.
    `brief`: in some seconds, between requests; whoever needs all of it measures. `looked_s`: when it was measured or
    looked at again, Unix time; `changed`: what was no longer true then."""

    profile: Profile
    disturbed: bool = False
    brief: bool = False
    looked_s: float = 0.0
    changed: str = ""

    @property
    def settled(self) -> bool:
        return not (self.disturbed or self.brief)


def profile_key(threads: int, place: Path) -> str:
    """What speed depends on, as text: on so many threads, with the disk that `place` lies on."""
    nearest = next((path for path in (place, *place.parents) if path.exists()), Path("/"))
    return f"{FORM} | {kernels_key()} | {os.cpu_count()} | {threads} | {nearest.stat().st_dev}"


def read_kept(path: Path, key: str) -> Kept | None:
    """What is kept, if that still holds."""
    try:
        found = msgspec.json.decode(path.read_bytes(), type=_File)
        if found.key != key:
            return None
        profile = parse_profile(bytes(found.profile), str(path))
        return Kept(profile, found.disturbed, found.brief, found.looked_s, found.changed)
    except (OSError, msgspec.MsgspecError, DaemonError):
        return None


def write_kept(path: Path, key: str, kept: Kept) -> None:
    """What cannot be kept is measured again."""
    text = msgspec.Raw(profile_text(kept.profile))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(path.name + ".new")
        found = _File(key, text, kept.disturbed, kept.brief, kept.looked_s, kept.changed)
        fresh.write_bytes(msgspec.json.encode(found))
        fresh.replace(path)
    except OSError as error:
        log.warning("%s cannot be written: %s", path, error)
