"""The profile of this machine in a file, and what it depends on: hardware, kernels, threads, the disk.

Knows the file. `profiling` measures; `own_machine` is what the daemon makes of it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from msgspec import Struct

from shoal.comm.home import disk_of
from shoal.daemon.cluster.speed import kernels_key
from shoal.daemon.errors import DaemonError
from shoal.partition.throughput.prediction import Binding
from shoal.partition.throughput.profile import Profile

from .profile_files import parse_profile, profile_text

log = logging.getLogger(__name__)

LEAST_CHANGE = 1.2  # times: a machine that others share differs by so much from one minute to the next
FORM = 14  # of what is measured: a later one is measured anew


class _File(Struct, frozen=True):
    key: str
    profile: msgspec.Raw
    disturbed: bool = False
    brief: bool = False
    looked_s: float = 0.0
    drift: dict[Binding, float] = {}


@dataclass(frozen=True)
class Kept:
    """A profile as it is kept. `disturbed`: others computed meanwhile, so it is measured again when they do not.
    `brief`: in some seconds, between requests; whoever needs all of it measures. `looked_s`: when it was measured or
    looked at again, Unix time; `drift`: how many times as long parts took then as when it was measured, of those that
    had changed. The profile is as it was then."""

    profile: Profile
    disturbed: bool = False
    brief: bool = False
    looked_s: float = 0.0
    drift: Mapping[Binding, float] = field(default_factory=dict)

    @property
    def settled(self) -> bool:
        """Whether whoever needs all of it need not measure."""
        return not (self.disturbed or self.brief or self._changes)

    @property
    def slower(self) -> bool:
        """Whether a part takes longer than when it was measured."""
        return any(times > 1 for times in self._changes.values())

    @property
    def changed(self) -> str:
        """The drift in words; "" if all is as it was."""
        return ", ".join(f"{part} takes {times:.2g} times as long" for part, times in self._changes.items())

    @property
    def _changes(self) -> Mapping[Binding, float]:
        return {part: times for part, times in self.drift.items() if max(times, 1 / times) > LEAST_CHANGE}


def profile_key(threads: int, place: Path) -> str:
    """What speed depends on, as text: on so many threads, with the disk that `place` lies on."""
    return f"{FORM} | {kernels_key()} | {os.cpu_count()} | {threads} | {disk_of(place)}"


def read_kept(path: Path, key: str) -> Kept | None:
    """What is kept, if that still holds."""
    try:
        found = msgspec.json.decode(path.read_bytes(), type=_File)
        if found.key != key:
            return None
        profile = parse_profile(bytes(found.profile), str(path))
        return Kept(profile, found.disturbed, found.brief, found.looked_s, found.drift)
    except (OSError, msgspec.MsgspecError, RecursionError, DaemonError):
        return None


def write_kept(path: Path, key: str, kept: Kept) -> None:
    """What cannot be kept is measured again."""
    text = msgspec.Raw(profile_text(kept.profile))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(path.name + ".new")
        found = _File(key, text, kept.disturbed, kept.brief, kept.looked_s, dict(kept.drift))
        fresh.write_bytes(msgspec.json.encode(found))
        fresh.replace(path)
    except OSError as error:
        log.warning("%s cannot be written: %s", path, error)
