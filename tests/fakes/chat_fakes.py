"""A chat without a model: a daemon that only pretends, a user with a script, and the state between them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest

from shoal import client as client_room
from shoal.cli import background
from shoal.cli.chat.commands import ChatState
from shoal.cli.chat.line_input import Said
from shoal.cli.chat.loop import ChatLoop
from shoal.cli.options import AnswerOptions
from shoal.comm.errors import NoDaemon
from shoal.comm.home import Home
from shoal.comm.messages import Chat

from .cli_fakes import FakeClient, model_status


class Daemon:
    """A daemon that runs or does not, and can be started."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.up = True
        self.starts = 0
        self.client = FakeClient(model_status("tiny"))
        monkeypatch.setattr(client_room, "Client", self.connect)
        monkeypatch.setattr(background, "running_pid", lambda home: 42 if self.up else None)
        monkeypatch.setattr(background, "start", self.start)

    def connect(self, *_: Any, **__: Any) -> FakeClient:
        if not self.up:
            raise NoDaemon("no daemon answers")
        return self.client

    def start(self, home: Home, arguments: list[str]) -> int:
        self.starts += 1
        self.up = True
        self.client.fails = None
        self.client.models.clear()
        return 43

    def die(self) -> None:
        self.up = False
        self.client.fails = NoDaemon("the daemon went away")


class Script:
    """A user who says these texts, calls these functions in between, and then leaves."""

    def __init__(self, *said: str | Said | Callable[[], None]) -> None:
        self.said = list(said)

    def read(self) -> Said | None:
        while self.said:
            said = self.said.pop(0)
            if isinstance(said, Said):
                return said
            if isinstance(said, str):
                return Said(said)
            said()
        return None

    def listening(self) -> AbstractContextManager[None]:
        return nullcontext()


def talk(state: ChatState, *said: str | Said | Callable[[], None], **options: Any) -> int:
    return ChatLoop(state, AnswerOptions(**options), Script(*said)).run()


def asked(daemon: Daemon) -> list[list[tuple[str, Any]]]:
    requests = daemon.client.answers.requests
    return [
        [(m.role, m.content) for m in request.messages] for request in requests if isinstance(request, Chat)
    ]


def put(state: ChatState, name: str) -> None:
    with state.library.stage(name, "test") as staging:
        (staging.path / f"{name}.gguf").write_bytes(b"GGUF")
        staging.commit("gguf", {f"{name}.gguf": "0" * 64})
