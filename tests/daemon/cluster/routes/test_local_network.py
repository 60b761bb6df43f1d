"""Joining without an address: heads say where they are, a machine with a code finds the right one."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from fakes.asking import CONFIG
from fakes.group.clusters import SPEED, wait_for
from fakes.group.networks import FakeNetwork
from fakes.group.nodes import begun_threads

from shoal.comm.cluster_messages import Invitation, Invite
from shoal.comm.group.discovery import MAX_HEADS, FoundHead
from shoal.comm.group.peers import Peers
from shoal.comm.home import Home
from shoal.daemon.cluster.membership import Membership
from shoal.daemon.cluster.pairing_up import pair_with_head
from shoal.daemon.cluster.roster import Roster
from shoal.daemon.cluster.routes import local_network
from shoal.daemon.cluster.routes.local_network import LocalNetwork, announced, interfaces
from shoal.daemon.cluster.routes.own_addresses import parse_address
from shoal.daemon.cluster.shard_stores import ShardStores
from shoal.daemon.errors import DaemonError
from shoal.offload.budget import Budget

CODE = "7K3M-Q9TX-2BD4F"


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> FakeNetwork:
    """Everybody is on loopback, and that counts as an address."""
    monkeypatch.setattr(local_network, "_for_others", lambda host: True)
    monkeypatch.setattr(local_network, "ANNOUNCE_LOOK_S", 0.05)
    return FakeNetwork()


@pytest.fixture
def heads(tmp_path: Path, network: FakeNetwork) -> Iterator[list[Membership]]:
    homes = [Home(tmp_path / f"head{number}") for number in range(3)]
    made = [
        Membership(
            home.cluster,
            CONFIG,
            Budget(0),
            Roster(),
            ShardStores(home.shards),
            lambda: SPEED,
            network=network,
        )
        for home in homes
    ]
    yield made
    for head in made:
        head.close()


def invite(head: Membership, *listen: str) -> Invitation:
    invitation = head.answer(Invite(listen=list(listen)))
    assert isinstance(invitation, Invitation)
    return invitation


def test_the_right_head_is_found_among_others(
    heads: list[Membership], network: FakeNetwork, tmp_path: Path
) -> None:
    network.heads.append(FoundHead("decoy", "00" * 8, (("127.0.0.1", 1), ("127.0.0.1", 2))))
    codes = [invite(head, "127.0.0.1:0").code for head in heads]
    wait_for(lambda: len(network.heads) == 4)
    for number, (head, code) in enumerate(zip(heads, codes, strict=True)):
        home = Home(tmp_path / f"worker{number}")
        pair_with_head(home, code, network=network)
        (peer,) = Peers(home.cluster).listed()
        assert peer.certificate == head._identity().certificate
        with pytest.raises(DaemonError, match=r"is a worker of .* already"):
            pair_with_head(home, code, network=network)
    wrong = Home(tmp_path / "wrong")
    with pytest.raises(DaemonError, match="not paired: no such join code"):
        pair_with_head(wrong, CODE, network=network)
    assert Peers(wrong.cluster).listed() == ()


def test_a_worker_finds_its_head_though_another_has_its_address_and_many_say_that_they_are_heads(
    heads: list[Membership], network: FakeNetwork, tmp_path: Path
) -> None:
    home = Home(tmp_path / "worker")
    network.heads += [
        FoundHead("decoy", f"{number:016x}", (("127.0.0.1", 1),)) for number in range(MAX_HEADS)
    ]
    code, other = (invite(head, "127.0.0.1:0") for head in heads[:2])
    pair_with_head(home, code.code, code.addresses, network)
    peers, fingerprint = Peers(home.cluster), heads[0]._identity().fingerprint
    peers.reached(fingerprint, (parse_address(other.addresses[0]),))
    wait_for(lambda: len(network.heads) == MAX_HEADS + 2)
    worker = Membership(
        home.cluster, CONFIG, Budget(0), Roster(), ShardStores(home.shards), lambda: SPEED, network=network
    )
    worker.start()
    try:
        wait_for(lambda: worker._worker is not None and worker._worker.attached)
    finally:
        worker.close()
    assert network.looked == 1


def test_nothing_found_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(DaemonError, match=r"no head was found on the local network: _shoal\._tcp") as raised:
        pair_with_head(Home(tmp_path), CODE, network=FakeNetwork())
    assert "\n" not in str(raised.value)
    assert "`address=HOST:PORT`" in raised.value.hint


def test_no_multicast_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(DaemonError, match=r"cannot be looked for .*: Network is unreachable") as raised:
        pair_with_head(Home(tmp_path), CODE, network=FakeNetwork(trouble="Network is unreachable"))
    assert "`address=HOST:PORT`" in raised.value.hint


def test_a_code_that_cannot_be_one_bothers_nobody(tmp_path: Path) -> None:
    network = FakeNetwork()
    with pytest.raises(DaemonError):
        pair_with_head(Home(tmp_path), "nonsense", network=network)
    assert network.looked == 0


def test_a_head_is_announced_while_it_listens(heads: list[Membership], network: FakeNetwork) -> None:
    head = heads[0]
    assert network.heads == []
    assert invite(head, "127.0.0.1:0").announced
    wait_for(lambda: len(network.heads) == 1)
    (said,) = network.heads
    assert said.fingerprint == head._identity().fingerprint
    invite(head, "127.0.0.2:0")
    wait_for(lambda: len(network.heads) == 1 and network.heads[0].addresses != said.addresses)
    head.close()
    assert network.heads == []


def test_it_is_announced_anew_when_its_addresses_change(
    heads: list[Membership], network: FakeNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    now: list[str] = []
    monkeypatch.setattr(Membership, "_reachable", lambda self: now or ["192.0.2.1:5"])
    invite(heads[0], "127.0.0.1:0")
    wait_for(lambda: [head.addresses for head in network.heads] == [(("192.0.2.1", 5),)])
    now.append("[2001:db8::1]:5")
    wait_for(lambda: [head.addresses for head in network.heads] == [(("2001:db8::1", 5),)])


def test_without_multicast_a_head_serves_and_says_it_once(
    heads: list[Membership], network: FakeNetwork, caplog: pytest.LogCaptureFixture
) -> None:
    network.trouble = "No such device"
    with caplog.at_level(logging.WARNING):
        assert invite(heads[0], "127.0.0.1:0").code
        wait_for(lambda: "cannot be announced" in caplog.text)
        threading.Event().wait(0.3)
    assert caplog.text.count("cannot be announced: No such device") == 1
    network.trouble = ""
    wait_for(lambda: len(network.heads) == 1)


def test_on_loopback_alone_nothing_is_announced(tmp_path: Path) -> None:
    home, network = Home(tmp_path), FakeNetwork()
    head = Membership(
        home.cluster, CONFIG, Budget(0), Roster(), ShardStores(home.shards), lambda: SPEED, network=network
    )
    assert not invite(head, "127.0.0.1:0").announced
    head.close()
    assert network.heads == []


def test_what_is_announced_is_of_use_to_others() -> None:
    texts = ["192.0.2.5:7447", "[2001:db8::5]:7447", "127.0.0.1:7447", "[::1]:7447", "pi.local:7447"]
    assert announced(texts) == (("192.0.2.5", 7447), ("2001:db8::5", 7447))
    assert not {"127.0.0.1", "::1"} & set(interfaces())


def test_a_machine_that_is_alone_has_no_thread_for_it(tmp_path: Path) -> None:
    home, begun = Home(tmp_path), begun_threads()
    alone = Membership(
        home.cluster,
        CONFIG,
        Budget(0),
        Roster(),
        ShardStores(home.shards),
        lambda: SPEED,
        network=LocalNetwork(),
    )
    alone.start()
    assert "shoal-announce" not in begun()
    alone.close()
