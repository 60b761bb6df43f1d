"""How much of the context a conversation is said to take before anything is asked."""

from __future__ import annotations

import pytest
from fakes.chat_fakes import talk

from shoal.cli.chat.commands import ChatState
from shoal.cli.chat.loop import toolbar


def test_what_is_loaded_is_counted(state: ChatState, capsys: pytest.CaptureFixture[str]) -> None:
    talk(state, "one two three", "/save it", "/clear")
    assert state.used_tokens == 0
    talk(state, "/load it")
    words = sum(len(message.content.split()) for message in state.conversation.so_far())
    assert words >= 3
    assert state.used_tokens == words
    assert f"context {words}/100" in toolbar(state)
    talk(state, "/system be brief")
    assert state.used_tokens == words + 2
    talk(state, "/clear")
    assert state.used_tokens == 0
