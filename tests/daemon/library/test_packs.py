"""Where packs are kept: finding, refusing, listing and removing them, by two processes at once, and by the verbs."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
from fakes import tiny
from fakes.cli_fakes import shoal
from fakes.packing import assert_holds

from shoal.comm.home import Home
from shoal.daemon.errors import DaemonError
from shoal.daemon.library.pack_shelf import PackShelf
from shoal.daemon.library.packs import Estimate, Packs
from shoal.models.checkpoint.checkpoint import open_checkpoint
from shoal.offload.pack.manifest import BLOCKS, MANIFEST, Quant
from shoal.offload.pack.pack import Pack
from shoal.partition.spec import BlockId

Usage = namedtuple("Usage", "total used free")


pytestmark = pytest.mark.usefixtures("home")


def get(home: Home, path: Path, quant: Quant = "keep", **options: Any) -> tuple[Pack, bool]:
    """The model's pack, and whether it was built now."""
    told: list[Estimate] = []
    with open_checkpoint(path) as checkpoint:
        pack = Packs(home, told.append).get(checkpoint, quant=quant, **options)
        assert pack.manifest.quant == quant
        if quant == "keep":
            assert_holds(pack, checkpoint)
    return pack, bool(told)


def partial_bytes(home: Home) -> int:
    return sum(file.stat().st_size for path in home.packs.glob("*.partial") for file in path.iterdir())


def test_a_pack_is_built_once_and_found_again(home: Home, model: Path) -> None:
    pack, built = get(home, model)
    assert built
    again, built = get(home, model)
    assert not built
    assert again.path == pack.path
    other, built = get(home, model, "q8")
    assert built
    assert other.path != pack.path
    assert {entry.state for entry in PackShelf(home).list()} == {"ready"}


def test_a_model_that_has_changed_gets_its_pack_anew(home: Home, model: Path) -> None:
    pack, _ = get(home, model)
    tiny.save_gguf(tiny.hf_model("qwen2", seed=1), model, type="F16")
    os.utime(model, ns=(1, 1))
    assert [entry.state for entry in PackShelf(home).list()] == ["outdated"]
    new, built = get(home, model)
    assert built
    assert new.path == pack.path
    assert len(PackShelf(home).list()) == 1


@pytest.mark.parametrize("file", [BLOCKS, MANIFEST])
def test_a_damaged_pack_is_built_anew(file: str, home: Home, model: Path) -> None:
    pack, _ = get(home, model)
    with (pack.path.parent / file).open("r+b") as stream:
        stream.truncate(1000)
    assert [entry.state for entry in PackShelf(home).list()] == ["damaged"]
    assert get(home, model)[1]
    assert [entry.state for entry in PackShelf(home).list()] == ["ready"]


def test_a_pack_that_was_found_altered_is_listed_as_such_and_built_anew(home: Home, model: Path) -> None:
    packs = Packs(home)
    pack, _ = get(home, model)
    with pack.path.open("rb"):  # a daemon has it open, too
        pack.condemn()
        assert pack.damaged
        assert [entry.state for entry in packs.shelf.list()] == ["damaged"]
        made, built = get(home, model)
        assert built
        assert [entry.state for entry in packs.shelf.list()] == ["ready"]
        pack.condemn()  # must not mark the new pack, which is in the old one's place now
    assert [entry.state for entry in packs.shelf.list()] == ["ready"]
    with made.path.open("r+b") as file:
        file.seek(made.manifest.nbytes // 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    assert packs.verify(made.path.parent)
    assert get(home, model)[1]
    assert not packs.verify(made.path.parent)


def test_what_verify_cannot_even_open_is_listed_as_damaged(home: Home, model: Path) -> None:
    pack, _ = get(home, model)
    with pack.path.open("r+b") as file:
        file.seek(pack.manifest.vectors.offset)
        file.write(b"altered")
    with pytest.raises(DaemonError, match="norms and biases were altered"):
        Packs(home).verify(pack.path.parent)
    assert [entry.state for entry in PackShelf(home).list()] == ["damaged"]
    assert get(home, model)[1]
    assert [entry.state for entry in PackShelf(home).list()] == ["ready"]


def test_blocks_that_cannot_be_read_are_named_by_verify(
    home: Home, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack, _ = get(home, model)
    block = pack.manifest.blocks[1]
    read = os.preadv

    def failing(descriptor: int, buffers: Any, offset: int) -> int:
        if offset == block.offset:
            raise OSError(errno.EIO, "Input/output error")
        return read(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", failing)
    assert Packs(home).verify(pack.path.parent) == [str(block.block)]


def test_two_processes_do_not_build_the_same_pack(home: Home, model: Path) -> None:
    shelf = PackShelf(home)
    with shelf.alone(shelf.place(str(model), "keep")):
        with pytest.raises(DaemonError, match="another process is packing") as caught:
            get(home, model)
        with pytest.raises(DaemonError, match="another process"):
            shelf.alone(shelf.place(str(model), "keep")).__enter__()
        assert get(home, model, "q8")[1]
    assert caught.value.code == "busy"
    assert get(home, model)[1]


def test_too_small_a_disk_is_refused_with_the_figures(
    home: Home, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9, 5000))
    with pytest.raises(
        DaemonError, match=r"a pack of .*tiny\.gguf needs .* kB, .*packs has 5 kB free"
    ) as caught:
        get(home, model)
    assert caught.value.code == "resources"
    assert partial_bytes(home) == 0


def test_a_disk_that_fills_up_leaves_nothing(
    home: Home, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = os.pwrite
    calls: list[int] = []

    def filling(descriptor: int, data: Any, offset: int) -> int:
        calls.append(offset)
        if len(calls) > 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        return written(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", filling)
    with pytest.raises(DaemonError, match="the disk is full") as caught:
        get(home, model)
    assert caught.value.code == "resources"
    assert [path for path in home.packs.iterdir() if path.name != ".locks"] == []
    monkeypatch.undo()
    assert get(Home(home.root), model)[1]


def test_what_was_interrupted_is_listed_and_goes_on(home: Home, model: Path) -> None:
    class Stopped(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done > total / 2:
            raise Stopped

    with pytest.raises(DaemonError, match="Stopped"):
        get(home, model, progress=stop)
    (entry,) = PackShelf(home).list()
    assert (entry.model, entry.quant, entry.state) == (str(model), "keep", "unfinished")
    assert get(home, model)[1]
    assert [entry.state for entry in PackShelf(home).list()] == ["ready"]


def test_memory_that_is_too_little_is_refused(home: Home, model: Path) -> None:
    with pytest.raises(
        DaemonError, match=r"packing needs .* [MG]B of memory; only 1 MB is allowed"
    ) as caught:
        get(home, model, memory_bytes=10**6)
    assert caught.value.code == "resources"
    assert get(home, model, memory_bytes=10**12)[1]


# --- the verbs ----------------------------------------------------------------------------------------------


def test_a_model_in_the_store_is_packed_listed_and_removed_with_its_packs(home: Home, model: Path) -> None:
    shoal("pull", str(model))
    result = shoal("pack", "tiny")
    assert result.exit_code == 0, result.stderr
    assert "packing takes" in result.stderr
    assert "tiny is packed in" in result.stderr
    assert "tiny was packed already" in shoal("pack", "tiny").stderr
    found = json.loads(shoal("pack", "--quant", "q4", "--json", "tiny").stdout)
    assert list(found) == ["model", "quant", "shard", "bytes", "path", "built", "seconds"]
    assert (found["quant"], found["built"]) == ("q4", True)
    (entry,) = json.loads(shoal("ls", "--json").stdout)
    assert [(pack["quant"], pack["state"]) for pack in entry["packs"]] == [("keep", "ready"), ("q4", "ready")]
    assert "pack of" in shoal("ls").stdout
    assert shoal("pack", "--verify", "tiny").exit_code == 0
    removed = shoal("rm", "--packs", "tiny")
    assert removed.exit_code == 0
    assert "the packs of tiny" in removed.stderr
    assert json.loads(shoal("ls", "--json").stdout)[0]["packs"] == []
    shoal("pack", "tiny")
    shoal("rm", "--yes", "tiny")
    assert shoal("ls").stdout == ""
    assert PackShelf(home).list() == ()
    assert shoal("rm", "--packs", "tiny").exit_code == 1


def test_a_model_stays_while_its_pack_is_being_made(home: Home, model: Path) -> None:
    shoal("pull", str(model))
    shoal("pack", "tiny")
    shelf = PackShelf(home)
    with shelf.alone(shelf.place("tiny", "keep")):
        refused = shoal("rm", "--yes", "tiny")
    assert refused.exit_code == 3
    assert "another process is packing" in refused.stderr
    (entry,) = json.loads(shoal("ls", "--json").stdout)
    assert (entry["name"], len(entry["packs"])) == ("tiny", 1)


def test_a_model_that_was_pulled_again_has_outdated_packs(model: Path) -> None:
    shoal("pull", str(model))
    shoal("pack", "tiny")
    tiny.save_gguf(tiny.hf_model("qwen2", seed=3), model, type="F16")
    shoal("rm", "--yes", "tiny")
    shoal("pull", str(model))
    assert json.loads(shoal("pack", "--json", "tiny").stdout)["built"]


def test_a_pack_that_is_removed_while_packs_are_listed_is_left_out(
    home: Home, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_checkpoint(model) as checkpoint:
        Packs(home).get(checkpoint)
    is_file = Path.is_file
    monkeypatch.setattr(Path, "is_file", lambda path: is_file(path) and path.unlink() is None)
    assert PackShelf(home).list() == ()


def test_packs_of_paths_are_listed_and_removed(model: Path) -> None:
    shoal("pack", str(model))
    (found,) = json.loads(shoal("ls", "--json").stdout)
    assert (found["kind"], found["name"], found["state"]) == ("pack", str(model), "ready")
    model.unlink()
    assert json.loads(shoal("ls", "--json").stdout)[0]["state"] == "outdated"
    assert shoal("rm", "--packs", str(model)).exit_code == 0
    assert json.loads(shoal("ls", "--json").stdout) == []


def test_verify_names_the_altered_block(home: Home, model: Path) -> None:
    pack, _ = get(home, model)
    with pack.path.open("r+b") as file:
        file.seek(pack.blocks[BlockId("attn", 1)].offset + 5)
        file.write(b"x")
    result = shoal("pack", "--verify", "--json", str(model))
    assert result.exit_code == 1
    assert json.loads(result.stdout)["damaged"] == ["layers.1.attn"]
    assert "altered since it was written: layers.1.attn" in result.stderr
    assert "shoal rm --packs" in result.stderr
    missing = shoal("pack", "--verify", "--quant", "q8", str(model))
    assert missing.exit_code == 1
    assert "pack it with: shoal pack" in missing.stderr


def test_what_is_no_model_and_too_little_memory(tmp_path: Path, model: Path) -> None:
    (tmp_path / "no.gguf").write_bytes(b"nothing at all")
    result = shoal("pack", str(tmp_path / "no.gguf"))
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert shoal("pack", "--memory", "1MB", str(model)).exit_code == 3
    assert shoal("pack", "--quant", "q3", str(model)).exit_code == 2
