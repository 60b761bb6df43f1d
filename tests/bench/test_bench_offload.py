"""The harness for models larger than memory: cgroups as files, the disk, plots, models. Nothing is limited or timed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import account
import compare
import disk
import gguf
import numpy as np
import pytest
import synthetic
import synthetic_hf
import widen
from fakes import tiny
from fakes.packing import build_pack
from fakes.running import Running
from harness import cgroup, plot
from harness.cgroup import Cgroup, CgroupError
from harness.figures import Figure
from harness.rows import OFFLOAD_ROWS, chosen
from inputs import hollow
from inputs.shapes import SHAPES, Shape

from shoal.daemon.memory import resident_bytes
from shoal.models.checkpoint.checkpoint import open_checkpoint

DENSE = Shape("small", "llama", "BF16", 2, 64, 4, 2, 128, len(tiny.TOKENS), 128, 10000.0, tied=True)


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_gguf(tiny.hf_model("llama"), tmp_path_factory.mktemp("vocabulary") / "tiny.gguf")


def test_every_resident_byte_has_a_kind() -> None:
    if not Path("/proc/self/smaps").exists():
        return
    found = account.by_kind(os.getpid())
    assert {"heap", "files: code", "small mappings"} <= found.keys()
    assert sum(found.values()) == pytest.approx(resident_bytes(), rel=0.1)


def v1(root: Path) -> Path:
    (root / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    return root


def v2(root: Path) -> Path:
    (root / "cgroup.subtree_control").write_text("cpu memory\n")
    return root


@pytest.mark.parametrize(
    ("make", "files", "limit"),
    [
        (
            v1,
            {
                "memory.max_usage_in_bytes": "700\n",
                "memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n",
                "memory.stat": "cache 9\nmapped_file 300\n",
                "memory.usage_in_bytes": "600\n",
            },
            "memory.limit_in_bytes",
        ),
        (
            v2,
            {
                "memory.peak": "700\n",
                "memory.events": "max 9\noom 3\noom_kill 2\n",
                "memory.stat": "file 9\nfile_mapped 300\n",
                "memory.current": "600\n",
            },
            "memory.max",
        ),
    ],
)
def test_a_group_is_read_in_both_versions(
    make: object, files: dict[str, str], limit: str, tmp_path: Path
) -> None:
    assert callable(make)
    tree, names = cgroup._tree(make(tmp_path))
    group = Cgroup(tree, names)
    for name, text in files.items():
        (tree / name).write_text(text)
    group.limit(1000)
    assert (tree / limit).read_text() == "1000"
    assert (group.usage_bytes, group.peak_bytes, group.oom_kills, group.mapped_bytes) == (600, 700, 2, 300)
    group.enter()
    assert (tree / "cgroup.procs").read_text() == str(os.getpid())


def test_without_cgroups_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CgroupError, match="neither a version 1 nor a version 2"), cgroup.limited(1, tmp_path):
        pass
    v1(tmp_path)
    monkeypatch.setattr(Path, "mkdir", lambda path: path.open())
    with pytest.raises(CgroupError, match="wants root"), cgroup.limited(1, tmp_path):
        pass


def test_direct_reads_are_timed(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(64 << 10))
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError:  # a file system in memory
        return
    assert disk.read_gb_per_s(path, sample_bytes=32 << 10, read_bytes=4096, in_flight=3) > 0
    with pytest.raises(OSError, match="shorter than one read"):
        disk.read_gb_per_s(path, read_bytes=128 << 10)


def test_a_directory_is_a_model(vocabulary: Path, tmp_path: Path) -> None:
    path = synthetic_hf.cached(DENSE, tmp_path, vocabulary, lambda done, total: None)
    running = Running(path)
    assert running.spec.tied
    assert np.isfinite(running.logits(list(range(9)), prefill=[9])).all()
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.tokenizer().encode("the thing and on")
    assert compare.bytes_per_token(path) == sum(
        2 * int(np.prod(tensor.sizes)) for tensor in DENSE.tensors() if len(tensor.sizes) > 1
    )
    with pytest.raises(synthetic.SyntheticError, match="only dense llama"):
        synthetic_hf.write(SHAPES["olmoe-half"], tmp_path / "other", vocabulary)


def test_a_wider_model_says_the_same(tmp_path: Path) -> None:
    source = tiny.save_gguf(tiny.hf_model("llama"), tmp_path / "tiny.gguf")
    widen.widen(source, tmp_path / "wide.gguf", times=3)
    ids = list(range(20))
    narrow = Running(source).logits(ids, prefill=[20])
    wide = Running(tmp_path / "wide.gguf").logits(ids, prefill=[20])
    assert np.abs(narrow - wide).max() < 0.1 * narrow.std()  # Q8_0
    assert (tmp_path / "wide.gguf").stat().st_size > 0


def test_a_hollow_model_is_its_pack(vocabulary: Path, tmp_path: Path) -> None:
    shape = Shape("hollow", "llama", "Q4_K_M", 2, 256, 4, 2, 512, len(tiny.TOKENS), 128, 10000.0)
    whole = synthetic.cached(shape, tmp_path, vocabulary, lambda done, total: None)
    path = hollow.cached(shape, tmp_path, vocabulary, lambda done, total: None)
    assert path.name.endswith(hollow.SUFFIX)
    assert path.stat().st_size == whole.stat().st_size
    with hollow.filled(path) as checkpoint:
        pack = build_pack(checkpoint, tmp_path / "pack")
    assert gguf.GGUFReader(path).tensors[0].data.any() == 0
    assert pack.path.stat().st_size > 0.9 * path.stat().st_size
    assert len(set(pack.path.read_bytes())) == 256


def test_what_a_figure_must_come_to_is_found_by_its_name() -> None:
    (dense,) = chosen("dense", OFFLOAD_ROWS)
    assert compare._longest(dense.must, "time per token") == pytest.approx(1 / 0.55)
    assert compare._longest(dense.must, "time per token against the disk's floor") == pytest.approx(1 / 1.15)
    assert compare._longest(dense.must, "loading") == 0.0


def test_figures_along_an_axis_are_drawn() -> None:
    figures = [
        Figure(str(at), "s", "less", {"shoal": [4.0 - at, 4.2 - at], "line": [4.0 - at]}, at=at)
        for at in (0.5, 1, 3)
    ]
    drawn = plot.svg([*figures, Figure("else", "s")], "GB", "s")
    assert drawn.count("<circle") == 3
    assert drawn.startswith("<svg")
    assert "nan" not in drawn
    assert plot.svg([Figure("else", "s")], "GB", "s") == ""


def test_results_keep_what_figures_have() -> None:
    figure = Figure("x", "s", "less", {"shoal": [1.0]}, at=2.0, must=0.5)
    assert Figure.from_json(json.loads(json.dumps(figure.to_json()))) == figure
