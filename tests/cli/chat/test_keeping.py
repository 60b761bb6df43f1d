"""`shoal chat`: no text is taken for something else, and nothing that happens loses a conversation."""

from __future__ import annotations

import errno
import os

import pytest
from click.testing import CliRunner
from fakes.chat_fakes import Daemon, asked, put, talk

from shoal.cli.chat.commands import ChatState
from shoal.cli.chat.line_input import Said
from shoal.cli.verbs import cli
from shoal.comm.errors import NoDaemon


@pytest.mark.parametrize(
    "text", ["/tmp is full", "/etc/hosts", " /clear", "/", "// a comment", "/usr/bin/env is what?", "/save/"]
)
def test_text_that_begins_as_a_command_does(daemon: Daemon, state: ChatState, text: str) -> None:
    talk(state, Said(text, literal=text == "/"), Said("/exit", literal=True))
    assert [messages[-1] for messages in asked(daemon)] == [("user", text), ("user", "/exit")]


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("/quit", "there is no command /quit (did you mean /exit?"),
        ("/cler", "there is no command /cler (did you mean /clear?"),
        ("/modle other", "there is no command /modle (did you mean /model?"),
        ("/stop", "there is no command /stop (/help lists them; a space before it makes it text)"),
        ("/clear the floor", "/clear takes no more words (a space before it makes it text)"),
    ],
)
def test_what_looks_like_a_command_changes_nothing(
    daemon: Daemon, state: ChatState, capsys: pytest.CaptureFixture[str], typed: str, said: str
) -> None:
    assert talk(state, "Hi", typed) == 2
    assert said in capsys.readouterr().err
    assert len(state.conversation.turns) == len(asked(daemon)) == 1


def test_an_error_of_any_kind_ends_its_own_turn_only(
    daemon: Daemon, state: ChatState, capsys: pytest.CaptureFixture[str]
) -> None:
    daemon.client.answers.fails = ZeroDivisionError("oops")
    assert talk(state, "Hi", lambda: setattr(daemon.client.answers, "fails", None), "And?") == 0
    assert "unexpected error: ZeroDivisionError: oops" in capsys.readouterr().err
    assert [turn.user for turn in state.conversation.turns] == ["Hi", "And?"]


@pytest.mark.parametrize("end", [OSError(5, "Input/output error"), SystemExit(129)])
def test_a_chat_that_its_user_does_not_end_keeps_the_conversation(
    state: ChatState, end: BaseException
) -> None:
    def cut() -> None:
        raise end

    with pytest.raises(type(end)):
        talk(state, "Hi", cut)
    with pytest.raises(KeyboardInterrupt):
        talk(state, "Again", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    talk(state, "/load rescued")
    assert [turn.user for turn in state.conversation.turns] == ["Hi"]


@pytest.mark.parametrize("trouble", ["full", "directory", "closed", "no directory"])
def test_a_conversation_that_cannot_be_saved_goes_on(
    state: ChatState, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    sessions = state.home.sessions
    code = {"full": 3, "no directory": 3}.get(trouble, 1)
    if trouble == "no directory":
        sessions.parent.mkdir(parents=True)
        sessions.write_bytes(b"")
    else:
        (sessions / "mine.json").mkdir(parents=True)
    if trouble in ("full", "closed"):

        def refuse(*_: object) -> None:
            raise OSError(errno.ENOSPC if trouble == "full" else errno.EACCES, trouble)

        monkeypatch.setattr(os, "open", refuse)
    assert talk(state, "Hi", "/save mine") == code
    monkeypatch.undo()
    assert "mine" in capsys.readouterr().err or trouble == "no directory"
    assert [turn.user for turn in state.conversation.turns] == ["Hi"]
    if trouble != "no directory":
        assert [path.name for path in sessions.iterdir()] == ["mine.json"]


def test_what_is_no_saved_conversation_is_not_loaded(
    state: ChatState, capsys: pytest.CaptureFixture[str]
) -> None:
    state.home.sessions.mkdir(parents=True)
    place = state.home.sessions / "odd.json"
    deep = b'{"x":' + b"[" * 100_000
    no_utf_8, no_text = b'{"turns":[{"user":"\xff","assistant":""}]}', b'{"turns":[{"user":"\\ud800"}]}'
    for data in (b"{", no_utf_8, no_text, deep):
        place.write_bytes(data)
        assert talk(state, "/load odd") == 1
        assert f"{place} is not a saved conversation" in capsys.readouterr().err
    place.unlink()
    os.mkfifo(place)  # it would be waited for
    assert talk(state, "Hi", "/load odd") == 1
    assert f"{place} is not a file" in capsys.readouterr().err
    assert len(state.conversation.turns) == 1


def test_another_conversation_of_the_same_name_is_kept(
    state: ChatState, capsys: pytest.CaptureFixture[str]
) -> None:
    talk(state, "one", "/save mine", "two", "/save mine", "/clear")
    assert "older" not in capsys.readouterr().err
    talk(state, "three", "/save mine")
    assert "the one before is mine.older now" in capsys.readouterr().err
    talk(state, "/load mine.older")
    assert [turn.user for turn in state.conversation.turns] == ["one", "two"]


@pytest.mark.parametrize("end", [KeyboardInterrupt(), NoDaemon("gone")])
def test_an_answer_that_was_stopped_counts(
    daemon: Daemon, state: ChatState, capsys: pytest.CaptureFixture[str], end: BaseException
) -> None:
    talk(state, "/stats")
    assert "last answer" not in capsys.readouterr().err
    daemon.client.answers.fails = end
    talk(state, "Hi", lambda: setattr(daemon.client.answers, "fails", None), "/stats")
    said = capsys.readouterr().err
    assert "last answer: 7 prompt tokens · first token after 0.0" in said
    assert "2 tokens" in said
    assert " · stopped\n" in said
    assert "this conversation: 1 turn; this chat: 1 answer of 2 tokens\n" in said
    daemon.client.answers.words = ()
    talk(state, "Nothing comes", "/stats")
    assert "this conversation: 1 turn; this chat: 1 answer of 2 tokens\n" in capsys.readouterr().err


def test_bytes_from_a_pipe_that_are_no_utf8_end_nothing(daemon: Daemon, state: ChatState) -> None:
    put(state, "tiny")
    piped = "caf\udce9\n  two \\\n\tlines \n/clear\n".encode("utf-8", "surrogateescape")
    result = CliRunner().invoke(cli, ["chat", "tiny"], input=piped, prog_name="shoal")
    assert result.exit_code == 0
    assert [messages[-1][1] for messages in asked(daemon)] == ["caf\ufffd", "  two \n\tlines "]
    assert "no UTF-8 text" in result.stderr


def test_the_ending_of_the_file_is_no_part_of_the_name(
    state: ChatState, capsys: pytest.CaptureFixture[str]
) -> None:
    talk(state, "one", "/save a.json", "/clear", "/load a", "/load a.json", "/load")
    assert [path.name for path in state.home.sessions.iterdir()] == ["a.json"]
    assert len(state.conversation.turns) == 1
    said = capsys.readouterr().err
    assert "saved as a; /load a brings it back" in said
    assert said.count("loaded a, 1 turn") == 2
    assert talk(state, "/save .json", "/save ../a.json") == 2
