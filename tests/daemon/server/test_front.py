"""Crowds of connections, clients that send and do not read, and a process without descriptors."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections import Counter
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path

import pytest
from fakes.api_fakes import PATIENCE_S, QUICK, RawClient, alive, done, gone, ipc, running
from fakes.zmtp import GREETING, HANDSHAKE, acquainted, frames, message, send_all_it_takes, stranger

from shoal.client import Client
from shoal.comm.messages import (
    STREAMING,
    TYPE_NAMES,
    Cancel,
    Done,
    Generate,
    Hello,
    Ping,
    Pong,
    Status,
    Token,
)
from shoal.daemon.server.descriptors import left_for_clients
from shoal.daemon.server.limits import LINK_DESCRIPTORS, ServerLimits
from shoal.daemon.server.outbox import MAX_REFUSALS

SMALL = replace(QUICK, connections=8)


@pytest.mark.parametrize("where", ["tcp", "ipc"])
@pytest.mark.parametrize(
    "said", [b"", b"\xff", GREETING, HANDSHAKE, HANDSHAKE + frames(b"shoal/1", more=True)]
)
def test_a_crowd_of_idle_connections_keeps_nobody_out(tmp_path: Path, where: str, said: bytes) -> None:
    with running("tcp://127.0.0.1:0", ipc(tmp_path), limits=SMALL) as daemon, ExitStack() as crowd:
        crowded = daemon.server.addresses[where == "ipc"]
        with RawClient(crowded) as served:
            served.send(Generate(prompt="manual"))
            run = daemon.backend.run("manual")
            for _ in range(60):
                end = crowd.enter_context(stranger(crowded))
                end.sendall(said)
            for address in daemon.server.addresses:
                with Client(address, timeout_s=PATIENCE_S) as client:
                    client.ping()
                    assert client.text("a b")[0] == "a b "
            assert len(daemon.server._front._links) <= SMALL.connections
            run.emit(Token(text="still here", ids=[1]))
            run.emit(done())
            assert served.until(Token).text == "still here"
            served.until(Done)


def test_who_was_served_once_outstays_who_never_asked(daemon) -> None:
    with running(limits=SMALL) as small, RawClient(small.address) as quiet, ExitStack() as crowd:
        quiet.send(Ping())
        quiet.until(Pong)
        for _ in range(30):
            crowd.enter_context(stranger(small.address)).sendall(HANDSHAKE)
        assert alive(small)
        quiet.send(Ping())
        quiet.until(Pong)


def test_when_all_are_busy_a_newcomer_is_turned_away_and_later_let_in() -> None:
    limits = replace(QUICK, connections=4)
    with running(limits=limits) as small:
        front = small.server._front
        busy = [RawClient(small.address) for _ in range(3)]
        for number, raw in enumerate(busy):
            raw.send(Status(), b"s")
            raw.receive()
            raw.send(Generate(prompt=f"manual {number}"))
            if number < 2:
                small.backend.run(f"manual {number}")
        assert busy[2].error().code == "busy"  # half of the connections may have requests in flight
        for link in list(front._links.values()):
            link.busy = True
        with stranger(small.address) as newcomer:
            assert newcomer.recv(1) == b""
        for raw in busy:
            raw.close()
        assert gone(small)
        assert alive(small)


def test_limits_follow_the_descriptors_that_the_process_may_have() -> None:
    for descriptors in (64, 256, 1024, 20_000):
        limits = ServerLimits().within(descriptors)
        assert limits.connections * LINK_DESCRIPTORS <= max(12, left_for_clients(descriptors))
        assert left_for_clients(descriptors) <= descriptors - min(512, descriptors // 2)
        assert limits.clients <= limits.connections // 2
    assert (limits.connections, limits.clients) == (ServerLimits().connections, ServerLimits().clients)


@pytest.mark.parametrize(
    "rubbish",
    [
        frames(*[b""] * 100, more=True),
        frames(b"x" * 5000, b"x" * 5000, b"x" * 5000, b"x" * 5000, more=True),
        b"\x02" + (1 << 40).to_bytes(8, "big"),
        b"\x08\x00",
        b"\xff" * 100,
    ],
)
def test_who_sends_endless_or_malformed_frames_is_parted_from(rubbish: bytes) -> None:
    with running(limits=replace(QUICK, message_bytes=8000)) as small:
        with acquainted(small.address) as end:
            end.sendall(rubbish)
            wait_for_the_end(end)
        assert alive(small)


def test_many_large_messages_begun_and_never_ended_cost_the_slowest_their_connection() -> None:
    limits = replace(QUICK, unfinished_bytes=50_000)
    with running(limits=limits) as small, ExitStack() as crowd:
        ends = [crowd.enter_context(acquainted(small.address)) for _ in range(10)]
        for end in ends:
            end.sendall(frames(b"x" * 20_000)[:-1])
        ends[0].settimeout(PATIENCE_S)
        wait_for_the_end(ends[0])
        with RawClient(small.address) as raw:
            raw.send(Generate(prompt="y" * 40_000))
            raw.until(Done)
        assert small.server._front._unfinished_bytes <= limits.unfinished_bytes


def wait_for_the_end(end: socket.socket) -> None:
    """Until the other side has closed the connection."""
    with suppress(ConnectionResetError):
        while end.recv(1000):
            pass


MIXED = [
    Ping(),
    Status(),
    Hello(),
    Cancel(target="31"),
    Generate(prompt="a b c"),
    Generate(prompt="refuse"),
    None,
]


def test_thousands_of_pipelined_requests_each_get_one_answer() -> None:
    """More than any queue holds, sent before the first answer is read."""
    with running(limits=replace(QUICK, outbox_s=PATIENCE_S)) as daemon:
        with acquainted(daemon.address) as end, RawClient(daemon.address) as other:
            count, ends = 6000, Counter[bytes]()
            body = bytearray()
            for number in range(count):
                request = MIXED[number % len(MIXED)]
                request_id = b"r%d" % number
                body += (
                    message(request, request_id)
                    if request
                    else frames(b"shoal/1", b"load", request_id, b"\xc1")
                )
            end.settimeout(0.5)
            sent = 0
            try:
                while sent < len(body):
                    sent += end.send(body[sent : sent + 10_000])
            except TimeoutError:
                pass
            for _ in range(3):
                other.send(Ping())
                other.until(Pong)
            reader = Reader(end)
            end.setblocking(False)
            deadline_s = time.monotonic() + PATIENCE_S
            while len(ends) < count and time.monotonic() < deadline_s:
                with suppress(BlockingIOError):
                    sent += end.send(body[sent : sent + 10_000]) if sent < len(body) else 0
                for kind, request_id in reader.messages():
                    if kind not in STREAMING:
                        ends[request_id] += 1
            missing = [number for number in range(count) if b"r%d" % number not in ends]
            assert not missing, [(number, MIXED[number % len(MIXED)]) for number in missing]
            assert set(ends.values()) == {1}
            assert len(ends) == count
        assert gone(daemon)


class Reader:
    """Takes apart what the daemon sends over a socket that does not block."""

    def __init__(self, end: socket.socket) -> None:
        self.end = end
        self.data = b""
        self.parts: list[bytes] = []

    def messages(self) -> list[tuple[str, bytes]]:
        """(type, request id) of the messages that have come; waits a little for the first."""
        try:
            self.data += self.end.recv(1 << 16)
        except BlockingIOError:
            time.sleep(0.001)
        found, at = [], 0
        while at < len(self.data):
            flags, head = self.data[at], 9 if self.data[at] & 2 else 2
            size = int.from_bytes(self.data[at + 1 : at + head], "big")
            if len(self.data) < at + head + size:
                break
            at += head
            if not flags & 4:
                self.parts.append(self.data[at : at + size])
                if not flags & 1:
                    found.append((self.parts[1].decode(), self.parts[2]))
                    self.parts = []
            at += size
        self.data = self.data[at:]
        return found


@pytest.mark.parametrize("what", [*(TYPE_NAMES[type(one)] for one in MIXED if one), "rubbish"])
def test_who_does_not_read_is_not_read_from(tmp_path: Path, what: str) -> None:
    request = next((one for one in MIXED if one and TYPE_NAMES[type(one)] == what), None)
    with running("tcp://127.0.0.1:0", ipc(tmp_path), limits=replace(QUICK, outbox_s=PATIENCE_S)) as daemon:
        local = daemon.server.addresses[1]
        with acquainted(local) as end:
            data = b"".join(
                message(request, b"%d" % number) if request else frames(b"", b"") for number in range(300)
            )
            sent = send_all_it_takes(end, data, 1.0)
            assert sent < 4_000_000
            (peer,) = daemon.server._outbox._peers.values()
            assert len(peer.refusals) < MAX_REFUSALS
            for address in daemon.server.addresses:
                with Client(address, timeout_s=PATIENCE_S) as client:
                    assert client.text("a b")[0] == "a b "
        assert gone(daemon)


def test_who_never_reads_is_parted_from_in_the_end(tmp_path: Path) -> None:
    limits = replace(QUICK, outbox_s=0.2)
    with running(ipc(tmp_path), limits=limits) as daemon, acquainted(daemon.address) as end:
        data = b"".join(message(Generate(prompt="forever"), b"%d" % number) for number in range(300))
        send_all_it_takes(end, data, PATIENCE_S)  # ends when the connection is closed
        assert gone(daemon)
        assert not daemon.server._front._links or alive(daemon)


# --- without descriptors ------------------------------------------------------------------------------------

DAEMON = """
import os, resource, sys, threading
resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))
from fakes.api_fakes import FakeBackend
from shoal.daemon.server.server import Server
server = Server(FakeBackend(), ["tcp://127.0.0.1:0", sys.argv[1]])
server.bind()
print(server.addresses[0], flush=True)

def obey():
    held = []
    for line in sys.stdin:
        if line == "take\\n":
            try:
                while True:
                    held.append(os.open(os.devnull, os.O_RDONLY))
            except OSError:
                pass
        else:
            while held:
                os.close(held.pop())
        print("did", flush=True)

threading.Thread(target=obey, daemon=True).start()
server.serve()
"""


def test_a_daemon_without_descriptors_lives_and_serves_who_is_connected(tmp_path: Path) -> None:
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    child = subprocess.Popen(
        [sys.executable, "-c", DAEMON, ipc(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        text=True,
    )
    assert child.stdin is not None
    assert child.stdout is not None

    def tell(word: str) -> None:
        child.stdin.write(word + "\n")
        child.stdin.flush()
        assert child.stdout.readline() == "did\n"

    try:
        tcp = child.stdout.readline().strip()
        with Client(ipc(tmp_path), timeout_s=PATIENCE_S) as friend, ExitStack() as crowd:
            friend.ping()
            for _ in range(300):
                crowd.enter_context(stranger(tcp))
            friend.ping()
            time.sleep(0.3)  # until libzmq has accepted those
            tell("take")
            for address in (tcp, ipc(tmp_path)) * 20:
                crowd.enter_context(stranger(address))
            assert friend.text("a b")[0] == "a b "
            before_s = sum(os.times()[:2])
            used_s = processor_s(child.pid)
            time.sleep(1)
            assert processor_s(child.pid) - used_s < 0.5, (before_s, "it spins")
            assert friend.text("a b")[0] == "a b "
            tell("free")
            with Client(tcp, timeout_s=PATIENCE_S) as late:
                retry(late.ping)
            friend.ping()
        assert child.poll() is None
    finally:
        child.kill()
        child.communicate()


def processor_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def retry(act) -> None:
    """Try again for a while: the front rests a moment when it has no descriptor."""
    deadline_s = time.monotonic() + PATIENCE_S
    while True:
        try:
            act()
        except Exception:
            if time.monotonic() > deadline_s:
                raise
            time.sleep(0.1)
        else:
            return
