"""Building packs: interrupted, on a full disk, out of order, quantised. No pack is ever half made."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes.packing import assert_holds, build_pack, memory_of, small_slices, tiny_checkpoint

from shoal.kernels import dequantize
from shoal.kernels.arrays import Floats
from shoal.models.checkpoint.checkpoint import Checkpoint
from shoal.offload.errors import PackError, PackPointless
from shoal.offload.pack import builder as pack_build
from shoal.offload.pack import writer as pack_file
from shoal.offload.pack.builder import PackBuilder, partial_of
from shoal.offload.pack.manifest import BLOCKS
from shoal.offload.pack.pack import Pack
from shoal.offload.pack.writer import PackFile, damaged_blocks
from shoal.partition.spec import BlockId


class Stopped(Exception):
    """Ends a build in the middle."""


def stop_at(share: float) -> Any:
    def progress(done: int, total: int) -> None:
        if done > share * total:
            raise Stopped

    return progress


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[BlockId]:
    """A list that gets the block of every matrix that is read from now on."""
    read: list[BlockId] = []
    original = Checkpoint.read_rows

    def read_rows(self: Checkpoint, block: BlockId, *rest: Any) -> Any:
        read.append(block)
        return original(self, block, *rest)

    monkeypatch.setattr(Checkpoint, "read_rows", read_rows)
    return read


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "phi3"])
def test_small_parts_and_chunks_make_the_same_pack(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_slices(monkeypatch)
    with tiny_checkpoint(tmp_path, family, "Q8_0") as checkpoint:
        whole = build_pack(checkpoint, tmp_path / "whole")
        monkeypatch.setattr(pack_file, "BUFFER_BYTES", 4096)
        parts = PackBuilder(checkpoint, part_bytes=1000).build(tmp_path / "parts")
        assert_holds(parts, checkpoint)
    assert parts.path.read_bytes() == whole.path.read_bytes()
    assert parts.manifest == whole.manifest


def test_without_direct_writes_it_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = os.open

    def refusing(path: Any, flags: int, *rest: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument", str(path))
        return opened(path, flags, *rest)

    with tiny_checkpoint(tmp_path) as checkpoint:
        monkeypatch.setattr(os, "open", refusing)
        pack = build_pack(checkpoint, tmp_path / "pack")
        assert damaged_blocks(pack) == []
        monkeypatch.undo()
        assert_holds(pack, checkpoint)


def test_an_interrupted_build_leaves_no_pack_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_slices(monkeypatch)
    place = tmp_path / "pack"
    with tiny_checkpoint(tmp_path, "llama") as checkpoint:
        with pytest.raises(Stopped):
            build_pack(checkpoint, place, progress=stop_at(0.5))
        assert not place.exists()
        with pytest.raises(PackError, match="is no pack"):
            pack_build.open_pack(partial_of(place))
        read = count_reads(monkeypatch)
        pack = build_pack(checkpoint, place)
        assert 0 < len(set(read)) < len(checkpoint.spec.blocks()) - 1
        assert BlockId("attn", 0) not in read
        assert_holds(pack, checkpoint)
    assert sorted(path.name for path in place.iterdir()) == ["blocks.bin", "manifest.json"]
    assert not partial_of(place).exists()


def test_what_was_damaged_meanwhile_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "pack"
    with tiny_checkpoint(tmp_path, "qwen2") as checkpoint:
        with pytest.raises(Stopped):
            build_pack(checkpoint, place, progress=stop_at(0.8))
        block = BlockId("ffn", 0)
        offset = next(i.offset for i in PackBuilder(checkpoint).manifest.blocks if i.block == block)
        with (partial_of(place) / BLOCKS).open("r+b") as file:
            file.seek(offset + 8)
            file.write(b"wrong")
        journal = partial_of(place) / "journal"
        journal.write_text(journal.read_text() + "no such block\n\x00garbage\nlayers.0.attn")
        read = count_reads(monkeypatch)
        pack = build_pack(checkpoint, place)
        assert block in read
        assert BlockId("ffn", 1) not in read
        assert_holds(pack, checkpoint)


def test_another_packs_remains_are_not_used(tmp_path: Path) -> None:
    place = tmp_path / "pack"
    with tiny_checkpoint(tmp_path, "qwen2") as checkpoint:
        with pytest.raises(Stopped):
            build_pack(checkpoint, place, "q8", progress=stop_at(0.8))
        assert_holds(build_pack(checkpoint, place), checkpoint)


KILLED = """
import os, signal, sys
from pathlib import Path
from shoal.models.checkpoint.checkpoint import open_checkpoint
from shoal.offload.pack.builder import PackBuilder
def progress(done, total):
    if done > total / 2:
        os.kill(os.getpid(), signal.SIGKILL)
with open_checkpoint(sys.argv[1]) as checkpoint:
    PackBuilder(checkpoint).build(Path(sys.argv[2]), progress)
"""


def test_a_killed_build_leaves_no_pack_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "pack"
    with tiny_checkpoint(tmp_path, "mixtral") as checkpoint:
        command = [sys.executable, "-c", KILLED, str(checkpoint.path), str(place)]
        assert subprocess.run(command, timeout=120, check=False).returncode == -signal.SIGKILL
        assert not place.exists()
        read = count_reads(monkeypatch)
        pack = build_pack(checkpoint, place)
        assert BlockId("attn", 0) not in read
        assert_holds(pack, checkpoint)


@pytest.mark.parametrize("call", ["pwrite", "posix_fallocate", "fsync"])
def test_a_full_or_failing_disk_is_an_error_and_no_pack(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with tiny_checkpoint(tmp_path) as checkpoint:
        monkeypatch.setattr(os, call, fail)
        with pytest.raises(OSError, match="No space"):
            build_pack(checkpoint, tmp_path / "pack")
        monkeypatch.undo()
        assert not (tmp_path / "pack").exists()
        assert_holds(build_pack(checkpoint, tmp_path / "pack"), checkpoint)


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: written(fd, data[:4096], at))
    with tiny_checkpoint(tmp_path) as checkpoint:
        assert_holds(build_pack(checkpoint, tmp_path / "pack"), checkpoint)


def test_a_checkpoint_that_changes_meanwhile_makes_no_pack(tmp_path: Path) -> None:
    changed = pytest.raises(PackError, match=r"m\.gguf: was changed while it was packed")
    with tiny_checkpoint(tmp_path) as checkpoint, changed:
        build_pack(checkpoint, tmp_path / "pack", progress=lambda done, total: os.utime(checkpoint.path))
    assert not (tmp_path / "pack").exists()


def test_a_sample_tells_how_long_it_takes_and_leaves_nothing(tmp_path: Path) -> None:
    with tiny_checkpoint(tmp_path) as checkpoint:
        (tmp_path / "packs").mkdir()
        assert PackBuilder(checkpoint, "q4").seconds(tmp_path / "packs" / "new") > 0
    assert list((tmp_path / "packs").iterdir()) == []


def test_progress_never_goes_back_and_what_is_left_is_known(tmp_path: Path) -> None:
    class Stopped(Exception):
        pass

    heard: list[int] = []
    stop_at = 0.6

    def progress(done: int, total: int) -> None:
        heard.append(done)
        if done > total * stop_at:
            raise Stopped

    with tiny_checkpoint(tmp_path, "qwen3") as checkpoint:  # its head is tied
        builder = PackBuilder(checkpoint, "q4")
        directory = tmp_path / "pack"
        assert builder.left_bytes(directory) == builder.nbytes
        with pytest.raises(Stopped):
            builder.build(directory, progress)
        assert heard == sorted(heard)
        heard.clear()
        left, stop_at = builder.left_bytes(directory), 2.0
        assert 0 < left < builder.nbytes
        assert builder.seconds(directory) > 0
        assert builder.build(directory, progress).path.stat().st_size == builder.nbytes == heard[-1]
    assert heard == sorted(heard)


def test_an_extent_is_filled_up_with_zeros_and_hashed(tmp_path: Path) -> None:
    with PackFile(tmp_path / "file", 12288) as file:
        found = file.write(4096, 8192, [np.ones(5000, np.uint8), np.zeros(0, np.uint8)])
        assert file.checksum(4096, 8192) == found
    assert (tmp_path / "file").read_bytes() == bytes(4096) + b"\1" * 5000 + bytes(3192)


# --- quantised ------------------------------------------------------------------------------------------------


def decoded(pack: Pack, block: BlockId) -> dict[str, Floats]:
    weights = pack.weights(block, memory_of(pack, block))
    return {role: dequantize(matrix) for role, matrix in weights.matrix.items()}


@pytest.mark.parametrize(("quant", "most"), [("q8", 0.01), ("q4", 0.12)])
@pytest.mark.parametrize("type", ["F32", "F16", "BF16"])
def test_quantised_packs_are_close_to_the_checkpoint(
    quant: Any, most: float, type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_slices(monkeypatch)
    with tiny_checkpoint(tmp_path, "qwen2_moe", type, hf=True) as checkpoint:
        pack = PackBuilder(checkpoint, quant, part_bytes=10_000).build(tmp_path / "pack")
        pack.require(checkpoint.spec)
        assert damaged_blocks(pack) == []
        kinds = {tensor.type for item in pack.blocks.values() for tensor in item.tensors.values()}
        assert kinds == {type, "Q8_0"} | ({"Q4_0"} if quant == "q4" else set())
        for block in checkpoint.spec.blocks()[1:-1]:
            for role, got in decoded(pack, block).items():
                wanted = dequantize(checkpoint.read_block(block).matrix[role])
                assert np.linalg.norm(got - wanted) <= most * np.linalg.norm(wanted), (block, role)
                if role in ("router", "shared_scale"):
                    assert np.array_equal(got, wanted)
        assert {item.tensors["head"].type for b, item in pack.blocks.items() if b.kind == "head"} == {"Q8_0"}


@pytest.mark.parametrize(
    ("stored", "quant", "kept"),
    [
        ("Q8_0", "q8", True),
        ("Q4_1", "q4", True),  # saving a tenth is not worth rounding again
        ("Q4_0", "q8", True),
        ("Q5_0", "q4", False),
        ("Q8_0", "q4", False),
    ],
)
def test_only_what_gets_smaller_is_quantised(stored: str, quant: Any, kept: bool, tmp_path: Path) -> None:
    with tiny_checkpoint(tmp_path, "qwen2", stored) as checkpoint:
        if kept:
            with pytest.raises(
                PackPointless, match=f"would not make it smaller, as its weights are .*{stored}"
            ):
                build_pack(checkpoint, tmp_path / "pack", quant)
            assert not (tmp_path / "pack.partial").exists()
        else:
            pack = build_pack(checkpoint, tmp_path / "pack", quant)
            assert pack.blocks[BlockId("ffn", 0)].tensors["up"].type != stored


def test_rows_that_are_not_whole_blocks_stay(tmp_path: Path) -> None:
    with tiny_checkpoint(tmp_path, "llama", intermediate_size=100, hf=True, type="BF16") as checkpoint:
        pack = build_pack(checkpoint, tmp_path / "pack", "q4")
    tensors = pack.blocks[BlockId("ffn", 0)].tensors
    assert {role: tensor.type for role, tensor in tensors.items()} == {
        "gate": "Q4_0",
        "up": "Q4_0",
        "down": "BF16",
    }
