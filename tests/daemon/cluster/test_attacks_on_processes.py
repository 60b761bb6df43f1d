"""A head and a worker as processes, attacked by strangers, by a paired worker and by a paired head: nothing is
accepted, nothing crashes, memory stays, and the same question gets the same answer afterwards. Run by
`make test-cluster`; FRAMES says how many frames are made up for each.
"""

from __future__ import annotations

import os
import random
import shutil
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest
from fakes import tiny
from fakes.group.clusters import wait_for
from fakes.group.nodes import relay
from fakes.group.processes import Daemons
from fakes.group.weights import shard_of
from fakes.running import planned

from shoal.client import Client
from shoal.comm.group.channel import Channel
from shoal.comm.group.dialing import dial
from shoal.comm.group.errors import GroupError
from shoal.comm.group.group_protocol import Purpose
from shoal.comm.group.listener import GroupListener
from shoal.comm.group.node_identity import NodeIdentity
from shoal.comm.group.peers import PairedNode, Peers
from shoal.comm.messages import Token
from shoal.daemon.cluster import control_messages as control
from shoal.daemon.cluster.weights import weight_messages as weights
from shoal.daemon.config import NodeConfig
from shoal.models.checkpoint.checkpoint import open_checkpoint
from shoal.models.checkpoint.shard import CheckpointShard

pytestmark = pytest.mark.cluster

FRAMES = int(os.environ.get("FRAMES", "2000"))
GROWN_BYTES = 64 << 20  # that a process may have got larger by; buffers and threads' memory are kept
PORT = 17449
HEAD = ("127.0.0.1", PORT)
PURPOSES: tuple[Purpose, ...] = ("control", "data", "weights", "measure")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tiny.hf_model("llama", hidden_size=256, intermediate_size=768, num_hidden_layers=8)
    return tiny.save_gguf(made, tmp_path_factory.mktemp("model") / "m.gguf", type="Q8_0")


@pytest.fixture(scope="module")
def daemons(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemons]:
    with Daemons(tmp_path_factory.mktemp("cluster"), PORT) as made:
        made.start("head")
        made.join("worker")
        made.wait_attached(1)
        yield made


@pytest.fixture(scope="module")
def wanted(daemons: Daemons, path: Path) -> list[int]:
    """What the two answer together."""
    return answer(daemons, path)


def answer(daemons: Daemons, path: Path) -> list[int]:
    with daemons.client() as client:
        wait_for(lambda: together(client, path), 60)
        stream = client.generate(
            prompt_tokens=list(range(40)), model=str(path), max_tokens=24, temperature=0, ignore_eos=True
        )
        return [token for event in stream if isinstance(event, Token) for token in event.ids]


def together(client: Client, path: Path) -> bool:
    with suppress(Exception):
        return client.load(str(path), ranks=2).model.ranks == 2
    return False


def sizes(daemons: Daemons, *names: str) -> list[int]:
    return [daemons.resident_bytes(name) for name in names]


def assert_as_before(
    daemons: Daemons, path: Path, wanted: list[int], before: Sequence[int], *names: str
) -> None:
    daemons.wait_attached(1)
    assert answer(daemons, path) == wanted
    after = sizes(daemons, *names)
    print("resident MB:", {n: (b >> 20, a >> 20) for n, b, a in zip(names, before, after, strict=True)})
    assert all(now - then < GROWN_BYTES for then, now in zip(before, after, strict=True))
    for name in ("head", "worker"):
        assert "bug in Shoal" not in daemons.log(name)
        assert "Traceback" not in daemons.log(name), daemons.log(name)[-3000:]


# --- strangers ---------------------------------------------------------------------------------------------


def test_codes(daemons: Daemons, wanted: list[int]) -> None:
    def join(code: str) -> str:
        there = ("--address", f"127.0.0.1:{PORT}")
        done = daemons.shoal("stranger", "cluster", "join", code, *there, "--detach", check=False)
        assert done.returncode
        return done.stderr

    good = daemons.invite()
    assert "no such join code" in join("7K3M-Q9TX-2BD4F")
    assert "13" in join("7K3M")
    identity, peers = made_up(daemons, "second")
    from shoal.comm.group.dialing import pair

    pair(identity, peers, good, [HEAD])
    assert "used already" in join(good)
    daemons.shoal("head", "cluster", "forget", "second")
    with pytest.raises(GroupError):
        dial(identity, peers, peers.listed()[0].fingerprint, "control", [HEAD])


def made_up(daemons: Daemons, name: str) -> tuple[NodeIdentity, Peers]:
    directory = daemons.home(name).cluster
    directory.mkdir(parents=True, exist_ok=True)
    return NodeIdentity.of(directory, name), Peers(directory)


def likeness(daemons: Daemons, directory: Path) -> Path:
    """A certificate with the name and the number of the worker's, and another key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    real = x509.load_der_x509_certificate(NodeIdentity.of(daemons.home("worker").cluster).certificate)
    key = ec.generate_private_key(ec.SECP256R1())
    made = (
        x509.CertificateBuilder()
        .subject_name(real.subject)
        .issuer_name(real.issuer)
        .public_key(key.public_key())
        .serial_number(real.serial_number)
        .not_valid_before(real.not_valid_before_utc)
        .not_valid_after(real.not_valid_after_utc)
        .sign(key, hashes.SHA256())
    )
    file = directory / "likeness.pem"
    file.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        + made.public_bytes(serialization.Encoding.PEM)
    )
    return file


def stranger(version: ssl.TLSVersion, ciphers: str = "") -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_ciphers(ciphers or "ALL:@SECLEVEL=0")
    context.minimum_version = ssl.TLSVersion.TLSv1
    context.maximum_version = version
    return context


def test_strangers_get_no_channel(daemons: Daemons, path: Path, wanted: list[int], tmp_path: Path) -> None:
    before = sizes(daemons, "head")
    contexts = [
        stranger(version)
        for version in (ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1, ssl.TLSVersion.TLSv1_2)
    ]
    contexts.append(stranger(ssl.TLSVersion.TLSv1_2, "aNULL:eNULL:@SECLEVEL=0"))
    for context in contexts:
        with pytest.raises(OSError), socket.create_connection(HEAD, 5) as raw:
            context.wrap_socket(raw).close()
    like = stranger(ssl.TLSVersion.TLSv1_3)
    like.load_cert_chain(likeness(daemons, tmp_path))
    opening = msgspec.msgpack.encode({"type": "opening", "purpose": "control", "speaks": {}})
    for context in (like, stranger(ssl.TLSVersion.TLSv1_3)):
        with suppress(OSError), socket.create_connection(HEAD, 5) as raw, context.wrap_socket(raw) as secure:
            secure.sendall(len(opening).to_bytes(4, "little") + opening)
            assert b"opened" not in secure.recv(4096)
    chance = random.Random(1)
    for _ in range(max(1, FRAMES // 20)):  # port scans
        with suppress(OSError), socket.create_connection(HEAD, 5) as raw:
            raw.sendall(chance.randbytes(chance.randrange(3000)))
    assert_as_before(daemons, path, wanted, before, "head")


def test_what_was_recorded_cannot_be_replayed(
    daemons: Daemons, path: Path, wanted: list[int], tmp_path: Path
) -> None:
    """All that a worker has sent on a good channel, sent again."""
    before = sizes(daemons, "head")
    identity, peers = stolen(daemons, "worker", tmp_path)
    (head,) = peers.listed()
    with (
        relay(HEAD) as (between, said),
        dial(identity, peers, head.fingerprint, "control", [between]) as channel,
    ):
        channel.send_message(attach())
        time.sleep(0.3)
    with suppress(OSError), socket.create_connection(HEAD, 5) as raw:
        raw.sendall(said)
        raw.settimeout(3)
        heard = b""
        while data := raw.recv(4096):
            heard += data
        assert len(heard) < 4096  # a hello and an alert
    assert_as_before(daemons, path, wanted, before, "head")


# --- frames that are made up -------------------------------------------------------------------------------


def stolen(daemons: Daemons, name: str, directory: Path) -> tuple[NodeIdentity, Peers]:
    """Who a machine is, and with whom it is paired, in the hands of somebody else."""
    copy = directory / f"stolen-{name}"
    shutil.copytree(daemons.home(name).cluster, copy)
    return NodeIdentity.of(copy), Peers(copy)


def attach() -> control.Attach:
    return control.Attach(name="w", version="9", kernels="scalar", threads=1, memory_bytes=1 << 40)


def frame(chance: random.Random, messages: Sequence[msgspec.Struct]) -> bytes:
    """A message behind its length: as it should be, damaged, or nothing of the kind."""
    body = bytearray(msgspec.msgpack.encode(chance.choice(messages)))
    length = len(body)
    match chance.randrange(8):
        case 0 | 1:
            pass
        case 2 | 3:
            for _ in range(chance.randint(1, 6)):
                body[chance.randrange(len(body))] = chance.randrange(256)
        case 4:
            length = chance.choice([0, 1, length - 1, length + 1, 1 << 20, 1 << 31, (1 << 32) - 1])
        case 5:
            body = bytearray(chance.choice([b"\x91", b"\x81\xa1a"]) * chance.choice([10, 30_000]))
            length = len(body)
        case 6:
            body = bytearray(
                chance.choice([b"\xdf", b"\xdd", b"\xdb", b"\xc6"]) + b"\xff" * 4 + chance.randbytes(20)
            )
            length = len(body)
        case 7:
            body = bytearray(chance.randbytes(chance.randrange(200)))
            length = len(body)
    return (length & 0xFFFFFFFF).to_bytes(4, "little") + body


def poured(channel: Channel, chance: random.Random, messages: Sequence[msgspec.Struct], most: int) -> int:
    """Frames into a channel until the other side has had enough; how many."""
    sent = 0
    with suppress(GroupError, OSError):
        while sent < most:
            channel.send(frame(chance, messages), timeout_s=5)
            sent += 1
            if sent % 16 == 0:  # what comes back is read, or the other side would wait
                with suppress(GroupError):
                    while True:
                        channel.receive_into(bytearray(1), 0.0)
            if channel.closed:
                break
    return sent


def test_a_paired_worker_says_whatever_it_likes(
    daemons: Daemons, path: Path, wanted: list[int], tmp_path: Path
) -> None:
    daemons.kill("worker")
    before, chance, sent = sizes(daemons, "head"), random.Random(2), 0
    identity, peers = stolen(daemons, "worker", tmp_path)
    (head,) = peers.listed()
    with open_checkpoint(path) as checkpoint:
        block = checkpoint.spec.blocks()[1]
    from_worker: list[msgspec.Struct] = [
        control.Beat(epoch=1, steps=5, at_work=True, free_bytes=1 << 49),
        control.Loading(epoch=1, done=5, total=1),
        control.Ready(epoch=1, peak_bytes=1 << 60),
        control.ShardRefused(epoch=1, code="resources", reason="x" * 4000),
        control.Probed(number=3, data=bytes(1 << 20)),
        control.Listens(epoch=1, addresses=["1.2.3.4:5"]),
        control.Met(epoch=1, fellows=[control.FellowMet(rank=3, latency_s=1e18)]),
    ]
    about_weights: list[msgspec.Struct] = [
        weights.Describe(1, 1),
        weights.WantPiece("x" * 64, block, "q", 0, 1 << 40),
        weights.WantChecksum("", block),
    ]
    ends_s = time.monotonic() + 120
    while sent < FRAMES and time.monotonic() < ends_s:
        purpose = chance.choice(PURPOSES)
        with (
            suppress(GroupError, OSError),
            dial(identity, peers, head.fingerprint, purpose, [HEAD]) as channel,
        ):
            if purpose == "control" and chance.random() < 0.8:
                channel.send_message(attach())
            elif purpose in ("data", "weights") and chance.random() < 0.8:
                channel.send_message(control.Epoch(epoch=chance.choice([0, 1, 1 << 61])))
            messages = [*from_worker, attach()] if purpose != "weights" else about_weights
            sent += poured(channel, chance, messages, 200)
    assert sent >= FRAMES
    daemons.start("worker")
    assert_as_before(daemons, path, wanted, before, "head")


def test_a_paired_head_says_whatever_it_likes(
    daemons: Daemons, path: Path, wanted: list[int], tmp_path: Path
) -> None:
    daemons.kill("head")
    before, chance, sent = sizes(daemons, "worker"), random.Random(3), 0
    identity, peers = stolen(daemons, "head", tmp_path)
    with open_checkpoint(path) as checkpoint:
        shard = shard_of(checkpoint)
        part = CheckpointShard(checkpoint, shard)
        plan = planned(part, NodeConfig(threads=1), 1 << 33)  # type: ignore[arg-type]
        block = part.spec.blocks()[1]
    serve = control.Serve(
        epoch=7, model="m", shard=shard, spec=part.spec, plan=plan, quant="keep", wire="f32"
    )
    huge = msgspec.structs.replace(
        serve, model="n", epoch=(1 << 62), fellows=[control.Fellow(rank=9, certificate=b"x")]
    )
    from_head: list[msgspec.Struct] = [
        serve,
        huge,
        control.Alive(),
        control.Drop(epoch=7),
        control.Probe(number=1, data=b"", reply_bytes=1 << 20),
        control.Introduce(epoch=7, fellows=[control.FellowAt(rank=9, addresses=["127.0.0.1:1"])]),
        control.HeadAt(addresses=["127.0.0.1:1", "[::1]:99999", "x" * 128]),
    ]
    about_weights: list[msgspec.Struct] = [
        weights.Refused("corrupt", "x" * 1000),
        weights.PieceFollows("0" * 16),
        weights.BlockChecksum("f" * 16),
        weights.WantChecksum("", block),
    ]
    ends_s = time.monotonic() + 120
    with GroupListener(identity, peers, [HEAD]) as listener:
        while sent < FRAMES and time.monotonic() < ends_s:
            if (channel := listener.accept(5)) is None:
                continue
            with channel, suppress(GroupError, OSError):
                if channel.purpose == "measure":
                    channel.send_message(control.HeadAt(addresses=[]))
                    for _ in range(chance.choice([2, 300])):
                        probe: control.Probe = channel.receive_message(control.Probe, 2, 4 << 20)
                        channel.send_message(control.Probed(number=probe.number))
                    continue
                if channel.purpose == "control":
                    threading.Thread(target=drained, args=(channel,), daemon=True).start()
                    for _ in range(4):
                        channel.send_message(chance.choice(from_head))
                sent += poured(
                    channel, chance, from_head if channel.purpose == "control" else about_weights, 200
                )
    print("frames:", sent)
    daemons.start("head")
    assert_as_before(daemons, path, wanted, before, "worker")


def drained(channel: Channel) -> None:
    with suppress(GroupError, OSError):
        while True:
            channel.receive_into(bytearray(1), 10)


def test_the_paired_are_still_the_same(daemons: Daemons) -> None:
    (worker,) = Peers(daemons.home("head").cluster).listed()
    assert worker.role == "worker"
    assert isinstance(worker, PairedNode)
    assert worker.fingerprint == NodeIdentity.of(daemons.home("worker").cluster).fingerprint
