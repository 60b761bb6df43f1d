"""Where Shoal keeps its files: one directory, moved by SHOAL_HOME.

Knows paths and their permissions. Does not know what is in the files.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from .errors import HomeError

SOCKET_PATH_LIMIT = 100  # sockaddr_un.sun_path holds 108 bytes on Linux, 104 on macOS


@dataclass(frozen=True)
class Home:
    """Paths below one root. Leaves nothing behind."""

    root: Path

    @classmethod
    def from_env(cls, *, whatever: bool = False) -> Home:
        """Raises HomeError where the root, or what is above it, is a file, unless `whatever` is there will do."""
        configured = os.environ.get("SHOAL_HOME")
        root = Path(configured) if configured else Path(platformdirs.user_data_dir("shoal", appauthor=False))
        home = cls(root.expanduser().absolute())
        if home.why_no_directory and not whatever:
            raise HomeError(f"SHOAL_HOME={home.root}: {home.why_no_directory}")
        return home

    @property
    def nearest(self) -> Path:
        """The root, or while it is not made, what is there of the directories above it."""
        return _nearest(self.root)

    @property
    def why_no_directory(self) -> str:
        """A file that is in its place, or above it; "" if there is none."""
        if self.nearest.is_dir():
            return ""
        return (
            "is no directory"
            if self.nearest == self.root
            else f"cannot be made: {self.nearest} is no directory"
        )

    def why_not_written(self) -> str:
        """What keeps files from being written there, which is tried; "" if nothing does."""
        try:
            with tempfile.TemporaryDirectory(dir=self.nearest):
                return ""
        except OSError as error:
            made = "" if self.nearest == self.root else f"cannot be made: {self.nearest} "
            return f"{made}cannot be written: {error.strerror}"

    @property
    def models(self) -> Path:
        return self.root / "models"

    @property
    def packs(self) -> Path:
        return self.root / "packs"

    @property
    def streamed(self) -> Path:
        """A directory on the disk that weights are streamed from, which is that of packs: the one of models, if it lies
        there, too, since there are files to read before there is a pack."""
        return self.models if disk_of(self.models) == disk_of(self.packs) else self.packs

    @property
    def shards(self) -> Path:
        """Packs of what this machine holds of models that others have."""
        return self.root / "shards"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def keys(self) -> Path:
        return self.root / "keys"

    @property
    def sessions(self) -> Path:
        return self.root / "sessions"

    @property
    def cluster(self) -> Path:
        """Who this machine is among others: its key, its certificate, and with whom it is paired."""
        return self.root / "cluster"

    @property
    def kv(self) -> Path:
        """KV pages of conversations, a directory for each model."""
        return self.root / "kv"

    def profile(self, kernels: str, threads: int) -> Path:
        """What this machine can do with these kernels (`shoal.kernels.home`) on so many threads, as it was measured:
        whoever tries others finds what was measured with these again."""
        return self.root / f"profile-{kernels}-{threads}.json"

    @property
    def experts(self) -> Path:
        """How often the experts of mixtures were used, a file for each model."""
        return self.root / "experts"

    @property
    def devices(self) -> Path:
        """What this machine's devices can do, as it was measured."""
        return self.root / "devices.json"

    @property
    def run(self) -> Path:
        """The directory of the socket and its lock: a short private path when the root's is too long for a socket."""
        path = self.root / "run"
        if len(os.fsencode(path / "daemon.sock")) <= SOCKET_PATH_LIMIT:
            return path
        digest = hashlib.sha256(os.fsencode(self.root)).hexdigest()[:12]
        return Path(tempfile.gettempdir()) / f"shoal-{os.getuid()}-{digest}"

    @property
    def socket(self) -> Path:
        return self.run / "daemon.sock"

    @property
    def address(self) -> str:
        return f"ipc://{self.socket}"


def disk_of(path: Path) -> int:
    """Which disk a path lies on, also one that is still to be made. Raises OSError."""
    return _nearest(path).stat().st_dev


def _nearest(path: Path) -> Path:
    """The path, or of the directories above it the nearest that is there."""
    return next((it for it in (path, *path.parents) if it.exists()), Path("/"))
