"""Where a head listens: everywhere that is real while a machine may come, and nowhere but in use when all are there."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from fakes.asking import CONFIG
from fakes.group.clusters import Cluster, wait_for

from shoal.comm.cluster_messages import Forget, Invite, Nodes, NodesReply
from shoal.comm.errors import AddressError
from shoal.comm.group.join_code import CODE_S, Codes
from shoal.comm.group.node_identity import NodeIdentity
from shoal.comm.group.peers import Peers
from shoal.comm.group.streams import Address
from shoal.daemon.cluster.pairing_up import pair_with_head
from shoal.daemon.cluster.routes.listening import Listening, real_hosts
from shoal.daemon.cluster.routes.own_addresses import OwnAddress, spelled

CABLE = OwnAddress("127.0.0.1", "eth0", "cable")
SIXTH = OwnAddress("::1", "eth0", "cable")
WIFI = OwnAddress("127.0.0.2", "wlan0", "wifi")
DECOYS = (
    OwnAddress("127.0.0.3", "docker0", "bridge"),
    OwnAddress("127.0.0.4", "tun0", "vpn"),
    OwnAddress("127.0.0.5", "eth1", "link-local"),
    OwnAddress("127.0.0.6", "lo", "loopback"),
)
ALL = (CABLE, SIXTH, WIFI, *DECOYS)


def free_port() -> int:
    """Free at every address that these tests use."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=1).close()
    except OSError:
        return False
    return True


def answering(port: int, own: Sequence[OwnAddress] = ALL) -> list[str]:
    return [one.host for one in own if answers(one.host, port)]


def listening(tmp_path: Path, *wanted: str, own: Sequence[OwnAddress] = ALL) -> Listening:
    return Listening(NodeIdentity.of(tmp_path), Peers(tmp_path), wanted, Codes(), lambda: own)


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        (ALL, ["127.0.0.1", "::1", "127.0.0.2"]),
        ([WIFI, *DECOYS], ["127.0.0.2"]),
        (DECOYS, ["127.0.0.4"]),  # better a tunnel than nothing
        (DECOYS[2:], ["127.0.0.5"]),
        (DECOYS[3:], ["127.0.0.6"]),
        ([], []),
    ],
)
def test_what_is_real(own: Sequence[OwnAddress], expected: list[str]) -> None:
    assert real_hosts(own) == expected


def test_it_follows_who_is_awaited(tmp_path: Path) -> None:
    port = free_port()
    found = listening(tmp_path, f"auto:{port}")
    try:
        assert answering(port) == ["127.0.0.1", "::1", "127.0.0.2"]
        assert found.follow(awaited=False, used=[("127.0.0.2", port)])
        wait_for(lambda: answering(port) == ["127.0.0.2"])
        assert not found.follow(awaited=False, used=[("127.0.0.2", port)])
        assert found.follow(awaited=True, used=[("127.0.0.2", port)])
        assert sorted(answering(port)) == ["127.0.0.1", "127.0.0.2", "::1"]
        assert found.follow(awaited=False, used=())
        wait_for(lambda: not answering(port))
        assert found.addresses == ()
        assert len(found.all_reachable) == 3
    finally:
        found.close()
    assert not found.follow(awaited=True, used=())  # it was closed meanwhile
    assert not answering(port)


def test_what_was_asked_for_stays_open(tmp_path: Path) -> None:
    port = free_port()
    found = listening(tmp_path, f"127.0.0.3:{port}", f"auto:{port}", own=[CABLE, *DECOYS])
    try:
        assert answering(port) == ["127.0.0.1", "127.0.0.3"]
        used: list[Address] = [("127.0.0.3", port)]
        assert found.follow(awaited=False, used=used)
        wait_for(lambda: answering(port) == ["127.0.0.3"])
    finally:
        found.close()


def test_another_program_has_an_address(tmp_path: Path) -> None:
    port = free_port()
    with socket.create_server(("127.0.0.1", port)) as other:
        found = listening(tmp_path, f"auto:{port}", own=[CABLE, WIFI])
        try:
            assert found.addresses == (("127.0.0.2", port),)
            other.close()
            found.follow(awaited=True, used=())
            assert found.addresses == (("127.0.0.2", port), ("127.0.0.1", port))
        finally:
            found.close()


def test_no_address_can_be_had(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(AddressError, match="in use"):
            listening(tmp_path, f"auto:{port}", own=[CABLE])


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with Cluster(tmp_path, CONFIG, workers=0) as cluster:
        yield cluster


def nodes(cluster: Cluster) -> NodesReply:
    found = cluster.head.answer(Nodes())
    assert isinstance(found, NodesReply)
    return found


def test_only_what_is_in_use_is_listened_at(cluster: Cluster) -> None:
    now = [0.0]
    own = [CABLE, SIXTH, WIFI, *DECOYS]
    cluster.head._codes = Codes(lambda: now[0])
    cluster.head._own = lambda: own
    port = free_port()
    invited = cluster.head.answer(Invite(listen=[f"auto:{port}"]))
    everywhere = [spelled((host, port)) for host in ("127.0.0.1", "::1", "127.0.0.2")]
    assert nodes(cluster).listening == everywhere
    assert sorted(invited.addresses) == sorted(everywhere)

    now[0] += CODE_S  # nobody came, and nobody can
    wait_for(lambda: not answering(port))
    assert nodes(cluster).listening == []
    assert sorted(nodes(cluster).closed) == sorted(everywhere)

    code = cluster.head.answer(Invite()).code
    pair_with_head(cluster.home(1), code, [everywhere[2]])
    assert len(answering(port)) == 3  # until it attaches, it may come by any way
    cluster.start(1)
    cluster.wait(1)
    used = cluster.roster.members[0].own_address
    wait_for(lambda: answering(port) == [used[0]])
    assert nodes(cluster).listening == [spelled(used)]
    assert len(nodes(cluster).closed) == 2

    own.insert(0, OwnAddress("127.0.0.7", "eth9", "cable"))  # nothing moves
    member = cluster.roster.members[0]
    for _ in range(3):
        cluster.head._follow_members()
    assert answering(port, own) == [used[0]]
    assert cluster.roster.members == [member]

    cluster.stop(1)  # a machine is missing
    wait_for(lambda: len(answering(port, own)) == 4)
    cluster.start(1)
    cluster.wait(1)
    wait_for(lambda: len(answering(port, own)) == 1)
    cluster.head.answer(Forget(node=nodes(cluster).nodes[1].name))
    wait_for(lambda: not answering(port, own))
