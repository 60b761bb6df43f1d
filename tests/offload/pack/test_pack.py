"""Packs hold what the checkpoint gives, and nothing in their files is trusted."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from fakes import tiny
from fakes.packing import assert_holds, build_pack, memory_of, small_slices, tiny_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.kernels import WEIGHT_TYPES
from shoal.models.checkpoint.checkpoint import open_checkpoint
from shoal.offload.errors import PackCorrupt, PackError
from shoal.offload.pack.manifest import BLOCKS, MANIFEST
from shoal.offload.pack.pack import Pack, open_pack
from shoal.offload.pack.writer import damaged_blocks
from shoal.partition.spec import BlockId


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("hf", [False, True], ids=["gguf", "hf"])
def test_blocks_are_bitwise_those_of_the_checkpoint(
    family: str, hf: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_slices(monkeypatch)
    with tiny_checkpoint(tmp_path, family, "F16" if hf else "F32", hf) as checkpoint:
        pack = build_pack(checkpoint, tmp_path / "pack")
        assert_holds(pack, checkpoint)
    assert sum(block.kind == "head" for block in pack.blocks) > 1
    assert damaged_blocks(pack) == []


@pytest.mark.parametrize(
    "type", [kind.name for kind in WEIGHT_TYPES if kind.name not in ("BF16", "F16", "F32")]
)
@pytest.mark.parametrize("family", ["llama", "qwen2"])  # tied and not
def test_quantised_types_are_kept(
    type: str, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_slices(monkeypatch)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1}
    with tiny_checkpoint(tmp_path, family, type, **sizes) as checkpoint:
        assert_holds(build_pack(checkpoint, tmp_path / "pack"), checkpoint)


def test_extents_are_pages_in_the_order_of_a_step(tmp_path: Path) -> None:
    with tiny_checkpoint(tmp_path, "qwen2_moe", hf=True) as checkpoint:
        pack = build_pack(checkpoint, tmp_path / "pack")
        order = [block for block in checkpoint.spec.blocks() if block.kind != "head"]
    items = list(pack.blocks.values())
    assert all(item.offset % 4096 == 0 == item.nbytes % 4096 for item in items)
    assert [item.block for item in sorted(items, key=lambda item: item.offset)][: len(order)] == order
    assert str(BlockId("head", -1, 0)) == "head.0" == str(items[-1].block)


def test_a_tied_embedding_is_the_heads_slices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_slices(monkeypatch)
    with tiny_checkpoint(tmp_path, "llama") as checkpoint:
        pack = build_pack(checkpoint, tmp_path / "pack")
    embed = pack.blocks[BlockId("embed")]
    slices = [item for block, item in pack.blocks.items() if block.kind == "head"]
    assert (embed.offset, embed.nbytes) == (slices[0].offset, sum(item.nbytes for item in slices))
    assert embed.offset + embed.nbytes == pack.path.stat().st_size
    memory = memory_of(pack, BlockId("embed"))
    pack.check(BlockId("embed"), memory)
    memory[5000] ^= 1
    with pytest.raises(PackCorrupt, match="block embed was altered"):
        pack.check(BlockId("embed"), memory)


# --- errors say what is wrong with a pack -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model, m.gguf, and its pack."""
    directory = tmp_path_factory.mktemp("packed")
    with tiny_checkpoint(directory, "qwen2", num_hidden_layers=2) as checkpoint:
        build_pack(checkpoint, directory / "pack")
    return directory


@pytest.fixture
def copy(packed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed / "pack", tmp_path / "pack"))


def alter(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 16]))


def test_an_altered_byte_names_its_block(copy: Path) -> None:
    pack = open_pack(copy)
    block = BlockId("ffn", 1)
    alter(pack.path, pack.blocks[block].offset + 777)
    with pytest.raises(PackCorrupt, match=r"blocks\.bin: block layers\.1\.ffn was altered"):
        pack.check(block, memory_of(pack, block))
    pack.check(BlockId("ffn", 0), memory_of(pack, BlockId("ffn", 0)))
    assert damaged_blocks(pack) == [block]
    assert damaged_blocks(open_pack(copy)) == [block]


def test_altered_vectors_are_found_when_a_pack_is_opened(copy: Path) -> None:
    alter(copy / BLOCKS, 100)
    with pytest.raises(PackCorrupt, match="norms and biases were altered"):
        open_pack(copy)


@pytest.mark.parametrize("change", [-4096, -1, 1, 4096])
def test_a_file_of_another_size_is_refused(copy: Path, change: int) -> None:
    path = copy / BLOCKS
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + change)
    with pytest.raises(PackCorrupt, match=rf"{BLOCKS}: has \d+ bytes, the manifest asks for"):
        open_pack(copy)


def test_what_is_no_pack_is_told(copy: Path) -> None:
    with pytest.raises(PackError, match="is no pack"):
        open_pack(copy.parent)
    (copy / BLOCKS).unlink()
    with pytest.raises(PackError, match="cannot be read"):
        open_pack(copy)


WRONG: list[tuple[list[Any], Any, str]] = [
    (["format"], 2, "not the manifest of a pack of this version"),
    (["kernel_layout"], 0, "not the manifest"),
    (["quant"], "q3", "not the manifest"),
    (["blocks", 1, "offset"], -4096, "not the manifest"),
    (["blocks", 1, "checksum"], "xyz", "not the manifest"),
    (["blocks", 1, "block", 0], "body", "not the manifest"),
    (["blocks", 1, "tensors", "q", 0], "Q9_9", "unknown type 'Q9_9'"),
    (["blocks", 1, "tensors", "q", 0], "Q4_K", "length must be a positive multiple of 256"),
    (["blocks", 1, "tensors", "q", 1], 1 << 30, "over what is before it|and needs"),
    (["blocks", 1, "tensors", "q", 3], 32, "not aligned"),
    (["blocks", 1, "tensors", "k", 3], 0, "over what is before it"),
    (["blocks", 1, "nbytes"], 4096, "bytes and needs"),
    (["blocks", 1, "offset"], 4100, "multiples of 4096"),
    (["blocks", 1, "offset"], 0, "lies over what is before"),
    (["blocks", 2, "block"], ["attn", 0, -1], "is there twice"),
    (["blocks", -1, "offset"], 1 << 59, "has .* bytes, the manifest asks"),
    (["vectors", "blocks", 0, 1, "norm", 0], 1 << 40, "outside of its extent"),
    (["vectors", "nbytes"], 1 << 40, "not the manifest"),
]


@pytest.mark.parametrize(("where", "value", "said"), WRONG)
def test_a_manifest_that_is_wrong_is_refused(copy: Path, where: list[Any], value: Any, said: str) -> None:
    manifest = json.loads((copy / MANIFEST).read_bytes())
    place = manifest
    for key in where[:-1]:
        place = place[key]
    assert where[-1] in place or isinstance(where[-1], int)
    place[where[-1]] = value
    (copy / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(PackCorrupt, match=said) as caught:
        open_pack(copy)
    assert "\n" not in str(caught.value)
    assert str(copy) in str(caught.value)


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_any_garbage_in_the_manifest_is_an_error_or_harmless(packed: Path, data: st.DataObject) -> None:
    original = (packed / "pack" / MANIFEST).read_bytes()
    at = data.draw(st.integers(0, len(original) - 1))
    piece = data.draw(st.binary(max_size=6) | st.sampled_from([b"-1", b"9" * 30, b"null", b"[]", b'"', b"{"]))
    length = data.draw(st.integers(0, 8))
    broken = packed / "broken"
    broken.mkdir(exist_ok=True)
    (broken / BLOCKS).unlink(missing_ok=True)
    (broken / BLOCKS).hardlink_to(packed / "pack" / BLOCKS)
    (broken / MANIFEST).write_bytes(original[:at] + piece + original[at + length :])
    try:
        pack = open_pack(broken)
        with open_checkpoint(packed / "m.gguf") as checkpoint:
            pack.require(checkpoint.spec)
    except PackError:
        return
    for block in pack.blocks:
        pack.weights(block, memory_of(pack, block))


def changed(pack: Pack, **fields: Any) -> Pack:
    return Pack(pack.path, msgspec.structs.replace(pack.manifest, **fields), pack.vectors, inode=0)


def test_a_pack_of_another_model_is_refused(packed: Path, tmp_path: Path) -> None:
    pack = open_pack(packed / "pack")
    with open_checkpoint(packed / "m.gguf") as checkpoint:
        pack.require(checkpoint.spec)
        spec = checkpoint.spec
    with pytest.raises(PackCorrupt, match="does not have the blocks"):
        changed(pack, blocks=pack.manifest.blocks[:-1]).require(spec)
    wider = dataclasses.replace(spec, ffn=128)
    with pytest.raises(PackCorrupt, match=r"block layers\.0\.ffn does not have the matrices"):
        pack.require(wider)
    with pytest.raises(PackCorrupt, match=r"block layers\.0\.attn does not have the vectors"):
        pack.require(dataclasses.replace(spec, pre_norm=False, post_norm=True))
    without = {block: found for block, found in pack.vectors.items() if block.kind != "head"}
    with pytest.raises(PackCorrupt, match="block head does not have the vectors"):
        Pack(pack.path, pack.manifest, without, inode=0).require(spec)
    assert pack.vectors[BlockId("head")]["norm"].dtype == np.float32


def test_a_pack_without_a_head_can_be_verified(copy: Path) -> None:
    manifest = json.loads((copy / MANIFEST).read_bytes())
    manifest["blocks"] = [item for item in manifest["blocks"] if item["block"][0] != "head"]
    (copy / MANIFEST).write_text(json.dumps(manifest))
    with (copy / BLOCKS).open("r+b") as file:
        file.truncate(max(item["offset"] + item["nbytes"] for item in manifest["blocks"]))
    pack = open_pack(copy)
    assert damaged_blocks(pack) == []
    pack.check(BlockId("embed"), memory_of(pack, BlockId("embed")))
