"""`shoal chat`: turns, trimming, commands, and what happens when an answer does not end well."""

from __future__ import annotations

import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from fakes.chat_fakes import Daemon, asked, put, talk
from fakes.cli_fakes import FakeAnswers, model_status, shoal

from shoal.cli import background
from shoal.cli.chat import loop as chat_module
from shoal.cli.chat.commands import COMMANDS, ChatState, completions, obey
from shoal.cli.chat.conversation import Conversation, finished, unfinished
from shoal.cli.chat.line_input import PlainReader, Said
from shoal.cli.chat.link import ChatLink
from shoal.cli.chat.loop import toolbar
from shoal.comm.errors import NoDaemon, RequestFailed
from shoal.comm.home import Home
from shoal.comm.messages import Stage
from shoal.daemon.errors import DaemonError


def test_a_path_is_no_command(daemon: Daemon, state: ChatState, capsys: pytest.CaptureFixture[str]) -> None:
    talk(state, "/etc/hosts is what?", "/etc")
    assert asked(daemon) == [[("user", "/etc/hosts is what?")]]
    assert "there is no command /etc (" in capsys.readouterr().err


def test_every_turn_carries_the_ones_before(
    daemon: Daemon, state: ChatState, capsys: pytest.CaptureFixture[str]
) -> None:
    state.conversation.system = "Be kind."
    assert talk(state, "Hi", "", "And?", temperature=0.0) == 0
    first = [("system", "Be kind."), ("user", "Hi")]
    assert asked(daemon) == [first, [*first, ("assistant", "Hello there."), ("user", "And?")]]
    assert capsys.readouterr().out == "Hello there.\nHello there.\n"
    assert state.used_tokens == 9
    assert toolbar(state) == " tiny · 12.5 tokens/s · context 9/100 (9%) · /help"


def test_ctrl_c_ends_the_turn_and_keeps_what_was_said(
    daemon: Daemon, state: ChatState, capsys: pytest.CaptureFixture[str]
) -> None:
    daemon.client.answers.fails = KeyboardInterrupt()
    talk(state, "Hi", lambda: setattr(daemon.client.answers, "fails", None), "Go on")
    assert daemon.client.answers.cancelled == 1
    assert [(turn.assistant, turn.complete) for turn in state.conversation.turns] == [
        ("Hello there.", False),
        ("Hello there.", True),
    ]
    assert asked(daemon)[1][1] == ("assistant", "Hello there.")
    assert "stopped; the conversation goes on" in capsys.readouterr().err


def test_a_daemon_that_dies_is_announced_and_started_again(
    daemon: Daemon, state: ChatState, capsys: pytest.CaptureFixture[str]
) -> None:
    daemon.client.answers.fails = NoDaemon("the daemon closed the connection")
    code = talk(state, "Hi", daemon.die)
    said = capsys.readouterr().err
    assert code == 4
    assert "the answer broke off; the conversation is kept, and /retry asks again" in said
    assert "the daemon closed the connection" in said
    daemon.client.answers.fails = None
    assert talk(state, "/retry") == 0
    assert daemon.starts == 1
    assert daemon.client.asked == [("tiny", None), ("tiny", None)]
    assert daemon.client.loads == []
    assert "started the daemon (pid 43)" in capsys.readouterr().err
    assert [turn.user for turn in state.conversation.turns] == ["Hi"]


def test_a_question_without_any_answer_can_be_asked_again(daemon: Daemon, state: ChatState) -> None:
    daemon.client.answers = FakeAnswers(fails=RequestFailed("busy", "queue full"))
    assert talk(state, "Hi") == 3
    assert state.conversation.turns == []
    daemon.client.answers = FakeAnswers("Yes")
    assert talk(state, "/retry") == 0
    assert asked(daemon) == [[("user", "Hi")]]


def test_what_does_not_fit_is_dropped_aloud(
    daemon: Daemon, state: ChatState, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(5):  # 20 + 2 words a turn; 75 fit beside the room for an answer
        state.conversation.answered(f"q{number} " * 20, "an answer")
    assert talk(state, "short question") == 0
    assert "dropped the oldest 2 turns to fit the context of 100 tokens" in capsys.readouterr().err
    assert [turn.user[:2] for turn in state.conversation.turns] == ["q2", "q3", "q4", "sh"]
    assert talk(state, "word " * 200) == 3
    assert "this message alone fills the context of 100 tokens" in capsys.readouterr().err
    assert len(state.conversation.turns) == 4


# --- the conversation as data -----------------------------------------------------------------------------


def count_words(messages: Iterable[Any]) -> int:
    return sum(len(str(message.content).split()) for message in messages)


def test_fit_drops_as_little_as_possible_and_never_the_system_message() -> None:
    conversation = Conversation("be terse")
    for number in range(4):
        conversation.answered(f"question {number}", "answer")
    assert conversation.fit("new", count_words, 15) == 0
    assert conversation.fit("new", count_words, 14) == 1
    assert [turn.user for turn in conversation.turns] == ["question 1", "question 2", "question 3"]
    assert conversation.fit("new", count_words, 3) == 3
    assert conversation.messages("new")[0].content == "be terse"
    conversation.answered("a", "b")
    assert conversation.fit("far too many words", count_words, 5) is None
    assert len(conversation.turns) == 1


def test_a_conversation_survives_being_saved() -> None:
    conversation = Conversation("sys")
    conversation.answered("q", "half an ans", complete=False)
    conversation.answered("lost", "")
    assert conversation.unanswered == "lost"
    again = Conversation()
    assert again.load_json(conversation.to_json("tiny")) == "tiny"
    assert (again.system, again.turns, again.unanswered) == ("sys", conversation.turns, "")
    assert [again.take_back(), again.take_back()] == ["q", ""]


@pytest.mark.parametrize(
    ("typed", "open_", "meant"),
    [
        ("hello", False, "hello"),
        ("one\\", True, None),
        ("one\\\ntwo", False, "one\ntwo"),
        ('"""', True, None),
        ('"""\na\n  b', True, None),
        ('"""\na\n  b\n"""', False, "a\n  b"),
        ('"""all in one"""', False, "all in one"),
        ('say """ aloud', False, 'say """ aloud'),
    ],
)
def test_several_lines_are_one_message(typed: str, open_: bool, meant: str | None) -> None:
    assert unfinished(typed) == open_
    if meant is not None:
        assert finished(typed) == meant


# --- commands ---------------------------------------------------------------------------------------------


def test_models_are_listed_and_changed(
    daemon: Daemon, state: ChatState, capsys: pytest.CaptureFixture[str]
) -> None:
    put(state, "tiny")
    put(state, "other")
    talk(state, "/model", "/model other", "Hi")
    said = capsys.readouterr().err
    assert "  other\n* tiny\n" in said
    assert "other answers from now on, with a context of 100 tokens" in said
    assert daemon.client.answers.requests[0].model == "other"
    assert talk(state, "/model nothing") == 1
    daemon.client.models["other"] = model_status("other", chat_template=False)
    talk(state, "/model tiny")
    assert talk(state, "/model other") == 1
    assert state.link.model.name == "tiny"


def test_conversations_are_saved_privately_and_loaded(
    state: ChatState, capsys: pytest.CaptureFixture[str]
) -> None:
    talk(state, "/load", "/system Be brief.", "Hi", "/save mine", "/clear", "/load mine", "/load")
    said = capsys.readouterr().err
    assert "nothing is saved yet" in said
    assert "saved: mine" in said
    assert state.conversation.system == "Be brief."
    assert [turn.user for turn in state.conversation.turns] == ["Hi"]
    path = state.home.sessions / "mine.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.write_text("{")
    assert [talk(state, f"/{line}") for line in ("load mine", "load gone", "save ../x")] == [1, 1, 2]


def test_retry_stats_help_clear_and_exit(
    daemon: Daemon, state: ChatState, capsys: pytest.CaptureFixture[str]
) -> None:
    assert talk(state, "/retry") == 2
    talk(state, "Hi", "/retry", "/stats", "/help")
    said = capsys.readouterr().err
    assert asked(daemon) == [[("user", "Hi")]] * 2
    assert "first token after 0.25 s" in said
    assert "1 rank, all in ram" in said
    assert all(command.usage in said for command in COMMANDS.values())
    talk(state, "/clear", "/system off", "/exit", "never said")
    assert state.leaving
    assert state.conversation.turns == []
    assert len(asked(daemon)) == 2


def test_unknown_commands_suggest_the_nearest(state: ChatState) -> None:
    with pytest.raises(DaemonError, match="did you mean /model"):
        obey(state, "/modle x")


def test_completion_of_commands_and_their_arguments(state: ChatState) -> None:
    put(state, "tiny")
    assert list(completions(state, "/s")) == ["/system", "/save", "/stats"]
    assert list(completions(state, "/model t")) == ["/model tiny"]
    assert list(completions(state, "/model x")) == []
    assert list(completions(state, "/nothing ")) == []


def test_a_model_in_fewer_bits_keeps_them(daemon: Daemon, state: ChatState) -> None:
    put(state, "tiny")
    put(state, "plain")
    daemon.client.models["plain"] = model_status("plain", chat_template=False)
    assert talk(state, "/model tiny:q4", "/ctx 64", "/model plain") == 1
    assert daemon.client.asked[-3:] == [("tiny:q4", None), ("plain", None), ("tiny:q4", 64)]
    assert daemon.client.loads == []


# --- the verb ---------------------------------------------------------------------------------------------


def test_lines_from_a_pipe(daemon: Daemon, state: ChatState) -> None:
    put(state, "tiny")
    result = shoal("chat", "tiny", "--system", "Be kind.", stdin='Hi\n"""\ntwo\nlines\n"""\n/exit\n')
    assert (result.exit_code, result.stdout) == (0, "Hello there.\nHello there.\n"), result.stderr
    assert asked(daemon)[1] == [
        ("system", "Be kind."),
        ("user", "Hi"),
        ("assistant", "Hello there."),
        ("user", "two\nlines"),
    ]


def test_the_line_below_the_prompt_fits_narrow_terminals(
    daemon: Daemon, state: ChatState, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    state.link._model = model_status("A-Model-With-A-Long-Name.Q4_1.gguf")
    assert toolbar(state) == " A-Model-… · context 0/100 (0%) · /help"
    assert len(toolbar(state)) < 40


def test_without_a_model_the_loaded_one_is_taken(daemon: Daemon, state: ChatState) -> None:
    daemon.client.models = {"big": model_status("big", path=str(state.home.root / "big.gguf"))}
    state.home.root.mkdir(exist_ok=True)
    (state.home.root / "big.gguf").write_bytes(b"GGUF")
    assert shoal("chat", stdin="Hi\n").exit_code == 0
    assert daemon.client.kept[-1] is True
    assert daemon.client.answers.requests[0].model == "big"


def test_without_a_daemon_one_is_started(daemon: Daemon, state: ChatState) -> None:
    put(state, "other")
    daemon.die()
    result = shoal("chat", "--ctx", "64", stdin="Hi\n")
    assert result.exit_code == 0, result.stderr
    assert daemon.starts == 1
    assert daemon.client.asked[-1] == ("other", 64)
    assert daemon.client.answers.requests[-1].context_tokens == 64


def test_the_keyboard_is_read_while_the_model_loads(
    daemon: Daemon, state: ChatState, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []

    class Quiet(PlainReader):
        @contextmanager
        def listening(self) -> Iterator[None]:
            order.append("listens")
            yield
            order.append("ends")

        def read(self) -> Said | None:
            order.append("reads")
            return None

    load = ChatLink.load
    monkeypatch.setattr(ChatLink, "load", lambda *given: (order.append("loads"), load(*given))[1])
    monkeypatch.setattr(chat_module, "PlainReader", Quiet)
    put(state, "tiny")
    assert shoal("chat", "tiny").exit_code == 0
    assert order == ["listens", "loads", "ends", "reads"]


def test_a_daemon_that_another_process_started_first_is_taken(
    daemon: Daemon, state: ChatState, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(home: Home, arguments: list[str]) -> int:
        daemon.start(home, arguments)
        raise DaemonError("internal", "a daemon is running already")

    daemon.die()
    monkeypatch.setattr(background, "start", late)
    assert talk(state, "Hi") == 0
    assert len(daemon.client.answers.requests) == 1


def test_what_cannot_be_talked_to(daemon: Daemon, state: ChatState) -> None:
    daemon.die()
    result = shoal("chat", stdin="Hi\n")
    assert result.exit_code == 1
    assert "there is no model yet (get one with: shoal pull smollm2)" in result.stderr
    assert daemon.starts == 0
    put(state, "base")
    daemon.start(state.home, [])
    daemon.client.models["base"] = model_status("base", chat_template=False)
    result = shoal("chat", "base", stdin="Hi\n")
    assert result.exit_code == 1
    assert "base has no chat template (continue texts with: shoal run)" in result.stderr


def test_options_that_shape_the_plan_keep_the_chat_in_this_process(
    daemon: Daemon, state: ChatState, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, configs = FakeAnswers("Here."), []

    @contextmanager
    def in_process(config: Any, library: Any) -> Iterator[FakeAnswers]:
        configs.append(config)
        yield here

    monkeypatch.setattr(chat_module, "in_process", in_process)
    put(state, "tiny")
    loads = list(daemon.client.asked)
    result = shoal("chat", "tiny", "--memory", "3GB", "--kv-type", "i8", stdin="Hi\nAnd?\n")
    assert (result.exit_code, result.stdout) == (0, "Here.\nHere.\n"), result.stderr
    assert (configs[0].memory_bytes, configs[0].kv_type) == (3 * 10**9, "i8")
    assert (configs[0].context_tokens, daemon.client.asked) == (None, loads)
    assert shoal("chat", "tiny", "--ctx", "64", stdin="Hi\n").stdout == "Hello there.\n"
    assert daemon.client.asked[len(loads) :] == [("tiny", 64)]
    assert len(configs) == 1


def test_a_chat_waits_for_the_model_that_the_daemon_is_loading(
    state: ChatState, daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And does not have another one loaded beside it."""
    client, big = daemon.client, state.home.root / "big.gguf"
    state.home.root.mkdir(exist_ok=True)
    big.write_bytes(b"GGUF")
    client.models.clear()
    client.asked.clear()
    client.changed = {"loading": "big", "stage": Stage(doing="loading", done=1, total=2)}
    looks: list[float] = []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 3:
            client.models["big"] = model_status("big", path=str(big))
            client.changed = {}

    monkeypatch.setattr("shoal.cli.chat.link.time.sleep", sleep)
    assert shoal("chat", stdin="Hi\n").exit_code == 0
    assert len(looks) == 3
    assert [model for model, _ in client.asked] == [str(big)]
