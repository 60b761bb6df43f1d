"""Hugging Face directories: dtypes, shards, and what is refused."""

from __future__ import annotations

import contextlib
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakes import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from shoal.kernels import dequantize
from shoal.models.checkpoint.checkpoint import open_checkpoint
from shoal.models.errors import CheckpointError, CorruptCheckpoint, MissingCheckpoint, UnsupportedCheckpoint
from shoal.partition.spec import BlockId

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_hf(tiny.hf_model("llama"), tmp_path_factory.mktemp("hf") / "whole")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_hf(tiny.hf_model("llama"), tmp_path_factory.mktemp("hf") / "sharded", sharded=True)


@pytest.fixture
def whole(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "whole")


@pytest.fixture
def parts(sharded: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sharded, tmp_path / "parts")


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


@pytest.mark.parametrize("type", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("shards", [False, True], ids=["single", "sharded"])
def test_blocks_hold_the_parameters(type: str, shards: bool, tmp_path: Path) -> None:
    model = tiny.hf_model("qwen2", seed=1)
    directory = tiny.save_hf(model, tmp_path / "m", shards, type)
    assert (directory / INDEX).exists() == shards
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    with open_checkpoint(directory) as checkpoint:
        assert checkpoint.types == {type: len(state)}
        assert (checkpoint.kind, checkpoint.name, checkpoint.path) == ("hf", "m", directory)
        weights = checkpoint.read_block(BlockId("attn", 2))
    matrix = weights.matrix["k"]
    assert matrix.type.name == type
    assert np.array_equal(dequantize(matrix), state["model.layers.2.self_attn.k_proj.weight"])
    assert np.array_equal(weights.vector["k_bias"], state["model.layers.2.self_attn.k_proj.bias"])
    assert weights.vector["norm"].dtype == np.float32


def test_tokenizer_and_advice(whole: Path) -> None:
    stated = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": None}
    (whole / "generation_config.json").write_text(json.dumps(stated))
    with open_checkpoint(whole) as checkpoint:
        assert checkpoint.tokenizer().decode(checkpoint.tokenizer().encode("the ring")) == "the ring"
    assert checkpoint.advice == (str(whole / "generation_config.json"), "", stated)
    (whole / "generation_config.json").unlink()
    with open_checkpoint(whole) as checkpoint:
        assert checkpoint.advice.values == {}


def test_name_of_a_hub_snapshot(whole: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--acme--Tiny-1" / "snapshots" / "0123abc"
    snapshot.parent.mkdir(parents=True)
    whole.rename(snapshot)
    with open_checkpoint(snapshot) as checkpoint:
        assert checkpoint.name == "acme/Tiny-1"


def test_linked_files_are_followed(whole: Path, tmp_path: Path) -> None:
    """The hub's cache keeps blobs elsewhere and links to them."""
    blob = (whole / SINGLE).rename(tmp_path / "blob")
    (whole / SINGLE).symlink_to(blob)
    with open_checkpoint(whole) as checkpoint:
        checkpoint.read_block(BlockId("embed"))


CONFIG: list[tuple[bytes, type[CheckpointError], str]] = [
    (b"{", CorruptCheckpoint, "not valid JSON"),
    (b"\xff\xfe\xff", CorruptCheckpoint, "not valid JSON"),
    (b"[" * 200_000, CorruptCheckpoint, "nested too deep: must be at most 64"),
    (b"[1]", CorruptCheckpoint, "must hold a JSON object, holds a list"),
    (b"{}", CorruptCheckpoint, "model_type is missing"),
]


@pytest.mark.parametrize(("content", "kind", "message"), CONFIG)
def test_broken_config(whole: Path, content: bytes, kind: type[CheckpointError], message: str) -> None:
    (whole / "config.json").write_bytes(content)
    with pytest.raises(kind, match=message) as caught:
        open_checkpoint(whole)
    assert str(whole / "config.json") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_weights(whole: Path) -> None:
    (whole / SINGLE).unlink()
    with pytest.raises(MissingCheckpoint, match=r"neither model\.safetensors nor"):
        open_checkpoint(whole)
    (whole / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(UnsupportedCheckpoint, match=r"pytorch_model\.bin, a pickle"):
        open_checkpoint(whole)


INDICES: list[tuple[Any, type[CheckpointError], str]] = [
    ({}, CorruptCheckpoint, "weight_map must be an object"),
    ({"weight_map": []}, CorruptCheckpoint, "weight_map must be an object"),
    ({"weight_map": {}}, CorruptCheckpoint, "weight_map must be an object"),
    ({"weight_map": {"a": 1}}, CorruptCheckpoint, "shard ''"),
    (
        {"weight_map": {"a": "../../etc/x.safetensors"}},
        CorruptCheckpoint,
        "must be a .safetensors file beside it",
    ),
    ({"weight_map": {"a": "/etc/x.safetensors"}}, CorruptCheckpoint, "beside it"),
    ({"weight_map": {"a": "sub/x.safetensors"}}, CorruptCheckpoint, "beside it"),
    ({"weight_map": {"a": "pytorch_model.bin"}}, CorruptCheckpoint, "beside it"),
    ({"weight_map": {"a": "x\0.safetensors"}}, MissingCheckpoint, "shard of the model is missing"),
    ({"weight_map": {"a": "gone.safetensors"}}, MissingCheckpoint, "gone.safetensors: this shard"),
]


@pytest.mark.parametrize(("index", "kind", "message"), INDICES)
def test_broken_index(parts: Path, index: Any, kind: type[CheckpointError], message: str) -> None:
    (parts / INDEX).write_text(json.dumps(index))
    with pytest.raises(kind, match=message):
        open_checkpoint(parts)


def test_tensor_in_two_shards(parts: Path) -> None:
    first, second = sorted(parts.glob("*.safetensors"))[:2]
    shutil.copy(first, second)
    with pytest.raises(CorruptCheckpoint, match="is in an earlier shard too"):
        open_checkpoint(parts)


def rewritten(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    tensors = load_file(directory / SINGLE)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / SINGLE)
    return directory


NAME = "model.layers.1.mlp.up_proj.weight"


def test_wrong_shape(whole: Path) -> None:
    rewritten(whole, lambda tensors: tensors.update({NAME: tensors[NAME].T}))
    with pytest.raises(CorruptCheckpoint, match=rf"{NAME} has shape \(64, 96\), .* asks for \(96, 64\)"):
        open_checkpoint(whole)
    rewritten(whole, lambda tensors: tensors.update({NAME: torch.tensor(1.0)}))
    with pytest.raises(CorruptCheckpoint, match=r"has shape \(\)"):
        open_checkpoint(whole)


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.float8_e4m3fn, "F8_E4M3"), (torch.int8, "I8"), (torch.float64, "F64")]
)
def test_other_dtypes_are_refused_where_needed(whole: Path, dtype: torch.dtype, name: str) -> None:
    rewritten(whole, lambda tensors: tensors.update(unused=torch.zeros(3).to(dtype)))
    open_checkpoint(whole).close()
    rewritten(whole, lambda tensors: tensors.update({NAME: tensors[NAME].to(dtype)}))
    with pytest.raises(UnsupportedCheckpoint, match=rf"{NAME} has type {name}.*supported: F32, F16, BF16"):
        open_checkpoint(whole)


def header_of(data: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(header: dict[str, Any], body: bytes) -> bytes:
    encoded = json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + body


def test_lying_headers(whole: Path) -> None:
    content = (whole / SINGLE).read_bytes()
    header, body = header_of(content)
    far = {**header, NAME: {**header[NAME], "data_offsets": [0, 2**62]}}
    shape = {**header, NAME: {**header[NAME], "shape": [2**40, 2**40]}}
    for damaged in (
        b"",
        content[:7],
        content[:100],
        content[:-1],
        content + b"x",
        struct.pack("<Q", 2**63) + content[8:],
        with_header(far, body),
        with_header(shape, body),
        with_header({**header, NAME: 7}, body),
    ):
        (whole / SINGLE).write_bytes(damaged)
        with pytest.raises(CorruptCheckpoint, match="not a sound safetensors file") as caught:
            open_checkpoint(whole)
        assert "\n" not in str(caught.value)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_flipped_bytes(saved: Path, tmp_path: Path, data: st.DataObject) -> None:
    directory = shutil.copytree(saved, tmp_path / "whole", dirs_exist_ok=True)
    name = data.draw(st.sampled_from([SINGLE, "config.json"]))
    damaged = bytearray((saved / name).read_bytes())
    end = min(len(damaged), 8 + int.from_bytes(damaged[:8], "little")) if name == SINGLE else len(damaged)
    for place in data.draw(st.lists(st.integers(0, end - 1), min_size=1, max_size=4)):
        damaged[place] = data.draw(st.one_of(st.integers(0, 255), st.sampled_from(b'0-9"{}[]e')))
    (directory / name).write_bytes(damaged)
    with contextlib.suppress(CheckpointError), open_checkpoint(directory) as checkpoint:
        for block in checkpoint.spec.blocks()[:4]:
            checkpoint.read_block(block)


@pytest.mark.parametrize("beginning", [b"\x80\x02", b"\x80\x04", b"PK"])
def test_the_length_of_a_header_may_look_like_the_beginning_of_another_file(
    tmp_path: Path, beginning: bytes
) -> None:
    path = tiny.save_hf(tiny.hf_model("llama"), tmp_path / "m")
    weights = path / "model.safetensors"
    data = weights.read_bytes()
    length = int.from_bytes(data[:8], "little")
    longer = int.from_bytes(beginning, "little")
    while longer < length:
        longer += 1 << 16
    header = data[8 : 8 + length].ljust(longer)
    weights.write_bytes(longer.to_bytes(8, "little") + header + data[8 + length :])
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.spec.layers
