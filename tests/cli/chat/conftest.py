"""The pretended daemon, and a chat that uses it."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from fakes.chat_fakes import Daemon

from shoal.cli.chat.commands import ChatState
from shoal.cli.chat.conversation import Conversation
from shoal.cli.chat.link import ChatLink
from shoal.comm.home import Home


@pytest.fixture(autouse=True)
def interrupts() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt also where a shell runs the tests in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def daemon(monkeypatch: pytest.MonkeyPatch) -> Daemon:
    return Daemon(monkeypatch)


@pytest.fixture
def state(daemon: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ChatState:
    home = Home(tmp_path / "home")
    monkeypatch.setenv("SHOAL_HOME", str(home.root))
    made = ChatState(home, ChatLink(home), Conversation())
    made.link.load("tiny", None)
    return made
