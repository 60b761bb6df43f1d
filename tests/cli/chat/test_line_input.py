"""The chat's line: what keys do, and that none of them shows in the middle of an answer."""

from __future__ import annotations

import os
import stat
import termios
from pathlib import Path

import pytest
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from shoal.cli.chat.line_input import LineReader
from shoal.cli.interrupt import unechoed


def type_keys(tmp_path: Path, keys: str) -> tuple[list[str | None], Path]:
    """What the reader returns for these keys, up to the end or Ctrl-C."""
    history = tmp_path / "history"
    said: list[str | None] = []
    with create_pipe_input() as pipe:
        pipe.send_text(keys)
        reader = LineReader(history, lambda text: [], lambda: "bar", input=pipe, output=DummyOutput())
        try:
            while not said or said[-1] is not None:
                line = reader.read()
                said.append(line and line.text)
        except KeyboardInterrupt:
            said.append("left by Ctrl-C")
    return said, history


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
