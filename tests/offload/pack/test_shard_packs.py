"""Packs of shards: what they hold, that none is taken for another, and how the verbs name them."""

from __future__ import annotations

import json
import shutil
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from fakes.cli_fakes import shoal
from fakes.packing import assert_holds, build_pack, memory_of, small_slices, tiny_checkpoint

from shoal.comm.home import Home
from shoal.daemon.errors import DaemonError
from shoal.daemon.library.pack_shelf import PackShelf
from shoal.daemon.library.packs import Packs
from shoal.daemon.model_name import ShardName
from shoal.kernels import dequantize
from shoal.kernels.arrays import Floats
from shoal.models.checkpoint.checkpoint import open_checkpoint
from shoal.models.checkpoint.shard import CheckpointShard
from shoal.offload.pack.layout import part_of
from shoal.offload.pack.manifest import MANIFEST
from shoal.offload.pack.pack import Pack, open_pack
from shoal.offload.pack.writer import damaged_blocks
from shoal.partition.slicing import divide
from shoal.partition.spec import BlockId

pytestmark = pytest.mark.usefixtures("home")


@pytest.mark.parametrize("hf", [False, True], ids=["gguf", "hf"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "gemma3", "qwen2_moe", "mixtral"])
def test_blocks_are_bitwise_those_of_the_shard(
    family: str, hf: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_slices(monkeypatch)
    with tiny_checkpoint(tmp_path, family, hf=hf) as checkpoint:
        for rank, cut in product(range(3), (False, True)):
            part = part_of(checkpoint, "keep", rank, 3, cut_vocabulary=cut)
            pack = build_pack(part, tmp_path / f"pack{rank}{cut}")
            assert_holds(pack, part)
            assert damaged_blocks(pack) == []
            assert pack.manifest.shard == part.shard
            assert pack.manifest == open_pack(pack.path.parent).manifest


def matrix(pack: Pack, block: BlockId, role: str) -> Floats:
    return dequantize(pack.weights(block, memory_of(pack, block)).matrix[role])


@pytest.mark.parametrize("quant", ["q8", "q4"])
def test_in_fewer_bits_it_is_what_the_whole_models_pack_has(quant: str, tmp_path: Path) -> None:
    """Every rank rounds blocks of 32 alike, so that a group computes what one machine computes."""
    with tiny_checkpoint(tmp_path, "qwen2", "F16") as checkpoint:
        whole = build_pack(checkpoint, tmp_path / "whole", quant)  # type: ignore[arg-type]
        halves = [
            build_pack(part, tmp_path / f"{rank}", quant)  # type: ignore[arg-type]
            for rank in range(2)
            for part in [part_of(checkpoint, quant, rank, 2, cut_vocabulary=True)]  # type: ignore[arg-type]
        ]
    for block, role, axis in (
        (BlockId("attn", 1), "o", 1),
        (BlockId("attn", 1), "k", 0),
        (BlockId("ffn", 2), "down", 1),
        (BlockId("ffn", 2), "up", 0),
        (BlockId("embed"), "embed", 0),
    ):
        parts = [matrix(half, block, role) for half in halves]
        assert np.array_equal(np.concatenate(parts, axis), matrix(whole, block, role)), (block, role)


def test_ranks_and_the_whole_have_packs_of_their_own(home: Home, model: Path) -> None:
    packs = Packs(home)
    with open_checkpoint(model) as checkpoint:
        parts = [checkpoint, *(part_of(checkpoint, "keep", rank, 2) for rank in range(2))]
        assert part_of(checkpoint, "keep", 0, 1) is checkpoint
        for part in parts:
            assert packs.find(part) is None
            made = packs.get(part)
            assert_holds(made, part)
        found = [packs.find(part) for part in parts]
    assert len({pack.path for pack in found if pack}) == 3
    listed = {(entry.shard, entry.state) for entry in packs.shelf.list()}
    assert listed == {("whole", "ready"), ("1/2", "ready"), ("2/2", "ready")}
    packs.shelf.remove(str(model))
    assert packs.shelf.list() == ()


def test_groups_of_different_sizes_share_what_is_the_same(home: Home, model: Path) -> None:
    packs = Packs(home)
    with open_checkpoint(model) as checkpoint:
        half = CheckpointShard(checkpoint, divide(checkpoint.spec, 2)[0])
        third = CheckpointShard(checkpoint, divide(checkpoint.spec, 3, shares=(2, 1, 1))[0])
        last = CheckpointShard(checkpoint, divide(checkpoint.spec, 3, shares=(2, 1, 1))[2])
        made = packs.get(half)
        shared = packs.find(third)
        assert packs.find(last) is None
    assert shared is not None
    assert shared.path == made.path


def test_a_shard_is_never_taken_for_the_model_or_another_shard(home: Home, model: Path) -> None:
    """Not even if one lies in the place of the other."""
    packs = Packs(home)
    with open_checkpoint(model) as checkpoint:
        first, second = (part_of(checkpoint, "keep", rank, 2) for rank in range(2))
        made = packs.get(first)
        for other in (checkpoint, second):
            place = packs.shelf.place(str(model), "keep", other.shard)
            shutil.copytree(made.path.parent, place)
            assert packs.find(other) is None
            assert_holds(packs.get(other), other)
        assert packs.find(first) is not None


def test_a_manifest_with_an_impossible_shard_is_nobodys(home: Home, model: Path) -> None:
    packs = Packs(home)
    with open_checkpoint(model) as checkpoint:
        part = part_of(checkpoint, "keep", 1, 2)
        made = packs.get(part)
        path = made.path.parent / MANIFEST
        manifest = json.loads(path.read_bytes())
        manifest["shard"]["ranges"]["ffn"] = [7, -3]
        path.write_text(json.dumps(manifest))
        assert packs.find(part) is None
        for wrong in ("half", {"rank": 1}, {**manifest["shard"], "rank": "x"}, None):
            path.write_text(json.dumps({**manifest, "shard": wrong}))
            assert [entry.state for entry in packs.shelf.list()] == ["damaged"]
        assert_holds(packs.get(part), part)


def test_an_interrupted_one_goes_on(home: Home, model: Path) -> None:
    class Stopped(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done > total / 2:
            raise Stopped

    packs = Packs(home)
    with open_checkpoint(model) as checkpoint:
        part = part_of(checkpoint, "keep", 1, 2)
        with pytest.raises(DaemonError, match="Stopped"):
            packs.get(part, stop)
        assert [(entry.shard, entry.state) for entry in packs.shelf.list()] == [("2/2", "unfinished")]
        left: list[int] = []
        Packs(home, lambda estimate: left.append(estimate.nbytes - estimate.left_bytes)).get(part)
        assert left[0] > 0
        found = packs.find(part)
        assert found is not None
        assert_holds(found, part)


# --- the verbs ----------------------------------------------------------------------------------------------


def test_a_shard_is_packed_shown_listed_verified_and_removed(home: Home, model: Path) -> None:
    result = shoal("pack", "--shard", "2/3", str(model))
    assert result.exit_code == 0, result.stderr
    assert f"shard 2/3 of {model} is packed in" in result.stderr
    found = json.loads(shoal("pack", "--shard", "2/3", "--json", str(model)).stdout)
    assert (found["shard"], found["built"]) == ("2/3", False)
    (entry,) = json.loads(shoal("ls", "--json").stdout)
    assert (entry["shard"], entry["path"], entry["state"]) == ("2/3", found["path"], "ready")
    assert "2/3" in shoal("ls").stdout
    (shown,) = json.loads(shoal("show", "--json", str(model)).stdout)["packs"]
    assert shown == entry
    assert "shard 2/3" in shoal("show", str(model)).stdout
    verified = shoal("pack", "--verify", "--json", "--shard", "2/3", str(model))
    assert json.loads(verified.stdout) == {
        "path": found["path"], "quant": "keep", "shard": "2/3", "damaged": []
    }  # fmt: skip
    missing = shoal("pack", "--verify", str(model))
    assert missing.exit_code == 1
    assert "is not packed yet" in missing.stderr
    missing = shoal("pack", "--verify", "--shard", "1/3", str(model))
    assert missing.exit_code == 1
    assert f"pack it with: shoal pack --shard 1/3 {model}" in missing.stderr
    assert shoal("rm", "--packs", str(model)).exit_code == 0
    assert PackShelf(home).list() == ()


def test_one_of_one_is_the_model(model: Path) -> None:
    found = json.loads(shoal("pack", "--shard", "1/1", "--json", str(model)).stdout)
    assert (found["shard"], found["built"]) == ("whole", True)
    assert not json.loads(shoal("pack", "--json", str(model)).stdout)["built"]
    assert json.loads(shoal("pack", "--verify", "--json", str(model)).stdout)["shard"] == "whole"


@pytest.mark.parametrize(
    "text", ["0/3", "4/3", "1/0", "x", "2", "2/", "/3", "-1/3", "1/3/5", "1.0/3", "²/3", ""]
)
def test_what_is_no_shard_is_told(text: str, model: Path) -> None:
    result = shoal("pack", "--shard", text, str(model))
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert "2/3" in result.stderr


def test_too_many_ranks(model: Path) -> None:
    for many in ("1/5", "1/999999999"):
        result = shoal("pack", "--shard", many, str(model))
        assert result.exit_code == 2
        assert result.stderr.count("\n") == 1
        assert "ranks are too many: there are 4 heads; 4 would do" in result.stderr


def test_a_shards_name() -> None:
    assert ShardName.parse("2/3") == (1, 3)
    assert str(ShardName.parse("2/3")) == "2/3"
    assert ShardName() == ShardName.parse("1/1")
