"""A head and workers on loopback: they answer as one machine, and go on when machines come and go."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fakes import tiny
from fakes.asking import CONFIG, prompt, text_of
from fakes.group.clusters import Cluster, wait_for

from shoal.comm.messages import Load
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
