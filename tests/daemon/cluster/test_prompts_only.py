"""Prompts are read by all machines and answers decoded by the head alone: the answers are those of one machine, the
head keeps all KV, and a machine that is lost costs nobody more than the step under way.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fakes import tiny
from fakes.asking import NEW, greedy, said, two_turns
from fakes.group import clusters
from fakes.group.clusters import Cluster, free_port, prompts_by_everybody, wait_for
from hosts import relay

from shoal.comm.group import greeting
from shoal.comm.messages import Load, ModelStatus, Token, Unload
from shoal.daemon.cluster import member
from shoal.daemon.cluster.forming import ALONE_AS_ASKED
from shoal.daemon.cluster.routes import route
from shoal.daemon.cluster.speed import NodeSpeed
from shoal.daemon.config import NodeConfig
from shoal.daemon.loading.loaded_model import LoadedModel
from shoal.engine.assisted import Assisted
from shoal.engine.learn.group_worth import GroupWorth
from shoal.engine.learn.kv_read_cost import ReadCost
from shoal.offload.pack.manifest import Quant
from shoal.partition.group_search import choose

CONFIG = NodeConfig(
    context_tokens=256, kv_tokens=1024, max_sequences=4, max_queue=16, chunk_tokens=64, memory_bytes=3 << 30
)
LACKS = re.compile(r"this machine needs [\d.]+ [KM]B for its part of tiny\.gguf")
TEXT = [7 * i % 53 for i in range(150)]
SECOND = [3 * i % 50 for i in range(30)]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its embedding is its head."""
    model = tiny.hf_model(
        "llama", seed=11, hidden_size=128, intermediate_size=192, max_position_embeddings=512
    )
    return tiny.save_gguf(model, tmp_path_factory.mktemp("m") / "tiny.gguf", type="F16")


@pytest.fixture(scope="module")
def truth(path: Path) -> list[list[int]]:
    return two_turns(path, CONFIG, TEXT, SECOND)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(member, "PROBE_S", 0.05)
        patch.setattr(GroupWorth, "pays", True)
        patch.setattr(ReadCost, "pays", lambda *_: True)  # a tiny model may compute faster than a disk reads
        with Cluster(tmp_path_factory.mktemp("cluster"), CONFIG, 2, prompts_by_everybody) as made:
            yield made


@pytest.fixture
def cluster(shared: Cluster) -> Iterator[Cluster]:
    """Both workers are there, nothing is loaded, and nothing is on any disk."""
    for number in {1, 2} - shared.workers.keys():
        shared.start(number)
    shared.wait(2)
    yield shared
    for model in shared.node.status().models:
        shared.node.unload(Unload(model=model.name))
    for number in range(3):
        for directory in shared.home(number).kv.glob("*"):
            shutil.rmtree(directory)


def load(cluster: Cluster, path: Path, quant: Quant | None = None) -> ModelStatus:
    status = cluster.node.load(Load(model=f"{path}:{quant}" if quant else str(path))).model
    assert status.ranks == 3
    return status


def loaded(cluster: Cluster) -> LoadedModel:
    (model,) = cluster.node._models
    return model


def steps(cluster: Cluster) -> int:
    """That the workers took part in."""
    one, other = (cluster.shard(number).pulse for number in (1, 2))
    wait_for(lambda: one.steps == other.steps and not (one.at_work or other.at_work))
    return one.steps


def turns(cluster: Cluster, truth: list[list[int]]) -> None:
    first, known = said(cluster.node, TEXT)
    assert (first, known) == (truth[0], 0)
    assert steps(cluster) == 3  # chunks of 64 tokens
    second, known = said(cluster.node, [*TEXT, *first, *SECOND])
    assert second == truth[1]
    assert known == len(TEXT) + NEW - 1
    assert steps(cluster) == 4


def test_answers_are_those_of_one_machine(cluster: Cluster, path: Path, truth: list[list[int]]) -> None:
    """What it says of itself, too: each machine's memory, and the model's weights once."""
    before_bytes = cluster.node.budget.held_bytes
    status = load(cluster, path)
    turns(cluster, truth)
    model = loaded(cluster)
    assert isinstance(model.engine.rank, Assisted)
    assert model.main.share_bytes > 0
    assert status.rank_bytes[0] == model.plan.peak_bytes + model.main.share_bytes
    assert status.rank_bytes[1:] == [cluster.shard(it).request.plan.peak_bytes for it in (1, 2)] or (
        status.rank_bytes[1:] == [cluster.shard(it).request.plan.peak_bytes for it in (2, 1)]
    )
    assert cluster.node.budget.held_bytes - before_bytes >= status.rank_bytes[0]
    assert status.parameters_bytes == model.plan.weights_bytes
    assert status.plan.endswith(", long steps by 3 ranks")
    assert status.machines_why.startswith(
        "prompts by all 3 machines, answers by this one alone: the first token"
    )
    assert len(status.machines) == 2
    assert all(not any(cluster.home(number).kv.glob("*")) for number in (1, 2))


def test_weights_in_fewer_bits_are_cut_likewise(cluster: Cluster, path: Path) -> None:
    status = load(cluster, path, "q8")
    assert status.quant == "q8"
    answer, _ = said(cluster.node, TEXT)
    assert steps(cluster) == 3
    cluster.node.unload(Unload(model=""))
    status = cluster.node.load(Load(model=f"{path}:q8", ranks=1)).model
    assert status.ranks == 1
    assert said(cluster.node, TEXT)[0] == answer


def test_a_number_of_ranks_means_a_whole_group(cluster: Cluster, path: Path, truth: list[list[int]]) -> None:
    status = cluster.node.load(Load(model=str(path), ranks=3)).model
    assert status.ranks == 3
    assert not isinstance(loaded(cluster).engine.rank, Assisted)
    assert said(cluster.node, TEXT)[0] == truth[0]


def test_one_rank_means_no_group(cluster: Cluster, path: Path) -> None:
    """It stays so for who asks for no number, until the model is unloaded."""
    load(cluster, path)
    for ranks in (1, None):
        status = cluster.node.load(Load(model=str(path), ranks=ranks)).model
        assert (status.ranks, status.machines) == (1, [])
        assert status.machines_why == ALONE_AS_ASKED
    cluster.node.unload(Unload(model=""))
    load(cluster, path)


def test_a_number_is_insisted_on_from_when_it_is_asked_for(cluster: Cluster, path: Path) -> None:
    """Also if as many compute the model already, because they are quicker."""
    cluster.node.load(Load(model=str(path), ranks=3))
    model = loaded(cluster)
    model.asked_ranks = None
    cluster.node.load(Load(model=str(path)))
    assert model.asked_ranks is None
    cluster.node.load(Load(model=str(path), ranks=3))
    assert loaded(cluster) is model
    assert model.asked_ranks == 3


def test_machines_that_come_reload_no_model_that_has_no_room_for_its_part(
    cluster: Cluster, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    budget = cluster.node.budget
    before_bytes, took = budget.held_bytes, {}
    for ranks in (None, 1):
        cluster.node.load(Load(model=str(path), ranks=ranks))
        took[ranks] = budget.held_bytes - before_bytes
        cluster.node.unload(Unload(model=""))
    budget.take("another", budget.free_bytes - (took[None] + took[1]) // 2)
    try:
        status = cluster.node.load(Load(model=str(path))).model
        assert status.ranks == 1
        assert LACKS.fullmatch(status.machines_why)
        model = loaded(cluster)
        main, arrivals = model.main, model.arrivals
        cluster.stop(1)
        cluster.start(1)
        wait_for(lambda: model.arrivals > arrivals)
        for _ in range(5):
            cluster.node._regrouping.look()
            assert (model.main, model.engine.lost, model.prepared) == (main, None, False)
            time.sleep(0.05)
        assert "is loaded again" not in caplog.text
        assert LACKS.fullmatch(model.main.why)
    finally:
        budget.release("another")


def test_kv_comes_back_from_the_heads_disk(cluster: Cluster, path: Path, truth: list[list[int]]) -> None:
    load(cluster, path)
    assert said(cluster.node, TEXT)[0] == truth[0]
    cluster.node.unload(Unload(model=""))
    load(cluster, path)
    answer, known = said(cluster.node, [*TEXT, *truth[0], *SECOND])
    assert answer == truth[1]
    assert known >= 128
    assert steps(cluster) == 1  # the workers were sent what was read


@pytest.mark.parametrize("when", ["while a prompt is read", "while an answer is decoded"])
def test_a_lost_machine_costs_a_step_at_most(
    when: str, cluster: Cluster, path: Path, truth: list[list[int]]
) -> None:
    load(cluster, path)
    model = loaded(cluster)
    if when == "while a prompt is read":
        follower = cluster.shard(1)._follower
        assert follower is not None

        def broken(*_: object) -> None:
            raise OSError("the disk is on fire")

        follower._rank.executor.forward = broken  # type: ignore[assignment]
        answer, _ = said(cluster.node, TEXT)
    else:
        stream = cluster.node.stream(greedy(TEXT))
        events = [next(stream)]
        while not isinstance(events[-1], Token):
            events.append(next(stream))
        cluster.stop(1)
        events += list(stream)
        answer = [token for event in events if isinstance(event, Token) for token in event.ids]
    assert answer == truth[0]
    assert model.engine.scheduler.totals.preemptions == 0
    wait_for(lambda: isinstance(model.engine.rank, Assisted) and model.engine.lost is None)
    wait_for(lambda: cluster.node.status().models[0].ranks == (2 if len(cluster.workers) == 1 else 3))
    assert said(cluster.node, [*TEXT, *answer, *SECOND])[0] == truth[1]


DELAY_S = 0.005  # one way


@pytest.fixture
def far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """One worker, behind a relay that delays all that passes. Machines say that they are slow, as the model is tiny."""
    monkeypatch.setattr(member, "PROBE_S", 0.1)
    monkeypatch.setattr(greeting, "BESIDE", "not on one machine")
    monkeypatch.setattr(route, "_told", lambda *_: [])  # where else the head is
    monkeypatch.setattr(clusters, "SPEED", NodeSpeed(1e12, 1e8, 0))
    relays: list[subprocess.Popen[bytes]] = []

    def by(address: str) -> str:
        there = f"127.0.0.1:{free_port()}"
        command = [sys.executable, relay.__file__, there, address]
        started = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        relays.append(started)
        assert started.stdin is not None
        assert started.stdout is not None
        started.stdout.readline()
        started.stdin.write(b'{"delay_s": %f}\n' % DELAY_S)
        started.stdin.flush()
        started.stdout.readline()
        return there

    try:
        with Cluster(tmp_path, CONFIG, 0, choose) as made:
            made.speed = clusters.SPEED
            made.by = by
            made.join(1)
            made.wait(1)
            yield made
    finally:
        for one in relays:
            one.kill()
            one.wait()


def test_it_is_chosen_where_links_are_long_and_answers_do_not_wait_for_them(
    far: Cluster, path: Path, truth: list[list[int]]
) -> None:
    status = far.node.load(Load(model=str(path))).model
    assert status.machines_why.startswith(
        "prompts by both machines, answers by this one alone: the first token"
    )
    assert status.ranks == 2
    pulse = far.shard(1).pulse
    stream = far.node.stream(greedy(TEXT))
    while not isinstance(next(stream), Token):
        pass
    blocks = pulse.blocks
    assert blocks > 0
    rest = [token for event in stream if isinstance(event, Token) for token in event.ids]
    assert rest == truth[0][-len(rest) :]
    assert pulse.blocks == blocks
