"""A conversation's context is its own, whatever becomes of the model; and answers that only repeat themselves."""

from __future__ import annotations

import pytest
from fakes.chat_fakes import Daemon, put, talk
from fakes.cli_fakes import FakeAnswers, FakeClient, model_status

from shoal.cli.chat.commands import ChatState
from shoal.cli.chat.conversation import Conversation
from shoal.cli.chat.link import ChatLink
from shoal.cli.chat.loop import toolbar


@pytest.fixture
def client(daemon: Daemon) -> FakeClient:
    """Of a daemon that has "tiny" with a context of 100 tokens."""
    return daemon.client


def test_the_context_can_be_changed(
    client: FakeClient, state: ChatState, capsys: pytest.CaptureFixture[str]
) -> None:
    assert talk(state, "/ctx", "/ctx 64", "Hi", "/ctx") == 0
    said = capsys.readouterr().err
    assert "a context of 100 tokens, 0 in use; /ctx N changes it\n" in said
    assert "this conversation has a context of 64 tokens from now on" in said
    assert "a context of 64 tokens, 9 in use; /ctx N changes it; tiny holds 100\n" in said
    assert client.answers.requests[-1].context_tokens == 64
    assert toolbar(state).endswith("context 9/64 (14%) · /help")
    wrong = ("many", "0", "-1", "²", "9" * 5000)
    assert [talk(state, f"/ctx {number}") for number in wrong] == [2] * len(wrong)
    assert "must be a number of tokens, from 1 to 100" in capsys.readouterr().err
    assert state.link.context_tokens == 64


def test_a_conversation_cannot_change_the_model_of_others(
    client: FakeClient, state: ChatState, capsys: pytest.CaptureFixture[str]
) -> None:
    """More than the model is loaded with is refused, and the act that changes it for all is named."""
    put(state, "other")
    assert talk(state, "/ctx 64", "/ctx 101") == 3
    said = capsys.readouterr().err
    assert "a context of 101 tokens was asked for, tiny is loaded with 100, for all who use it" in said
    assert "(shoal load tiny --ctx 101 loads it anew, for all of them)" in said
    assert state.link.context_tokens == 64
    client.models["tiny"] = model_status(context_limit_tokens=100)
    assert talk(state, "/ctx 101") == 3
    assert (
        "a context of 101 tokens was asked for, the model was made for 100 (use /ctx 100 or less)"
        in capsys.readouterr().err
    )
    client.load("tiny", 50)  # somebody does so, with less
    talk(state, "Hi", "/model other", "And?")
    assert [request.context_tokens for request in client.answers.requests] == [50, 100]
    assert state.link.context is None
    assert client.loads == [("tiny", 50)]


def test_a_chat_of_its_own_gets_more_context_at_once(state: ChatState) -> None:
    """Nobody else uses its model. Going over to another begins with that model's own context."""
    here = FakeAnswers("Here.")
    link = ChatLink(state.home, here)  # type: ignore[arg-type]
    mine = ChatState(state.home, link, Conversation())
    link.load("tiny", 80)
    put(state, "other")
    here.status = model_status(context_tokens=200)
    assert talk(mine, "/ctx 60", "/ctx 150") == 0
    assert here.contexts == [80]
    here.status = model_status(context_tokens=100)
    assert talk(mine, "/ctx 150") == 3  # what a real one would refuse itself
    assert here.contexts == [80, 150]
    assert talk(mine, "/model other") == 0
    assert here.contexts == [80, 150, None]


def test_an_answer_that_only_repeats_itself_is_ended_and_the_chat_goes_on(
    client: FakeClient, state: ChatState, capsys: pytest.CaptureFixture[str]
) -> None:
    client.answers.reason = "repetition"
    assert talk(state, "Hi") == 0
    said = "the answer only repeated itself, so it was ended (shoal chat --keep-repeating lets it go on)\n"
    assert capsys.readouterr().err == said
    assert [turn.complete for turn in state.conversation.turns] == [True]
    talk(state, "And?", keep_repeating=True)
    assert [request.stop_repeating for request in client.answers.requests] == [True, False]
