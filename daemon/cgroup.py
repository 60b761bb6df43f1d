"""How much memory and processor time the control groups of this process leave it (Linux, v1 and v2; elsewhere there are
none).

Every group from its own up to the root may have a limit, and the tightest holds. Pages in the cache that were read once
and not used again go first when memory is short, so they do not count as taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

MOUNT = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
UNLIMITED = 1 << 60  # v1 says "no limit" by a number near 2^63


class _Files(NamedTuple):
    limits: tuple[str, ...]
    usage: str
    idle_cache: str  # in memory.stat: of the group and all below it


_V2 = _Files(("memory.max", "memory.high"), "memory.current", "inactive_file")
_V1 = _Files(("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file")


def room_bytes(mount: Path = MOUNT, membership: Path = MEMBERSHIP) -> int | None:
    """Bytes this process may still take before a group's limit is reached; None when no group has one."""
    return _tightest(_room, mount, membership)


def limit_bytes(mount: Path = MOUNT, membership: Path = MEMBERSHIP) -> int | None:
    """The tightest limit; None when no group has one."""
    return _tightest(_limit, mount, membership)


def processors(mount: Path = MOUNT, membership: Path = MEMBERSHIP) -> float | None:
    """How many processors' time a group's quota leaves this process, possibly less than one; None if none has one."""
    found = (_processors(group) for _, group in _places("cpu", mount, membership))
    return min((number for number in found if number is not None), default=None)


def _processors(group: Path) -> float | None:
    try:
        quota, period = (group / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = (group / "cpu.cfs_quota_us").read_text()
            period = (group / "cpu.cfs_period_us").read_text()
        except OSError:
            return None
    try:
        share = int(quota) / int(period)  # "max" or -1 is no quota
    except (ValueError, ZeroDivisionError):
        return None
    return share if share > 0 else None


def _tightest(bound: Callable[[Path, _Files], int | None], mount: Path, membership: Path) -> int | None:
    bounds = [bound(group, files) for group, files in _groups(mount, membership)]
    return min((number for number in bounds if number is not None), default=None)


def _limit(group: Path, files: _Files) -> int | None:
    limits = [limit for name in files.limits if (limit := _number(group / name)) is not None]
    limit = min(limits, default=UNLIMITED)
    return None if limit >= UNLIMITED else limit


def _room(group: Path, files: _Files) -> int | None:
    limit, usage = _limit(group, files), _number(group / files.usage)
    if usage is None or limit is None:
        return None
    return max(0, limit - usage + min(usage, _idle_cache(group, files)))


def _groups(mount: Path, membership: Path) -> Iterator[tuple[Path, _Files]]:
    for second, group in _places("memory", mount, membership):
        yield group, _V2 if second else _V1


def _places(controller: str, mount: Path, membership: Path) -> Iterator[tuple[bool, Path]]:
    """(whether of v2, directory) of this process's groups and those around them, as far as they can be seen. In a
    container /proc names groups as the host sees them, where the container sees only its own, at the root."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = mount / controller if controllers else mount
        inside = Path(path.lstrip("/"))
        for group in (inside, *inside.parents):
            if ".." not in group.parts and (root / group).is_dir():
                yield not controllers, root / group


def _idle_cache(group: Path, files: _Files) -> int:
    try:
        lines = (group / "memory.stat").read_text().splitlines()
        return next((int(line.split()[1]) for line in lines if line.split()[0] == files.idle_cache), 0)
    except (OSError, ValueError, IndexError):
        return 0


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no such controller, or "max"
        return None
