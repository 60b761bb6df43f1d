"""What people give in place of a model, so that an error says what it is and what to do.

Knows how such files begin, what such directories hold and what such GGUF metadata says. A model is not looked into.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from shoal.models.errors import CorruptCheckpoint, MissingCheckpoint, UnsupportedCheckpoint
from shoal.models.regular_files import open_regular

from .gguf_header import MAGIC
from .tensor_files import unreadable

_BEGINNING_BYTES = 512
_PICKLED = "has its weights in a pickle, which can run code when opened; use its safetensors or a GGUF file"
_OLD = "is in a form of ggml that is older than GGUF; fetch or convert the model again"
_BEGINNINGS: tuple[tuple[bytes, str], ...] = (
    (
        b"version https://git-lfs",
        "is a Git LFS pointer, not the file itself; run `git lfs pull` where it was cloned",
    ),
    (b"<!doctype", "is a web page, not a model; the download went wrong"),
    (b"<html", "is a web page, not a model; the download went wrong"),
    (b"pk\3\4", _PICKLED),  # what torch.save writes is a zip archive
    (b"\x80\2", _PICKLED),
    (b"\x80\4", _PICKLED),
    (b"lmgg", _OLD),
    (b"fmgg", _OLD),
    (b"tjgg", _OLD),
    (b"algg", "is a LoRA adapter of the time before GGUF, not a model"),
    (b"\x1f\x8b", "is compressed by gzip; unpack it first"),
    (b"7z\xbc\xaf", "is a 7z archive; unpack it first"),
    (b"(\xb5/\xfd", "is compressed by zstd; unpack it first"),
)
_MERGE = "is a LoRA adapter, not a model; merge it into its base model first"
_MMPROJ = (
    "is the part of a model that sees or hears (mmproj), not the language model; give the other GGUF file"
)
_TYPES = {
    "adapter": _MERGE,
    "lora": _MERGE,
    "mmproj": _MMPROJ,
    "clip": _MMPROJ,
    "imatrix": "is an importance matrix, which is used for quantising, not a model",
    "controlvector": "is a control vector, not a model",
    "vocab": "holds a vocabulary alone and no weights",
}
_NO_MODEL = "is not a model directory: it has no config.json"
# A file in a directory without config.json → what the directory is then.
_DIRECTORIES = {
    "adapter_config.json": _MERGE,
    "model_index.json": "is a pipeline of diffusers, not a language model",
    "params.json": "is in the format of the model's makers (params.json); use the Hugging Face or GGUF form of it",
}
_PICKLES = (".bin", ".pt", ".pth")


def strange(beginning: bytes) -> str | None:
    """What a file that begins so is, if it is none of a model's but is known."""
    start = beginning.lstrip().lower()
    return next((said for magic, said in _BEGINNINGS if start.startswith(magic)), None)


def check_file(path: Path) -> None:
    """Raises CheckpointError unless the file begins as GGUF does."""
    try:
        with open_regular(path) as stream:
            start = stream.read(_BEGINNING_BYTES) or b""
    except FileNotFoundError as error:
        raise MissingCheckpoint(f"{path}: there is no such file or directory") from error
    except OSError as error:
        raise unreadable(path, error) from error
    if start.startswith(MAGIC):
        return
    if not start:
        raise CorruptCheckpoint(f"{path}: is empty; fetch it again")
    said = strange(start)
    if said is None:
        begins = start[:4]
        shown = (
            f"'{begins.decode()}'" if begins.isascii() and begins.decode().isprintable() else begins.hex(" ")
        )
        said = (
            f"is neither a GGUF file nor a directory with config.json and safetensors: it begins with {shown}"
        )
        if path.suffix == ".safetensors" or path.name == "config.json":
            said += f"; give the directory: {path.parent}"
    raise UnsupportedCheckpoint(f"{path}: {said}")


def check_directory(path: Path) -> None:
    """Raises CheckpointError unless there is a config.json, and names the file that the user may have meant."""
    if os.path.lexists(path / "config.json"):
        return
    for name, said in _DIRECTORIES.items():
        if (path / name).exists():
            raise UnsupportedCheckpoint(f"{path}: {said}")
    inside = sorted(path.glob("*.gguf"), key=lambda file: ("mmproj" in file.name.lower(), file.name))
    if inside:
        raise MissingCheckpoint(f"{path}: {_NO_MODEL}; give the GGUF file itself: {inside[0]}")
    if snapshot := next(iter(sorted(path.glob("snapshots/*/config.json"))), None):
        raise MissingCheckpoint(f"{path}: {_NO_MODEL}; give the snapshot: {snapshot.parent}")
    if pickled := pickle_in(path):
        raise UnsupportedCheckpoint(f"{path}: {_NO_MODEL}, only {pickled}, a pickle, which Shoal never opens")
    raise MissingCheckpoint(f"{path}: {_NO_MODEL}")


def pickle_in(directory: Path) -> str | None:
    """The name of a file of pickled weights in a directory."""
    return next((p.name for p in sorted(directory.glob("*")) if p.suffix in _PICKLES), None)


def check_gguf(path: Path, metadata: Mapping[str, Any], tensors: Collection[str]) -> None:
    """Raises UnsupportedCheckpoint for a GGUF file that is sound but no model."""
    kind, arch = metadata.get("general.type"), metadata.get("general.architecture")
    said = next((_TYPES[key] for key in (kind, arch) if isinstance(key, str) and key in _TYPES), None)
    if any(name.endswith((".lora_a", ".lora_b")) for name in tensors):
        said = _MERGE
    if not tensors and "tokenizer.ggml.tokens" in metadata:
        said = said or _TYPES["vocab"]
    if said is not None:
        raise UnsupportedCheckpoint(f"{path}: {said}")
