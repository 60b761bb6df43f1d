"""GGUF files, whole or split in parts.

Knows how the parts of a split file are named and numbered, and that they must agree; each part's header is read by
`gguf_header`. Does not know what a key or a tensor means (`models.families`).
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from shoal.models.errors import CorruptCheckpoint, MissingCheckpoint, UnsupportedCheckpoint

from .gguf_header import read_header
from .identity import stamped
from .tensor_files import TensorFiles

_PARTS = 1 << 10


def open_gguf(path: Path, *, whole: bool = True) -> TensorFiles:
    """Opens a GGUF file; of a split one, give the first part: the others are found beside it. `whole`: the data have to
    be there, too.

    Raises MissingCheckpoint, CorruptCheckpoint or UnsupportedCheckpoint.
    """
    stamps = stamped([path])
    metadata, tensors = read_header(path, 0, whole=whole)
    paths = [path]
    for number, other in enumerate(_other_parts(path, metadata), start=1):
        stamps |= stamped([other])
        more_metadata, more_tensors = read_header(other, number, whole=whole)
        if more_metadata.get("split.no") != number:
            raise CorruptCheckpoint(
                f"{other}: says it is part {more_metadata.get('split.no')} (split.no), expected {number}"
            )
        if twice := tensors.keys() & more_tensors.keys():
            raise CorruptCheckpoint(f"{other}: tensor {min(twice)} is in an earlier part too")
        tensors |= more_tensors
        paths.append(other)
    expected = metadata.get("split.tensors.count", len(tensors))
    if len(paths) > 1 and expected != len(tensors):
        raise CorruptCheckpoint(
            f"{path}: the parts hold {len(tensors)} tensors, split.tensors.count is {expected}"
        )
    return TensorFiles(paths, tensors, metadata, stamps=stamps)


def _other_parts(path: Path, metadata: dict[str, Any]) -> list[Path]:
    """Paths of parts 2..N of a split file, given its first part."""
    count, number = metadata.get("split.count", 1), metadata.get("split.no", 0)
    if type(count) is not int or not 0 <= count <= _PARTS:
        raise CorruptCheckpoint(f"{path}: split.count={count!r}: must be from 1 to {_PARTS}")
    if count <= 1:
        return []
    if number != 0:
        raise UnsupportedCheckpoint(
            f"{path}: is not the first of its {count} parts; open the one named 00001-of-{count:05}"
        )
    stem = re.fullmatch(rf"(.*)-00001-of-{count:05}\.gguf", path.name)
    if not stem:
        raise CorruptCheckpoint(
            f"{path}: is the first of {count} parts, so its name must end in -00001-of-{count:05}.gguf"
        )
    others = [path.with_name(f"{stem[1]}-{i:05}-of-{count:05}.gguf") for i in range(2, count + 1)]
    for other in others:
        if not os.path.lexists(other):
            raise MissingCheckpoint(f"{other}: this part of the split model is missing")
    return others
