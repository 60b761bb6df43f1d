"""Packs of tiny models, and what each of their blocks should hold."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from fakes import tiny

from shoal.kernels.arrays import Bytes
from shoal.models.checkpoint.checkpoint import Checkpoint, open_checkpoint
from shoal.models.checkpoint.shard import AnyCheckpoint
from shoal.offload.bytes_done import BytesDone, unheard
from shoal.offload.pack import layout as pack_layout
from shoal.offload.pack.builder import PackBuilder
from shoal.offload.pack.manifest import Quant
from shoal.offload.pack.pack import Pack
from shoal.partition.spec import BlockId


@contextmanager
def tiny_checkpoint(
    directory: Path, family: str = "llama", type: str = "F32", hf: bool = False, **overrides: object
) -> Iterator[Checkpoint]:
    """A tiny model of the family, as a GGUF file or a Hugging Face directory in `directory`."""
    model = tiny.hf_model(family, **overrides)
    if hf:
        path = tiny.save_hf(model, directory / "hf", type=type)
    else:
        path = tiny.save_gguf(model, directory / "m.gguf", type=type)
    with open_checkpoint(path) as checkpoint:
        yield checkpoint


def build_pack(
    checkpoint: AnyCheckpoint, directory: Path, quant: Quant = "keep", progress: BytesDone = unheard
) -> Pack:
    """Packs a checkpoint into `directory`, which must not exist yet."""
    return PackBuilder(checkpoint, quant).build(directory, progress)


def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes slices so small that even a tiny head has several."""
    monkeypatch.setattr(pack_layout, "SLICE_BYTES", 4096)


def memory_of(pack: Pack, block: BlockId) -> Bytes:
    """The bytes of a block, uint8."""
    item = pack.blocks[block]
    with pack.path.open("rb") as file:
        file.seek(item.offset)
        return np.fromfile(file, np.uint8, item.nbytes)


def assert_holds(pack: Pack, checkpoint: AnyCheckpoint) -> None:
    """Asserts that every block of the pack is bitwise that of the checkpoint, or of a shard of one."""
    spec = checkpoint.spec
    pack.require(spec)
    for block in spec.blocks():
        expected = checkpoint.read_block(block)
        assert pack.vectors.get(block, {}).keys() == expected.vector.keys()
        if block.kind == "head":
            continue
        memory = memory_of(pack, block)
        pack.check(block, memory)
        got = pack.weights(block, memory)
        assert got.matrix.keys() == expected.matrix.keys()
        for role, matrix in expected.matrix.items():
            mine = got.matrix[role]
            assert (mine.type, mine.rows, mine.cols) == (matrix.type, matrix.rows, matrix.cols)
            assert np.array_equal(mine.data, matrix.data), (block, role)
            assert mine.data.ctypes.data - memory.ctypes.data == pack.blocks[block].tensors[role].offset
        for role, vector in expected.vector.items():
            assert np.array_equal(got.vector[role], vector), (block, role)
    if not spec.vocab:  # a shard without embedding and head
        assert not any(block.kind in ("embed", "head") for block in pack.blocks)
        return
    block, role = pack_layout.head_origin(checkpoint)
    expected = checkpoint.read_block(block).matrix[role]
    slices = [pack.weights(b, memory_of(pack, b)) for b in sorted(pack.blocks) if b.kind == "head"]
    assert np.array_equal(np.concatenate([weights.matrix["head"].data for weights in slices]), expected.data)
    assert sum(weights.matrix["head"].rows for weights in slices) == spec.vocab
    norm = checkpoint.read_block(BlockId("head")).vector["norm"]
    assert all(np.array_equal(weights.vector["norm"], norm) for weights in slices)
