"""The file of paired nodes: what is remembered, what is told apart, and what becomes of a damaged file."""

from __future__ import annotations

import stat
import threading

import pytest
from fakes.group.nodes import Machine

from shoal.comm.errors import KeyFileError
from shoal.comm.group.errors import ChannelError, NotPaired
from shoal.comm.group.peers import MAX_CHANNELS, MAX_PEERS, PairedNode, Peers


@pytest.fixture(scope="module")
def certificates(tmp_path_factory) -> list[bytes]:
    directory = tmp_path_factory.mktemp("machines")
    return [Machine.at(directory, f"m{number}").identity.certificate for number in range(4)]


class Held:
    """A channel as far as peers know."""

    closed = False

    def close(self) -> None:
        self.closed = True


def node(certificate: bytes, name: str = "pi", **fields) -> PairedNode:
    return PairedNode(name, "worker", certificate, **fields)


def test_what_was_added_is_there_for_the_next_process(tmp_path, certificates):
    addresses = (("192.168.1.5", 7000), ("fe80::1%eth0", 7000))
    added = Peers(tmp_path).add(node(certificates[0], addresses=addresses))
    again = Peers(tmp_path)
    assert again.listed() == (added,)
    assert again.get(added.fingerprint) == again.named("pi") == again.named(added.fingerprint) == added
    assert added.addresses == addresses
    assert stat.S_IMODE((tmp_path / "peers.json").stat().st_mode) == 0o600


def test_no_file_is_no_nodes(tmp_path):
    peers = Peers(tmp_path / "nowhere")
    assert peers.listed() == ()
    with pytest.raises(NotPaired):
        peers.get("0" * 64)
    with pytest.raises(NotPaired, match="no node called 'pi' is paired here"):
        peers.forget("pi")


def test_nodes_of_one_name_are_told_apart(tmp_path, certificates):
    peers = Peers(tmp_path)
    names = [peers.add(node(certificate), own_name="pi").name for certificate in certificates[:3]]
    assert names == ["pi-2", "pi-3", "pi-4"]
    assert peers.add(node(certificates[1], "other")).name == "other"  # the same node under a new name
    assert [peer.name for peer in peers.listed()] == ["pi-2", "pi-4", "other"]
    assert peers.add(node(certificates[3], "\x1b[2J" + "x" * 99)).name == "2J" + "x" * 62


def test_addresses_are_remembered(tmp_path, certificates):
    peers = Peers(tmp_path)
    one, other = (peers.add(node(certificate)) for certificate in certificates[:2])
    peers.reached(one.fingerprint, (("10.0.0.1", 1),))
    assert [peer.addresses for peer in Peers(tmp_path).listed()] == [(("10.0.0.1", 1),), ()]
    before = (tmp_path / "peers.json").stat()
    peers.reached(one.fingerprint, (("10.0.0.1", 1),))
    assert (tmp_path / "peers.json").stat().st_ino == before.st_ino  # nothing was written
    with pytest.raises(NotPaired):
        peers.reached("0" * 64, ())
    assert other in peers.listed()


def test_what_another_process_forgets_is_forgotten_here(tmp_path, certificates):
    here, there = Peers(tmp_path), Peers(tmp_path)
    one, other = (
        here.add(node(certificate, name)) for certificate, name in zip(certificates, "ab", strict=False)
    )
    channels = [Held(), Held()]
    here.hold(one.fingerprint, channels[0])
    here.hold(other.fingerprint, channels[1])
    assert here.listed() is here.listed()
    there.forget("a")
    assert here.listed() == (other,)
    assert [channel.closed for channel in channels] == [True, False]
    with pytest.raises(NotPaired):
        here.hold(one.fingerprint, Held())


def test_a_removed_file_is_all_nodes_forgotten(tmp_path, certificates):
    peers, channel = Peers(tmp_path), Held()
    peers.hold(peers.add(node(certificates[0])).fingerprint, channel)
    (tmp_path / "peers.json").unlink()
    assert peers.listed() == ()
    assert channel.closed


def test_channels_of_one_node_are_bounded(tmp_path, certificates):
    peers = Peers(tmp_path)
    one = peers.add(node(certificates[0])).fingerprint
    channels = [Held() for _ in range(MAX_CHANNELS)]
    for channel in channels:
        peers.hold(one, channel)
    with pytest.raises(ChannelError, match=str(MAX_CHANNELS)):
        peers.hold(one, Held())
    channels.pop().close()
    peers.hold(one, channel := Held())
    assert not channel.closed


def test_nodes_are_bounded(tmp_path, certificates, monkeypatch):
    assert MAX_PEERS >= 16
    monkeypatch.setattr("shoal.comm.group.peers.MAX_PEERS", 2)
    peers = Peers(tmp_path)
    for certificate in certificates[:2]:
        peers.add(node(certificate))
    with pytest.raises(NotPaired, match="2 nodes"):
        peers.add(node(certificates[2]))
    assert peers.add(node(certificates[0], "again")).name == "again"


DAMAGE = {
    "empty": lambda text: "",
    "cut off": lambda text: text[: len(text) // 2],
    "rubbish": lambda text: "\x00\xff" * 20,
    "another form": lambda text: '{"peers": {}}',
    "no list": lambda text: "[]",
    "deep": lambda text: "[" * 100_000,
    "a number for a name": lambda text: text.replace('"pi"', "7"),
    "a role of its own": lambda text: text.replace("worker", "king"),
    "twice": lambda text: '{"peers": [' + text[text.index("[") + 1 : text.rindex("]")] * 1 + ","
    + text[text.index("[") + 1 : text.rindex("]")] + "]}",
    "no base64": lambda text: text.replace('"certificate": "', '"certificate": "!'),
    "no certificate": lambda text: text.replace('"certificate": "MII', '"certificate": "AAA'),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_file_admits_nobody_and_is_kept(tmp_path, certificates, kind):
    Peers(tmp_path).add(node(certificates[0]))
    file = tmp_path / "peers.json"
    damaged = DAMAGE[kind](file.read_text())
    file.write_text(damaged, encoding="latin-1")
    peers = Peers(tmp_path)
    for act in (peers.listed, lambda: peers.add(node(certificates[1])), lambda: peers.forget("pi")):
        with pytest.raises(KeyFileError, match=r"peers\.json"):
            act()
    assert file.read_text(encoding="latin-1") == damaged
    assert sorted(path.name for path in tmp_path.iterdir()) == ["peers.json", "peers.lock"]


def test_damage_while_running_admits_nobody_new_and_mending_helps(tmp_path, certificates):
    peers = Peers(tmp_path)
    one = peers.add(node(certificates[0]))
    text = peers.file.read_text()
    peers.file.write_text("{")
    with pytest.raises(KeyFileError):
        peers.get(one.fingerprint)
    peers.file.write_text(text)
    assert peers.get(one.fingerprint) == one


def test_a_file_that_others_may_write_is_refused(tmp_path, certificates):
    peers = Peers(tmp_path)
    peers.add(node(certificates[0]))
    peers.file.chmod(0o666)
    with pytest.raises(KeyFileError, match="chmod 600"):
        peers.listed()


def test_changes_of_several_processes_at_once_are_all_kept(tmp_path, certificates):
    """Each `Peers` has a lock of its own, as each process has."""
    failed: list[BaseException] = []

    def act(certificate: bytes) -> None:
        try:
            Peers(tmp_path).add(node(certificate))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=act, args=(certificate,)) for certificate in certificates]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert failed == []
    assert {peer.certificate for peer in Peers(tmp_path).listed()} == set(certificates)


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path, certificates, monkeypatch):
    peers = Peers(tmp_path)
    one = peers.add(node(certificates[0]))

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shoal.comm.key_files.os.fsync", full)
    with pytest.raises(KeyFileError, match="No space left"):
        peers.add(node(certificates[1]))
    assert peers.listed() == Peers(tmp_path).listed() == (one,)
