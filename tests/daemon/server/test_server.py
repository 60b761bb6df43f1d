"""The server with a scripted backend: many clients at once, clients that vanish, and slow ones."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import replace

import pytest
from fakes.api_fakes import PATIENCE_S, QUICK, RawClient, done, gone, ipc, running

from shoal.client import Client
from shoal.client.session import Exchange
from shoal.comm import wire
from shoal.comm.messages import (
    STREAMING,
    TYPE_NAMES,
    Accepted,
    Cancel,
    Done,
    Error,
    Generate,
    Hello,
    Load,
    Loaded,
    Ok,
    Ping,
    Pong,
    Stage,
    Status,
    StatusReply,
    Token,
    Waiting,
    Welcome,
)
from shoal.daemon.server import server
from shoal.daemon.server.no_front import NoFront


def test_twenty_clients_get_their_own_texts(daemon):
    texts: dict[int, list[str]] = {}

    def talk(n: int) -> None:
        with Client(daemon.address, timeout_s=PATIENCE_S) as client:
            texts[n] = [client.text(" ".join(f"{n}.{turn}.{i}" for i in range(30)))[0] for turn in range(3)]

    threads = [threading.Thread(target=talk, args=(n,)) for n in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * PATIENCE_S)
    expected = [["".join(f"{n}.{t}.{i} " for i in range(30)) for t in range(3)] for n in range(20)]
    assert [texts[n] for n in range(20)] == expected
    assert gone(daemon)


def test_where_there_is_no_front(tmp_path, monkeypatch):
    monkeypatch.setattr(server, "Front", NoFront)
    with running("tcp://127.0.0.1:0", ipc(tmp_path)) as daemon:
        for address in daemon.server.addresses:
            with Client(address, timeout_s=PATIENCE_S) as client:
                assert client.text("a b c")[0] == "a b c "
            with RawClient(address) as raw:
                raw.send(Generate(prompt="forever"))
                raw.until(Token)
        assert gone(daemon)
    assert not list(tmp_path.glob("**/*.sock"))


def test_the_server_can_be_imported_where_there_is_no_epoll():
    code = (
        "import asyncio, select, sys, msgspec, numpy, psutil, zmq; "
        "[delattr(select, name) for name in dir(select) if name.lower().startswith('epoll')]; "
        "sys.platform = 'darwin'; "
        "from shoal.daemon.server import server; import shoal.daemon.service; "
        "print(type(server.Server(None, [])._front).__name__)"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "NoFront"


def test_hello_agrees_on_a_version_or_says_why_not(raw):
    raw.send(Hello(max_version=7))
    welcome = raw.until(Welcome)
    assert welcome.version == 1
    assert welcome.limits["message_bytes"] == wire.MAX_REQUEST_BYTES
    assert "chat" in welcome.features
    raw.send(Hello(min_version=2, max_version=3))
    assert raw.error().code == "version"


def test_every_request_gets_exactly_one_terminal_reply(daemon):
    """Whatever is asked, in whatever order, cancelled or not."""
    random_ = random.Random(5)
    requests = [
        Generate(prompt="a b c"),
        Generate(prompt="forever"),
        Generate(prompt="refuse"),
        Generate(prompt="crash"),
        None,  # a body without a prompt
        Load(model="missing"),
        Load(model="m"),
        Status(),
        Ping(),
    ]
    with RawClient(daemon.address) as raw:
        ids = [f"r{n}".encode() for n in range(60)]
        for request_id in ids:
            request = random_.choice(requests)
            if request is None:
                raw.send_frames(b"shoal/1", b"generate", request_id, b"\x80")
            else:
                raw.send(request, request_id)
        for request_id in ids:
            raw.send(Cancel(target=request_id.hex()), b"c" + request_id)
        ends: Counter[bytes] = Counter()
        while len(ends) < 120:
            request_id, message = raw.receive()
            if TYPE_NAMES[type(message)] not in STREAMING:
                ends[request_id] += 1
        assert set(ends.values()) == {1}
    assert gone(daemon)


def test_cancel_is_idempotent_and_knows_only_own_requests(daemon, raw):
    raw.send(Generate(prompt="manual"))
    run = daemon.backend.run("manual")
    with RawClient(daemon.address) as other:
        other.send(Cancel(target=b"1".hex()))
        other.until(Ok)
    for target in ("", "zz", "31313131", "ff" * 64):
        raw.send(Cancel(target=target), b"c")
        raw.until(Ok, b"c")
    assert not run.cancelled.is_set()
    for _ in range(3):
        raw.send(Cancel(target=b"1".hex()), b"c")
    assert raw.until(Done).finish_reason == "cancelled"
    raw.send(Cancel(target=b"1".hex()), b"d")
    raw.until(Ok, b"d")


@pytest.mark.parametrize("how", ["cancelled", "deadline"])
def test_a_request_whose_submit_has_not_returned_ends_at_once(daemon, raw, how):
    """Loading its model may take long. The backend is told to cancel as soon as it has the request."""
    entered, leave = threading.Event(), threading.Event()
    submit = daemon.backend.submit

    def slow_submit(request, emit, client):
        entered.set()
        assert leave.wait(PATIENCE_S)
        return submit(request, emit, client)

    daemon.backend.submit = slow_submit
    if how == "deadline":
        raw.send(Generate(prompt="forever", deadline_s=0.001))
        assert raw.until(Done).finish_reason == "deadline"
    else:
        raw.send(Generate(prompt="forever"))
        assert entered.wait(PATIENCE_S)
        raw.send(Cancel(target=b"1".hex()), b"c")
        assert raw.until(Error).code == "cancelled"
        raw.until(Ok, b"c")
    leave.set()
    assert daemon.backend.run("forever").cancelled.wait(PATIENCE_S)
    assert gone(daemon)


def test_who_waits_for_a_model_to_load_keeps_no_worker_from_others(daemon, raw):
    leave, submit = threading.Event(), daemon.backend.submit

    def slow_submit(request, emit, client):
        assert request.model != "slow" or leave.wait(PATIENCE_S)
        return submit(request, emit, client)

    daemon.backend.submit = slow_submit
    slow = [b"s%d" % number for number in range(2 * QUICK.workers + 1)]
    for request_id in slow:
        raw.send(Generate(prompt="one", model="slow"), request_id)
    raw.send(Generate(prompt="late", model="slow", deadline_s=0.001), b"late")
    raw.send(Generate(prompt="two"), b"fast")
    ends: dict[bytes, str] = {}
    while len(ends) < 2:
        request_id, message = raw.receive()
        if isinstance(message, Done):
            ends[request_id] = message.finish_reason
    assert ends == {b"fast": "stop", b"late": "deadline"}
    leave.set()
    while len(ends) < 2 + len(slow):
        request_id, message = raw.receive()
        if isinstance(message, Done):
            ends[request_id] = message.finish_reason
    assert {ends[request_id] for request_id in slow} == {"stop"}
    assert gone(daemon)
    assert not daemon.server._dispatcher._pending_bytes


def test_pings_and_status_are_answered_while_models_load(daemon, raw):
    raw.send(Load(model="slow"), b"load")
    assert daemon.backend.loading.wait(PATIENCE_S)
    raw.send(Ping(), b"p")
    raw.until(Pong, b"p")
    raw.send(Status(), b"s")
    assert not raw.until(StatusReply, b"s").draining
    waiting = raw.until(Waiting, b"load")
    assert waiting.seconds >= QUICK.keepalive_s
    daemon.backend.release_load.set()
    raw.until(Loaded, b"load")


def test_messages_after_the_terminal_one_are_swallowed(daemon, raw):
    raw.send(Generate(prompt="manual"))
    run = daemon.backend.run("manual")
    run.emit(done())
    run.emit(done())
    run.emit(Token(text="late", ids=[1]))
    raw.until(Done)
    raw.send(Ping(), b"p")
    assert raw.receive()[0] == b"p"


# --- absent and slow clients ----------------------------------------------------------------------------


def test_a_client_killed_mid_stream_is_cancelled(daemon):
    raw = RawClient(daemon.address)
    raw.send(Generate(prompt="forever"))
    raw.until(Token)
    raw.close()
    assert daemon.backend.run("forever").cancelled.wait(PATIENCE_S)
    assert gone(daemon)


def test_a_client_killed_while_nothing_is_sent_is_cancelled(daemon):
    raw = RawClient(daemon.address)
    raw.send(Generate(prompt="manual"))
    run = daemon.backend.run("manual")
    raw.close()
    assert run.cancelled.wait(PATIENCE_S)
    assert gone(daemon)


def test_a_slow_reader_stalls_nobody_and_loses_its_requests():
    """Tokens that wait for it are joined; when they take too much memory its requests end with an error."""
    limits = replace(QUICK, queue_messages=2, outbox_s=PATIENCE_S, outbox_bytes=1 << 20)
    with running(limits=limits) as daemon, RawClient(daemon.address, RCVHWM=2, RCVBUF=4096) as slow:
        slow.send(Generate(prompt="manual"))
        run = daemon.backend.run("manual")
        sent = 0
        with Client(daemon.address, timeout_s=PATIENCE_S) as other:
            while not run.cancelled.is_set():
                for _ in range(100):
                    run.emit(Token(text="x" * 1000, ids=[sent]))
                    sent += 1
                assert other.text("hi")[0] == "hi "
                assert sent < 1_000_000
        ids, messages = [], 0
        while True:
            _, message = slow.receive()
            if isinstance(message, Token):
                assert len(message.text) == 1000 * len(message.ids)
                ids += message.ids
                messages += 1
            if isinstance(message, Error):
                break
        assert "reader too slow" in message.message
        assert ids == list(range(len(ids)))
        assert messages < len(ids)  # some were joined
        assert gone(daemon)


def test_a_reader_that_stops_for_good_is_forgotten():
    limits = replace(QUICK, queue_messages=2, outbox_s=0.2)
    with running(limits=limits) as daemon, RawClient(daemon.address, RCVHWM=2, RCVBUF=4096) as stuck:
        stuck.send(Generate(prompt="manual"))
        run = daemon.backend.run("manual")
        while not run.cancelled.is_set():
            run.emit(Token(text="x" * 10_000, ids=[1]))
            run.cancelled.wait(0.001)
        assert gone(daemon)


def test_a_slow_but_reading_client_gets_everything():
    limits = replace(QUICK, queue_messages=2, outbox_s=PATIENCE_S)
    with running(limits=limits) as daemon, RawClient(daemon.address, RCVHWM=2, RCVBUF=4096) as slow:
        slow.send(Generate(prompt="manual"))
        run = daemon.backend.run("manual")
        run.emit(Accepted(model="m", prompt_tokens=1))
        for n in range(3000):
            run.emit(Token(text=f"{n} " + "x" * 200, ids=[n]))
        run.emit(done())
        ids: list[int] = []
        message: object = None
        while not isinstance(message, Done):
            _, message = slow.receive()
            if isinstance(message, Token):
                ids += message.ids
        assert ids == list(range(3000))


def test_a_stage_is_told_to_who_asked_for_it(monkeypatch):
    monkeypatch.setattr("shoal.daemon.server.in_flight.STAGE_S", 0.0)
    heard = []
    with running() as daemon, Client(daemon.address, timeout_s=PATIENCE_S) as client:
        assert "progress" in client.hello().features

        def hear(stage):
            heard.append(stage)
            daemon.backend.release_load.set()

        assert client.load("slow", heard=hear).model.name == "slow"
    assert (heard[0].doing, heard[0].done, heard[0].total) == ("loading", 1, 3)
    assert heard[0].seconds > 0


@pytest.mark.parametrize("asked", [False, True])
def test_the_progress_of_a_prompt_is_told_to_who_asked_for_it(monkeypatch, asked):
    """Everybody else gets `waiting`, as clients that are older do."""
    monkeypatch.setattr("shoal.daemon.server.in_flight.STAGE_S", 0.0)
    with running() as daemon, RawClient(daemon.address) as client:
        client.send(Generate(prompt="manual", progress=asked))
        run = daemon.backend.run("manual")
        run.emit(Accepted(model="m", prompt_tokens=5))
        told = client.until(Stage if asked else Waiting)
        assert told.seconds >= 0  # in thousandths, and it may be told at once
        if asked:
            assert (told.doing, told.done, told.total, told.tokens_per_s) == ("prompt", 2, 5, 4.0)
        run.emit(done())
        while not isinstance(message := client.receive()[1], Done):
            assert type(message) in (Accepted, Stage if asked else Waiting)


def test_stages_nobody_reads_are_one():
    exchange = Exchange(b"1")
    for number in range(5):
        exchange.put(Stage(doing="reading", done=number, total=9), terminal=False)
    exchange.put(Token(text="x", ids=[1]), terminal=False)
    assert [getattr(message, "done", None) for message in exchange.take()] == [4, None]
