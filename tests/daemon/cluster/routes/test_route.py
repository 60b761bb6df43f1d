"""How a worker reaches its head: over the best address that answers, found out by measuring, and kept."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from fakes.group.clusters import free_port
from fakes.group.networks import slow_road
from fakes.group.nodes import Machine, paired

from shoal.comm.errors import CommError
from shoal.comm.group.discovery import FoundHead
from shoal.comm.group.errors import Forgotten
from shoal.comm.group.listener import GroupListener
from shoal.comm.group.streams import Address
from shoal.daemon.cluster.control_messages import HeadAt
from shoal.daemon.cluster.roster import NobodyKnown, Roster
from shoal.daemon.cluster.routes import route
from shoal.daemon.cluster.routes.own_addresses import spelled
from shoal.daemon.cluster.routes.route import HeadRoute


@dataclass
class Head(NobodyKnown):
    """Listens, and answers who measures."""

    machine: Machine
    worker: Machine
    says: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.roster = Roster()
        self.roster.known = self
        self.listener: GroupListener = self.machine.listening()
        self.open = True
        threading.Thread(target=self._accept, daemon=True).start()

    def addresses(self) -> list[str]:
        return self.says

    @property
    def address(self) -> Address:
        return self.listener.addresses[0]

    def route(self, *known: Address, look: object = list) -> HeadRoute:
        self.worker.peers.reached(self.machine.fingerprint, known)
        return HeadRoute(self.worker.identity, self.worker.peers, self.machine.fingerprint, look)

    @property
    def remembered(self) -> tuple[Address, ...]:
        return self.worker.peers.get(self.machine.fingerprint).addresses

    def _accept(self) -> None:
        while self.open:
            if (channel := self.listener.accept(0.1)) is None:
                continue
            if channel.purpose == "measure":
                threading.Thread(target=self.roster.take, args=(channel,), daemon=True).start()

    def close(self) -> None:
        self.open = False
        self.listener.close()
        self.roster.close()


@pytest.fixture
def head(tmp_path: Path) -> Iterator[Head]:
    made = Head(*paired(tmp_path))
    yield made
    made.close()


@pytest.mark.parametrize("first", ["slow", "fast"])
def test_the_fast_address_is_used_wherever_it_is_listed(head: Head, first: str) -> None:
    with slow_road(head.address) as slow:
        known = [slow, head.address] if first == "slow" else [head.address, slow]
        way = head.route(*known)
        with way.dial("control") as control, way.dial("data") as data:
            assert control.remote == data.remote == head.address
    assert way.now is not None
    assert way.now.compared == 2
    assert way.now.rtt_s < 0.005
    assert way.now.bytes_per_s > 1e6
    assert head.remembered == (head.address, slow)


def test_an_address_that_only_the_head_knows_is_found(head: Head) -> None:
    """Paired over the slow one."""
    with slow_road(head.address) as slow:
        head.says = [
            "192.0.2.300:1",
            "nonsense",
            "127.0.0.1:0",
            "[::1]:x",
            spelled(slow),
            spelled(head.address),
        ]
        way = head.route(slow)
        with way.dial("control") as control:
            assert control.remote == head.address
    assert head.remembered == (head.address, slow)


def test_it_stays_where_it_is_while_that_works(head: Head) -> None:
    """Something faster appears: what is dialled later still goes the same way, until it attaches again."""
    with slow_road(head.address) as slow:
        way = head.route(slow)
        with way.dial("control"):
            head.says = [spelled(head.address)]
            with way.dial("data") as data, way.dial("weights") as weights:
                assert data.remote == weights.remote == slow
        with way.dial("control") as control:
            assert control.remote == head.address


def test_equally_good_ones_do_not_take_turns(head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(route, "ROUTES_ALIKE", 1e9)
    with slow_road(head.address, delay_s=0) as other:
        for known in ([other, head.address], [head.address, other]):
            way = head.route(*known)
            for _ in range(2):
                with way.dial("control") as control:
                    assert control.remote == known[0]


def test_decoys_hold_nobody_up(head: Head, tmp_path: Path) -> None:
    """A mute one, one that is closed, one that is another machine."""
    other = Machine.at(tmp_path, "other")
    with socket.create_server(("127.0.0.1", 0)) as mute, socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and does not listen
        gone = closed.getsockname()
        with other.listening() as listener:
            way = head.route(mute.getsockname(), gone, listener.addresses[0], head.address)
            with way.dial("control") as control:
                assert control.remote == head.address
    assert way.now is not None
    assert way.now.compared == 1


def test_a_head_with_another_address_is_looked_for(head: Head) -> None:
    gone = "127.0.0.1", free_port()
    start = head.machine.fingerprint[:16]
    found = [
        FoundHead("other", "0" * 16, (("127.0.0.1", 1),)),
        FoundHead("nameless", "", (("127.0.0.1", 2),)),
        FoundHead("head", start, (head.address,)),
    ]
    looked: list[int] = []

    def look() -> list[FoundHead]:
        looked.append(1)
        return found if len(looked) > 1 else []

    way = head.route(gone, look=look)
    with pytest.raises(CommError, match="cannot be reached"):
        way.dial("control")
    with pytest.raises(CommError, match="cannot be reached"):
        way.dial("control")
    assert len(looked) == 1, "not each time"
    way._look_s = 0
    with way.dial("control") as control:
        assert control.remote == head.address
    assert head.remembered[0] == head.address


UNKNOWN_CA = bytes([21, 3, 3, 0, 2, 2, 48])  # a fatal alert in the clear, which anybody can send


@contextlib.contextmanager
def refusing(answers: int) -> Iterator[Address]:
    """Somebody who refuses whoever dials, and proves nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            for _ in range(answers):
                connected, _ = server.accept()
                with connected:
                    connected.recv(1 << 16)
                    connected.sendall(UNKNOWN_CA)

        answering = threading.Thread(target=answer)
        answering.start()
        yield server.getsockname()
        answering.join(5)


@pytest.mark.parametrize("there", ["another head", "somebody who refuses", "both"])
def test_a_head_whose_address_is_another_machines_is_looked_for(
    head: Head, there: str, tmp_path: Path
) -> None:
    looked: list[int] = []

    def look() -> list[FoundHead]:
        looked.append(1)
        return [FoundHead("head", head.machine.fingerprint[:16], (head.address,))]

    with (
        Machine.at(tmp_path, "other").listening() as listener,
        refusing(int(there != "another head")) as mute,
    ):
        known = {"another head": [listener.addresses[0]], "somebody who refuses": [mute]}
        way = head.route(*known.get(there, [listener.addresses[0], mute]), look=look)
        with way.dial("control") as control:
            assert control.remote == head.address
    assert head.remembered[0] == head.address
    assert len(looked) == 1


def test_without_multicast_the_reason_is_still_that_of_the_address(head: Head) -> None:
    def look() -> list[FoundHead]:
        raise OSError("no multicast here")

    gone = "127.0.0.1", free_port()
    with pytest.raises(CommError, match="cannot be reached"):
        head.route(gone, look=look).dial("control")


def test_who_was_forgotten_is_told(head: Head) -> None:
    """By the head itself, so there is no other that might be looked for."""
    looked: list[int] = []
    head.machine.peers.forget("worker")
    with pytest.raises(Forgotten):
        head.route(head.address, look=lambda: looked.append(1) or []).dial("control")
    assert not looked


@pytest.mark.parametrize("said", [None, HeadAt(addresses=["x"] * 64, version="v" * 4096)])
def test_a_head_that_goes_while_it_is_measured(head: Head, said: HeadAt | None) -> None:
    def take(channel: object) -> None:
        with contextlib.suppress(CommError):
            if said is not None:
                channel.send_message(said)
        channel.close()

    head.roster.take = take
    with pytest.raises((CommError, OSError), match=r".+"):
        head.route(head.address).dial("control")


def test_loopback_of_a_head_elsewhere_is_not_ours() -> None:
    said = HeadAt(
        addresses=["127.0.0.1:7447", "[::1]:7447", "192.0.2.5:7447", "[2001:db8::5]:7447", "name:1"]
    )
    there = [("192.0.2.5", 7447), ("2001:db8::5", 7447)]
    assert route._told(said, {("192.0.2.9", 7447): said}) == there
    assert route._told(said, {("127.0.0.1", 7447): said})[0] == ("127.0.0.1", 7447)
