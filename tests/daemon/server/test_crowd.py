"""Two hundred clients at once, with a real server and model: some are told to retry; each gets its own answer."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import zmq
from fakes import tiny
from fakes.api_fakes import PATIENCE_S, ipc

from shoal.comm import wire
from shoal.comm.messages import REPLIES, Accepted, Done, Error, Generate, Load, Message, Sampling, Token
from shoal.daemon.config import NodeConfig
from shoal.daemon.node import Node
from shoal.daemon.server.server import Server

CLIENTS, QUEUE, TOGETHER, NEW = 200, 64, 8, 6
CONFIG = NodeConfig(
    context_tokens=96,
    kv_tokens=512,
    max_sequences=TOGETHER,
    max_queue=QUEUE,
    chunk_tokens=64,
    memory_bytes=3 << 30,
)


def request(number: int) -> Generate:
    """Each four prompts begin alike."""
    ids = [(5 * (number // 4) + 11 * i) % 250 for i in range(20)] + [number % 4] * (1 + number % 3)
    return Generate(
        prompt_tokens=ids,
        sampling=Sampling(temperature=0.0),
        max_tokens=NEW,
        ignore_eos=True,
        model="tiny.gguf",
    )


class Crowd:
    """The clients' sockets, which one thread reads, and the replies of each client."""

    def __init__(self, address: str) -> None:
        self.context = zmq.Context()
        self.poller = zmq.Poller()
        self.sockets: list[zmq.Socket[bytes]] = []
        self.replies: list[list[Message]] = [[] for _ in range(CLIENTS)]
        for _ in range(CLIENTS):
            socket = self.context.socket(zmq.DEALER)
            socket.connect(address)
            self.poller.register(socket, zmq.POLLIN)
            self.sockets.append(socket)

    def read(self) -> None:
        """Wait for replies, and take one from each socket that has some."""
        ready = dict(self.poller.poll(1000 * PATIENCE_S))
        assert ready, "nobody gets an answer"
        for number, socket in enumerate(self.sockets):
            if socket in ready:
                envelope = wire.split(socket.recv_multipart(), wire.MAX_REPLY_BYTES)
                self.replies[number].append(wire.decode(envelope, REPLIES))

    def those_with(self, kind: type[Message]) -> list[int]:
        return [n for n, found in enumerate(self.replies) if any(isinstance(m, kind) for m in found)]

    def close(self) -> None:
        for socket in self.sockets:
            socket.close(linger=0)
        self.context.term()


def test_a_crowd_is_served_or_told_to_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny.save_gguf(tiny.hf_model("llama", seed=11), tmp_path / "tiny.gguf", type="Q8_0")
    node = Node(CONFIG, resolve=lambda name: path)
    node.load(Load(model="tiny.gguf"))
    engine = next(iter(node._models)).engine
    forward, gate = engine.rank.executor.forward, threading.Event()

    def gated(*arguments: Any) -> object:
        assert gate.wait(PATIENCE_S)
        return forward(*arguments)

    monkeypatch.setattr(engine.rank.executor, "forward", gated)
    server = Server(node, [ipc(tmp_path)])
    server.bind()
    thread = threading.Thread(target=server.serve)
    thread.start()
    crowd = Crowd(server.addresses[0])
    try:
        for number, socket in enumerate(crowd.sockets):
            socket.send_multipart(wire.encode(request(number), b"1"))
        while len(crowd.those_with(Accepted)) + len(crowd.those_with(Error)) < CLIENTS:
            crowd.read()
        (status,) = node.status().models
        assert status.running <= TOGETHER
        assert status.running + status.waiting == len(crowd.those_with(Accepted)) == TOGETHER + QUEUE
        gate.set()
        while len(crowd.those_with(Done)) < TOGETHER + QUEUE:
            crowd.read()
        for number in crowd.those_with(Error):
            (error,) = crowd.replies[number]
            assert isinstance(error, Error)
            assert (error.code, error.retry_after_s > 0) == ("busy", True)
        for number in crowd.those_with(Accepted):
            alone = [event for event in node.stream(request(number)) if isinstance(event, Token)]
            assert ids_of(crowd.replies[number]) == ids_of(alone)
            assert [type(m) for m in crowd.replies[number]].count(Done) == 1
        assert node.status().models[0].kv_used_tokens == 0
    finally:
        gate.set()
        crowd.close()
        server.stop()
        server.stop()
        thread.join(PATIENCE_S)


def ids_of(messages: list[Message]) -> list[int]:
    return [token for message in messages if isinstance(message, Token) for token in message.ids]
