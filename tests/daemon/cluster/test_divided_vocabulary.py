"""A head whose memory has no room for embedding and head of the vocabulary: workers have rows of them, and all compute
what one machine does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fakes import asking, tiny
from fakes.asking import prompt, text_of
from fakes.group.clusters import Cluster, everybody, wait_for

from shoal.comm.home import Home
from shoal.comm.messages import Load, Token
from shoal.daemon.cluster import forming
from shoal.daemon.cluster.choosing import planned_cut
from shoal.daemon.errors import DaemonError
from shoal.daemon.library.packs import Packs
from shoal.daemon.loading.loaded_model import LoadedModel
from shoal.daemon.model_name import Reference
from shoal.daemon.node import Node
from shoal.daemon.throughput.own_machine import OwnMachine
from shoal.engine import leader
from shoal.engine.order import Order
from shoal.engine.order_bytes import order_bytes
from shoal.offload.pack.manifest import Quant
from shoal.partition.group_choice import Choice, NoGroup
from shoal.partition.machines import Links, Machine
from shoal.partition.plan import Wanted
from shoal.partition.spec import BlockId

ROOMY = replace(asking.CONFIG, threads=2, kv_type="f16")
# Two ranks need 19.1 MB here if the vocabulary is cut, and three 20.3 if it is not.
TIGHT_BYTES = 19_700_000
SAID = "the vocabulary is divided, too, so the others see token ids"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Embedding and head are 2.4 MB each, and all the rest is 7.6."""
    sizes = {"hidden_size": 2048, "num_hidden_layers": 2, "head_dim": 16}
    model = tiny.hf_model("llama", seed=3, tie_word_embeddings=False, **sizes)
    return tiny.save_gguf(model, tmp_path_factory.mktemp("model") / "tiny.gguf")


@pytest.fixture(scope="module")
def alone(path: Path) -> list[list[int]]:
    with Node(ROOMY) as node:
        node.load(Load(model=str(path)))
        return [text_of(node, prompt(i))[1] for i in range(3)]


def evenly(
    wanted: Wanted,
    block_bytes: Mapping[BlockId, int],
    machines: Sequence[Machine],
    links: Links,
    **how: Any,
) -> Choice | NoGroup:
    """All machines take part with equal shares, whatever memory they have."""
    roomy = [machine._replace(memory_bytes=1 << 30) for machine in machines]
    found = everybody(wanted, block_bytes, roomy, links, **how)
    return found if isinstance(found, NoGroup) else found._replace(shares=(1.0,) * len(found.ranks))


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with Cluster(tmp_path, ROOMY, workers=2, choosing=evenly) as cluster:
        yield cluster


@pytest.fixture
def tight(cluster: Cluster) -> Cluster:
    budget = cluster.node.budget
    budget.take("another", budget.free_bytes - TIGHT_BYTES)
    return cluster


def loaded(cluster: Cluster) -> LoadedModel:
    (model,) = cluster.node._models
    return model


def rows(cluster: Cluster) -> list[int]:
    """Of the vocabulary, that each rank has."""
    workers = sorted(
        (cluster.shard(number).request.shard for number in cluster.workers), key=lambda it: it.rank
    )
    return [loaded(cluster).main.executor.model.spec.vocab, *(it.ranges.vocab.size for it in workers)]


def test_workers_have_rows_of_the_vocabulary(tight: Cluster, path: Path, alone: list[list[int]]) -> None:
    """Also after one of them is lost."""
    tight.node.load(Load(model=str(path)))
    assert tight.ranks == 3
    assert sum(rows(tight)) == loaded(tight).checkpoint.spec.vocab
    assert min(rows(tight)) > 0
    assert loaded(tight).status().machines_why.endswith(SAID)
    assert text_of(tight.node, prompt(1))[1] == alone[1]
    stream = tight.node.stream(prompt(0))
    events = [next(stream) for _ in range(4)]
    tight.stop(1)
    events += list(stream)
    assert [token for event in events if isinstance(event, Token) for token in event.ids] == alone[0]
    wait_for(lambda: tight.ranks == 2)
    assert text_of(tight.node, prompt(2))[1] == alone[2]
    assert sum(rows(tight)) == loaded(tight).checkpoint.spec.vocab
    assert loaded(tight).status().machines_why.endswith(SAID)


def cut_anyhow(*about: Any, may_cut_vocabulary: bool) -> planned_cut.PlannedCut:
    """Whatever room there is."""
    assert may_cut_vocabulary
    return planned_cut._planned(*about, cut_vocabulary=True)


@pytest.mark.parametrize(
    ("tied", "quant", "shard_disk_bytes"),
    [(False, "keep", None), (True, "keep", None), (True, "q8", None), (True, "q8", 0), (False, "q8", 0)],
)
def test_rows_are_read_from_every_kind_of_pack(
    tied: bool,
    quant: Quant,
    shard_disk_bytes: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a tied head, and of one in fewer bits, which packs have in slices; and where there is no room for a pack."""
    monkeypatch.setattr(forming, "planned_cut", cut_anyhow)
    monkeypatch.setattr("shoal.offload.pack.layout.SLICE_BYTES", 1)
    model = tiny.hf_model(
        "llama", tie_word_embeddings=tied, hidden_size=2048, num_hidden_layers=1, head_dim=16
    )
    path = tiny.save_gguf(model, tmp_path / "tiny.gguf")
    config = replace(ROOMY, shard_disk_bytes=shard_disk_bytes)
    machine = OwnMachine(1, alone=lambda: False)  # which rounds inputs as a group does
    with Node(config, packs=Packs(Home(tmp_path)), machine=machine) as node:
        node.load(Load(model=str(Reference(str(path), quant))))
        expected = text_of(node, prompt(0))[1]
    with Cluster(tmp_path, config, workers=1, choosing=evenly) as cluster:
        cluster.node.load(Load(model=str(Reference(str(path), quant))))
        assert min(rows(cluster)) > 0
        heads = [it for it in loaded(cluster).plan.blocks if it.block.kind == "head"]
        assert len(heads) > 1 or quant == "keep"
        assert text_of(cluster.node, prompt(0))[1] == expected


def test_a_worker_that_cannot_is_sent_no_token_ids(
    tight: Cluster, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for worker in tight.roster.members:
        monkeypatch.setattr(worker, "divides_vocabulary", False)
    with pytest.raises(DaemonError, match=r"this machine needs [\d.]+ MB for its part of"):
        tight.node.load(Load(model=str(path), ranks=3))


def test_token_ids_stay_here_where_there_is_room(
    cluster: Cluster, path: Path, alone: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[bool] = []

    def noted(order: Order, *, tokens: bool = False) -> bytes:
        told.append(tokens)
        return order_bytes(order, tokens=tokens)

    monkeypatch.setattr(leader, "order_bytes", noted)
    cluster.node.load(Load(model=str(path)))
    assert cluster.ranks == 3
    assert rows(cluster) == [loaded(cluster).checkpoint.spec.vocab, 0, 0]
    assert SAID not in loaded(cluster).status().machines_why
    assert text_of(cluster.node, prompt(0))[1] == alone[0]
    assert told
    assert not any(told)
