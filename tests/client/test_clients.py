"""The clients against a server with a scripted backend: texts, errors, cancelling, silence, absence."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from unittest.mock import patch

import pytest
from fakes.api_fakes import PATIENCE_S, RunningServer, done, ipc, running

from shoal.client import AsyncClient, Client
from shoal.client.connection import CONNECT_S
from shoal.client.session import generate_request
from shoal.comm import wire
from shoal.comm.errors import NoDaemon, RequestFailed, TimedOut
from shoal.comm.messages import Accepted, Chat, ChatMessage, Done, Generate, Message, Sampling, Token


@pytest.fixture
def daemon(tmp_path) -> Iterator[RunningServer]:
    with running(ipc(tmp_path)) as it:
        yield it


@pytest.fixture
def client(daemon) -> Iterator[Client]:
    with Client(daemon.address, timeout_s=PATIENCE_S) as it:
        yield it


def test_a_stream_is_accepted_then_tokens_then_done(client):
    messages = list(client.generate("one two three"))
    assert isinstance(messages[0], Accepted)
    assert all(isinstance(message, Token) for message in messages[1:-1])
    assert isinstance(messages[-1], Done)
    assert "".join(m.text for m in messages[1:-1]) == "one two three "
    assert [i for m in messages[1:-1] for i in m.ids] == [0, 1, 2]


def test_text_of_a_prompt_and_of_a_conversation(client):
    assert client.text("a b")[0] == "a b "
    text, end = client.text(messages=[{"role": "user", "content": "c d"}], temperature=0.0)
    assert text == "c d "
    assert end.finish_reason == "stop"


@pytest.mark.parametrize("messages", ["hi", ["hi"], {"role": "user", "content": "hi"}, [None], [5]])
def test_what_is_no_list_of_messages(client, messages):
    with pytest.raises(RequestFailed, match=r"^messages\[0\]=.*: must be a message, \{") as failed:
        client.text(messages=messages)
    assert failed.value.code == "bad_request"


def test_a_prompt_beside_messages_is_not_dropped(client):
    with pytest.raises(RequestFailed, match="exactly one of them must be given, not both"):
        client.text("a", messages=[{"role": "user", "content": "b"}])


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (lambda client: client.text(), "^prompt, messages: exactly one of them must be given, not neither"),
        (lambda client: client.text(prompt_tokens=[1], messages=[]), "^prompt, messages: exactly one"),
        (lambda client: client.generate(), "^prompt: exactly one of prompt, prompt_tokens must be given"),
        (lambda client: client.load("m", 5, least_context=5), "^least_context: give this or context"),
        (lambda client: client.tokenize(), "^text: exactly one of text, tokens, messages must be given"),
        (lambda client: client.text("hi\udcff"), r'cannot encode: prompt="hi\\udcff": must be text without'),
        (lambda client: client.text("a", model="\udcff"), r'model="\\udcff": must be text'),
        (lambda client: client.text("a", stop=["b", "\ud800"]), r'stop\[1\]="\\ud800": must be text'),
        (
            lambda client: client.text("a", stop=[object()]),
            r"stop\[0\]=<object .*Encoding objects of type object",
        ),
        (lambda client: client.text(prompt_tokens=[1, 1 << 70]), r"prompt_tokens\[1\]=1180.*serialize ints"),
        (lambda client: client.load("\udcff"), r'model="\\udcff": must be text'),
        (
            lambda client: client.text(messages=[{"role": "user", "content": "\udcff"}]),
            r'messages\[0\].content="\\udcff": must be text',
        ),
        (
            lambda client: client.text(messages=[{"role": "user", "content": "a", "\udcff": 1}]),
            r"messages\[0\]: its keys must be text",
        ),
    ],
)
def test_what_a_client_cannot_ask_names_its_field(client, ask, said):
    with pytest.raises(RequestFailed, match=said) as failed:
        ask(client)
    assert failed.value.code == "bad_request"


def test_a_request_that_exists_already_is_sent_as_it_is(client, daemon):
    for request in (
        Generate(prompt="one two", max_tokens=9, sampling=Sampling(seed=1)),
        Chat(messages=[ChatMessage(role="user", content="one two")], tools=[{"name": "t"}], priority=2),
    ):
        with patch.object(daemon.backend, "submit", wraps=daemon.backend.submit) as submit:
            *_, last = client.stream(request)
            assert last.usage.completion_tokens == 2
            assert submit.call_args[0][0] == request

            async def sent_by_the_other(request=request) -> list[Message]:
                async with AsyncClient(daemon.address, timeout_s=PATIENCE_S) as client:
                    return [message async for message in client.stream(request)]

            *_, last = asyncio.run(sent_by_the_other())
            assert last.usage.completion_tokens == 2
            assert submit.call_args[0][0] == request


def test_the_text_of_a_prompt_in_tokens(client, daemon):
    assert client.text(prompt_tokens=[1, 2], max_tokens=1)[0].strip() == ""


def test_the_other_requests(client):
    assert client.tokenize("ab").ids == [97, 98]
    assert client.tokenize(tokens=[97]).text == "a"
    assert client.load("m").model.name == "m"
    client.unload("m")
    assert client.status().models[0].name == "fake"
    assert client.ping().time_s > 0
    assert client.hello().version == 1


def test_errors_carry_code_and_hint_and_leave_the_client_usable(client):
    with pytest.raises(RequestFailed, match="must be at most 8") as failed:
        client.text("refuse")
    assert (failed.value.code, failed.value.hint) == ("context_overflow", "shorten it")
    with pytest.raises(RequestFailed, match="max_tokens=0: must be int >= 1"):
        client.text("x", max_tokens=0)
    with pytest.raises(RequestFailed, match="no such model"):
        client.load("missing")
    for unsendable in ("\udcff", "x" * (wire.MAX_REQUEST_BYTES + 1)):
        with pytest.raises(RequestFailed, match=r"cannot encode|must be at most") as failed:
            client.text(unsendable)
        assert failed.value.code == "bad_request"
    assert client.text("still here")[0] == "still here "


def test_streams_on_one_client_can_be_read_in_turns(client):
    streams = [client.generate(f"a{n} b{n} c{n}") for n in range(5)]
    texts = [""] * 5
    for _ in range(5):
        for n, stream in enumerate(streams):
            message = next(stream, None)
            if isinstance(message, Token):
                texts[n] += message.text
    for n, stream in enumerate(streams):
        texts[n] += "".join(m.text for m in stream if isinstance(m, Token))
    assert texts == [f"a{n} b{n} c{n} " for n in range(5)]


def test_many_requests_are_under_way_at_once_and_fail_one_by_one(client):
    prompts = [f"a{n} b{n}" for n in range(6)] + [
        "refuse",
        "crash",
        "x" * (wire.MAX_REQUEST_BYTES + 1),
        "last one",
    ]
    coming = [None, *enumerate(Generate(prompt=prompt) for prompt in prompts)]
    texts, ends = [""] * len(prompts), {}
    for key, event in client.many(iter(coming), 3):
        if isinstance(event, Token):
            texts[key] += event.text
        elif isinstance(event, Done | RequestFailed):
            assert key not in ends
            ends[key] = event
    assert texts == [f"a{n} b{n} " for n in range(6)] + ["", "", "", "last one "]
    assert [getattr(ends[n], "code", "done") for n in range(len(prompts))] == [
        *["done"] * 6, "context_overflow", "internal", "bad_request", "done"
    ]  # fmt: skip


def test_leaving_many_cancels_those_under_way(client, daemon):
    requests = ((n, Generate(prompt=f"forever {n}")) for n in range(3))
    many = client.many(requests, 2)
    assert isinstance(next(many)[1], Accepted)
    many.close()
    for n in range(2):
        assert daemon.backend.run(f"forever {n}").cancelled.wait(PATIENCE_S)
    assert client.text("next")[0] == "next "
    assert list(client.many(iter([]), 2)) == []


def test_many_end_when_the_daemon_goes(client, daemon):
    many = client.many(iter([(0, Generate(prompt="forever"))]), 2)
    next(many)
    client.close()
    with pytest.raises(NoDaemon):
        list(many)


def test_closing_a_stream_cancels_and_the_client_goes_on(client, daemon):
    stream = client.generate("forever")
    assert isinstance(next(stream), Accepted)
    next(stream)
    stream.close()
    assert daemon.backend.run("forever").cancelled.wait(PATIENCE_S)
    assert client.text("next")[0] == "next "


def test_leaving_a_loop_cancels(client, daemon):
    for message in client.generate("forever"):
        if isinstance(message, Token):
            break
    assert daemon.backend.run("forever").cancelled.wait(PATIENCE_S)


def test_closing_the_client_cancels(daemon):
    with Client(daemon.address) as client:
        stream = client.generate("forever")
        next(stream)
    assert daemon.backend.run("forever").cancelled.wait(PATIENCE_S)
    with pytest.raises(NoDaemon):
        list(stream)


def test_sampling_fields_may_be_given_directly():
    request = generate_request("x", None, {"temperature": 0.5, "max_tokens": 3})
    assert request.sampling == Sampling(temperature=0.5)
    assert request.max_tokens == 3
    with pytest.raises(TypeError, match="give one of the two"):
        generate_request("x", None, {"temperature": 0.5, "sampling": Sampling()})


def test_no_daemon_is_told_at_once(tmp_path):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        for address in (f"ipc://{tmp_path}/nothing.sock", f"tcp://127.0.0.1:{port}"):
            began = time.monotonic()
            with pytest.raises(NoDaemon, match="no daemon answers"), Client(address) as client:
                client.ping()
            assert time.monotonic() - began < CONNECT_S - 0.5


def test_a_listener_that_says_nothing_is_no_daemon():
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        address = f"tcp://127.0.0.1:{mute.getsockname()[1]}"
        with pytest.raises(NoDaemon), Client(address) as client:
            client.ping()


def test_silence_is_no_timeout_while_the_daemon_says_waiting(daemon):
    with Client(daemon.address, timeout_s=1.0) as client:
        texts: list[str] = []
        reader = threading.Thread(target=lambda: texts.append(client.text("manual")[0]))
        reader.start()
        run = daemon.backend.run("manual")
        reader.join(2.0)  # twice the timeout
        assert reader.is_alive()
        run.emit(Token(text="late", ids=[1]))
        run.emit(done())
        reader.join(PATIENCE_S)
        assert texts == ["late"]


def test_a_daemon_that_stalls_is_timed_out(daemon, monkeypatch):
    with Client(daemon.address, timeout_s=PATIENCE_S) as client:
        client.ping()
        client._timeout_s = 0.3
        monkeypatch.setattr(daemon.server._outbox, "_keep_alive", lambda now_s: None)
        with pytest.raises(TimedOut, match=r"silent for 0\.3 s"):
            client.text("manual")
    assert daemon.backend.run("manual").cancelled.wait(PATIENCE_S)


def test_a_daemon_that_ends_is_noticed_and_a_new_one_found(tmp_path):
    client = Client(ipc(tmp_path), timeout_s=PATIENCE_S)
    with running(ipc(tmp_path)):
        streams = client.generate("forever 1"), client.generate("forever 2")
        for stream in streams:
            next(stream)
    for stream in streams:
        with pytest.raises((RequestFailed, NoDaemon)):
            list(stream)
    with pytest.raises(NoDaemon):
        client.ping()
    with running(ipc(tmp_path)):
        client.ping()
    with running(ipc(tmp_path)):
        with contextlib.suppress(NoDaemon):  # it may learn only now that the first one has ended
            client.ping()
        client.ping()
    client.close()


def test_the_last_reply_of_a_daemon_that_has_gone_is_read(tmp_path):
    with running(ipc(tmp_path)) as daemon, Client(daemon.address) as client:
        stream = client.generate("forever")
        assert isinstance(next(stream), Accepted)
        daemon.server.stop()
        daemon.server.stop()
        daemon.thread.join(PATIENCE_S)
        with pytest.raises(RequestFailed) as failed:
            list(stream)
        assert failed.value.code == "shutting_down"
        with pytest.raises(NoDaemon):
            client.ping()


def test_async_the_last_reply_of_a_daemon_that_has_gone_is_read(tmp_path):
    async def ask(daemon: RunningServer) -> None:
        async with AsyncClient(daemon.address) as client:
            stream = client.generate("forever")
            assert isinstance(await anext(stream), Accepted)
            daemon.server.stop()
            daemon.server.stop()
            daemon.thread.join(PATIENCE_S)  # and this loop reads nothing meanwhile
            with pytest.raises(RequestFailed) as failed:
                async for _ in stream:
                    pass
            assert failed.value.code == "shutting_down"

    with running(ipc(tmp_path)) as daemon:
        asyncio.run(ask(daemon))


def test_importing_the_client_is_cheap():
    code = (
        "import sys, shoal.client; "
        "print([m for m in ('torch', 'numpy', 'asyncio', 'transformers') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# --- asyncio --------------------------------------------------------------------------------------------


def test_async_streams_run_side_by_side(daemon):
    async def main() -> list[str]:
        async with AsyncClient(daemon.address, timeout_s=PATIENCE_S) as client:
            answers = await asyncio.gather(*(client.text(f"a{n} b{n} c{n}") for n in range(20)))
        return [text for text, _ in answers]

    assert asyncio.run(main()) == [f"a{n} b{n} c{n} " for n in range(20)]


def test_async_requests_and_errors(daemon):
    async def main() -> None:
        async with AsyncClient(daemon.address, timeout_s=PATIENCE_S) as client:
            assert (await client.tokenize("ab")).ids == [97, 98]
            assert (await client.load("m")).model.name == "m"
            await client.unload()
            assert (await client.status()).models
            assert (await client.hello()).version == 1
            with pytest.raises(RequestFailed, match="must be at most 8"):
                await client.text("refuse")
            assert (await client.text(messages=[{"role": "user", "content": "x"}]))[0] == "x "

    asyncio.run(main())


def test_async_closing_a_stream_or_cancelling_its_task_cancels(daemon):
    async def main() -> None:
        async with AsyncClient(daemon.address, timeout_s=PATIENCE_S) as client:
            async with contextlib.aclosing(client.generate("forever 1")) as stream:
                async for message in stream:
                    if isinstance(message, Token):
                        break
            task = asyncio.create_task(client.text("forever 2"))
            await asyncio.to_thread(daemon.backend.run, "forever 2")
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            for prompt in ("forever 1", "forever 2"):
                cancelled = daemon.backend.run(prompt).cancelled
                assert await asyncio.to_thread(cancelled.wait, PATIENCE_S)
            assert (await client.text("next"))[0] == "next "

    asyncio.run(main())


def test_async_no_daemon_and_a_daemon_that_ends(tmp_path):
    async def main() -> None:
        async with AsyncClient(ipc(tmp_path)) as client:
            with pytest.raises(NoDaemon):
                await client.ping()
            with running(ipc(tmp_path)) as daemon:
                await client.ping()
                task = asyncio.create_task(client.text("manual"))
                await asyncio.to_thread(daemon.backend.run, "manual")
            with pytest.raises((RequestFailed, NoDaemon)):
                await task
            with running(ipc(tmp_path)):
                with contextlib.suppress(NoDaemon):  # it may learn only now that the first one has ended
                    await client.ping()
                await client.ping()

    asyncio.run(main())


def test_async_silence_times_out(daemon, monkeypatch):
    async def main() -> None:
        async with AsyncClient(daemon.address, timeout_s=PATIENCE_S) as client:
            await client.ping()
            client._timeout_s = 0.3
            monkeypatch.setattr(daemon.server._outbox, "_keep_alive", lambda now_s: None)
            with pytest.raises(TimedOut):
                await client.text("manual")

    asyncio.run(main())
