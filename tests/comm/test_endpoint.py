"""Addresses and keys: what is refused, and that files and sockets are this user's alone."""

from __future__ import annotations

import os
import stat
import threading

import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.comm import curve_keys, endpoint
from shoal.comm.curve_keys import ClientKeys, KeyRing, load_server
from shoal.comm.errors import AddressError, KeyFileError
from shoal.comm.log_rate import SeldomLog
from shoal.comm.waker import Waker


def mode(path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def router():
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        yield socket


@pytest.mark.parametrize(
    ("address", "canonical"),
    [
        ("tcp://127.0.0.1:5555", "tcp://127.0.0.1:5555"),
        ("tcp://127.8.9.1:*", "tcp://127.8.9.1:*"),
        ("tcp://localhost:0", "tcp://127.0.0.1:*"),
        ("tcp://[::1]:5555", "tcp://[::1]:5555"),
        ("tcp://[0:0::1]:5555", "tcp://[::1]:5555"),
    ],
)
def test_loopback(address, canonical):
    parsed = endpoint.parse(address)
    assert parsed.loopback
    assert str(parsed) == canonical


@pytest.mark.parametrize(
    "host",
    ["0.0.0.0", "[::]", "*", "eth0", "lo", "example.org", "localhost.example.org", "192.168.1.5", "127.1",
     "0177.0.0.1", "2130706433", "[::ffff:127.0.0.1]", "[fe80::1]", "LOCALHOST", "127.0.0.1.example.org"],
)  # fmt: skip
def test_everything_else_is_not_loopback_and_refused_without_keys(host, router):
    address = f"tcp://{host}:5555"
    assert not endpoint.parse(address).loopback
    with pytest.raises(AddressError, match="in plain text"):
        endpoint.listen(address)
    with pytest.raises(AddressError):
        endpoint.connect(router, address)


@pytest.mark.parametrize(
    "address",
    ["", "127.0.0.1:5", "udp://127.0.0.1:5", "inproc://x", "ipc://", "ipc://relative", "ipc://@abstract", "ipc://*",
     "ipc:///" + "x" * 200, "tcp://127.0.0.1", "tcp://127.0.0.1:65536", "tcp://127.0.0.1:5;10.0.0.1:6", "tcp://[x]:5",
     "tcp://127.0.0.1:*[1-2]", "tcp://::1:5", "tcp://a b:5", "ipc:///a\0b", "tcp://127.0.0.1:-1"],
)  # fmt: skip
def test_malformed_addresses_are_refused(address):
    with pytest.raises(AddressError):
        endpoint.parse(address)


@settings(deadline=None, max_examples=100, derandomize=True)
@given(st.text(max_size=40), st.sampled_from(["", "tcp://", "ipc://", "tcp://127.0.0.1", "tcp://["]))
def test_any_text_parses_or_is_refused(text, prefix):
    try:
        parsed = endpoint.parse(prefix + text)
    except AddressError:
        return
    assert str(parsed).startswith(("tcp://", "ipc:///"))


def test_ipc_sockets_are_private(tmp_path):
    before = os.umask(0)
    try:
        with endpoint.listen(f"ipc://{tmp_path}/run/d.sock") as public:
            bound = endpoint.address_of(public)
        assert os.umask(0) == 0  # as it was
    finally:
        os.umask(before)
    assert bound == f"ipc://{tmp_path}/run/d.sock"
    assert mode(tmp_path / "run") == 0o700
    assert mode(tmp_path / "run" / "d.sock") == 0o600


def test_ipc_in_a_directory_others_can_write_to_is_refused(tmp_path):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(AddressError, match="writable by nobody else"):
        endpoint.listen(f"ipc://{tmp_path}/open/d.sock")


def test_a_taken_port_is_told():
    with endpoint.listen("tcp://127.0.0.1:0") as public, pytest.raises(AddressError, match="cannot listen"):
        endpoint.listen(endpoint.address_of(public))


# --- keys -----------------------------------------------------------------------------------------------


def test_keys_are_made_once_and_private(tmp_path):
    ring = KeyRing(tmp_path / "keys")
    pair = ring.server()
    assert KeyRing(tmp_path / "keys").server() == pair
    assert ring.client() != pair
    assert mode(tmp_path / "keys") == 0o700
    assert {mode(path) for path in (tmp_path / "keys").iterdir()} == {0o600}
    assert pair.secret not in repr(pair)
    assert len(list((tmp_path / "keys").iterdir())) == 2  # no temporary file is left


def test_racing_processes_agree_on_one_key(tmp_path):
    pairs = []
    start = threading.Barrier(8)

    def make() -> None:
        start.wait(10)
        pairs.append(KeyRing(tmp_path).server())

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(pairs) == 8
    assert len(set(pairs)) == 1


def test_authorising_and_revoking(tmp_path):
    ring, key = KeyRing(tmp_path), zmq.curve_keypair()[0].decode()
    assert ring.authorised() == {}
    assert load_server(tmp_path) is None
    ring.authorise("laptop", key)
    ring.authorise("phone", key)
    ring.revoke("phone")
    assert ring.authorised() == {"laptop": key}
    assert load_server(tmp_path) == ring.server_keys()
    assert mode(tmp_path / "authorised") == 0o600
    with pytest.raises(KeyFileError, match="no client called 'phone' is authorised"):
        ring.revoke("phone")
    for name in ("", "a b", "x\ny", "#x", "a" * 65):
        with pytest.raises(KeyFileError, match="is no name of a client"):
            ring.authorise(name, key)
    for bad in ("", key[:-1], key[:-1] + "\n", key[:-1] + '"'):
        with pytest.raises(KeyFileError, match="40 characters"):
            ring.authorise("x", bad)
    with pytest.raises(KeyFileError, match="server public key"):
        ClientKeys(ring.client(), "short")


def test_bad_key_files_are_refused(tmp_path):
    ring = KeyRing(tmp_path)
    pair = ring.server()
    path = tmp_path / "server.key"
    path.chmod(0o644)
    with pytest.raises(KeyFileError, match="chmod 600"):
        ring.server()
    path.chmod(0o600)
    for text in ("", "x\ny\n", f"{pair.public}\n", f"{ring.client().public}\n{pair.secret}\n"):
        path.write_text(text)
        with pytest.raises(KeyFileError, match=r"server\.key"):
            ring.server()
    path.write_bytes(b"\xff")
    with pytest.raises(KeyFileError, match="ASCII"):
        ring.server()
    (tmp_path / "authorised").write_text("laptop not-a-key\n")
    (tmp_path / "authorised").chmod(0o600)
    with pytest.raises(KeyFileError, match="line 1"):
        ring.authorised()


# --- waker ----------------------------------------------------------------------------------------------


def test_a_wake_is_seen_and_many_cost_one_byte():
    waker = Waker()
    poller = zmq.Poller()
    poller.register(waker.fileno(), zmq.POLLIN)
    assert not poller.poll(0)
    for _ in range(100_000):
        waker.wake()
    assert poller.poll(1000)
    waker.clear()
    assert not poller.poll(0)
    waker.wake()
    assert poller.poll(1000)
    waker.close()
    waker.wake()  # harmless after the end


def test_a_damaged_file_of_keys_does_not_fill_the_log(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(curve_keys, "_seldom", SeldomLog(curve_keys.log))
    ring = KeyRing(tmp_path)
    ring.server()
    (tmp_path / "authorised").write_text("no key\n")
    (tmp_path / "authorised").chmod(0o600)
    for _ in range(5):  # anybody may connect so often
        assert not ring.callback("shoal", b"x" * 40)
    assert len(caplog.records) == 1
    assert "refusing a client" in caplog.text
