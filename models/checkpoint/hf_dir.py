"""Hugging Face directories: config.json and safetensors, whole or sharded.

Knows where the files are and which dtypes are read. The `safetensors` library checks each file. The bytes are read by
`tensor_files`, because the library would map files into memory. Pickled weights are never opened. Does not know what
a key or a tensor means (`models.families`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from shoal.kernels import WeightType, weight_type
from shoal.models.errors import CorruptCheckpoint, MissingCheckpoint, UnsupportedCheckpoint

from .tensor_files import StoredTensor, TensorFiles, unreadable

_TYPES: dict[str, WeightType] = {"F32": weight_type(0), "F16": weight_type(1), "BF16": weight_type(30)}
_JSON_BYTES = 128 << 20
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def open_hf(directory: Path) -> TensorFiles:
    """Opens a directory with config.json and its safetensors; `metadata` is the configuration.

    Raises MissingCheckpoint, CorruptCheckpoint or UnsupportedCheckpoint.
    """
    config = read_json(directory / "config.json")
    paths = shards(directory)
    tensors: dict[str, StoredTensor] = {}
    unsupported: dict[str, str] = {}
    for number, path in enumerate(paths):
        data, header = _header(path)
        for name, entry in header.items():
            if name in tensors or name in unsupported:
                raise CorruptCheckpoint(f"{path}: tensor {name} is in an earlier shard too")
            kind = _TYPES.get(entry["dtype"])
            if kind is None:
                unsupported[name] = entry["dtype"]
            else:
                start = data + entry["data_offsets"][0]
                tensors[name] = StoredTensor(name, kind, tuple(entry["shape"]), number, start)
    return TensorFiles(paths, tensors, config, unsupported)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError."""
    try:
        with path.open("rb") as stream:
            data = stream.read(_JSON_BYTES + 1)
    except OSError as error:
        raise unreadable(path, error) from error
    if len(data) > _JSON_BYTES:
        raise CorruptCheckpoint(f"{path}: is longer than {_JSON_BYTES >> 20} MiB")
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpoint(f"{path}: is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CorruptCheckpoint(f"{path}: must hold a JSON object, holds a {type(value).__name__}")
    return value


def shards(directory: Path) -> list[Path]:
    """The safetensors files of the directory, each checked to be there."""
    if (directory / _SINGLE).is_file():
        return [directory / _SINGLE]
    if (directory / _INDEX).is_file():
        return _indexed(directory)
    pickled = next((p.name for p in sorted(directory.glob("*")) if p.suffix in (".bin", ".pt", ".pth")), None)
    if pickled:
        raise UnsupportedCheckpoint(
            f"{directory}: has its weights in {pickled}, a pickle, which can run code when opened; "
            "Shoal reads safetensors or GGUF only, convert it or fetch another revision"
        )
    raise MissingCheckpoint(f"{directory}: has neither {_SINGLE} nor {_INDEX}")


def _indexed(directory: Path) -> list[Path]:
    index = directory / _INDEX
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise CorruptCheckpoint(f"{index}: weight_map must be an object that names a file for each tensor")
    files = set(names.values()) if all(isinstance(name, str) for name in names.values()) else {""}
    for name in files:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CorruptCheckpoint(f"{index}: shard {name!r} must be a .safetensors file beside it")
        if not (directory / name).is_file():
            raise MissingCheckpoint(f"{directory / name}: this shard of the model is missing")
    return [directory / name for name in sorted(files)]


def _header(path: Path) -> tuple[int, dict[str, dict[str, Any]]]:
    """Where the data begins, and the entries of the header; the `safetensors` library has found the file sound."""
    try:
        with safe_open(path, framework="np"):  # "pt" would import torch
            pass
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header: dict[str, dict[str, Any]] = json.loads(stream.read(length))
    except (SafetensorError, ValueError) as error:
        raise CorruptCheckpoint(f"{path}: is not a sound safetensors file: {error}") from error
    except OSError as error:
        raise unreadable(path, error) from error
    header.pop("__metadata__", None)
    return 8 + length, header
