"""The reader of GGUF headers, versions 2 and 3, little endian.

Knows what a file has before its weights: header, metadata and tensor table. Every count, length and offset is checked
against the size of the file before memory is allocated for it. Arrays of numbers become lists, long ones NumPy arrays,
arrays of strings `Texts`. Does not know what a key or a tensor means (`models.families`). Layout: docs/gguf.md of the
ggml project.
"""

from __future__ import annotations

import io
import os
import struct
from array import array
from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from shoal.kernels import OperandError, UnsupportedTypeError, weight_type
from shoal.models.errors import CorruptCheckpoint, UnsupportedCheckpoint
from shoal.models.regular_files import open_regular
from shoal.models.texts import Texts

from .tensor_files import StoredTensor, unreadable

MAGIC = b"GGUF"
_HEADER_BYTES = 64 << 20  # a vocabulary of 260 000 tokens with its merges takes about 15 MiB
_STRING_BYTES = 16 << 20
_KEY_BYTES = 1 << 16
_NAME_BYTES = 256
_ARRAY_ITEMS = 1 << 22
# Longer arrays of numbers stay arrays, because as a list of objects they take ten times as much.
_LIST_ITEMS = 1 << 12
_KEYS = 1 << 16
_TENSORS = 1 << 17
_ALIGNMENT = 1 << 20
_DIMENSIONS = 4
_WEIGHTS = 1 << 48

_STRING, _ARRAY, _BOOL = 8, 9, 7
_NUMBERS: dict[int, np.dtype[Any]] = {
    0: np.dtype("u1"),
    1: np.dtype("i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    7: np.dtype("u1"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}


def read_header(
    path: Path, file: int, *, whole: bool = True
) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """(metadata, tensors by name) of one GGUF file; `file` becomes the tensors' `file`. `whole`: what
    the tensors hold has to be there, too.

    Raises MissingCheckpoint, CorruptCheckpoint or UnsupportedCheckpoint.
    """
    try:
        with io.BufferedReader(open_regular(path)) as stream:
            return _Header(stream, path, os.fstat(stream.fileno()).st_size, whole).read(file)
    except OSError as error:
        raise unreadable(path, error) from error


class _Header:
    """One pass over the header of one file."""

    def __init__(self, stream: io.BufferedReader[io.FileIO], path: Path, size: int, whole: bool) -> None:
        # It reads None where it would wait.
        self._read: Callable[[int], bytes] = lambda count: stream.read(count) or b""
        self._path = path
        self._size = size
        self._whole = whole
        self._end = min(size, _HEADER_BYTES)
        self._at = 0

    def read(self, file: int) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
        """As `read_header`."""
        self._version()
        tensor_count = self._count("tensors", _TENSORS)
        key_count = self._count("metadata keys", _KEYS)
        metadata: dict[str, Any] = {}
        for _ in range(key_count):
            key = self._string(_KEY_BYTES, "a metadata key")
            if key in metadata:
                raise self._corrupt(f"metadata key {key!r} appears twice")
            metadata[key] = self._value(self._integer("<I"), key)
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 1 <= alignment <= _ALIGNMENT or alignment & (alignment - 1):
            raise self._corrupt(f"general.alignment={alignment!r}: must be a power of two up to {_ALIGNMENT}")
        tensors = [self._tensor(file) for _ in range(tensor_count)]
        data = -(-self._at // alignment) * alignment
        return metadata, self._placed(tensors, data, alignment)

    def _version(self) -> None:
        if self._take(4, "the magic") != MAGIC:
            raise self._corrupt("does not start with GGUF")
        version = self._integer("<I")
        if version & 0xFFFF == 0 and version:
            raise UnsupportedCheckpoint(
                f"{self._path}: is a big-endian GGUF; Shoal reads little-endian files only"
            )
        if version not in (2, 3):
            raise UnsupportedCheckpoint(
                f"{self._path}: is GGUF version {version}; Shoal reads versions 2 and 3"
            )

    def _tensor(self, file: int) -> StoredTensor:
        """The next entry of the tensor table; its offset still counts from the start of the data."""
        name = self._string(_NAME_BYTES, "a tensor name")
        dimensions = self._integer("<I")
        if not 1 <= dimensions <= _DIMENSIONS:
            raise self._corrupt(f"tensor {name!r} has {dimensions} dimensions: must have 1 to {_DIMENSIONS}")
        shape = tuple(self._integer("<Q") for _ in range(dimensions))[::-1]
        if min(shape) < 1 or prod(shape) > _WEIGHTS:
            raise self._corrupt(
                f"tensor {name!r} has shape {shape}: every size must be from 1, in all up to 2**48"
            )
        try:
            kind = weight_type(self._integer("<I"))
            kind.row_bytes(shape[-1])
        except UnsupportedTypeError as error:
            raise UnsupportedCheckpoint(f"{self._path}: tensor {name}: {error}") from error
        except OperandError as error:
            raise self._corrupt(f"tensor {name}: {error}") from error
        return StoredTensor(name, kind, shape, file, self._integer("<Q"))

    def _placed(self, tensors: list[StoredTensor], data: int, alignment: int) -> dict[str, StoredTensor]:
        """The tensors with offsets from the start of the file, which must lie within it and not overlap."""
        placed: dict[str, StoredTensor] = {}
        end = data
        for tensor in sorted(tensors, key=lambda t: t.offset):
            name, start = tensor.name, data + tensor.offset
            if name in placed:
                raise self._corrupt(f"tensor {name} appears twice")
            if tensor.offset % alignment:
                raise self._corrupt(f"tensor {name} starts at {tensor.offset}: not a multiple of {alignment}")
            if start < end:
                raise self._corrupt(f"tensor {name} overlaps the one before it")
            end = start + tensor.nbytes
            if self._whole and end > self._size:
                raise self._corrupt(
                    f"tensor {name} ends at byte {end}, the file at {self._size}; the file was cut short"
                )
            placed[name] = replace(tensor, offset=start)
        return placed

    def _value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self._string(_STRING_BYTES, key)
        if kind == _ARRAY:
            return self._array(key)
        return self._numbers(kind, 1, key).tolist()[0]

    def _array(self, key: str) -> list[Any] | Texts | np.ndarray:
        kind = self._integer("<I")
        count = self._count(f"items of {key}", _ARRAY_ITEMS)
        if kind == _ARRAY:
            raise UnsupportedCheckpoint(
                f"{self._path}: {key} is an array of arrays, which Shoal does not read"
            )
        if kind == _STRING:
            return self._strings(count, key)
        values = self._numbers(kind, count, key)
        return values if count > _LIST_ITEMS else list(values.tolist())

    def _numbers(self, kind: int, count: int, key: str) -> np.ndarray:
        dtype = _NUMBERS.get(kind)
        if dtype is None:
            raise UnsupportedCheckpoint(f"{self._path}: {key} has the unknown value type {kind}")
        values = np.frombuffer(self._take(count * dtype.itemsize, key), dtype)
        if kind != _BOOL:
            return values
        if (values > 1).any():
            raise self._corrupt(f"{key} is a boolean that is neither 0 nor 1")
        return values.astype(bool)

    def _strings(self, count: int, key: str) -> Texts:
        """A vocabulary has more than 100 000 of these, so the loop is written out and keeps no object for each."""
        data, lengths = bytearray(), array("I")
        read = self._read
        unpack = struct.Struct("<Q").unpack
        at, end = self._at, self._end
        try:
            for _ in range(count):
                (length,) = unpack(read(8))
                at += 8 + length
                if length > _STRING_BYTES or at > end:
                    raise self._corrupt(
                        f"an item of {key} is {length} bytes long: longer than the limit or the file (cut short?)"
                    )
                data += read(length)
                lengths.append(length)
        except struct.error as error:
            raise self._cut_short(key) from error
        self._at = at
        if len(data) != sum(lengths):
            raise self._cut_short(key)
        try:
            return Texts(bytes(data), lengths)
        except ValueError as error:
            raise self._corrupt(f"{key}: {error}") from error

    def _string(self, limit: int, what: str) -> str:
        length = self._integer("<Q")
        if length > limit:
            raise self._corrupt(f"{what} is {length} bytes long: must be up to {limit}")
        try:
            return self._take(length, what).decode()
        except UnicodeDecodeError as error:
            raise self._corrupt(f"{what} is not valid UTF-8") from error

    def _count(self, what: str, limit: int) -> int:
        value = self._integer("<Q")
        # Every item takes at least a byte, so a file cannot hold more items than it has bytes.
        if value > min(limit, self._size):
            raise self._corrupt(
                f"claims {value} {what}: more than the limit of {limit} or than the file can hold"
            )
        return value

    def _integer(self, layout: str) -> int:
        value: int = struct.unpack(layout, self._take(struct.calcsize(layout), "the header"))[0]
        return value

    def _take(self, count: int, what: str) -> bytes:
        if self._at + count > self._end:
            if self._end < self._size:
                raise self._corrupt(f"its header has more than {self._end} bytes, and no more are read")
            raise self._corrupt(
                f"{what} needs bytes up to {self._at + count}, the header ends at {self._end}; "
                "the file was cut short, fetch it again"
            )
        data = self._read(count)
        if len(data) != count:
            raise self._cut_short(what)
        self._at += count
        return data

    def _cut_short(self, within: str) -> CorruptCheckpoint:
        return self._corrupt(f"ends within {within}; the file was cut short, fetch it again")

    def _corrupt(self, what: str) -> CorruptCheckpoint:
        return CorruptCheckpoint(f"{self._path}: {what}")
