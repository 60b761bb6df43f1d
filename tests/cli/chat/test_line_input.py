"""The chat's line: what keys do, and that none of them shows in the middle of an answer."""

from __future__ import annotations

import os
import stat
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.input.vt100 import Vt100Input
from prompt_toolkit.output import DummyOutput

from shoal.cli.chat.line_input import LineReader, Said
from shoal.cli.interrupt import unechoed


def say(tmp_path: Path, *keys: bytes) -> tuple[list[Said | None], Path]:
    """What the reader returns for these keys, up to the end or Ctrl-C. A piece of them is pressed when the lines of the
    pieces before it have been said and are in the history."""
    history = tmp_path / "history"
    said: list[Said | None] = []

    def press() -> None:
        for number, piece in enumerate(keys):
            lines = b"".join(keys[:number]).count(b"\r")
            while number and not (len(said) == lines < len(reader._session.default_buffer._working_lines)):
                time.sleep(0.02)
            pipe.send_bytes(piece)

    with create_pipe_input() as pipe:
        reader = LineReader(history, lambda text: [], lambda: "bar", input=pipe, output=DummyOutput())
        threading.Thread(target=press, daemon=True).start()
        try:
            while not said or said[-1] is not None:
                said.append(reader.read())
        except KeyboardInterrupt:
            said.append(Said("left by Ctrl-C"))
    return said, history


def type_keys(tmp_path: Path, keys: str) -> tuple[list[str | None], Path]:
    said, history = say(tmp_path, keys.encode())
    return [line and line.text for line in said], history


def paste(text: bytes) -> bytes:
    return b"\x1b[200~" + text + b"\x1b[201~"


def test_enter_sends_and_ctrl_d_leaves(tmp_path: Path) -> None:
    said, history = type_keys(tmp_path, "hello\rthere\r\x04")
    assert said == ["hello", "there", None]
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    assert "+hello" in history.read_text()


def test_lines_go_on_after_alt_enter_backslash_and_quotes(tmp_path: Path) -> None:
    assert type_keys(tmp_path, "a\x1b\rb\rc\\\rd\r\x04")[0] == ["a\nb", "c\nd", None]
    assert type_keys(tmp_path, '"""\rx\ry\r"""\r\x04')[0] == ["x\ny", None]


def test_ctrl_c_clears_then_warns_then_leaves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert type_keys(tmp_path, "half\x03whole\r\x03again\r\x03\x03")[0] == [
        "whole",
        "again",
        "left by Ctrl-C",
    ]
    assert capsys.readouterr().err.count("Ctrl-C again, Ctrl-D or /exit leaves") == 2


PASTES = {
    "a command that goes on": b"docker run \\\n  -p 80:80 \\\n  nginx",
    "a backslash at the end": b"one\\",
    "a path": b"/tmp is full",
    "a command of the chat": b"/clear",
    "quotation marks": b'"""doc"""\nx = 1',
    "open quotation marks": b'"""\nopen',
    "white space around": b"   \tindented\n\tmore \n\n",
    "escape sequences": b"\x1b[31mred\x1b[0m \x1b]52;c;aGk=\x07 \x1b",
    "control characters": bytes(range(10)) + bytes([11, 12, *range(14, 32), 127]),
    "other characters": "grüße 日本 👩‍👩‍👧 \u0085\u2028".encode(),
    "its own end": b"rm \x1b[201~ -rf\nls\n/clear\n",
    "its own end, twice": b"\x1b[201~\x1b[201~x\x1b[201~",
    "its own beginning": b"a \x1b[200~ b",
    "much": b"0123456789\n" * 5000,  # a pipe holds no more
}


@pytest.mark.parametrize("text", PASTES.values(), ids=PASTES)
def test_a_paste_is_text_as_it_is(tmp_path: Path, text: bytes) -> None:
    said = say(tmp_path, paste(text.replace(b"\n", b"\r")) + b"\r\x04")[0]
    assert said == [Said(text.decode(), literal=True), None]


def test_ends_of_lines_in_a_paste(tmp_path: Path) -> None:
    assert say(tmp_path, paste(b"a\r\nb\rc\nd") + b"\r\x04")[0][0] == Said("a\nb\nc\nd", literal=True)


def test_typed_and_pasted_text_in_one_message(tmp_path: Path) -> None:
    keys = b"Explain: " + paste(b"a \\\r b\\") + b"\r/system " + paste(b"/be \\\rkind") + b"\r"
    keys += paste(b"/x") + b" y\\\rz\r" + paste(b"a") + b"\r" + paste(b"/b") + b"\r\x04"
    assert say(tmp_path, keys)[0] == [
        Said("Explain: a \\\n b\\"),
        Said("/system /be \\\nkind"),
        Said("/x y\nz", literal=True),
        Said("a", literal=True),
        Said("/b", literal=True),
        None,
    ]


def test_a_block_is_text_and_ends_where_it_was_typed(tmp_path: Path) -> None:
    keys = b'"""\r/clear\r' + paste(b"x \\\ry") + b'\r"""\r"""in a line"""\r"""a""" and more\r'
    keys += b'"""\r' + paste(b'a = """doc') + b'\r"""\r\x04'
    assert say(tmp_path, keys)[0] == [
        Said("/clear\nx \\\ny", literal=True),
        Said("in a line", literal=True),
        Said('"""a""" and more'),
        Said('a = """doc', literal=True),
        None,
    ]


def test_what_was_pasted_is_text_when_it_is_called_back(tmp_path: Path) -> None:
    up = b"\x1b[A"
    keys = [paste(b"/clear") + b"\r/help\r", up + up + b"\r", up + up + b"\r", b"\x04"]
    assert say(tmp_path, *keys)[0] == [
        Said("/clear", literal=True),
        Said("/help"),
        Said("/clear", literal=True),
        Said("/help"),
        None,
    ]


def test_a_paste_that_was_deleted_leaves_no_trace(tmp_path: Path) -> None:
    assert say(tmp_path, paste(b"/tmp") + b"\x15/help\r\x04")[0] == [Said("/help"), None]


def test_bytes_that_are_no_utf8_are_replaced_aloud(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said, history = say(tmp_path, b"caf\xe9\r" + paste(b"\xed\xa0\x80 \xff") + b"\r\x04")
    assert said == [Said("caf\ufffd"), Said("\ufffd\ufffd\ufffd \ufffd", literal=True), None]
    assert capsys.readouterr().err.count("no UTF-8 text") == 2
    history.read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", ["directory", "pipe", "nowhere"])
def test_a_history_that_cannot_be_kept_is_told_and_done_without(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    place = tmp_path / "history"
    if kind == "directory":
        place.mkdir()
    elif kind == "pipe":
        os.mkfifo(place)
    else:
        tmp_path = tmp_path / "gone"
    assert say(tmp_path, b"hello\r", b"\x1b[A\r\x04")[0] == [Said("hello"), Said("hello"), None]
    assert "this chat's lines are not remembered" in capsys.readouterr().err


def test_enter_in_a_search_sends_what_was_found(tmp_path: Path) -> None:
    keys = [b"about red\rabout blue\r", b"\x12red\r", b"next\r", b"\x12nothing such\rlast\r\x04"]
    said = [line and line.text for line in say(tmp_path, *keys)[0]]
    assert said == ["about red", "about blue", "about red", "next", "last", None]


# --- while an answer comes --------------------------------------------------------------------------------


class Typist:
    """A terminal whose other end is in the test's hands."""

    def __init__(self, tmp_path: Path) -> None:
        self.master, self.slave = os.openpty()
        self.stdin = os.fdopen(self.slave, encoding="utf-8")
        self.keys = Vt100Input(self.stdin)
        self.reader = LineReader(
            tmp_path / "history", lambda text: [], lambda: "bar", input=self.keys, output=DummyOutput()
        )

    def type(self, keys: bytes) -> None:
        for begin in range(0, len(keys), 1000):
            os.write(self.master, keys[begin : begin + 1000])
        time.sleep(0.1)

    def said(self, count: int) -> list[str]:
        found = [self.reader.read() for _ in range(count)]
        return [line.text for line in found if line]

    def close(self) -> None:
        self.stdin.close()
        os.close(self.master)


@pytest.fixture
def typist(tmp_path: Path) -> Iterator[Typist]:
    made = Typist(tmp_path)
    with made.reader.opened():
        yield made
    made.close()


def test_a_paste_while_an_answer_comes_is_one_text_of_the_next_line(typist: Typist) -> None:
    lines = b"one \\\rtwo\rthree \x03\x1c\x1a\r" * 700  # more than a terminal keeps for who does not read
    with typist.reader.listening():
        typist.type(b"see: " + paste(lines))
    typist.type(b"\r")
    assert typist.said(1) == ["see: " + lines.decode().replace("\r", "\n")]


def test_lines_typed_while_an_answer_comes_are_said_after_it(typist: Typist) -> None:
    with typist.reader.listening():
        typist.type(b"one\rtwo\x1b[1;1R\x1c")  # a terminal's answer, and what would quit
    typist.type(b"\r")
    assert typist.said(2) == ["one", "two"]


@pytest.mark.parametrize("waiting", [b"", b"a line\r" * 3000, paste(b"pasted\r" * 3000)])
def test_ctrl_c_stops_an_answer_whatever_waits(typist: Typist, waiting: bytes) -> None:
    def answer() -> None:
        with typist.reader.listening():
            typist.type(waiting)
            typist.type(b"\x03\x03\x03")
            time.sleep(10)

    with pytest.raises(KeyboardInterrupt):
        answer()
    typist.type(b"\x03next\r")  # pressed in haste: belongs to the one before
    assert typist.said(1) == ["next"]


def test_ctrl_c_behind_lines_that_were_read_early_stops_the_next_answer(typist: Typist) -> None:
    typist.type(b"one\rtwo\rthree\r\x03")
    assert typist.said(1) == ["one"]

    def answer() -> None:
        with typist.reader.listening():
            time.sleep(10)

    with pytest.raises(KeyboardInterrupt):
        answer()
    typist.type(b"next\r")
    assert typist.said(1) == ["next"]


def test_keys_pressed_during_an_answer_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    master, slave = os.openpty()
    with os.fdopen(master, "rb"), os.fdopen(slave, "r") as terminal:
        monkeypatch.setattr("sys.stdin", terminal)

        def echoes() -> bool:
            return bool(termios.tcgetattr(slave)[3] & termios.ECHO)

        with unechoed():
            assert not echoes()
        assert echoes()
    monkeypatch.setattr("sys.stdin", None)
    with unechoed():
        pass
