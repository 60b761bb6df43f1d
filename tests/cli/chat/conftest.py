"""The pretended daemon, and a chat that uses it."""

from __future__ import annotations

from pathlib import Path

import pytest
from fakes.chat_fakes import Daemon

from shoal.cli.chat.commands import ChatState
from shoal.cli.chat.conversation import Conversation
from shoal.cli.chat.link import ChatLink
from shoal.comm.home import Home


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
