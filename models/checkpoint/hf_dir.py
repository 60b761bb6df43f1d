"""Hugging Face directories: config.json and safetensors, whole or sharded.

Knows where the files are and which dtypes are read, and checks the header of each file before its tensors are believed
(docs of the safetensors project, "Format"). The library of that name would map files into memory, and a page that
cannot be read would kill the process. Pickled weights are never opened. Does not know what a key or a tensor means
(`models.families`).
"""

from __future__ import annotations

import os
from math import prod
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from shoal.kernels import WeightType, weight_type
from shoal.models.errors import (
    CheckpointError,
    CorruptCheckpoint,
    MissingCheckpoint,
    UnsupportedCheckpoint,
    one_line,
)
from shoal.models.regular_files import FileTooLong, open_regular, read_advice, read_object, read_regular

from .foreign import pickle_in, strange
from .identity import companions, stamped
from .tensor_files import StoredTensor, TensorFiles, unreadable

_TYPES: dict[str, WeightType] = {"F32": weight_type(0), "F16": weight_type(1), "BF16": weight_type(30)}
_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
}
_BITS |= {"I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32}
_BITS |= {"I64": 64, "U64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
_INDEX_BYTES = 32 << 20  # of the largest models it has 15 MB
_HEADER_BYTES = 32 << 20
_TENSORS = 1 << 17
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def open_hf(directory: Path, *, whole: bool = True) -> TensorFiles:
    """Opens a directory with config.json and its safetensors; `metadata` is the configuration. `whole`: the data behind
    the headers have to be there, too.

    Raises MissingCheckpoint, CorruptCheckpoint or UnsupportedCheckpoint.
    """
    stamps = stamped(companions(directory))
    config = read_json(directory / "config.json")
    paths = shards(directory)
    stamps |= stamped(path for path in paths if path not in stamps)
    tensors: dict[str, StoredTensor] = {}
    unsupported: dict[str, str] = {}
    for number, path in enumerate(paths):
        data, header = _header(path, whole)
        for name, entry in header.items():
            if name in tensors or name in unsupported:
                raise CorruptCheckpoint(f"{path}: tensor {name} is in an earlier shard too")
            kind = _TYPES.get(entry.dtype)
            if kind is None:
                unsupported[name] = entry.dtype
            else:
                start = data + entry.data_offsets[0]
                tensors[name] = StoredTensor(name, kind, tuple(entry.shape), number, start)
    return TensorFiles(paths, tensors, config, unsupported, stamps)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError."""
    try:
        return read_object(path)
    except OSError as error:
        raise unreadable(path, error) from error
    except ValueError as error:
        raise CorruptCheckpoint(f"{path}: {error}") from error


def read_advised(path: Path) -> tuple[dict[str, Any], list[str]]:
    """As `read_advice`. Raises CheckpointError where the file cannot be read."""
    try:
        return read_advice(path)
    except OSError as error:
        raise unreadable(path, error) from error


def shards(directory: Path) -> list[Path]:
    """The safetensors files of the directory, each checked to be there."""
    if os.path.lexists(directory / _SINGLE):
        return [directory / _SINGLE]
    if os.path.lexists(directory / _INDEX):
        return _indexed(directory)
    if (directory / "adapter_model.safetensors").exists():
        raise UnsupportedCheckpoint(
            f"{directory}: holds a LoRA adapter and no model; merge it into its base model first"
        )
    if pickled := pickle_in(directory):
        raise UnsupportedCheckpoint(
            f"{directory}: has its weights in {pickled}, a pickle, which can run code when opened; "
            "Shoal reads safetensors or GGUF only, convert it or fetch another revision"
        )
    raise MissingCheckpoint(f"{directory}: has neither {_SINGLE} nor {_INDEX}")


class _Index(Struct):
    weight_map: dict[str, msgspec.Raw]


def _indexed(directory: Path) -> list[Path]:
    index = directory / _INDEX
    try:
        names = msgspec.json.decode(read_regular(index, _INDEX_BYTES), type=_Index).weight_map
        stored = {bytes(name) for name in names.values()}
        files = {msgspec.json.decode(name, type=str) if name.startswith(b'"') else "" for name in stored}
    except OSError as error:
        raise unreadable(index, error) from error
    except msgspec.ValidationError as error:
        raise CorruptCheckpoint(
            f"{index}: weight_map must be an object that names a file for each tensor: {one_line(error)}"
        ) from error
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise CorruptCheckpoint(f"{index}: is not valid JSON: {one_line(error)}") from error
    if not names:
        raise CorruptCheckpoint(f"{index}: weight_map must be an object that names a file for each tensor")
    for name in files:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CorruptCheckpoint(f"{index}: shard {name!r} must be a .safetensors file beside it")
        if not os.path.lexists(directory / name):
            raise MissingCheckpoint(f"{directory / name}: this shard of the model is missing")
    return [directory / name for name in sorted(files)]


_Size = Annotated[int, Meta(ge=0, lt=1 << 62)]


class _Entry(Struct):
    dtype: str
    shape: Annotated[list[_Size], Meta(max_length=16)]
    data_offsets: tuple[_Size, _Size]

    @property
    def nbytes(self) -> int:
        """What a tensor of this type and shape takes; -1 if that is no whole number of bytes, or not known."""
        bits = _BITS.get(self.dtype, -8) * prod(self.shape)
        return -1 if bits % 8 else bits // 8


def _header(path: Path, whole: bool) -> tuple[int, dict[str, _Entry]]:
    """Where the data begins, and the entries of the header, which have been found sound. Raises CheckpointError."""
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8) or b"", "little")
            if size < 8 or length > size - 8:  # only then: any bytes may be the beginning of a sound length
                if said := strange(length.to_bytes(8, "little") + (file.read(16) or b"")):
                    raise UnsupportedCheckpoint(f"{path}: {said}")
                raise _unsound(
                    path, f"it has {size} bytes, its header alone would have {length}; it was cut short"
                )
            if length > _HEADER_BYTES:
                raise FileTooLong(0, f"its header has {length} bytes, and at most {_HEADER_BYTES} are read")
            stored = file.read(length) or b""
    except OSError as error:
        raise unreadable(path, error) from error
    try:
        parts = msgspec.json.decode(stored, type=dict[str, msgspec.Raw])
        parts.pop("__metadata__", None)
        if len(parts) > _TENSORS:
            raise _unsound(path, f"it names {len(parts)} tensors, and at most {_TENSORS} are read")
        entries = {name: msgspec.json.decode(part, type=_Entry) for name, part in parts.items()}
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise _unsound(path, one_line(error)) from error
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        start, stop = entry.data_offsets
        if start != end:
            raise _unsound(
                path, f"tensor {name} begins at byte {start} of the data, the one before it ends at {end}"
            )
        if stop - start != entry.nbytes:
            raise _unsound(path, f"tensor {name}, {entry.dtype} {entry.shape}, has {stop - start} bytes")
        end = stop
    if whole and end != size - 8 - length:
        raise _unsound(
            path, f"it has {size - 8 - length} bytes of data, its tensors take {end}; was it cut short?"
        )
    return 8 + length, entries


def _unsound(path: Path, why: str) -> CheckpointError:
    return CorruptCheckpoint(f"{path}: is not a sound safetensors file: {why}")
