"""Painting an answer as it comes: every piece at once, words kept whole on a terminal.

Knows columns, and which characters of a model's text a terminal may get. Anything but a terminal gets it unchanged.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from typing import TextIO

# C0 and C1 controls but tab and newline: a model's text must not move the cursor or set the clipboard
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
MAX_WORD_COLUMNS = 40  # longer ones (addresses, hashes) are cut at the edge, where they are


def printable(text: str) -> str:
    """A model's text without what a terminal must not get."""
    return _CONTROLS.sub("", text)


class Painter:
    """Writes one answer to stdout, or nothing if it is `quiet`. While nothing comes, a line below says what it waits
    for, and vanishes again; it is on stderr if only that is a terminal. Methods raise BrokenPipeError."""

    def __init__(self, out: TextIO | None = None, *, quiet: bool = False) -> None:
        self._out = out or sys.stdout
        self._quiet = quiet
        self._columns = shutil.get_terminal_size().columns
        self._wrap = Wrap(self._columns) if self._out.isatty() and not quiet else None
        screens = [screen for screen in (self._out, sys.stderr) if screen.isatty()]
        self._screen = screens[0] if screens else None
        self._last = "\n"
        self._stage_shown = False

    @property
    def shows_stages(self) -> bool:
        return self._screen is not None

    def write(self, text: str) -> None:
        """Show the next piece now."""
        self._hide_stage()
        if self._quiet:
            return
        self._out.write(self._wrap.add(printable(text)) if self._wrap else text)
        self._out.flush()
        self._last = text[-1:] or self._last

    def stage(self, text: str) -> None:
        """Show below the answer what it waits for; nothing happens where there is no terminal."""
        if self._screen is None:
            return
        self._hide_stage()
        line = text[: self._columns - 1]
        dim = line if os.environ.get("NO_COLOR") else f"\x1b[2m{line}\x1b[0m"
        self._screen.write(("\n" if self._column else "") + dim)
        self._screen.flush()
        self._stage_shown = True

    def end(self) -> None:
        """End the line if it is open."""
        self._hide_stage()
        if self._last != "\n":
            self.write("\n")

    def _hide_stage(self) -> None:
        """Back to where the answer ends."""
        if self._stage_shown and self._screen is not None:
            column = self._column
            self._screen.write("\r\x1b[K" + (f"\x1b[A\x1b[{column}C" if column else ""))
            self._screen.flush()
        self._stage_shown = False

    @property
    def _column(self) -> int:
        """Where the answer ends on the screen."""
        return self._wrap.column if self._wrap else 0


class Wrap:
    """Text in pieces → the same with lines broken between words, though a word may come in several pieces.

    A word that crosses the edge has been shown in part: it is erased there and written again on the next line.
    """

    def __init__(self, columns: int) -> None:
        self.width = max(2, columns - 1)  # a terminal that is full to the edge is in a state of its own
        self.column = 0
        self._word = ""  # what was shown of the word at the end; only characters one column wide

    def add(self, text: str) -> str:
        """What to send to the terminal for the next piece."""
        from rich.cells import cell_len

        shown: list[str] = []
        for char in text:
            if char == "\n":
                self.column, self._word = 0, ""
                shown.append(char)
            elif char in " \t":
                self._space(shown)
            else:
                self._letter(char, cell_len(char), shown)
        return "".join(shown)

    def _space(self, shown: list[str]) -> None:
        self._word = ""
        if self.column < self.width:  # else the line ends here anyway
            self.column += 1
            shown.append(" ")

    def _letter(self, char: str, columns: int, shown: list[str]) -> None:
        if self.column + columns > self.width:
            moved = (
                self._word if columns == 1 and len(self._word) < min(self.column, MAX_WORD_COLUMNS) else ""
            )
            shown.append(f"\x1b[{len(moved)}D\x1b[K" if moved else "")
            shown.append("\n" + moved)
            self.column, self._word = len(moved), moved
        self.column += columns
        self._word = self._word + char if columns == 1 else ""
        shown.append(char)
