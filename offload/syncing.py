"""Waiting until something is on the disk, where it outlasts a power cut."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO


def sync(file: BinaryIO) -> None:
    """Wait until what was written is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Wait until the names in a directory are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
