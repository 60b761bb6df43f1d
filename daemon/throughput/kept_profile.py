"""The profile of this machine in a file, and what it depends on: hardware, kernels, threads, the disk.

Knows the file. `profiling` measures; `own_machine` is what the daemon makes of it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import msgspec
from msgspec import Struct

from shoal.daemon.cluster.speed import kernels_key
from shoal.daemon.errors import DaemonError
from shoal.daemon.private_files import keep, kept
from shoal.partition.throughput.profile import Profile

from .profile_files import parse_profile, profile_text

FORM = 2  # of what is measured: a later one is measured anew


class _File(Struct, frozen=True):
    key: str
    profile: msgspec.Raw
    disturbed: bool = False
    brief: bool = False


@dataclass(frozen=True)
class Kept:
    """A profile as it is kept. `disturbed`: others computed meanwhile, so it is measured again when they do not.
    `brief`: in two seconds, between requests; whoever needs all of it measures."""

    profile: Profile
    disturbed: bool = False
    brief: bool = False

    @property
    def settled(self) -> bool:
        return not (self.disturbed or self.brief)


def profile_key(threads: int, place: Path) -> str:
    """What speed depends on, as text: on so many threads, with the disk that `place` lies on."""
    nearest = next((path for path in (place, *place.parents) if path.exists()), Path("/"))
    return f"{FORM} | {kernels_key()} | {os.cpu_count()} | {threads} | {nearest.stat().st_dev}"


def read_kept(path: Path, key: str) -> Kept | None:
    """What is kept, if that still holds."""
    found = kept(path, _File)
    if found is None or found.key != key:
        return None
    try:
        return Kept(parse_profile(bytes(found.profile), str(path)), found.disturbed, found.brief)
    except DaemonError:
        return None


def settled_for_others(path: Path, key: str) -> bool:
    """Whether all was measured there for something else, such as more threads: worth more than what is brief."""
    found = kept(path, _File)
    return found is not None and found.key != key and not (found.brief or found.disturbed)


def write_kept(path: Path, key: str, found: Kept) -> None:
    """What cannot be kept is measured again."""
    keep(path, _File(key, msgspec.Raw(profile_text(found.profile)), found.disturbed, found.brief))
