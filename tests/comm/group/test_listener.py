"""Who comes in at a listener, who does not, and going there by several addresses."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import time

import pytest
from fakes.group.nodes import Machine, back_to, footprint, paired, stalled, tls

from shoal.comm.errors import AddressError, KeyFileError
from shoal.comm.group import dialing
from shoal.comm.group.channel import Channel
from shoal.comm.group.dialing import dial, dial_all
from shoal.comm.group.errors import (
    ChannelError,
    ChannelTimeout,
    Forgotten,
    GroupError,
    NotPaired,
    VersionMismatch,
)
from shoal.comm.group.greeting import greet
from shoal.comm.group.group_protocol import OURS, Agreed, Declined, Opening, Speaks, agree
from shoal.comm.group.listener import GroupListener
from shoal.comm.group.peers import PairedNode
from shoal.comm.group.tls import client_context, server_context, stranger_context


@pytest.fixture
def machines(tmp_path) -> tuple[Machine, Machine]:
    return paired(tmp_path)


def has_ipv6() -> bool:
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as probe:
        probe.bind(("::1", 0))
        return True
    return False


ipv6 = pytest.mark.skipif(not has_ipv6(), reason="no IPv6 here")


@pytest.mark.parametrize("purpose", ["control", "data", "weights", "measure"])
def test_paired_nodes_have_channels_of_each_purpose(machines, purpose):
    head, worker = machines
    with head.listening() as listener, worker.dial(head, listener.addresses, purpose) as at_worker:
        with listener.accept(5) as at_head:
            assert (at_head.peer, at_head.purpose) == (worker.fingerprint, purpose)
            assert (at_worker.peer, at_worker.purpose) == (head.fingerprint, purpose)
            assert at_worker.remote == listener.addresses[0] == at_head.local
            assert at_worker.local == at_head.remote
            at_worker.send(b"up")
            at_head.send(b"down")
            assert (at_head.receive_exactly(2, 5), at_worker.receive_exactly(4, 5)) == (b"up", b"down")
        assert listener.accept(0) is None


@ipv6
def test_it_listens_at_several_addresses_at_one_port(machines):
    head, worker = machines
    with GroupListener(head.identity, head.peers, [("127.0.0.1", 0), ("::1", 0)]) as listener:
        (_, port), (host, other) = listener.addresses
        assert (host, other) == ("::1", port)
        for address in listener.addresses:
            with worker.dial(head, (address,)) as channel:
                assert channel.remote == address
                listener.accept(5).close()


def test_an_address_that_is_taken(machines):
    head, _ = machines
    with head.listening() as listener, pytest.raises(AddressError, match="cannot listen at 127"):
        GroupListener(head.identity, head.peers, listener.addresses)


def test_a_listener_that_closes_leaves_channels_and_no_threads(machines):
    head, worker = machines
    before = footprint()
    with head.listening() as listener:
        at_worker = worker.dial(head, listener.addresses)
        at_head = listener.accept(5)
        untaken = worker.dial(head, listener.addresses)
    with pytest.raises(ChannelError):
        untaken.receive_exactly(1, 5)
    at_worker.send(b"x")
    assert at_head.receive_exactly(1, 5) == b"x"
    for channel in (at_worker, at_head, untaken):
        channel.close()
    assert back_to(before)
    with pytest.raises(ChannelError, match="refused"):
        worker.dial(head, listener.addresses)


# --- who is not let in


def test_a_node_that_is_not_paired_is_told_so(machines, tmp_path):
    head, _ = machines
    stranger = Machine.at(tmp_path, "stranger")
    stranger.trust(head, "head")
    with head.listening() as listener:
        with pytest.raises(Forgotten, match="does not know this one"):
            stranger.dial(head, listener.addresses)
        assert listener.accept(0.05) is None


UNKNOWN_CA = bytes([21, 3, 3, 0, 2, 2, 48])  # a fatal alert in the clear, which anybody can send


@pytest.mark.parametrize("after", [0, 1, 2])
def test_nobody_else_can_say_that_a_node_is_forgotten(machines, after):
    """`after` so many pieces of the worker's handshake somebody in the middle says what the head would."""
    head, worker = machines
    with head.listening() as listener, socket.create_server(("127.0.0.1", 0)) as between:

        def meddle() -> None:
            with contextlib.suppress(OSError):
                inner, _ = between.accept()
                with inner, socket.create_connection(listener.addresses[0]) as outer:
                    for part in range(after):
                        outer.sendall(inner.recv(1 << 16))
                        if not part:
                            inner.sendall(outer.recv(1 << 16))
                    inner.settimeout(0.2)
                    with contextlib.suppress(TimeoutError):  # it may have come with what was before it
                        inner.recv(1 << 16)
                    inner.sendall(UNKNOWN_CA)
                    with contextlib.suppress(TimeoutError):
                        inner.recv(1 << 16)

        meddling = threading.Thread(target=meddle)
        meddling.start()
        with pytest.raises(GroupError) as raised:
            worker.dial(head, [between.getsockname()], timeout_s=3.0)
        assert not isinstance(raised.value, Forgotten)
        assert "pair them again" not in str(raised.value), "that is for the head to say"
        if not after:
            assert "somebody at this address, who has not proved to be the other node" in str(raised.value)
        meddling.join(5)


def test_who_shows_no_certificate_gets_no_channel(machines):
    head, _ = machines
    with head.listening() as listener:
        for purpose in ("control", "data", "weights", "nonsense"):
            with tls(listener.addresses[0], stranger_context()) as channel, pytest.raises(NotPaired):
                greet(channel, purpose, OURS, time.monotonic() + 5)
        assert listener.accept(0.05) is None


def test_who_is_turned_away_hears_it_whatever_he_still_sends(machines):
    """A connection that is closed with bytes unread is reset, and what was sent last may be lost with it."""
    head, _ = machines
    with head.listening() as listener, tls(listener.addresses[0], stranger_context()) as channel:
        channel.send_message(Opening("control", OURS))
        channel.send(bytes(500_000))
        assert channel.receive_message(Declined, 5).reason == "unpaired"


def test_a_paired_node_cannot_vouch_for_another(machines, tmp_path):
    """OpenSSL takes a certificate that a pinned one has signed; the fingerprint is what counts."""
    import datetime

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    head = machines[0]
    root, leaf = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))

    def signed(name: str, key, by: str, ca: bool) -> x509.Certificate:
        names = [x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)]) for text in (name, by)]
        builder = (
            x509.CertificateBuilder()
            .subject_name(names[0])
            .issuer_name(names[1])
            .public_key(key.public_key())
        )
        builder = builder.serial_number(1).not_valid_before(datetime.datetime(2020, 1, 1))
        builder = builder.not_valid_after(datetime.datetime(2120, 1, 1))
        return builder.add_extension(x509.BasicConstraints(ca, None), True).sign(root, hashes.SHA256())

    pem, der = serialization.Encoding.PEM, serialization.Encoding.DER
    authority, child = signed("root", root, "root", True), signed("child", leaf, "root", False)
    head.peers.add(PairedNode("root", "worker", authority.public_bytes(der)))
    file = tmp_path / "child.pem"
    private = leaf.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    file.write_bytes(private + child.public_bytes(pem) + authority.public_bytes(pem))
    context = stranger_context()
    context.load_cert_chain(file)
    with head.listening() as listener:
        with tls(listener.addresses[0], context) as channel, pytest.raises(NotPaired, match="does not know"):
            greet(channel, "control", OURS, time.monotonic() + 5)
        assert listener.accept(0.05) is None


def test_a_certificate_without_its_key_is_of_no_use(machines, tmp_path):
    """All nodes of a group know each other's certificates."""
    worker = machines[1]
    thief = Machine.at(tmp_path, "thief")
    key = thief.identity.file.read_text().split("-----BEGIN CERT")[0]
    thief.identity.file.write_text(key + ssl.DER_cert_to_PEM_cert(worker.identity.certificate))
    with pytest.raises(ssl.SSLError):
        stranger_context().load_cert_chain(thief.identity.file)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_older_tls_is_refused_by_both_sides(machines, version):
    head, worker = machines
    old = client_context(worker.identity, head.identity.certificate)
    old.minimum_version, old.maximum_version = ssl.TLSVersion.TLSv1, version
    old.set_ciphers("ALL:@SECLEVEL=0")
    with head.listening() as listener:
        with pytest.raises(GroupError, match=r"TLS failed: .*protocol"):
            tls(listener.addresses[0], old)
        assert listener.accept(0.05) is None
    old = server_context(head.identity, [worker.identity.certificate])
    old.minimum_version, old.maximum_version = ssl.TLSVersion.TLSv1, version
    old.set_ciphers("ALL:@SECLEVEL=0")
    with impostor(old) as address, pytest.raises(ChannelError, match="TLS failed"):
        worker.dial(head, (address,))


@contextlib.contextmanager
def impostor(context: ssl.SSLContext, answer: bytes = b""):
    """A server of TLS that is none of ours."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def run() -> None:
            with contextlib.suppress(OSError):
                connected, _ = server.accept()
                with context.wrap_socket(connected, server_side=True) as secured:
                    secured.recv(65536)
                    secured.sendall(answer)

        thread = threading.Thread(target=run)
        thread.start()
        yield server.getsockname()
        thread.join(5)


def test_another_machine_at_the_address_is_not_taken_for_the_node(machines, tmp_path):
    head, worker = machines
    other = Machine.at(tmp_path, "other")
    with other.listening() as listener, pytest.raises(NotPaired, match="not the paired one") as raised:
        worker.dial(head, listener.addresses)
    assert not isinstance(raised.value, Forgotten)
    assert str(listener.addresses[0][1]) in str(raised.value)


def test_no_session_is_resumed(machines):
    """A ticket would let a node in that was forgotten since."""
    head, worker = machines
    context = client_context(worker.identity, head.identity.certificate)
    with (
        head.listening() as listener,
        socket.create_connection(listener.addresses[0]) as plain,
        context.wrap_socket(plain) as secured,
    ):
        secured.settimeout(0.2)
        with contextlib.suppress(OSError):
            secured.recv(1)
        assert secured.session is None or not secured.session.has_ticket


# --- forgetting


def test_a_forgotten_node_loses_its_channels_and_gets_no_new_ones(machines):
    head, worker = machines
    with head.listening() as listener:
        at_worker, untaken = (worker.dial(head, listener.addresses) for _ in range(2))
        at_head = listener.accept(5)
        caught: list[Exception] = []

        def wait() -> None:
            try:
                at_head.receive_exactly(1, 30)
            except ChannelError as error:
                caught.append(error)

        waiting = threading.Thread(target=wait)
        waiting.start()
        head.peers.forget("worker")
        waiting.join(2)
        assert caught
        assert at_head.closed
        assert listener.accept(0) is None  # what was not taken yet is closed, too
        with pytest.raises(ChannelError):
            at_worker.receive_exactly(1, 5)
        with pytest.raises(Forgotten, match="does not know"):
            worker.dial(head, listener.addresses)
        head.trust(worker, "worker")
        with worker.dial(head, listener.addresses):
            listener.accept(5).close()
        untaken.close()
        at_worker.close()


def test_a_head_that_is_forgotten_is_not_dialled(machines):
    head, worker = machines
    with head.listening() as listener:
        at_worker = worker.dial(head, listener.addresses)
        worker.peers.forget("head")
        assert at_worker.closed
        with pytest.raises(NotPaired):
            worker.dial(head, listener.addresses)


def test_what_another_process_forgets_is_closed_within_a_second(machines, monkeypatch):
    head, worker = machines
    monkeypatch.setattr("shoal.comm.group.listener.CHECK_S", 0.05)
    with head.listening() as listener, worker.dial(head, listener.addresses) as at_worker:
        at_head = listener.accept(5)
        type(head.peers)(head.peers.file.parent).forget("worker")
        with pytest.raises(ChannelError):
            at_head.receive_exactly(1, 5)
        with pytest.raises(ChannelError):
            at_worker.receive_exactly(1, 5)


def test_a_damaged_file_of_nodes_keeps_all_out_until_it_is_mended(machines, caplog):
    head, worker = machines
    with head.listening() as listener:
        text = head.peers.file.read_text()
        head.peers.file.write_text("{")
        with pytest.raises(ChannelError):
            worker.dial(head, listener.addresses)
        with pytest.raises(KeyFileError):
            head.peers.listed()
        head.peers.file.write_text(text)
        with worker.dial(head, listener.addresses):
            listener.accept(5).close()
    assert [record.message for record in caplog.records if "no node can connect" in record.message][1:] == []


# --- versions


def test_versions_and_features_are_agreed(machines):
    head, worker = machines
    theirs, ours = Speaks(1, 3, ("int8", "new")), Speaks(2, 5, ("int8", "other"))
    with (
        head.listening(speaks=theirs) as listener,
        worker.dial(head, listener.addresses, speaks=ours) as at_worker,
        listener.accept(5) as at_head,
    ):
        assert at_worker.agreed == Agreed(3, frozenset({"int8"}), theirs)
        assert at_head.agreed == Agreed(3, frozenset({"int8"}), ours)


@pytest.mark.parametrize(("theirs", "ours"), [((1, 1), (2, 4)), ((2, 4), (1, 1))])
def test_versions_that_do_not_meet_are_one_error_that_names_both(machines, theirs, ours):
    head, worker = machines
    with head.listening(speaks=Speaks(*theirs)) as listener:
        with pytest.raises(VersionMismatch) as caught:
            worker.dial(head, listener.addresses, speaks=Speaks(*ours))
        assert listener.accept(0.05) is None
    assert (
        f"this node speaks {Speaks(*ours)} of the group's protocol, the other node {Speaks(*theirs)}"
        in str(caught.value)
    )
    assert "version 1" in str(caught.value)
    assert "versions 2 to 4" in str(caught.value)


def test_the_highest_common_version_counts():
    assert agree(Speaks(1, 9), Speaks(4, 5)).version == 5
    assert agree(Speaks(5, 5), Speaks(1, 5)).version == 5
    with pytest.raises(VersionMismatch):
        agree(Speaks(3, 1), Speaks(1, 1))


@pytest.mark.parametrize("purpose", ["pair", "rule", "", "x" * 64])
def test_a_purpose_that_is_none_is_turned_away(machines, purpose):
    head, worker = machines
    with head.listening() as listener, pytest.raises(ChannelError, match="no use"):
        worker.dial(head, listener.addresses, purpose)


def test_a_newer_opening_may_have_more_fields(machines):
    class Newer(Opening, frozen=True, tag="opening"):
        zone: str = "kitchen"

    head, worker = machines
    context = client_context(worker.identity, head.identity.certificate)
    with head.listening() as listener, tls(listener.addresses[0], context) as channel:
        channel.send_message(Newer("control", Speaks()))
        with listener.accept(5) as at_head:
            assert at_head.peer == worker.fingerprint


# --- addresses


@contextlib.contextmanager
def silent():
    """It accepts and says nothing: the kernel does so for whoever listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()


def test_the_first_address_that_is_the_node_wins(machines, tmp_path):
    """Whatever the others are: nobody, somebody silent, another node, a name that leads nowhere, a bad port."""
    head, worker = machines
    with head.listening() as listener, Machine.at(tmp_path, "other").listening() as other, silent() as mute:
        decoys = (("127.0.0.1", 1), mute, *other.addresses, ("x" * 64, 7000), ("127.0.0.1", 70_000))
        started = time.monotonic()
        with worker.dial(head, (*decoys, *listener.addresses)) as channel:
            assert time.monotonic() - started < 5
            assert channel.remote == listener.addresses[0]
            listener.accept(5).close()
        assert listener.accept(0.05) is None  # one channel, not one for each address


def test_an_address_that_shows_the_certificate_and_says_nothing_holds_up_no_other(machines, monkeypatch):
    monkeypatch.setattr(dialing, "GREET_S", 9.0)
    head, worker = machines
    with (
        head.listening() as listener,
        stalled(listener.addresses[0]) as one,
        stalled(listener.addresses[0]) as other,
    ):
        started = time.monotonic()
        addresses = (one, other, *listener.addresses)
        (channel,) = dial_all(worker.identity, worker.peers, head.fingerprint, "measure", addresses)
        with channel:
            assert channel.remote == listener.addresses[0]
        assert time.monotonic() - started < dialing.GREET_S - 0.2


def test_a_file_of_nodes_that_is_damaged_while_somebody_dials_is_said_at_once(machines, monkeypatch):
    head, worker = machines

    def damaged(*_):
        raise KeyFileError("peers.json: not JSON")

    monkeypatch.setattr(worker.peers, "hold", damaged)
    with head.listening() as listener:
        started = time.monotonic()
        with pytest.raises(KeyFileError, match="not JSON"):
            dial_all(worker.identity, worker.peers, head.fingerprint, "measure", listener.addresses)
        assert time.monotonic() - started < dialing.DIAL_S - 1


def test_it_is_said_what_each_address_answered(machines):
    head, worker = machines
    with silent() as mute:
        with pytest.raises(ChannelTimeout) as caught:
            worker.dial(head, (mute, ("127.0.0.1", 1)), timeout_s=0.3)
        assert "127.0.0.1:1: Connection refused" in str(caught.value)
    with pytest.raises(ChannelError, match="no address of this node is known"):
        worker.dial(head, ())


def test_dialling_leaves_no_thread_and_no_descriptor(machines):
    head, worker = machines
    with silent() as mute:
        before = footprint()
        for _ in range(3):
            with pytest.raises(ChannelTimeout):
                worker.dial(head, (mute,), timeout_s=0.05)
        assert back_to(before)


def test_a_node_is_dialled_where_it_was_reached_last(machines):
    head, worker = machines
    with head.listening() as listener:
        worker.peers.reached(head.fingerprint, listener.addresses)
        with dial(worker.identity, worker.peers, head.fingerprint, "control") as channel:
            assert channel.remote == listener.addresses[0]
            listener.accept(5).close()


@ipv6
def test_a_name_stands_for_all_of_its_addresses(machines):
    head, worker = machines
    with GroupListener(head.identity, head.peers, [("::1", 0)]) as listener:
        port = listener.addresses[0][1]
        try:
            found = {entry[4][0] for entry in socket.getaddrinfo("localhost", port, type=socket.SOCK_STREAM)}
        except OSError:
            found = set()
        if "::1" not in found:
            pytest.skip("localhost has no IPv6 address here")
        with worker.dial(head, (("localhost", port),)) as channel:
            assert isinstance(channel, Channel)
            listener.accept(5).close()
