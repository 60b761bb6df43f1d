"""Pairing by join code: what both sides have afterwards, and who gets nothing."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time

import msgspec
import pytest
from fakes.group.networks import slow_road
from fakes.group.nodes import Machine, mute, relay, stalled, tls

from shoal.comm.errors import KeyFileError
from shoal.comm.group import listener as listener_module
from shoal.comm.group import pairing
from shoal.comm.group.channel import Channel, channel_pair
from shoal.comm.group.dialing import pair
from shoal.comm.group.errors import ChannelError, GroupError, PairingRefused, VersionMismatch
from shoal.comm.group.greeting import greet
from shoal.comm.group.group_protocol import OURS, Speaks
from shoal.comm.group.join_code import CODE_S, TRIES_BY_ONE, Codes, read_code
from shoal.comm.group.listener import GroupListener
from shoal.comm.group.pairing import Challenge, Claim, Denied, Paired, Proof, admit, join
from shoal.comm.group.streams import SocketStream, TlsStream
from shoal.comm.group.tls import server_context, stranger_context

WRONG = "0000-0000-00000"


@pytest.fixture
def head(tmp_path) -> Machine:
    return Machine.at(tmp_path, "head")


@pytest.fixture
def worker(tmp_path) -> Machine:
    return Machine.at(tmp_path, "worker")


def by(machine: Machine, code: str, addresses, **options):
    return pair(machine.identity, machine.peers, code, addresses, **options)


def refused(machine: Machine, code: str, addresses) -> str:
    with pytest.raises(PairingRefused) as caught:
        by(machine, code, addresses)
    assert "\n" not in str(caught.value)
    return caught.value.reason


def nothing_stored(*machines: Machine) -> bool:
    return all(machine.peers.listed() == () and not machine.peers.file.exists() for machine in machines)


def test_both_sides_know_each_other_afterwards(head, worker):
    with head.listening() as listener:
        found, known_as = by(worker, head.codes.new().lower().replace("-", " "), listener.addresses)
        assert found.addresses == listener.addresses
        assert (found.role, found.fingerprint, known_as) == ("head", head.fingerprint, "worker")
        assert worker.peers.listed() == (found,)
        assert [(peer.role, peer.fingerprint) for peer in head.peers.listed()] == [
            ("worker", worker.fingerprint)
        ]
        with worker.dial(head, listener.addresses) as channel:
            assert channel.peer == head.fingerprint
            with listener.accept(5) as at_head:
                assert at_head.peer == worker.fingerprint


def test_machines_of_one_name_are_told_apart(head, tmp_path):
    with head.listening() as listener:
        for number, directory in enumerate(("a", "b")):
            twin = Machine.at(tmp_path / directory, "head")
            assert by(twin, head.codes.new(), listener.addresses)[1] == f"head-{number + 2}"


def test_pairing_again_replaces(head, worker):
    with head.listening() as listener:
        for _ in range(2):
            by(worker, head.codes.new(), listener.addresses)
        assert len(head.peers.listed()) == len(worker.peers.listed()) == 1


def test_a_wrong_code_pairs_nobody_and_costs_nothing(head, worker):
    code = head.codes.new()
    with head.listening() as listener:
        for _ in range(TRIES_BY_ONE - 1):
            assert refused(worker, WRONG, listener.addresses) == "code"
        assert nothing_stored(head, worker)
        by(worker, code, listener.addresses)


def test_a_code_that_cannot_be_one_bothers_nobody(head, worker):
    with pytest.raises(PairingRefused, match="must be 13"):
        by(worker, "1234", [("127.0.0.1", 1)])


def test_tries_are_bounded(head, worker):
    code = head.codes.new()
    with head.listening() as listener:
        for _ in range(TRIES_BY_ONE):
            refused(worker, WRONG, listener.addresses)
        assert refused(worker, code, listener.addresses) == "often"
        assert nothing_stored(head, worker)


def warned(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("who", ["wrong code", "itself", "too often"])
def test_what_strangers_cause_is_seldom_logged(who, head, worker, caplog):
    if who == "too often":
        for _ in range(TRIES_BY_ONE):
            with contextlib.suppress(PairingRefused):
                head.codes.redeem("127.0.0.1", lambda code: False, lambda: None)
    with head.listening() as listener:
        for _ in range(4):
            refused(head if who == "itself" else worker, WRONG, listener.addresses)
    assert len(warned(caplog)) == 1
    assert "127.0.0.1 was not paired" in warned(caplog)[0]


def test_a_bug_that_strangers_find_is_seldom_logged(head, worker, caplog, monkeypatch):
    def fail(*_: object) -> None:
        raise RuntimeError("mended some day")

    monkeypatch.setattr(listener_module, "admit", fail)
    with head.listening() as listener:
        for _ in range(3):
            with pytest.raises(GroupError):
                by(worker, WRONG, listener.addresses)
    assert [line for line in warned(caplog) if "bug in Shoal" in line] == warned(caplog)
    assert len(warned(caplog)) == 1
    assert "mended some day" in caplog.text


def test_a_used_code(head, worker, tmp_path):
    code, other = head.codes.new(), Machine.at(tmp_path, "other")
    with head.listening() as listener:
        by(worker, code, listener.addresses)
        assert refused(other, code, listener.addresses) == "used"
        assert nothing_stored(other)
        assert len(head.peers.listed()) == 1


def test_an_expired_code(head, worker):
    now = time.monotonic()
    head.codes = Codes(lambda: now)
    code = head.codes.new()
    now += CODE_S
    with head.listening() as listener:
        assert refused(worker, code, listener.addresses) == "expired"
        assert nothing_stored(head, worker)


def test_of_two_that_use_a_code_at_once_one_is_paired(head, tmp_path):
    code, outcomes = head.codes.new(), list[str]()
    machines = [Machine.at(tmp_path, f"m{number}") for number in range(4)]

    def act(machine: Machine) -> None:
        try:
            by(machine, code, addresses)
            outcomes.append("paired")
        except PairingRefused as error:
            outcomes.append(error.reason)

    with head.listening() as listener:
        addresses = listener.addresses
        threads = [threading.Thread(target=act, args=(machine,)) for machine in machines]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
    assert sorted(outcomes) == ["paired", "used", "used", "used"]
    assert len(head.peers.listed()) == 1


def test_a_listener_without_codes_pairs_nobody(head, worker):
    with (
        GroupListener(head.identity, head.peers, [("127.0.0.1", 0)]) as listener,
        pytest.raises(ChannelError),
    ):
        by(worker, WRONG, listener.addresses)
    assert nothing_stored(head, worker)


def test_a_node_is_not_paired_with_itself(head):
    with head.listening() as listener:
        assert refused(head, head.codes.new(), listener.addresses) == "peer"
        assert nothing_stored(head)


def test_versions_that_do_not_meet(head, worker):
    with head.listening() as listener, pytest.raises(VersionMismatch, match="versions 7 to 9"):
        by(worker, head.codes.new(), listener.addresses, speaks=Speaks(7, 9))
    assert nothing_stored(head, worker)


def test_a_head_that_cannot_store_says_so_and_the_code_stays_good(head, worker):
    code = head.codes.new()
    with head.listening() as listener:
        head.peers.file.write_text("{")
        with pytest.raises(GroupError):
            by(worker, code, listener.addresses)
        head.peers.file.unlink()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("shoal.comm.group.peers.MAX_PEERS", 0)
            assert refused(worker, code, listener.addresses) == "stored"
        assert nothing_stored(head, worker)
        by(worker, code, listener.addresses)


def test_a_worker_that_cannot_store_says_so(head, worker):
    with head.listening() as listener:
        worker.peers.file.write_text("{")
        with pytest.raises(KeyFileError, match=r"peers\.json"):
            by(worker, head.codes.new(), listener.addresses)


def test_other_machines_at_the_addresses_do_not_matter(head, worker, tmp_path, monkeypatch):
    """Another head that has no such code, the worker's own listener, somebody silent, and the head a second time."""
    # All of them answer within that, but for the silent one.
    monkeypatch.setattr("shoal.comm.group.dialing.GREET_S", 1.0)
    other = Machine.at(tmp_path, "other")
    with contextlib.ExitStack() as stack:
        listener, again, wrong, own = (
            stack.enter_context(one.listening()) for one in (head, head, other, worker)
        )
        with socket.create_server(("127.0.0.1", 0)) as mute:
            addresses = (
                *wrong.addresses,
                *own.addresses,
                mute.getsockname(),
                *listener.addresses,
                *again.addresses,
            )
            assert by(worker, head.codes.new(), addresses)[0].fingerprint == head.fingerprint
            assert refused(worker, WRONG, addresses) == "code"
            assert len(head.codes._failed) == 1  # though it is at two addresses
    assert nothing_stored(other)


def test_a_server_of_tls_that_says_nothing_holds_up_for_a_moment_only(worker, tmp_path, monkeypatch):
    monkeypatch.setattr("shoal.comm.group.dialing.GREET_S", 0.2)
    with mute(Machine.at(tmp_path, "mute")) as address:
        started = time.monotonic()
        with pytest.raises(ChannelError):
            by(worker, WRONG, [address])
        assert time.monotonic() - started < 5


def test_any_number_of_silent_heads_do_not_hide_the_one(head, worker, tmp_path, monkeypatch):
    """Each would be waited for as long as the greeting may take: one after the other, longer than there is time."""
    monkeypatch.setattr("shoal.comm.group.dialing.GREET_S", 9.0)
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(mute(Machine.at(tmp_path, f"mute{number}"))) for number in range(12)]
        listener = stack.enter_context(head.listening())
        started = time.monotonic()
        found, _ = by(worker, head.codes.new(), [*silent, *listener.addresses], timeout_s=10)
        assert time.monotonic() - started < 8
        assert found.fingerprint == head.fingerprint


def test_who_passes_on_the_certificate_of_the_head_and_then_nothing_does_not_hide_it(
    head, worker, tmp_path, monkeypatch
):
    """Not even if another machine refuses meanwhile."""
    monkeypatch.setattr("shoal.comm.group.dialing.ASKED_S", 0.3)
    monkeypatch.setattr("shoal.comm.group.dialing.GREET_S", 9.0)
    other = Machine.at(tmp_path, "other")
    with head.listening() as listener, other.listening() as refusing, contextlib.ExitStack() as stack:
        silent = [stack.enter_context(stalled(listener.addresses[0])) for _ in range(4)]
        (direct,) = listener.addresses
        with slow_road(direct, delay_s=0.1) as address:  # the others are there before it
            started = time.monotonic()
            by(worker, head.codes.new(), [*refusing.addresses, *silent, address])
            assert time.monotonic() - started < 8


def test_who_passes_on_everything_and_has_tried_too_often_does_not_hide_the_head(head, worker, monkeypatch):
    """The head refuses his address, and nobody else's."""
    monkeypatch.setattr("shoal.comm.group.dialing.ASKED_S", 0.3)
    redeem, asked = head.codes.redeem, []

    def not_first(*about):
        asked.append(about)
        if len(asked) == 1:
            raise PairingRefused("often", "too many tries with wrong join codes")
        return redeem(*about)

    monkeypatch.setattr(head.codes, "redeem", not_first)
    with (
        head.listening() as listener,
        relay(listener.addresses[0]) as (between, _),
        slow_road(listener.addresses[0], delay_s=0.2) as direct,  # he is there before it
    ):
        found, _ = by(worker, head.codes.new(), [between, direct])
        assert found.addresses == (direct,)


def test_a_head_that_is_found_too_late_is_not_remembered(head, worker, monkeypatch):
    """Whoever asked has been told that it failed."""
    with head.listening() as listener, slow_road(listener.addresses[0], delay_s=0.15) as address:
        with pytest.raises(ChannelError):
            by(worker, head.codes.new(), [address], timeout_s=0.8)
        time.sleep(0.5)
        assert nothing_stored(worker)


# --- attacks


@contextlib.contextmanager
def asking(head: Machine, addresses):
    """A channel for pairing, as an attacker has it."""
    with tls(addresses[0], stranger_context()) as channel:
        greet(channel, "pair", OURS, time.monotonic() + 5)
        yield channel


def claim_of(machine: Machine) -> Claim:
    return Claim(b"n" * 32, machine.identity.certificate, machine.identity.name)


def test_somebody_in_the_middle_gets_nothing(head, worker, tmp_path):
    """He has a certificate of his own and passes on, word by word, what both sides say."""
    middle = Machine.at(tmp_path, "middle")
    code = head.codes.new()
    with head.listening() as listener, interposed(middle, listener.addresses[0]) as address:
        assert refused(worker, code, [address]) == "code"
        assert nothing_stored(head, worker)
        by(worker, code, listener.addresses)  # and the code is still good


@contextlib.contextmanager
def interposed(middle: Machine, target):
    """TLS ends here, and another begins."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def run() -> None:
            near = TlsStream(
                SocketStream(server.accept()[0]), server_context(middle.identity, []), server_side=True
            )
            near.handshake(time.monotonic() + 5)
            with Channel(near) as one, tls(target, stranger_context()) as other:
                carrying = threading.Thread(target=carry, args=(other, one))
                carrying.start()
                carry(one, other)
                carrying.join(5)

        def carry(source: Channel, sink: Channel) -> None:
            with contextlib.suppress(ChannelError):
                while True:
                    sink.send(source.receive_exactly(1, 5))
            sink._stream.abort()

        thread = threading.Thread(target=run)
        thread.start()
        yield server.getsockname()
        thread.join(5)


def test_what_was_recorded_cannot_be_replayed(head, worker):
    """The bytes of a whole pairing, sent once more: it was another TLS session."""
    with head.listening() as listener:
        with relay(listener.addresses[0]) as (address, sent):
            by(worker, head.codes.new(), [address])
        head.peers.forget("worker")
        head.codes.new()
        with socket.create_connection(listener.addresses[0]) as again:
            again.settimeout(5)
            again.sendall(sent)
            heard = b""
            with contextlib.suppress(ConnectionError):
                while data := again.recv(65536):
                    heard += data
        assert head.peers.listed() == ()
        assert listener.accept(0.05) is None


def test_a_proof_cannot_be_replayed(head, worker):
    """Nor by somebody who has read it inside of TLS: the head's nonce is another."""
    code = head.codes.new()
    with head.listening() as listener:
        with asking(head, listener.addresses) as channel:
            channel.send_message(claim_of(worker))
            challenge = channel.receive_message(Challenge, 5)
            proof = proven(code, head, worker, challenge)
        with asking(head, listener.addresses) as channel:
            channel.send_message(claim_of(worker))
            assert channel.receive_message(Challenge, 5).nonce != challenge.nonce
            channel.send_message(Proof(proof))
            assert channel.receive_message(Denied, 5).reason == "code"
        assert nothing_stored(head)


def proven(code: str, head: Machine, worker: Machine, challenge: Challenge) -> bytes:
    """What a worker with the code would say: computed by its own functions."""
    one, other = channel_pair("pair")
    with one, other:
        said = pairing._said(one, claim_of(worker), challenge, head.identity.certificate)
    return pairing._hmac(read_code(code), b"worker", said)


def test_the_two_sides_prove_different_things():
    assert (
        len(
            {
                pairing._hmac("0" * 13, role, b"said", name)
                for role in (b"worker", b"head")
                for name in ("", "x")
            }
        )
        == 4
    )


def test_that_proof_would_do_in_its_own_session(head, worker):
    """So the test above fails for the reason that it names."""
    code = head.codes.new()
    with head.listening() as listener, asking(head, listener.addresses) as channel:
        channel.send_message(claim_of(worker))
        challenge = channel.receive_message(Challenge, 5)
        channel.send_message(Proof(proven(code, head, worker, challenge)))
        assert channel.receive_message(Paired, 5).known_as == "worker"


def test_a_head_without_the_code_is_not_believed(head, worker, tmp_path):
    """It says that all is well, with any HMAC, or with the worker's own."""
    for answer in (lambda proof: b"\0" * 32, lambda proof: proof):
        at_worker, at_head = channel_pair("pair")

        def pretend(at_head=at_head, answer=answer) -> None:
            at_head.receive_message(Claim, 5)
            at_head.send_message(Challenge(b"n" * 32, "head"))
            at_head.send_message(Paired(answer(at_head.receive_message(Proof, 5).hmac), "worker"))

        thread = threading.Thread(target=pretend)
        thread.start()
        with at_worker, at_head, pytest.raises(PairingRefused) as caught:
            join(at_worker, head.identity.certificate, worker.identity, WRONG)
        thread.join(5)
        assert caught.value.reason == "proof"
    assert nothing_stored(worker)


@pytest.mark.parametrize("certificate", [b"", b"rubbish", b"\x30" * 2048])
def test_a_certificate_that_is_none_is_not_stored(head, worker, certificate):
    code = head.codes.new()
    with head.listening() as listener, asking(head, listener.addresses) as channel:
        claim = msgspec.structs.replace(claim_of(worker), certificate=certificate)
        channel.send_message(claim)
        challenge = channel.receive_message(Challenge, 5)
        said = pairing._said(channel, claim, challenge, head.identity.certificate)
        channel.send_message(Proof(pairing._hmac(read_code(code), b"worker", said)))
        assert channel.receive_message(Denied | Paired, 5) == Denied("stored")
    assert nothing_stored(head)
    with head.listening() as listener:
        by(worker, code, listener.addresses)


@pytest.mark.parametrize(
    "message",
    [Proof(b"x" * 32), Challenge(b"n" * 32, "x"), Claim(b"short", b"", "x"), Claim(b"n" * 32, b"x" * 4000, "x"),
     Claim(b"n" * 32, b"", "x" * 65), Claim(b"n" * 32, b"", "")],
)  # fmt: skip
def test_words_out_of_turn_or_bounds_end_the_channel(head, message):
    at_worker, at_head = channel_pair("pair")
    at_worker.send_message(message)
    with at_worker, at_head, pytest.raises(ChannelError):
        admit(at_head, head.identity, head.peers, head.codes)
    assert nothing_stored(head)


def test_who_stops_in_the_middle_does_not_stay(head, worker, monkeypatch):
    monkeypatch.setattr("shoal.comm.group.pairing.PAIR_S", 0.1)
    with head.listening() as listener, asking(head, listener.addresses) as channel:
        channel.send_message(claim_of(worker))
        channel.receive_message(Challenge, 5)
        with pytest.raises(ChannelError, match="other side closed"):
            channel.receive_exactly(1, 5)
