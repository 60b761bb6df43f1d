"""How much memory the control groups of this process leave it (Linux, v1 and v2; elsewhere there are none).

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
    """This process's groups and those around them, as far as they can be seen. In a container /proc names groups
    as the host sees them, where the container sees only its own, at the root."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, files = mount, _V2
        elif "memory" in controllers.split(","):
            root, files = mount / "memory", _V1
        else:
            continue
        inside = Path(path.lstrip("/"))
        for group in (inside, *inside.parents):
            if ".." not in group.parts and (root / group).is_dir():
                yield root / group, files


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
