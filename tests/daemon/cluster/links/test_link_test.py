"""Links are measured beside everything else that goes over them, and the member that others wait for is named."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from fakes import tiny
from fakes.asking import CONFIG, prompt, text_of
from fakes.group.clusters import Cluster, wait_for

from shoal.comm.cluster_messages import LinksReply, MeasureLinks
from shoal.comm.messages import Load
from shoal.daemon.cluster.control_messages import PROBE_BYTES, Probe, Probed
from shoal.daemon.cluster.links import link_test, verdicts
from shoal.daemon.cluster.served_shard import ServedShard
from shoal.daemon.errors import DaemonError

LATE_S = 0.1  # far more than a machine that is busy with other tests adds to a message
SLOW_S = 0.06  # for each sum


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_test, "TRIPS_S", 0.2)
    monkeypatch.setattr(link_test, "WAY_S", 0.1)
    monkeypatch.setattr(verdicts, "FAR_S", 0.75 * LATE_S)
    monkeypatch.setattr(verdicts, "UNSTEADY_S", 1.0)


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Cluster]:
    with Cluster(tmp_path, CONFIG, workers=2) as cluster:
        yield cluster


def measured(cluster: Cluster) -> LinksReply:
    found = cluster.head.answer(MeasureLinks())
    assert isinstance(found, LinksReply)
    return found


def names(cluster: Cluster) -> dict[int, str]:
    """As the head calls the workers."""
    by_print = {node.fingerprint: node.name for node in cluster.nodes()}
    return {number: by_print[it._identity().fingerprint] for number, it in cluster.workers.items()}


def answers_late(cluster: Cluster, number: int, late_s: float, kind: type) -> None:
    """What that worker says of `kind` comes so much later."""
    worker = cluster.workers[number]._worker
    assert worker is not None
    tell = worker._tell

    def later(message: Any) -> None:
        if isinstance(message, kind):
            time.sleep(late_s)
        tell(message)

    worker._tell = later  # type: ignore[method-assign]


def test_every_link_is_measured_and_none_stands_out(two: Cluster) -> None:
    found = measured(two)
    assert [link.verdict for link in found.links] == ["good", "good"]
    assert (found.culprit, found.why, found.computing) == ("", "no member stands out", [])
    for link in found.links:
        assert link.trips > 10
        assert 0 < link.rtt_s <= link.rtt_p99_s
        assert link.to_bytes_per_s > 1e6
        assert link.from_bytes_per_s > 1e6
        assert link.incast_bytes_per_s > 0
    assert found.incast_bytes_per_s > 1e6


def test_what_is_found_counts_when_machines_are_chosen(two: Cluster) -> None:
    """A link may have changed since its member attached."""
    members = two.head._roster.members
    before = [member.link for member in members]
    answers_late(two, 1, LATE_S, Probed)
    found = measured(two)
    for member, link, old in zip(members, found.links, before, strict=True):
        assert member.link != old
        assert member.link.bytes_per_s == min(link.to_bytes_per_s, link.from_bytes_per_s)
    assert max(member.link.latency_s for member in members) > LATE_S / 2


def test_a_member_that_is_far_is_named(two: Cluster) -> None:
    answers_late(two, 1, LATE_S, Probed)
    found = measured(two)
    far = names(two)[1]
    assert found.culprit == far
    assert {link.name: link.verdict for link in found.links} == {far: "far", names(two)[2]: "good"}
    assert f"{far}: 1" in found.why  # of seconds a tenth
    assert "there and back" in found.why
    assert "times the other: it is what a token waits for" in found.why


def test_a_member_that_computes_slowly_is_named(two: Cluster, tmp_path: Path, monkeypatch: Any) -> None:
    path = tiny.save_gguf(tiny.hf_model("llama"), tmp_path / "tiny.gguf")
    two.node.load(Load(model=str(path)))
    assert all(node.wait_s == 0 for node in two.nodes())
    worker = two.workers[2]._worker
    assert worker is not None
    (shard,) = worker.shards
    slow_down(shard)
    text_of(two.node, prompt(0, new=6))
    found = measured(two)
    slow = names(two)[2]
    assert {link.name: link.verdict for link in found.links}[slow] == "computes slowly"
    assert found.culprit == slow
    assert f"{slow}: the head waits " in found.why
    waits = {node.name: node.wait_s for node in two.nodes()}
    assert waits[slow] > SLOW_S / 2
    assert waits[names(two)[1]] < SLOW_S / 2
    assert [node.models for node in two.nodes()[1:]] == [["tiny.gguf"], ["tiny.gguf"]]
    assert all(0.1 < node.shares[0] < 0.5 for node in two.nodes()[1:])


def slow_down(shard: ServedShard) -> None:
    assert shard._follower is not None
    spoke = shard._follower._spoke
    allreduce = spoke.allreduce

    def slow(partial: Any) -> Any:
        time.sleep(SLOW_S)
        return allreduce(partial)

    spoke.allreduce = slow  # type: ignore[method-assign]


def test_answers_go_on_meanwhile_and_it_is_said(two: Cluster, tmp_path: Path) -> None:
    path = tiny.save_gguf(tiny.hf_model("llama"), tmp_path / "tiny.gguf")
    two.node.load(Load(model=str(path)))
    wanted = text_of(two.node, prompt(0))
    two.head._computing = lambda: [it.name for it in two.node.status().models if it.running]
    ends = threading.Event()
    answers: list[Any] = []

    def ask() -> None:
        while not ends.is_set():
            answers.append(text_of(two.node, prompt(0)))

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        wait_for(lambda: bool(answers))
        found = measured(two)
    finally:
        ends.set()
        asking.join()
    assert found.computing == ["tiny.gguf"]
    assert all(answer[1] == wanted[1] for answer in answers)
    assert len(two.roster.members) == 2


def test_a_member_lost_in_the_middle_is_said(two: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    lost = names(two)[2]
    tell = link_test._trips

    def losing(probes: Any, clock: Any) -> list[float]:
        if 2 in two.workers:
            two.stop(2)
        return tell(probes, clock)

    monkeypatch.setattr(link_test, "_trips", losing)
    found = measured(two)
    assert {link.name: link.verdict for link in found.links}[lost] == "lost"
    assert found.culprit == lost
    assert f"{lost} was lost meanwhile" in found.why


def test_a_member_that_never_answers_holds_nobody_up_for_long(
    two: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.daemon.cluster.links.link_probes.LINK_PROBED_S", 0.3)
    worker = two.workers[1]._worker
    assert worker is not None
    do = worker._do
    worker._do = lambda message: None if isinstance(message, Probe) else do(message)  # type: ignore[method-assign]
    began_s = time.monotonic()
    found = measured(two)
    assert time.monotonic() - began_s < 5
    assert {link.name: link.verdict for link in found.links}[names(two)[1]] == "lost"


def test_an_answer_of_another_size_counts_for_nothing(two: Cluster) -> None:
    worker = two.workers[1]._worker
    assert worker is not None
    tell = worker._tell
    worker._tell = lambda message: tell(  # type: ignore[method-assign]
        Probed(number=message.number, data=bytes(PROBE_BYTES)) if isinstance(message, Probed) else message
    )
    found = {link.name: link for link in measured(two).links}[names(two)[1]]
    assert (found.verdict, found.to_bytes_per_s) == ("lost", 0)
    assert f"an answer of {PROBE_BYTES} bytes: 0 were to come" in found.why


def test_workers_and_machines_alone_say_who_measures(two: Cluster, tmp_path: Path) -> None:
    with pytest.raises(DaemonError, match="its head measures links"):
        two.workers[1].answer(MeasureLinks())
    with pytest.raises(DaemonError, match="is in no cluster"):
        Cluster(tmp_path / "alone", CONFIG, workers=0).head.answer(MeasureLinks())


def test_a_head_without_workers_says_so(tmp_path: Path) -> None:
    with Cluster(tmp_path, CONFIG, workers=0) as cluster:
        cluster.invite()
        assert measured(cluster) == LinksReply(
            links=[], why="no worker is attached", seconds=measured_s(cluster)
        )


def measured_s(cluster: Cluster) -> float:
    return pytest.approx(0.0, abs=1.0)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "message",
    [
        {"type": "Probe", "number": 1, "reply_bytes": PROBE_BYTES + 1},
        {"type": "Probe", "number": 1, "reply_bytes": -1},
        {"type": "Probe", "number": 1, "data": bytes(PROBE_BYTES + 1)},
        {"type": "Probed", "number": 1, "data": bytes(PROBE_BYTES + 1)},
        {"type": "Probed", "number": -1},
    ],
)
def test_no_side_is_made_to_send_or_keep_more_than_a_probe(message: dict[str, Any]) -> None:
    data = msgspec.msgpack.encode(message)
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(data, type=Probe if message["type"] == "Probe" else Probed)


def test_answers_that_nobody_asked_for_are_not_kept(two: Cluster) -> None:
    probes = two.roster.members[0].probes
    for number in range(1000):
        probes.heard(Probed(number=number + 10_000, data=bytes(10)))
    assert probes._ended == {}
    assert measured(two).links[0].verdict == "good"
    assert (probes._ended, probes._began_s) == ({}, {})
