"""Workers that meet: let in by certificate and epoch, over several addresses, within a time; nobody else comes in."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes.group.nodes import Machine, back_to, footprint, tls

from shoal.comm.group.dialing import dial
from shoal.comm.group.errors import ChannelError, GroupError, NotPaired
from shoal.comm.group.greeting import greet
from shoal.comm.group.group_protocol import OURS
from shoal.comm.group.introduced import MAX_CHANNELS_INTRODUCED, Introduced
from shoal.comm.group.node_identity import NodeIdentity
from shoal.comm.group.tls import client_context, stranger_context
from shoal.daemon.cluster.control_messages import Epoch, Fellow, FellowAt, Introduce, Met
from shoal.daemon.cluster.mesh import fellows as module
from shoal.daemon.cluster.mesh.fellows import Fellows
from shoal.daemon.cluster.mesh.introductions import Introductions
from shoal.daemon.cluster.routes.own_addresses import parse_address

EPOCH = 5


@pytest.fixture(scope="module")
def identities(tmp_path_factory: pytest.TempPathFactory) -> list[NodeIdentity]:
    directory = tmp_path_factory.mktemp("nodes")
    return [NodeIdentity.of(directory / str(number), f"w{number}") for number in range(5)]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MEASURE_FELLOW_S", 0.005)
    monkeypatch.setattr(module, "DOOR_S", 0.05)


def known(identities: list[NodeIdentity], rank: int, ranks: int) -> list[Fellow]:
    return [Fellow(rank=it, certificate=identities[it].certificate) for it in range(1, ranks) if it != rank]


@contextmanager
def doors(identities: list[NodeIdentity], ranks: int, **more: Any) -> Iterator[dict[int, Fellows]]:
    opened = {
        rank: Fellows(identities[rank], "127.0.0.1", EPOCH, rank, known(identities, rank, ranks), **more)
        for rank in range(1, ranks)
    }
    try:
        yield opened
    finally:
        for one in opened.values():
            one.close()


def told(opened: dict[int, Fellows], rank: int, before: list[str] = []) -> Introduce:  # noqa: B006
    at = [
        FellowAt(rank=it, addresses=[*before, *other.listens.addresses])
        for it, other in opened.items()
        if it != rank
    ]
    return Introduce(epoch=EPOCH, fellows=at)


def meet(opened: dict[int, Fellows], before: list[str] = []) -> dict[int, Met]:  # noqa: B006
    with ThreadPoolExecutor(len(opened)) as threads:
        found = threads.map(lambda it: it[1].meet(told(opened, it[0], before)), opened.items())
        return dict(zip(opened, found, strict=True))


def test_all_meet_and_can_talk(identities: list[NodeIdentity]) -> None:
    before = footprint()
    with doors(identities, 5) as opened:
        met = meet(opened)
        assert all(not fellow.trouble for said in met.values() for fellow in said.fellows)
        for rank, said in met.items():
            assert [it.rank for it in said.fellows] == [it for it in opened if it != rank]
            assert all((it.latency_s > 0 and it.bytes_per_s > 0) == (it.rank < rank) for it in said.fellows)
            assert sorted(opened[rank].data) == [it for it in opened if it != rank]
        opened[4].data[2].send(b"hello")
        assert opened[2].data[4].receive_exactly(5, 1.0) == b"hello"
    assert back_to(before)


def test_addresses_that_lead_nowhere_hold_nobody_up(identities: list[NodeIdentity]) -> None:
    """One refuses, one accepts and says nothing, one is another machine."""
    with socket.create_server(("127.0.0.1", 0)) as silent, doors(identities, 3) as opened:
        decoys = ["127.0.0.1:1", f"127.0.0.1:{silent.getsockname()[1]}", "nonsense:x:y"]
        began = time.monotonic()
        met = meet(opened, decoys)
        assert not met[2].fellows[0].trouble
        assert time.monotonic() - began < module.MEET_S - 0.5


def test_one_that_cannot_be_reached_is_said_in_time(
    identities: list[NodeIdentity], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MEET_S", 1.5)
    with socket.create_server(("127.0.0.1", 0)) as silent, doors(identities, 4) as opened:
        nowhere = [f"127.0.0.1:{silent.getsockname()[1]}"]
        with ThreadPoolExecutor(3) as threads:
            began = time.monotonic()
            places = told(opened, 3).fellows
            futures = {rank: threads.submit(opened[rank].meet, told(opened, rank)) for rank in (1, 2)}
            broken = [FellowAt(rank=1, addresses=nowhere), *(it for it in places if it.rank == 2)]
            futures[3] = threads.submit(opened[3].meet, Introduce(epoch=EPOCH, fellows=broken))
            met = {rank: future.result(20) for rank, future in futures.items()}
        assert time.monotonic() - began < 10
        assert [bool(it.trouble) for it in met[3].fellows] == [True, False]
        assert [bool(it.trouble) for it in met[1].fellows] == [False, True]


def test_nobody_else_is_let_in(identities: list[NodeIdentity], tmp_path: Path) -> None:
    with doors(identities, 3) as opened:
        address = parse_address(opened[1].listens.addresses[0])
        stranger = Machine.at(tmp_path, "stranger")
        for identity in (stranger.identity, identities[4]):  # the second is known elsewhere
            believed = Introduced({1: identities[1].certificate})
            with pytest.raises(GroupError):
                dial(identity, believed, identities[1].fingerprint, "data", [address], 2.0)
        assert not opened[1].data
        shown = client_context(stranger.identity, identities[1].certificate)
        for context in (shown, stranger_context()):  # one of nobody, and none at all
            with pytest.raises((GroupError, OSError)), tls(address, context) as channel:
                greet(channel, "data", OURS, time.monotonic() + 2)
        assert not opened[1].data


@pytest.mark.parametrize(
    ("purpose", "epoch", "rank"),
    [("data", EPOCH + 1, 2), ("weights", EPOCH, 2), ("control", EPOCH, 2), ("data", EPOCH, 1)],
)
def test_a_fellow_may_do_no_more_than_it_was_introduced_for(
    identities: list[NodeIdentity], purpose: Any, epoch: int, rank: int
) -> None:
    """Another epoch; weights that nobody serves; orders; a channel for sums by the lower rank."""
    with doors(identities, 3) as opened:
        other = 3 - rank
        address = parse_address(opened[other].listens.addresses[0])
        believed = Introduced({other: identities[other].certificate})
        with dial(
            identities[rank], believed, identities[other].fingerprint, purpose, [address], 2.0
        ) as channel:
            channel.send_message(Epoch(epoch=epoch))
            with pytest.raises(ChannelError):
                channel.receive_exactly(1, 5.0)
        assert not opened[other].data


def test_weights_go_either_way(identities: list[NodeIdentity]) -> None:
    asked = threading.Event()

    def serve(rank: int, channel: Any) -> None:
        asked.set()
        channel.send(np.full(4, rank, np.uint8))

    with doors(identities, 3, serve_weights=serve) as opened:
        meet(opened)
        for one, other in ((1, 2), (2, 1)):
            with opened[one].dial(other, "weights") as channel:
                assert channel.receive_exactly(4, 2.0) == bytes([one] * 4)


def test_closing_ends_every_channel_and_the_door(identities: list[NodeIdentity]) -> None:
    with doors(identities, 3) as opened:
        meet(opened)
        channel = opened[2].data[1]
        address = parse_address(opened[1].listens.addresses[0])
        opened[1].close()
        with pytest.raises(ChannelError):
            channel.receive_exactly(1, 5.0)
        with pytest.raises(OSError):
            socket.create_connection(address, timeout=1).close()
        with pytest.raises(NotPaired):
            opened[1].dial(2, "weights")


def test_a_fellow_has_only_so_many_channels(identities: list[NodeIdentity]) -> None:
    kept: list[Any] = []
    with doors(identities, 3, serve_weights=lambda rank, channel: kept.append(channel)) as opened:
        meet(opened)
        more = []
        with pytest.raises(ChannelError):  # noqa: PT012
            for _ in range(2 * MAX_CHANNELS_INTRODUCED):
                more.append(opened[2].dial(1, "weights"))
        assert len(more) < MAX_CHANNELS_INTRODUCED


@pytest.mark.parametrize("certificate", [b"", b"x" * 100])
def test_introductions_with_no_certificate_are_refused(certificate: bytes) -> None:
    with pytest.raises(ChannelError):
        Introduced({1: certificate})


def test_nobody_is_introduced_twice(identities: list[NodeIdentity]) -> None:
    with pytest.raises(ChannelError, match="twice"):
        Introduced({1: identities[0].certificate, 2: identities[0].certificate})


class FakeMember:
    """A member that meets its fellows with a door of its own, or says nothing."""

    meets_fellows = True
    address = "127.0.0.1"

    def __init__(self, number: int, identity: NodeIdentity, silent: bool = False) -> None:
        self.name, self.certificate, self.silent = f"w{number}", identity.certificate, silent
        self.number = number
        self.door: Fellows | None = None
        self.told: list[Introduce] = []

    def send(self, message: Any) -> None:
        self.told.append(message)


def test_a_head_introduces_and_learns_who_reaches_whom(identities: list[NodeIdentity]) -> None:
    ended = threading.Event()
    members = [FakeMember(rank, identities[rank]) for rank in range(1, 4)]
    head = Introductions(EPOCH, members, ended.set)
    with doors(identities, 4) as opened:
        assert [it.rank for it in head.fellows(2)] == [1, 3]
        for rank, one in opened.items():
            assert not head.over
            head.heard(rank, one.listens)
        with ThreadPoolExecutor(3) as threads:
            met = list(threads.map(lambda it: opened[it.number].meet(it.told[0]), members))
        for rank, said in enumerate(met, 1):
            assert not head.links or rank > 1
            head.heard(rank, said)
    assert ended.is_set()
    assert head.over
    assert sorted(head.links) == [(1, 2), (1, 3), (2, 3)]
    assert not head.apart


def test_a_head_waits_only_so_long_and_says_who_is_missing(identities: list[NodeIdentity]) -> None:
    now = [0.0]
    members = [FakeMember(rank, identities[rank]) for rank in range(1, 3)]
    head = Introductions(EPOCH, members, clock=lambda: now[0])
    with doors(identities, 3) as opened:
        head.heard(1, opened[1].listens)
        assert not head.over
        now[0] = 60.0
        assert head.over
        assert not head.links
        assert head.apart == ["w2 does not reach w1 (no answer)"]


def test_two_ranks_need_no_introduction(identities: list[NodeIdentity]) -> None:
    head = Introductions(EPOCH, [FakeMember(1, identities[1])])
    assert head.over
    assert head.fellows(1) == []


def test_members_that_cannot_meet_are_not_introduced(identities: list[NodeIdentity]) -> None:
    members = [FakeMember(rank, identities[rank]) for rank in range(1, 3)]
    members[1].meets_fellows = False
    head = Introductions(EPOCH, members)
    assert head.over
    assert head.fellows(1) == []
