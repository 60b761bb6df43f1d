"""KV of a group lies on the disks of all its ranks: a conversation goes on where it stopped, or is computed again."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from fakes import tiny
from fakes.asking import NEW, said, two_turns
from fakes.group.clusters import SPEED, Cluster, wait_for
from msgspec.structs import replace

from shoal.comm.group.sums.manners import Manner, Manners, SumTopology
from shoal.comm.group.sums.wire_types import WireType
from shoal.comm.messages import Load, ModelStatus, Unload
from shoal.daemon.cluster import member
from shoal.daemon.cluster.group import Group
from shoal.daemon.config import NodeConfig
from shoal.daemon.library.kv_files import KvFiles
from shoal.engine.learn.kv_read_cost import ReadCost
from shoal.offload.kv.disk_file import INDEX, PAGES, KvFile
from shoal.offload.kv.disk_index import NO_TEXT, chained, packed

CONFIG = NodeConfig(
    context_tokens=256, kv_tokens=1024, max_sequences=4, max_queue=16, chunk_tokens=64, memory_bytes=3 << 30
)
TEXT = [7 * i % 53 for i in range(200)]
SECOND = [1, 2, 3]
KNOWN = len(TEXT) + NEW - 1  # the last token of an answer is never computed


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny.hf_model("llama", seed=11, max_position_embeddings=512)
    return tiny.save_gguf(model, tmp_path_factory.mktemp("m") / "tiny.gguf", type="Q8_0")


@pytest.fixture(scope="module")
def truth(path: Path) -> list[list[int]]:
    return two_turns(path, CONFIG, TEXT, SECOND)


@pytest.fixture(scope="module")
def quick() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(member, "PROBE_S", 0.05)
        patch.setattr(ReadCost, "pays", lambda *_: True)  # a tiny model may compute faster than a disk reads
        yield


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, quick: None) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("cluster"), CONFIG, workers=2) as made:
        yield made


@pytest.fixture
def cluster(shared: Cluster) -> Iterator[Cluster]:
    """Nothing is loaded, and nothing is on any disk."""
    yield shared
    for model in shared.node.status().models:
        shared.node.unload(Unload(model=model.name))
    for number in range(3):
        for directory in shared.home(number).kv.glob("*"):
            shutil.rmtree(directory)


def load(cluster: Cluster, path: Path, ranks: int = 3) -> ModelStatus:
    status = cluster.node.load(Load(model=str(path), ranks=ranks)).model
    assert status.ranks == ranks
    return status


def stored(cluster: Cluster, path: Path, truth: list[list[int]]) -> None:
    """The text with its answer is on the disks."""
    load(cluster, path)
    assert said(cluster.node, TEXT) == (truth[0], 0)
    cluster.node.unload(Unload(model=""))


def goes_on(cluster: Cluster, truth: list[list[int]]) -> int:
    """The second turn has the right answer. → how many tokens were known"""
    answer, known = said(cluster.node, [*TEXT, *truth[0], *SECOND])
    assert answer == truth[1]
    return known


def measured_again(cluster: Cluster) -> None:
    """The head starts again, and is a little quicker than it was before."""
    cluster.speed = replace(
        SPEED, flops=1.04 * SPEED.flops, memory_bytes_per_s=1.04 * SPEED.memory_bytes_per_s
    )
    cluster.restart_head()


def restart_worker(cluster: Cluster) -> None:
    cluster.stop(1)
    cluster.start(1)
    cluster.wait(2)


@pytest.mark.parametrize(
    "between",
    [
        measured_again,
        pytest.param(lambda cluster: None, marks=pytest.mark.cluster),
        pytest.param(restart_worker, marks=pytest.mark.cluster),
    ],
)
def test_a_conversation_goes_on(
    between: Callable[[Cluster], None], cluster: Cluster, path: Path, truth: list[list[int]]
) -> None:
    stored(cluster, path, truth)
    between(cluster)
    load(cluster, path)
    assert goes_on(cluster, truth) == KNOWN
    (status,) = cluster.node.status().models
    assert status.kv_disk_pages_read_total == 4
    own_bytes = cluster.node._models.pick("").engine.rank.disk.nbytes  # type: ignore[union-attr]
    assert status.kv_disk_bytes > own_bytes > 0
    assert not status.kv_disk_why


def damage(file: Path) -> None:
    with file.open("r+b") as stream:
        for place in range(0, file.stat().st_size, 4096):
            stream.seek(place + 11)
            stream.write(b"\x55")


def halve(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


SPOILT = [
    (name, spoil, rank)
    for name in (PAGES, INDEX)
    for spoil in (damage, Path.unlink, halve)
    for rank in (0, 2)
]


@pytest.mark.parametrize(
    ("name", "spoil", "rank"),
    [SPOILT[1], *(pytest.param(*each, marks=pytest.mark.cluster) for each in (SPOILT[0], *SPOILT[2:]))],
)
def test_what_one_rank_has_lost_is_computed_again(
    name: str,
    spoil: Callable[[Path], Any],
    rank: int,
    cluster: Cluster,
    path: Path,
    truth: list[list[int]],
) -> None:
    stored(cluster, path, truth)
    (file,) = cluster.home(rank).kv.rglob(name)
    spoil(file)
    load(cluster, path)
    assert goes_on(cluster, truth) < KNOWN
    cluster.node.unload(Unload(model=""))
    load(cluster, path)
    assert goes_on(cluster, truth) > KNOWN


@pytest.mark.cluster
def test_another_division_has_other_kv(cluster: Cluster, path: Path, truth: list[list[int]]) -> None:
    """What three machines have stored is not found by two, nor by one; it is when they are three again."""
    stored(cluster, path, truth)
    stores = []
    for ranks, known in ((2, 0), (1, 0), (3, KNOWN), (2, KNOWN + 1), (1, KNOWN + 1)):
        load(cluster, path, ranks)
        assert goes_on(cluster, truth) in (known, known + 1, known + 2)
        cluster.node.unload(Unload(model=""))
        stores.append(len([*cluster.home(0).kv.rglob(PAGES)]))
    assert stores == [2, 3, 3, 3, 3]


def test_other_sums_that_round_have_other_kv(
    cluster: Cluster, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(cluster, path)
    group = cluster.node._models.pick("").main.group
    assert isinstance(group, Group)
    exact = group.kv_key
    keys = set()
    topologies: tuple[SumTopology, ...] = ("star", "exchange")
    wires: tuple[WireType, ...] = ("f32", "bf16", "int8")
    for topology, wire, many_rows in product(topologies, wires, (8, 9)):
        manners = Manners(Manner(topology, wire), Manner("star", wire), many_rows)
        monkeypatch.setattr(type(group), "manners", manners)
        assert (group.kv_key == exact) == (wire == "f32")
        keys.add(group.kv_key)
    assert len(keys) == 1 + 2 * 2


def test_workers_are_told_no_texts(cluster: Cluster, path: Path, truth: list[list[int]]) -> None:
    """Nor can they find out by trying which texts they have."""
    stored(cluster, path, truth)
    first = packed(TEXT[:64])
    digest = chained(NO_TEXT, first)
    (own,) = cluster.home(0).kv.rglob(INDEX)
    assert first in own.read_bytes()
    for rank in (1, 2):
        (index,) = cluster.home(rank).kv.rglob(INDEX)
        wait_for(lambda index=index: index.stat().st_size > 4 * 32)  # type: ignore[misc]
        assert first not in index.read_bytes()
        assert digest not in index.read_bytes()


def kv_files(cluster: Cluster, number: int) -> KvFiles:
    """A worker's."""
    found = cluster.workers[number]._shards.kv_files  # type: ignore[attr-defined]
    assert isinstance(found, KvFiles)
    return found


@pytest.mark.cluster
def test_the_disk_with_the_least_room_decides(
    cluster: Cluster, path: Path, truth: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_files(cluster, 2), "_limit_bytes", 30_000)
    load(cluster, path)
    model = cluster.node._models.pick("")
    assert model is not None
    slots = model.engine.rank.disk.index.slots  # type: ignore[union-attr]
    assert 0 < slots < 4
    said(cluster.node, TEXT)
    cluster.node.unload(Unload(model=""))
    load(cluster, path)
    assert goes_on(cluster, truth) == slots * 64
    cluster.node.unload(Unload(model=""))
    monkeypatch.setattr(kv_files(cluster, 2), "_limit_bytes", 10)
    status = load(cluster, path)
    assert goes_on(cluster, truth) == 0
    assert status.kv_disk_why in [
        f"{member.name}: there is no room for a page of it" for member in cluster.roster.members
    ]


@pytest.mark.cluster
def test_a_disk_that_is_full_ends_nothing(
    cluster: Cluster, path: Path, truth: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of a worker: from then on no rank has more pages than it."""
    write, full = KvFile.write, cluster.home(1).kv

    def written(file: KvFile, entry: Any, page: Any) -> None:
        if file.directory.is_relative_to(full) and entry.slot >= 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(file, entry, page)

    monkeypatch.setattr(KvFile, "write", written)
    stored(cluster, path, truth)
    load(cluster, path)
    assert goes_on(cluster, truth) == 128
    cluster.node.unload(Unload(model=""))


@pytest.mark.cluster
def test_kv_in_memory_is_not_kept_if_a_machine_is_lost(
    cluster: Cluster, path: Path, truth: list[list[int]]
) -> None:
    load(cluster, path)
    assert said(cluster.node, TEXT) == (truth[0], 0)
    cluster.stop(1)
    wait_for(lambda: cluster.node.status().models[0].ranks < 3)
    assert goes_on(cluster, truth) == 0
    cluster.start(1)
    cluster.wait(2)
    wait_for(lambda: cluster.node.status().models[0].ranks == 3)
    assert goes_on(cluster, truth) == 0
    cluster.stop(1)
    wait_for(lambda: cluster.node.status().models[0].ranks == 2)
    assert goes_on(cluster, truth) >= KNOWN  # of when the machine came
    cluster.start(1)
    cluster.wait(2)
