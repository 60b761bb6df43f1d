"""Does the daemon survive rubbish? Sends fuzzed messages to a live one, and sound requests in between.

    python bench/fuzz_api.py                          a server that this starts, with an echo as its model
    python bench/fuzz_api.py --address ipc:///…       a running daemon (its models may work, or be unloaded)

Prints one JSON object: messages sent, replies by type, probes answered, and the daemon's resident memory
over time, which should be flat after the first thousands.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter

import zmq

from shoal.client import Client
from shoal.comm import wire
from shoal.comm.messages import (
    Accepted,
    Cancel,
    Chat,
    ChatMessage,
    Done,
    Generate,
    Hello,
    Load,
    Loaded,
    Message,
    Ok,
    Ping,
    Sampling,
    Status,
    StatusReply,
    Timings,
    Token,
    Tokenize,
    Tokens,
    Unload,
    Usage,
)
from shoal.daemon.backend import CancelCall, Emit
from shoal.daemon.errors import DaemonError
from shoal.daemon.memory import resident_bytes
from shoal.daemon.server.server import Server

SEEDS: list[Message] = [
    Hello(),
    Ping(),
    Status(),
    Cancel(target="31"),
    Load(model="no such model"),
    Unload(model="no such model"),
    Tokenize(text="one two"),
    Generate(prompt="one two", max_tokens=2, sampling=Sampling(temperature=1.0, logit_bias={1: 1.0})),
    Chat(messages=[ChatMessage(role="user", content="one two")], max_tokens=2, template_args={"a": [1]}),
]


class Echo:
    """A backend that answers with the prompt."""

    def submit(self, request: Generate | Chat, emit: Emit, client: str) -> CancelCall:
        text = request.prompt if isinstance(request, Generate) else str(request.messages[-1].content)
        emit(Accepted(model="echo", prompt_tokens=1))
        emit(Token(text=text or "", ids=[1]))
        emit(Done(finish_reason="stop", usage=Usage(prompt_tokens=1, completion_tokens=1), timings=Timings()))
        return lambda: None

    def tokenize(self, request: Tokenize) -> Tokens:
        return Tokens(ids=request.tokens or [], text=request.text or "")

    def load(self, request: Load) -> Loaded:
        raise DaemonError("not_found", "an echo loads nothing")

    def has(self, model: str) -> bool:
        return True

    def unload(self, request: Unload) -> Ok:
        return Ok()

    def status(self) -> StatusReply:
        return StatusReply(
            version="0",
            pid=0,
            uptime_s=0,
            threads=1,
            memory_bytes=resident_bytes(),
            models=[],
            requests_total=0,
            tokens_total=0,
        )

    def drain(self, timeout_s: float) -> None:
        """Nothing is running."""

    def close(self) -> None:
        """There is nothing to close."""


def mutate(random_: random.Random) -> list[bytes]:
    """A sound message with a few bytes, frames or lengths changed; one in ten stays sound."""
    frames = [bytearray(frame) for frame in wire.encode(random_.choice(SEEDS), random_.randbytes(4))]
    for _ in range(random_.choice((0, 1, 1, 1, 2, 2, 3, 5, 8, 20))):
        frame = random_.choice(frames)
        match random_.randrange(6):
            case 0:
                frames.insert(random_.randrange(len(frames) + 1), bytearray(random_.randbytes(30)))
            case 1 if len(frames) > 1:
                frames.remove(frame)
            case 2:
                frame += random_.randbytes(random_.choice((1, 10, 1000, 30_000)))
            case 3:
                del frame[random_.randrange(len(frame) + 1) :]
            case _ if frame:
                frame[random_.randrange(len(frame))] = random_.randrange(256)
    return [bytes(frame) for frame in frames]


def fuzz(address: str, messages: int, seed: int) -> dict[str, object]:
    random_ = random.Random(seed)
    context = zmq.Context()
    replies: Counter[str] = Counter()
    memory_bytes: list[int] = []
    slowest_probe_s = 0.0
    sockets: list[zmq.Socket[bytes]] = []
    began_s = time.monotonic()
    with Client(address) as probe:
        for n in range(messages):
            if n % 500 == 0:  # new connections now and then; the old ones close without a message
                for socket in sockets:
                    socket.close(linger=0)
                sockets = [context.socket(zmq.DEALER) for _ in range(8)]
                for socket in sockets:
                    socket.connect(address)
            socket = random_.choice(sockets)
            socket.send_multipart(mutate(random_))
            while socket.poll(0):
                replies[wire.split(socket.recv_multipart(), wire.MAX_REPLY_BYTES).kind] += 1
            if n % 250 == 0:
                probe_began_s = time.monotonic()
                memory_bytes.append(probe.status().memory_bytes)
                slowest_probe_s = max(slowest_probe_s, time.monotonic() - probe_began_s)
        memory_bytes.append(probe.status().memory_bytes)
    for socket in sockets:
        socket.close(linger=0)
    context.term()
    return {
        "messages": messages,
        "seconds": round(time.monotonic() - began_s, 2),
        "replies": dict(replies),
        "probes_answered": len(memory_bytes),
        "slowest_probe_s": round(slowest_probe_s, 4),
        "memory_mb": [round(size / 1e6, 1) for size in memory_bytes[:: max(1, len(memory_bytes) // 10)]],
        "memory_growth_mb_second_half": round(
            (memory_bytes[-1] - memory_bytes[len(memory_bytes) // 2]) / 1e6, 1
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--address", help="of a running daemon")
    parser.add_argument("--messages", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--serve", metavar="ADDRESS", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        server = Server(Echo(), [options.serve])
        with server.signals():
            server.bind()
            print("up", flush=True)
            server.serve()
        return
    if options.address:
        print(json.dumps(fuzz(options.address, options.messages, options.seed)))
        return
    with tempfile.TemporaryDirectory() as folder:
        address = f"ipc://{folder}/d.sock"
        command = [sys.executable, __file__, "--serve", address]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            child.stdout.readline()
            try:
                print(json.dumps(fuzz(address, options.messages, options.seed)))
            finally:
                child.terminate()


if __name__ == "__main__":
    main()
