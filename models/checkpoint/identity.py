"""Which files a checkpoint was made of, so that others in their places are noticed.

A path is no identity: a link may lead elsewhere, a file may be moved over another or written anew. Knows which files of
a directory say something about a model. Does not read them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

# What a Hugging Face directory may say a model with, beside its weights.
COMPANIONS = (
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates",
)


class FileStamp(NamedTuple):
    """One file as it is now. Times are in nanoseconds; `changed_ns` also tells of a write that has set `written_ns`
    back, as `cp -p` does."""

    device: int
    inode: int
    nbytes: int
    written_ns: int
    changed_ns: int

    @classmethod
    def of(cls, info: os.stat_result) -> FileStamp:
        return cls(info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns)


Stamps = Mapping[Path, FileStamp | None]
"""None: there is no such file."""


def stamped(paths: Iterable[Path]) -> dict[Path, FileStamp | None]:
    """The files as they are now."""
    return {path: _stamp(path) for path in paths}


def replaced(stamps: Stamps) -> Path | None:
    """The first file that is another now, or that has come or gone. What a model cannot be loaded without is not looked
    for again once it is gone: there is nothing else to load, and what is in memory still answers."""
    for path, before in stamps.items():
        now = _stamp(path)
        if now != before and (now is not None or path.name in COMPANIONS[3:]):
            return path
    return None


def _stamp(path: Path) -> FileStamp | None:
    try:
        return FileStamp.of(path.stat())
    except (OSError, ValueError):
        return None
