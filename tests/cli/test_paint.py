"""Answers on a terminal: words whole at the edge, whatever pieces they come in, and no control characters."""

from __future__ import annotations

import io
import os
import re
import sys
import termios

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.cli.terminal.output import folded, per_second, spinner, stage_text, steps_bar, transfer_bar
from shoal.cli.terminal.paint import Painter, Wrap, printable
from shoal.comm.messages import Stage

COLUMNS = 20


def screen(sent: str) -> list[str]:
    """What a terminal of COLUMNS columns shows after these bytes."""
    lines, column = [""], 0
    for escape, count, char in re.findall(r"(\x1b\[(\d*)[DK])|([\s\S])", sent):
        if char == "\n":
            lines.append("")
            column = 0
        elif char:
            assert column < COLUMNS, "the terminal would have wrapped by itself"
            lines[-1] = lines[-1][:column] + char + lines[-1][column + 1 :]
            column += 1
        elif escape.endswith("D"):
            column -= int(count)
            assert column >= 0
        else:
            lines[-1] = lines[-1][:column]
    return lines


@settings(deadline=None, max_examples=200)
@given(st.text(alphabet="abc  \n", max_size=200), st.lists(st.integers(1, 9), max_size=60))
def test_words_stay_whole(text: str, cuts: list[int]) -> None:
    wrap, sent, rest = Wrap(COLUMNS), "", text
    for cut in [*cuts, len(text)]:
        sent, rest = sent + wrap.add(rest[:cut]), rest[cut:]
    shown = screen(sent)
    assert "".join(shown).replace(" ", "") == text.replace("\n", "").replace(" ", "")
    assert all(len(line) < COLUMNS for line in shown)
    short = [word for word in text.split() if len(word) < COLUMNS - 1]
    found = [word for line in shown for word in line.split()]
    assert all(word in found for word in short)


def test_the_pieces_do_not_matter() -> None:
    text = "A keeper of a lighthouse, resilient, https://example.org/a/long/address and 漢字漢字漢字漢字漢字."
    whole = screen(Wrap(COLUMNS).add(text))
    wrap = Wrap(COLUMNS)
    assert screen("".join(wrap.add(char) for char in text)) == whole


def test_notes_are_folded_between_words() -> None:
    assert folded("one two three", 8) == "one two\nthree"
    assert folded("/save [X]   keeps\n\n  tiny", 80) == "/save [X]   keeps\n\n  tiny"
    assert folded("/a/path/that-is-long x", 8) == "/a/path/that-is-long\nx"


def test_control_characters_never_reach_a_terminal() -> None:
    assert printable("a\x1b[2Jb\x07\r\n\tc\x9b\x00d\x7f") == "a[2Jb\n\tcd"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_only_terminals_get_another_text() -> None:
    text = "word " * 40 + "\x1b[31m"
    plain, terminal = io.StringIO(), Terminal()
    for out in (plain, terminal):
        painter = Painter(out)
        painter.write(text)
        painter.end()
        painter.end()
    assert plain.getvalue() == text + "\n"
    assert terminal.getvalue().count("\n") > 1
    assert "\x1b[31m" not in terminal.getvalue()


def test_a_stage_stands_below_the_answer_and_goes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((COLUMNS, 9)))
    out = Terminal()
    painter = Painter(out)
    assert painter.shows_stages
    painter.stage("reading 1/9 blocks, 1.9 GB/s")
    painter.write("Hello")
    painter.stage("reading 2/9 blocks")
    painter.stage("reading 3/9 blocks")
    painter.write(" there")
    painter.end()
    first, second = "reading 1/9 blocks,", "reading 2/9 blocks"
    back = "\r\x1b[K\x1b[A\x1b[5C"
    third = second.replace("2", "3")
    assert out.getvalue() == f"{first}\r\x1b[KHello\n{second}{back}\n{third}{back} there\n"


def test_no_stage_where_there_is_no_terminal() -> None:
    out = io.StringIO()
    painter = Painter(out)
    assert not painter.shows_stages
    painter.stage("reading 1/9 blocks")
    painter.write("x")
    assert out.getvalue() == "x"


def test_a_stage_in_words() -> None:
    reading = Stage(doing="reading", done=41, total=80, bytes_per_s=1.9e9)
    assert stage_text(reading) == "reading 41/80 blocks, 1.9 GB/s"
    packing = Stage(doing="packing", done=600_000_000, total=1_000_000_000, bytes_per_s=1e8)
    assert stage_text(packing) == "packing 600 MB of 1 GB, 100 MB/s, 4 s left"
    assert stage_text(Stage(doing="loading", done=0, total=1000)) == "loading 0 B of 1 kB"
    prompt = Stage(doing="prompt", done=1024, total=4100, tokens_per_s=35.2)
    assert stage_text(prompt) == "reading the prompt, 1,024 of 4,100 tokens, 35.2/s, 1 min 27 s left"
    assert stage_text(Stage(doing="prompt", done=0, total=4100)) == "reading the prompt, 0 of 4,100 tokens"
    queued = Stage(doing="queued", done=2, total=5)
    assert stage_text(queued) == "waiting for its turn, place 2 of 5 in the queue"
    assert [per_second(speed) for speed in (0.512, 35.24, 1260.4)] == ["0.512/s", "35.2/s", "1,260/s"]


def test_a_stage_is_on_stderr_where_the_answer_goes_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    for quiet, written in ((False, "Hello\n"), (True, "")):
        out, screen = io.StringIO(), Terminal()
        monkeypatch.setattr("sys.stderr", screen)
        painter = Painter(out, quiet=quiet)
        assert painter.shows_stages
        painter.stage("reading the prompt")
        painter.write("Hello")
        painter.end()
        assert (out.getvalue(), screen.getvalue()) == (written, "reading the prompt\r\x1b[K")


def test_keys_pressed_while_something_loads_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    master, slave = os.openpty()
    with os.fdopen(master, "rb"), os.fdopen(slave, "w", buffering=1) as terminal:
        for name in ("stdin", "stderr"):
            monkeypatch.setattr(sys, name, terminal)

        def echoes() -> bool:
            return bool(termios.tcgetattr(slave)[3] & termios.ECHO)

        for showing in (spinner("loading"), transfer_bar(), steps_bar()):
            with showing:
                assert not echoes()
            assert echoes()
