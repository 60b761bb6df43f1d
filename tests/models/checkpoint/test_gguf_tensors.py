"""Tensors that the usual converter does not write to GGUF files: fused ones are read, unknown ones are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from fakes import tiny
from fakes.running import Running, relative_error

import shoal.models.checkpoint.checkpoint as checkpoint_module
from shoal.kernels.arrays import Bytes
from shoal.models.checkpoint.checkpoint import open_checkpoint
from shoal.models.checkpoint.tensor_files import StoredTensor, TensorFiles
from shoal.models.errors import UnsupportedCheckpoint

IDS = [7 * i % 250 for i in range(40)]


def fuse(tensors: tiny.Tensors, kind: str) -> tiny.Tensors:
    """q, k and v of every layer in one tensor `attn_qkv`, for kind "weight" or "bias"."""
    fused = dict(tensors)
    for name in tensors:
        if name.endswith(f".attn_q.{kind}"):
            parts = [fused.pop(name.replace("attn_q", f"attn_{role}")) for role in "qkv"]
            fused[name.replace("attn_q", "attn_qkv")] = (np.concatenate([p[0] for p in parts]), parts[0][1])
    return fused


@pytest.mark.parametrize("biases", ["apart", "fused"])
def test_fused_projections_are_read_in_any_family(biases: str, tmp_path: Path) -> None:
    def edit(tensors: tiny.Tensors) -> tiny.Tensors:
        tensors = fuse(tensors, "weight")
        return fuse(tensors, "bias") if biases == "fused" else tensors

    model = tiny.hf_model("qwen2", seed=4)
    path = tiny.save_gguf(model, tmp_path / "m.gguf", type="F16", edit=edit)
    assert relative_error(Running(path).logits(IDS, [30]), tiny.logits(model, IDS)) <= 1e-3
    with open_checkpoint(path) as checkpoint:
        for block in checkpoint.spec.blocks():
            assert checkpoint.block_bytes(block) == checkpoint.read_block(block).nbytes


def test_matrices_are_read_in_parts_and_not_through_malloc(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny.save_gguf(tiny.hf_model("llama"), tmp_path / "m.gguf", type="Q8_0")
    with open_checkpoint(path) as checkpoint:
        whole = [checkpoint.read_block(block) for block in checkpoint.spec.blocks()]
    read, parts = TensorFiles.read, 0

    def watched(
        self: TensorFiles,
        tensor: StoredTensor,
        first_row: int = 0,
        rows: int | None = None,
        into: Bytes | None = None,
    ) -> Bytes:
        nonlocal parts
        if len(tensor.shape) > 1:
            assert into is not None  # freed blocks of many sizes leave holes that stay resident
            assert len(into) <= part_bytes
            parts += 1
        return read(self, tensor, first_row, rows, into)

    part_bytes = 1 << 13
    monkeypatch.setattr(checkpoint_module, "_PART_BYTES", part_bytes)
    monkeypatch.setattr(TensorFiles, "read", watched)
    with open_checkpoint(path) as checkpoint:
        for block, expected in zip(checkpoint.spec.blocks(), whole, strict=True):
            for role, matrix in checkpoint.read_block(block).matrix.items():
                assert np.array_equal(matrix.data, expected.matrix[role].data)
    assert parts > sum(len(weights.matrix) for weights in whole)


@pytest.mark.parametrize("name", ["output.bias", "blk.0.attn_q_norm.weight", "blk.2.attn_q.scale"])
def test_a_tensor_without_a_place_is_refused(name: str, tmp_path: Path) -> None:
    def edit(tensors: tiny.Tensors) -> tiny.Tensors:
        return tensors | {name: (np.ones(16, np.float32), None)}

    path = tiny.save_gguf(tiny.hf_model("llama"), tmp_path / "m.gguf", edit=edit)
    with pytest.raises(UnsupportedCheckpoint, match=name):
        open_checkpoint(path)


def test_precomputed_rotations_are_ignored(tmp_path: Path) -> None:
    def edit(tensors: tiny.Tensors) -> tiny.Tensors:
        return tensors | {"blk.0.attn_rot_embd.weight": (np.ones(8, np.float32), None)}

    tiny.save_gguf(tiny.hf_model("llama"), tmp_path / "m.gguf", edit=edit)
    with open_checkpoint(tmp_path / "m.gguf") as checkpoint:
        assert checkpoint.spec.family == "llama"
