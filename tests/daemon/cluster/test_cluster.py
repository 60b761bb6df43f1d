"""A head and workers on loopback: they answer as one machine, and go on when machines come and go."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from fakes import tiny
from fakes.asking import CONFIG, prompt, text_of
from fakes.group.clusters import Cluster, wait_for

from shoal.comm.messages import Load
from shoal.daemon.errors import DaemonError
from shoal.daemon.node import Node


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_gguf(tiny.hf_model("llama"), tmp_path_factory.mktemp("model") / "tiny.gguf")


@pytest.fixture(scope="module")
def alone(path: Path) -> list[list[int]]:
    """What one machine answers to some prompts."""
    with Node(CONFIG) as node:
        node.load(Load(model=str(path)))
        return [text_of(node, prompt(i))[1] for i in range(4)]


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Cluster]:
    with Cluster(tmp_path, CONFIG, workers=2) as cluster:
        yield cluster


def ranks(cluster: Cluster) -> int:
    (model,) = cluster.node._models
    return model.plan.ranks


def test_three_machines_answer_as_one(two: Cluster, path: Path, alone: list[list[int]]) -> None:
    two.node.load(Load(model=str(path)))
    assert ranks(two) == 3
    assert [text_of(two.node, prompt(i))[1] for i in range(4)] == alone


def test_a_machine_that_goes_and_comes_back(two: Cluster, path: Path, alone: list[list[int]]) -> None:
    two.node.load(Load(model=str(path)))
    stream = two.node.stream(prompt(0))
    events = [next(stream) for _ in range(4)]
    two.stop(1)
    events += list(stream)
    ids = [token for event in events for token in getattr(event, "ids", [])]
    assert ids == alone[0]
    wait_for(lambda: ranks(two) == 2)
    assert text_of(two.node, prompt(1))[1] == alone[1]
    two.start(1)
    wait_for(lambda: ranks(two) == 3)
    assert text_of(two.node, prompt(2))[1] == alone[2]


@pytest.mark.cluster
def test_a_context_that_only_a_group_has_room_for(tmp_path: Path) -> None:
    long = 100_000
    model = tiny.hf_model("llama", max_position_embeddings=long)
    path = tiny.save_gguf(model, tmp_path / "long.gguf")
    with Cluster(tmp_path, replace(CONFIG, kv_tokens=None, max_sequences=1), workers=1) as cluster:
        budget = cluster.node.budget

        def loaded(ranks: int | None, context: int) -> int:
            return cluster.node.load(Load(model=str(path), ranks=ranks, context=context)).model.rank_bytes[0]

        alone_bytes, own_bytes = loaded(1, long), loaded(2, long)
        loaded(1, 96)
        (loaded_model,) = cluster.node._models
        room = budget.free_bytes + loaded_model.peak_bytes
        budget.take("another", room - (alone_bytes + own_bytes) // 2)
        assert loaded(None, long) == own_bytes
        with pytest.raises(DaemonError, match="needs at least"):
            loaded(1, long)
