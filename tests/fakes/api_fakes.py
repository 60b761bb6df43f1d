"""A backend that follows a script instead of a model, a server around it, and a client without manners."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import zmq

from shoal.client import Client
from shoal.comm import wire
from shoal.comm.messages import (
    REPLIES,
    Accepted,
    Chat,
    Done,
    Error,
    Generate,
    Load,
    Loaded,
    Message,
    ModelStatus,
    Ok,
    Ping,
    Pong,
    Stage,
    StatusReply,
    Timings,
    Token,
    Tokenize,
    Tokens,
    Unload,
    Usage,
)
from shoal.daemon.errors import DaemonError
from shoal.daemon.server.limits import ServerLimits
from shoal.daemon.server.server import Server

# Timeout for what must happen; it can be long because a test that passes never waits so long.
PATIENCE_S = 20.0
QUICK = ServerLimits(keepalive_s=0.1, outbox_s=0.5, farewell_s=2.0, drain_s=PATIENCE_S)


def done(reason: str = "stop", tokens: int = 0) -> Done:
    return Done(
        finish_reason=reason,
        usage=Usage(prompt_tokens=1, completion_tokens=tokens),
        timings=Timings(ttft_s=0.1),
    )


class Run:
    """One submitted request. For prompts that begin with `manual`, the test itself calls `emit`."""

    def __init__(self, prompt: str, emit: Callable[[Message], None], client: str) -> None:
        self.prompt = prompt
        self.client = client
        self.emit = emit
        self.cancelled = threading.Event()
        self.cancels = 0

    def cancel(self) -> None:
        self.cancels += 1
        self.cancelled.set()
        if self.prompt.startswith("manual"):
            self.emit(done("cancelled"))

    def stage(self) -> Stage | None:
        return Stage(doing="prompt", done=2, total=5, tokens_per_s=4.0)

    def echo(self) -> None:
        """Emit the words of the prompt, one token each. `forever` never ends by itself."""
        self.emit(Accepted(model="fake", prompt_tokens=len(self.prompt.split())))
        words = self.prompt.split(" ")
        count = 0
        while not self.cancelled.is_set():
            if count == len(words) and not self.prompt.startswith("forever"):
                self.emit(done(tokens=count))
                return
            word = words[count % len(words)]
            self.emit(Token(text=word + " ", ids=[count]))
            count += 1
            if self.prompt.startswith("forever"):
                self.cancelled.wait(0.001)
        self.emit(done("cancelled", count))


class FakeBackend:
    """Answers by the first word of the prompt: `manual`, `forever`, `refuse`, `crash`, else an echo."""

    def __init__(self) -> None:
        self.runs: dict[str, Run] = {}
        self.submitted = threading.Condition()
        self.release_load = threading.Event()
        self.loading = threading.Event()
        self.released = threading.Event()  # `drain` returns when this is set
        self.released.set()
        self.drains: list[float] = []
        self.closed = False
        self._threads: list[threading.Thread] = []

    def run(self, prompt: str) -> Run:
        """Wait for the request with this prompt."""
        with self.submitted:
            assert self.submitted.wait_for(lambda: prompt in self.runs, PATIENCE_S), f"no request {prompt!r}"
            return self.runs[prompt]

    def submit(self, request: Generate | Chat, emit: Callable[[Message], None], client: str) -> Run:
        prompt = request.prompt if isinstance(request, Generate) else str(request.messages[-1].content)
        prompt = prompt or ""
        if prompt.startswith("refuse"):
            raise DaemonError("context_overflow", "prompt_tokens=9: must be at most 8", "shorten it")
        if prompt.startswith("crash"):
            raise RuntimeError("a bug")
        run = Run(prompt, emit, client)
        with self.submitted:
            self.runs[prompt] = run  # whoever has its answer finds it here
            if not prompt.startswith("manual"):
                thread = threading.Thread(target=run.echo, daemon=True)
                self._threads.append(thread)
                thread.start()
            self.submitted.notify_all()
        return run

    def tokenize(self, request: Tokenize) -> Tokens:
        if request.text is None:
            return Tokens(ids=request.tokens or [], text="".join(map(chr, request.tokens or [])))
        return Tokens(ids=[ord(c) for c in request.text], text=request.text)

    def load(self, request: Load) -> Loaded:
        if request.model == "missing":
            raise DaemonError("not_found", "model=missing: no such model", "`shoal ls` lists them")
        if request.model == "slow":
            self.loading.set()
            assert self.release_load.wait(PATIENCE_S)
        return Loaded(model=self._model(request.model), seconds=0.1)

    def has(self, model: str) -> bool:
        return model != "slow"

    def stage(self, model: str) -> Stage | None:
        return Stage(doing="loading", done=1, total=3) if model == "slow" else None

    def unload(self, request: Unload) -> Ok:
        return Ok()

    def status(self) -> StatusReply:
        return StatusReply(
            version="0",
            pid=1,
            uptime_s=1.0,
            threads=1,
            memory_bytes=1,
            models=[self._model("fake")],
            requests_total=len(self.runs),
            tokens_total=0,
        )

    def drain(self, timeout_s: float) -> None:
        self.drains.append(timeout_s)
        assert self.released.wait(PATIENCE_S)
        with self.submitted:
            threads = list(self._threads)
        for thread in threads:
            thread.join(PATIENCE_S)

    def close(self) -> None:
        self.closed = True
        self.release_load.set()
        self.released.set()
        for run in list(self.runs.values()):
            run.cancelled.set()

    def _model(self, name: str) -> ModelStatus:
        return ModelStatus(
            name=name,
            path="/" + name,
            family="fake",
            parameters_bytes=1,
            context_tokens=8,
            running=0,
            waiting=0,
            kv_used_tokens=0,
            kv_total_tokens=8,
            plan="",
        )


class RunningServer:
    def __init__(self, server: Server, thread: threading.Thread, backend: FakeBackend) -> None:
        self.server = server
        self.thread = thread
        self.backend = backend
        self.address = server.addresses[0]


@contextmanager
def running(
    *addresses: str, backend: FakeBackend | None = None, limits: ServerLimits = QUICK, **options: object
) -> Iterator[RunningServer]:
    backend = backend or FakeBackend()
    server = Server(backend, addresses or ["tcp://127.0.0.1:0"], limits=limits, **options)
    server.bind()
    thread = threading.Thread(target=server.serve)
    thread.start()
    try:
        yield RunningServer(server, thread, backend)
    finally:
        server.stop()
        server.stop()
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


def ipc(path: Path) -> str:
    return f"ipc://{path}/d.sock"


class RawClient:
    """A DEALER socket that sends whatever it is told."""

    def __init__(self, address: str, **options: int) -> None:
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.linger = 0
        for name, value in options.items():
            self.socket.setsockopt(getattr(zmq, name), value)
        self.socket.connect(address)
        self.deadline_s = time.monotonic() + 3 * PATIENCE_S

    def __enter__(self) -> RawClient:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection without telling the server."""
        self.socket.close(linger=0)
        self.context.term()

    def send(self, message: Message, request_id: bytes = b"1") -> None:
        self.socket.send_multipart(wire.encode(message, request_id))

    def send_frames(self, *frames: bytes) -> None:
        self.socket.send_multipart(frames)

    def receive(self, timeout_s: float = PATIENCE_S) -> tuple[bytes, Message]:
        """The request id and the message of the next reply."""
        assert self.socket.poll(int(1000 * timeout_s)), "no reply"
        assert time.monotonic() < self.deadline_s, "nothing but `waiting`"
        envelope = wire.split(self.socket.recv_multipart(), wire.MAX_REPLY_BYTES)
        return envelope.request_id, wire.decode(envelope, REPLIES)

    def until(self, kind: type[Message], request_id: bytes = b"1") -> Message:
        """The next reply of type `kind` to a request. Other replies are dropped."""
        while True:
            got_id, message = self.receive()
            if got_id == request_id and isinstance(message, kind):
                return message

    def error(self, request_id: bytes = b"1") -> Error:
        message = self.until(Error, request_id)
        assert isinstance(message, Error)
        return message


def alive(daemon: RunningServer) -> bool:
    with Client(daemon.address, timeout_s=PATIENCE_S) as client:
        return client.text("are you there")[0] == "are you there "


def gone(daemon: RunningServer) -> bool:
    """Whether the server soon has forgotten all clients."""
    outbox, deadline_s = daemon.server._outbox, time.monotonic() + PATIENCE_S
    with RawClient(daemon.address) as probe:
        while time.monotonic() < deadline_s:
            probe.send(Ping())
            probe.until(Pong)
            if outbox.in_flight == 0 and outbox.clients == 0:
                return True
    return False
