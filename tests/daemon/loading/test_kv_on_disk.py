"""A node that keeps KV on disk computes less for the same texts: after restarts, in little memory, with faults."""

from __future__ import annotations

import logging
import os
import stat
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from fakes import tiny
from fakes.asking import said

from shoal.comm.messages import Load, ModelStatus, Unload
from shoal.daemon.config import NodeConfig
from shoal.daemon.library.kv_files import KvFiles, spelled
from shoal.daemon.node import Node
from shoal.engine.learn.kv_read_cost import ReadCost
from shoal.offload.kv.disk_file import INDEX, PAGES
from shoal.partition.spec import LayerSpec, ModelSpec, NormShare, RopeSpec

CONFIG = NodeConfig(
    context_tokens=256, kv_tokens=1024, max_sequences=4, max_queue=16, chunk_tokens=64, memory_bytes=3 << 30
)
SMALL = replace(CONFIG, kv_tokens=256)  # one sequence at full length
# A spec as it was spelled when KV was first kept on disk.
SPELLED = (
    "ModelSpec(family='olmo2', layers=(LayerSpec(window=None, rope=0, moe=False), LayerSpec(window=64, rope=0, "
    "moe=False)), hidden=64, vocab=256, context=512, heads=4, kv_heads=2, head_dim=16, ffn=128, ropes=(RopeSpec("
    "dims=16, theta=10000.0, interleaved=False, divisors=(), long_divisors=(), long_from_tokens=0, magnitude=1.0, "
    "long_magnitude=1.0),), norm_eps=1e-05, activation='silu', qk_norm='full', pre_norm=True, post_norm=False, "
    "embed_scale=1.0, query_scale=0.0, qkv_clip=None, tied=False, o_margins=(0, 0), moe=None)"
)
TEXT = [7 * i % 53 for i in range(200)]
OTHER = [(11 * i + 5) % 53 for i in range(201)]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny.hf_model("llama", seed=11, max_position_embeddings=512)
    return tiny.save_gguf(model, tmp_path_factory.mktemp("m") / "tiny.gguf", type="Q8_0")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "kv"


def started(path: Path, root: Path | None, config: NodeConfig = CONFIG) -> Node:
    node = Node(config, kv_root=root)
    node.load(Load(model=str(path)))
    return node


def status(node: Node) -> ModelStatus:
    return node.status().models[0]


def written(node: Node) -> bool:
    """Whether the pages that have left memory are on disk: the writer may lag on a busy machine."""
    disk = node._models.pick("").engine.rank.disk  # type: ignore[union-attr]
    assert disk is not None
    until_s = time.monotonic() + 30
    while not disk._behind.idle and time.monotonic() < until_s:
        time.sleep(0.001)
    return disk._behind.idle


def only_store(root: Path) -> Path:
    (directory,) = root.iterdir()
    return directory


@pytest.fixture(scope="module")
def truth(path: Path) -> Iterator[list[list[int]]]:
    """The answers without a disk: to the text, then to the text with its answer and a question."""
    with started(path, None) as node:
        first = said(node, TEXT)[0]
        yield [first, said(node, [*TEXT, *first, 1, 2, 3])[0], said(node, OTHER)[0]]


@pytest.mark.parametrize("how", ["close", "unload"])
def test_a_conversation_survives_a_restart(path: Path, root: Path, truth: list[list[int]], how: str) -> None:
    with started(path, root) as node:
        assert said(node, TEXT) == (truth[0], 0)
        if how == "unload":
            node.unload(Unload(model=""))
    with started(path, root) as node:
        again, cached = said(node, [*TEXT, *truth[0], 1, 2, 3])
        # The last token of an answer is never computed.
        assert (again, cached) == (truth[1], len(TEXT) + len(truth[0]) - 1)
        assert status(node).kv_disk_pages_read_total == 4
        assert status(node).kv_disk_bytes > 0
    for name in (INDEX, PAGES):
        assert stat.S_IMODE((only_store(root) / name).stat().st_mode) == 0o600
    assert stat.S_IMODE(root.stat().st_mode) == stat.S_IMODE(only_store(root).stat().st_mode) == 0o700


def test_texts_take_turns_in_memory(
    path: Path, root: Path, truth: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages that one pushes out of memory come back from disk for the other."""
    # A tiny model may compute faster than a busy disk reads.
    monkeypatch.setattr(ReadCost, "pays", lambda *_: True)
    with started(path, root, SMALL) as node:
        for turn in range(3):
            for prompt, expected in ((TEXT, truth[0]), (OTHER, truth[2])):
                answer, cached = said(node, prompt)
                assert answer == expected
                assert cached == (len(prompt) - 1 if turn else 0)
                assert written(node)
        assert status(node).kv_disk_pages_read_total >= 12
        assert status(node).kv_disk_pages_written_total <= 8


def test_a_store_that_is_altered_is_not_believed(
    path: Path, root: Path, truth: list[list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    with started(path, root) as node:
        said(node, TEXT)
    pages = only_store(root) / PAGES
    size = pages.stat().st_size
    with pages.open("r+b") as stream:
        for place in range(0, size, 4096):
            stream.seek(place)
            stream.write(b"\x55")
    with started(path, root) as node, caplog.at_level(logging.WARNING):
        assert said(node, TEXT) == (truth[0], 0)
        assert said(node, TEXT) == (truth[0], len(TEXT) - 1)
    assert "altered" in caplog.text
    with started(path, root) as node:
        assert said(node, TEXT) == (truth[0], len(TEXT) - 1)


def test_files_that_vanish_cost_nothing_but_time(path: Path, root: Path, truth: list[list[int]]) -> None:
    with started(path, root, SMALL) as node:
        assert said(node, TEXT) == (truth[0], 0)
        for name in (INDEX, PAGES):
            (only_store(root) / name).unlink()
        assert said(node, OTHER) == (truth[2], 0)
        assert said(node, TEXT)[0] == truth[0]
    with started(path, root) as node:
        assert said(node, TEXT) == (truth[0], 0)


def test_only_one_node_has_a_store(
    path: Path, root: Path, truth: list[list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    with started(path, root) as first:
        with caplog.at_level(logging.WARNING), started(path, root) as second:
            assert said(second, TEXT) == (truth[0], 0)
            assert (
                len([record for record in caplog.records if "another process uses it" in record.message]) == 1
            )
        assert said(first, TEXT) == (truth[0], 0)


def test_none_is_kept_when_none_is_wanted(path: Path, root: Path) -> None:
    with started(path, root, replace(CONFIG, kv_disk_bytes=0)) as node:
        said(node, TEXT)
    with started(path, root, replace(CONFIG, kv_disk_bytes=10)) as node:  # no page fits
        said(node, TEXT)
        assert status(node).kv_disk_bytes == 0
    assert not list(root.rglob("*.kv"))


def test_another_kind_of_kv_or_another_file_has_another_store(path: Path, root: Path) -> None:
    with started(path, root) as node:
        said(node, TEXT)
    with started(path, root, replace(CONFIG, kv_type="i8")) as node:
        assert said(node, TEXT)[1] == 0
    os.utime(path, (1, 1))
    with started(path, root) as node:
        assert said(node, TEXT)[1] == 0
    assert len(list(root.iterdir())) == 3


def test_the_longest_unused_stores_go_but_none_in_use(tmp_path: Path, path: Path, root: Path) -> None:
    for age in range(4):
        directory = root / f"model{age}"
        directory.mkdir(parents=True)
        (directory / PAGES).write_bytes(b"x" * 40_000)
        (directory / INDEX).touch()
        os.utime(directory / INDEX, (1000 - age, 1000 - age))
    with started(path, root, replace(CONFIG, kv_disk_bytes=190_000)) as node:
        assert sorted(one.name for one in root.iterdir() if one.name.startswith("model")) == [
            "model0",
            "model1",
        ]
        assert said(node, TEXT)[1] == 0
        assert KvFiles(root, 1)._room_bytes({root / "model0"}) < 0
        assert not (root / "model1").exists()
        assert len(list(root.iterdir())) == 2  # model0, whose turn it is, and the one in use


def test_the_bound_is_of_all_models_together(path: Path, root: Path, tmp_path: Path) -> None:
    others = [
        tiny.save_gguf(
            tiny.hf_model("llama", seed=seed, max_position_embeddings=512), tmp_path / f"{seed}.gguf"
        )
        for seed in (1, 2)
    ]
    bound = 10 * 25_000 + 2 * 4096  # pages of 24,576 bytes with their records

    def kept() -> list[int]:
        """How many pages each store has. Together their files are within the bound."""
        assert sum(file.stat().st_size for file in root.rglob("*.kv")) <= bound
        return [file.stat().st_size // 24_576 for file in root.rglob(PAGES)]

    texts = [[(7 * i + start) % 53 for i in range(200)] for start in range(0, 40, 10)]
    with Node(replace(SMALL, kv_disk_bytes=bound), kv_root=root) as node:
        for share, model in zip((10, 5, 3), (path, *others), strict=True):
            node.load(Load(model=str(model)))
            for text in texts:
                said(node, text, model=str(model))
            assert max(kept()) <= share
        assert [said(node, text, model=str(path))[0] for text in texts] == truths(path, texts)
    assert kept() == [3, 3, 3]


def truths(path: Path, texts: list[list[int]]) -> list[list[int]]:
    with started(path, None) as node:
        return [said(node, text)[0] for text in texts]


def test_kv_is_found_again_when_a_spec_gets_another_field() -> None:
    """What names a store of KV is part of SHOAL_HOME: the words below are those of the first version."""
    spec = ModelSpec(
        "olmo2",
        (LayerSpec(), LayerSpec(64)),
        64,
        256,
        512,
        4,
        2,
        16,
        128,
        (RopeSpec(16, 1e4),),
        qk_norm="full",
    )
    assert spelled(spec) == SPELLED
    assert spelled(replace(spec, norm_share=NormShare(4, 2, True))) != SPELLED
