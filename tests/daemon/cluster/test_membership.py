"""Who may join whom, what an address may be, and that nothing stays open when a machine leaves."""

from __future__ import annotations

import socket
import threading
import time
from pathlib import Path

import pytest
from fakes.asking import CONFIG
from fakes.group.clusters import Cluster, wait_for
from fakes.group.networks import FakeNetwork

from shoal.comm.cluster_messages import Forget, LinksReply, MeasureLinks, NodesReply, Rejoin
from shoal.comm.cluster_messages import Nodes as AskNodes
from shoal.comm.group.channel import Channel
from shoal.comm.group.discovery import MAX_HEADS, FoundHead
from shoal.comm.group.group_protocol import Purpose
from shoal.comm.home import Home
from shoal.daemon.cluster import worker as worker_room
from shoal.daemon.cluster.control_messages import Attach
from shoal.daemon.cluster.membership import Membership
from shoal.daemon.cluster.pairing_up import NowPaired, pair_with_head, unpair
from shoal.daemon.cluster.routes.own_addresses import parse_address
from shoal.daemon.cluster.routes.route import HeadRoute
from shoal.daemon.errors import DaemonError

CODE = "7K3M-Q9TX-2BD4F"


@pytest.mark.parametrize("text", ["31100", "31100:7447", "a b:1", "host:99999", "host:-1", "host:x"])
@pytest.mark.parametrize("with_host", [False, True])
def test_addresses_that_cannot_be(text: str, with_host: bool) -> None:
    with pytest.raises(DaemonError, match="address"):
        parse_address(text, with_host=with_host)


@pytest.mark.parametrize("text", [":7447", "", "host:0", ":0"])
def test_where_a_head_is_has_a_host_and_a_port(text: str) -> None:
    parse_address(text)
    with pytest.raises(DaemonError, match="HOST:PORT"):
        parse_address(text, with_host=True)


def test_a_head_joins_nobody_and_a_worker_only_one(tmp_path: Path) -> None:
    with Cluster(tmp_path, CONFIG, workers=0) as cluster:
        address = cluster.invite().addresses[0]
        head, worker = Home(tmp_path / "head"), cluster.home(1)
        with pytest.raises(DaemonError, match="is a head"):
            pair_with_head(head, CODE, [address])
        cluster.join(1)
        with pytest.raises(DaemonError, match="is a head"):
            pair_with_head(head, CODE, [address])
        with pytest.raises(DaemonError, match="is a worker of"):
            pair_with_head(worker, CODE, [address])


def fake_heads(count: int) -> list[FoundHead]:
    """At addresses where nobody is."""
    return [FoundHead(f"pi{number}", "", ((f"127.0.1.{number + 1}", 9),)) for number in range(count)]


def test_heads_that_are_none_do_not_hide_the_one(tmp_path: Path) -> None:
    with Cluster(tmp_path, CONFIG, workers=0) as cluster:
        invited = cluster.invite()
        real = FoundHead("head", "", (parse_address(invited.addresses[0]),))
        network = FakeNetwork(*fake_heads(59), real)
        assert len(network.heads) <= MAX_HEADS
        pair_with_head(cluster.home(1), invited.code, network=network)


def test_where_heads_are_none_the_error_is_short_and_says_what_helps(tmp_path: Path) -> None:
    with pytest.raises(DaemonError) as caught:
        pair_with_head(Home(tmp_path / "worker"), CODE, network=FakeNetwork(*fake_heads(30)))
    assert "30 heads answered on the local network" in caught.value.message
    assert "127.0.1." in caught.value.message
    assert "and 27 more" in caught.value.message
    assert len(caught.value.message) < 300
    assert "`address=HOST:PORT`" in caught.value.hint


def test_a_code_that_a_found_head_refuses_may_be_anothers(tmp_path: Path) -> None:
    with Cluster(tmp_path, CONFIG, workers=0) as cluster:
        found = FoundHead("head", "", (parse_address(cluster.invite().addresses[0]),))
        with pytest.raises(DaemonError, match="no such join code") as caught:
            pair_with_head(cluster.home(1), CODE, network=FakeNetwork(found))
        assert "`address=HOST:PORT`" in caught.value.hint
        with pytest.raises(DaemonError, match="no such join code") as caught:
            pair_with_head(cluster.home(1), CODE, [cluster.invite().addresses[0]])
        assert "address" not in caught.value.hint


def test_a_head_that_leaves_listens_no_more(tmp_path: Path) -> None:
    with Cluster(tmp_path, CONFIG, workers=1) as cluster:
        host, port = parse_address(cluster.invite().addresses[0])
        unpair(Home(tmp_path / "head"))
        cluster.head.answer(Rejoin())
        cluster.wait(0)
        assert cluster.head.role == "alone"
        with pytest.raises(OSError):
            socket.create_connection((host, port), timeout=1).close()


def test_a_worker_that_forgets_its_head_dials_it_no_more(tmp_path: Path) -> None:
    with Cluster(tmp_path, CONFIG, workers=1) as cluster:
        worker = cluster.workers[1]
        assert worker._worker is not None
        worker.answer(Forget(node=worker._worker.head))
        wait_for(lambda: worker._worker is None)
        cluster.wait(0)
        wait_for(lambda: not cluster.head.paired())  # it is told, and waits for nobody


def test_a_worker_that_leaves_takes_no_other_with_it(tmp_path: Path) -> None:
    with Cluster(tmp_path, CONFIG, workers=2) as cluster:
        first, second = (cluster.workers[number]._identity().fingerprint for number in (1, 2))
        assert cluster.head.paired() == [first, second]
        cluster.workers[1].answer(Forget(node=cluster.head._identity().fingerprint))
        wait_for(lambda: cluster.head.paired() == [second])
        cluster.wait(1)


@pytest.mark.parametrize("attached", [True, False])
def test_a_worker_that_was_forgotten_says_so_and_dials_rarely(
    attached: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It hears it when it happens, or when it attaches next; and it attaches again if the head knows it again."""
    dials: list[str] = []
    dial = HeadRoute.dial

    def counted(route: HeadRoute, purpose: Purpose) -> Channel:
        dials.append(purpose)
        return dial(route, purpose)

    monkeypatch.setattr(HeadRoute, "dial", counted)
    monkeypatch.setattr(worker_room, "REDIAL_S", (0.01, 0.01))
    with Cluster(tmp_path, CONFIG, workers=1) as cluster:
        peers = cluster.home(0).cluster / "peers.json"
        before = peers.read_bytes()
        if not attached:
            cluster.stop(1)
            cluster.wait(0)
        cluster.head.answer(Forget(node=cluster.nodes()[1].fingerprint))
        if not attached:
            cluster.start(1)
        worker = cluster.workers[1]._worker
        assert worker is not None
        wait_for(lambda: worker.trouble == worker_room.FORGOTTEN)
        assert f"not attached to {worker.head}: {worker_room.FORGOTTEN}" in caplog.text
        dialled = len(dials)
        time.sleep(0.2)
        assert len(dials) == dialled
        cluster.stop(1)

        monkeypatch.setattr(worker_room, "REDIAL_FORGOTTEN_S", 0.01)
        cluster.start(1)
        worker = cluster.workers[1]._worker
        assert worker is not None
        wait_for(lambda: worker.trouble == worker_room.FORGOTTEN)
        peers.write_bytes(before)
        cluster.wait(1)
        wait_for(lambda: worker.attached and not worker.trouble)


def test_a_forgotten_worker_is_paired_anew_by_a_code_of_the_same_head(tmp_path: Path) -> None:
    """By whoever may start commands there. Its daemon does not wait out the minute until it would dial next."""
    with Cluster(tmp_path, CONFIG, workers=1) as cluster:
        head, home, worker = cluster.nodes()[0].fingerprint, cluster.home(1), cluster.workers[1]
        address = cluster.invite().addresses[0]

        def again() -> NowPaired:
            return pair_with_head(home, cluster.invite().code, [address], head)

        assert again().before  # it is known
        cluster.head.answer(Forget(node=cluster.nodes()[1].fingerprint))
        assert worker._worker is not None
        wait_for(lambda: worker._worker.trouble == worker_room.FORGOTTEN)  # type: ignore[union-attr]
        with pytest.raises(DaemonError, match="is a worker of"):
            pair_with_head(home, cluster.invite().code, [address])
        with pytest.raises(DaemonError, match="no such join code"):
            pair_with_head(home, CODE, [address], head)
        paired = again()
        assert (paired.before, paired.fingerprint) == (False, cluster.head.paired()[0])
        worker.answer(Rejoin())
        cluster.wait(1)
        assert again().before
        cluster.stop(1)
        cluster.head.close()
        assert pair_with_head(home, CODE, [address], head).before  # it is away, and has said nothing


def test_a_worker_that_has_joined_and_is_not_there_yet_prepares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured, attach = threading.Event(), Membership._attach

    def slowly(membership: Membership) -> Attach:
        assert measured.wait(20)
        return attach(membership)

    monkeypatch.setattr(Membership, "_attach", slowly)
    with Cluster(tmp_path, CONFIG, workers=0) as cluster:
        cluster.join(1)

        def states(membership: Membership) -> list[tuple[bool, bool]]:
            found = membership.answer(AskNodes())
            assert isinstance(found, NodesReply)
            return [(node.attached, node.preparing) for node in found.nodes]

        wait_for(lambda: states(cluster.head) == [(True, False), (False, True)])
        wait_for(lambda: states(cluster.workers[1]) == [(False, True), (False, False)])
        name = cluster.nodes()[1].name
        assert cluster.roster.absent == [f"{name} has joined just now and is still preparing"]
        links = cluster.head.answer(MeasureLinks())
        assert isinstance(links, LinksReply)
        assert links.why == f"no worker is attached; {name} has joined just now and is still preparing"
        measured.set()
        cluster.wait(1)
        assert cluster.roster.absent == []
        wait_for(lambda: states(cluster.workers[1]) == [(True, False), (True, False)])
        cluster.head._follow_members()
        cluster.stop(1)
        cluster.wait(0)
        assert states(cluster.head) == [(True, False), (False, False)]  # it is away
        assert cluster.roster.absent == [f"{name} is away"]


def test_a_worker_that_leaves_while_it_is_forgotten_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Cluster(tmp_path, CONFIG, workers=1) as cluster:
        gone = cluster.nodes()[1].fingerprint
        monkeypatch.setattr(cluster.roster, "tell_forgotten", cluster.head.forget)
        cluster.head.answer(Forget(node=gone))
        assert cluster.head.paired() == []


@pytest.mark.parametrize("of_head", [True, False])
def test_a_last_word_waits_for_nobody_who_still_sends(of_head: bool, tmp_path: Path) -> None:
    """To a machine that does not read: a thread may be at it for a minute."""
    with Cluster(tmp_path, CONFIG, workers=1) as cluster:
        (member,), worker = cluster.roster.members, cluster.workers[1]._worker
        assert worker is not None
        control = member._control if of_head else worker._control
        assert control is not None
        began_s = time.monotonic()
        with control._sending:
            if of_head:
                cluster.roster.tell_forgotten(member.fingerprint)
            else:
                worker.say_farewell()
        assert time.monotonic() - began_s < 30


def test_what_the_head_has_said_holds_though_it_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_room, "REDIAL_FORGOTTEN_S", 0.01)
    with Cluster(tmp_path, CONFIG, workers=1) as cluster:
        worker = cluster.workers[1]._worker
        assert worker is not None
        cluster.head.answer(Forget(node=cluster.nodes()[1].fingerprint))
        wait_for(lambda: bool(worker.trouble))
        cluster.head.close()
        time.sleep(0.2)
        assert worker.trouble == worker_room.FORGOTTEN


def test_a_worker_that_looks_for_its_head_stops_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks, over = threading.Event(), threading.Event()

    def look(route: HeadRoute, purpose: str) -> Channel:
        looks.set()
        over.wait(20)
        raise OSError("there is no head")

    with Cluster(tmp_path, CONFIG, workers=1) as cluster:
        monkeypatch.setattr(HeadRoute, "dial", look)
        cluster.head.close()
        assert looks.wait(10)
        began_s = time.monotonic()
        cluster.stop(1)
        assert time.monotonic() - began_s < 15
        over.set()


def test_before_the_first_beat_all_memory_is_free(tmp_path: Path) -> None:
    with Cluster(tmp_path, CONFIG, workers=1) as cluster:
        (node,) = [it for it in cluster.nodes() if it.role == "worker"]
        assert node.free_bytes == node.memory_bytes > 0


def test_a_head_says_how_fast_workers_are_and_the_links_between_them(tmp_path: Path) -> None:
    with Cluster(tmp_path, CONFIG, workers=2) as cluster:
        cluster.wait(2)
        found = cluster.head.answer(AskNodes())
        assert isinstance(found, NodesReply)
        head, *workers = found.nodes
        speeds = {member.fingerprint: member.speed for member in cluster.roster.members}
        for node in workers:
            said = node.memory_bytes_per_s, node.flops, node.disk_bytes_per_s
            own = speeds[node.fingerprint]
            assert said == (own.memory_bytes_per_s, own.flops, own.disk_bytes_per_s)
            assert node.memory_bytes_per_s > 0
        assert head.flops == 0  # its own profile knows more
        (pair,) = found.pairs
        assert set(pair.between) == set(speeds)
        assert pair.bytes_per_s > 0
