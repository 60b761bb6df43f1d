"""Uses of experts in a file: they come back for the same model, and whatever else is in the file counts as nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fakes import tiny

from shoal.comm.home import Home
from shoal.comm.messages import Load
from shoal.daemon.config import NodeConfig
from shoal.daemon.loading import kept_uses
from shoal.daemon.loading.kept_uses import TELLING_PARTS, KeptUses, with_chances
from shoal.daemon.node import Node
from shoal.daemon.throughput.model_sizes import weighed
from shoal.daemon.throughput.own_machine import OwnMachine, profile_file
from shoal.engine.learn.expert_use import FADING, NONE_YET, UseCounts
from shoal.models.checkpoint.checkpoint import Checkpoint, open_checkpoint
from shoal.partition.spec import BlockId

COUNTS = UseCounts({BlockId("expert", 0, 2): 7, BlockId("expert", 2, 5): FADING - 1}, {0: 9, 2: FADING - 1})


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_gguf(tiny.hf_model("qwen3_moe"), tmp_path_factory.mktemp("m") / "m.gguf", type="Q8_0")


@pytest.fixture
def checkpoint(mixture: Path) -> Any:
    with open_checkpoint(mixture) as found:
        yield found


def test_they_come_back(checkpoint: Checkpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = tmp_path / "experts"
    kept = KeptUses(directory, checkpoint, "keep")
    assert kept.read() == NONE_YET
    kept.keep(NONE_YET)
    assert not directory.exists()
    kept.keep(COUNTS)
    (file,) = directory.iterdir()
    written = file.stat().st_mtime_ns
    kept.keep(UseCounts(dict(COUNTS.uses), dict(COUNTS.parts)))  # nothing new
    again = KeptUses(directory, checkpoint, "keep")
    assert again.read() == COUNTS
    again.keep(COUNTS)
    assert file.stat().st_mtime_ns == written
    assert KeptUses(directory, checkpoint, "q4").read() == NONE_YET  # another model
    assert not caplog.records


def skewed(checkpoint: Checkpoint, parts: int) -> UseCounts:
    """Each token of so many has chosen the same experts, which are as many as it chooses."""
    spec = checkpoint.spec
    assert spec.moe is not None
    layers = [number for number, layer in enumerate(spec.layers) if layer.moe]
    uses = {BlockId("expert", layer, it): parts for layer in layers for it in range(spec.moe.active)}
    return UseCounts(uses, dict.fromkeys(layers, parts))


def test_what_was_counted_tells_which_experts_tokens_choose(checkpoint: Checkpoint) -> None:
    model = weighed(checkpoint, "keep")
    moe = checkpoint.spec.moe
    assert moe is not None
    assert with_chances(model, NONE_YET) is model
    assert with_chances(model, skewed(checkpoint, TELLING_PARTS - 1)) is model, "it may be chance"
    found = with_chances(model, skewed(checkpoint, 4000)).chances
    assert len(found) == sum(layer.moe for layer in checkpoint.spec.layers)
    for chances in found:
        assert sum(chances) == pytest.approx(moe.active)
        assert min(chances[: moe.active]) > 0.99
        assert max(chances[moe.active :]) < 0.01


def test_a_model_is_loaded_with_what_was_counted_of_it(mixture: Path, tmp_path: Path) -> None:
    """Several rows take less where they choose the same experts."""
    home, took = Home(tmp_path), []
    for counted in (False, True):
        if counted:
            with open_checkpoint(mixture) as found:
                KeptUses(home.experts, found, "keep").keep(skewed(found, 4000))
        machine = OwnMachine(1, profile_file(home, 1), alone=lambda: False)
        with Node(NodeConfig(context_tokens=96, threads=1), machine=machine) as node:
            node.load(Load(model=str(mixture)))
            (model,) = node._models
            expected = model.main.expectation.step_curve()
            assert expected is not None
            took.append((expected(1), expected(4)))
    (one, four), (same_one, fewer) = took
    assert same_one == pytest.approx(one)
    assert fewer < four


def test_of_another_file_at_the_same_place_nothing_is_known(mixture: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(mixture.read_bytes())
    with open_checkpoint(path) as found:
        KeptUses(tmp_path / "experts", found, "keep").keep(COUNTS)
    os.utime(path, ns=(1, 1))
    with open_checkpoint(path) as found:
        assert KeptUses(tmp_path / "experts", found, "keep").read() == NONE_YET


def changed(change: Callable[[Any], object]) -> Callable[[Path], None]:
    def run(file: Path) -> None:
        found = json.loads(file.read_bytes())
        change(found)
        file.write_text(json.dumps(found))

    return run


BROKEN: dict[str, Callable[[Path], object]] = {
    "empty": lambda file: file.write_bytes(b""),
    "no JSON": lambda file: file.write_bytes(b"\xff\x00" * 100),
    "deep": lambda file: file.write_bytes(b"[" * 100_000),
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-20]),
    "long": lambda file: file.write_bytes(file.read_bytes() + b" " * kept_uses.USES_FILE_BYTES),
    "another's": changed(lambda it: it.update(key="0" * 64)),
    "no key": changed(lambda it: it.pop("key")),
    "negative": changed(lambda it: it["uses"][0].__setitem__(0, -1)),
    "a fraction": changed(lambda it: it["uses"][0].__setitem__(0, 0.5)),
    "more than all": changed(lambda it: it["uses"][0].__setitem__(0, 10)),
    "too many": changed(lambda it: it["parts"].__setitem__(0, FADING)),
    "huge": changed(lambda it: it["parts"].__setitem__(0, 10**30)),
    "fewer experts": changed(lambda it: it["uses"][1].pop()),
    "more layers": changed(lambda it: it["uses"].append([0] * 6)),
    "fewer parts": changed(lambda it: it["parts"].pop()),
    "a directory": lambda file: (file.unlink(), file.mkdir()),
    "a pipe": lambda file: (file.unlink(), os.mkfifo(file)),
}


@pytest.mark.parametrize("how", BROKEN)
def test_nothing_is_believed(
    how: str, checkpoint: Checkpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    KeptUses(tmp_path, checkpoint, "keep").keep(COUNTS)
    (file,) = tmp_path.iterdir()
    BROKEN[how](file)
    kept = KeptUses(tmp_path, checkpoint, "keep")
    assert kept.read() == NONE_YET
    (line,) = (it.getMessage() for it in caplog.records)
    assert line.startswith(f"{file}: how often experts were used is not known, as the file is of no use: ")
    assert "\n" not in line
    kept.keep(COUNTS)
    if how != "a directory":
        assert KeptUses(tmp_path, checkpoint, "keep").read() == COUNTS


def test_there_are_only_so_many(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_uses, "MOST_FILES", 3)
    for number in range(5):
        other = tmp_path / f"{number}.json"
        other.write_text("{}")
        os.utime(other, ns=(number, number))
    KeptUses(tmp_path, checkpoint, "keep").keep(COUNTS)
    assert {it.name for it in tmp_path.iterdir()} >= {"3.json", "4.json"}
    assert len([*tmp_path.iterdir()]) == 3
