"""The chat's line: typed with editing, history and completion, or read plainly when stdin is no terminal.

Knows keys and prompt_toolkit. Does not know what the commands do.
"""

from __future__ import annotations

import os
import sys
import termios
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.filters import completion_is_selected
from prompt_toolkit.formatted_text import HTML, AnyFormattedText
from prompt_toolkit.history import FileHistory
from prompt_toolkit.input import Input
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import Output
from prompt_toolkit.styles import Style

from shoal.cli.output import note
from shoal.daemon.errors import DaemonError

from .conversation import finished, unfinished

Complete = Callable[[str], Iterable[str]]
"""Everything that may stand in place of the text so far, which begins with '/'."""

_STYLE = Style.from_dict({"bottom-toolbar": "noreverse fg:ansibrightblack", "prompt": "bold"})


class Reader(Protocol):
    def read(self) -> str | None:
        """What the user says next; None at the end. Raises KeyboardInterrupt when the user insists on leaving."""


class PlainReader:
    """Lines of stdin, without prompt or echo."""

    def read(self) -> str | None:
        """Raises DaemonError `bad_request` when stdin is not text."""
        lines: list[str] = []
        try:
            for line in iter(sys.stdin.readline, ""):
                lines.append(line.rstrip("\n"))
                if not unfinished("\n".join(lines)):
                    break
        except UnicodeDecodeError as error:
            raise DaemonError("bad_request", f"stdin is not {error.encoding} text") from error
        return finished("\n".join(lines)) if lines else None


class LineReader:
    """An editable line. Enter sends; Alt-Enter, a trailing backslash or an open \"\"\" goes on."""

    def __init__(
        self,
        history: Path,
        complete: Complete,
        toolbar: Callable[[], str],
        *,
        input: Input | None = None,
        output: Output | None = None,
    ) -> None:
        os.close(os.open(history, os.O_CREAT | os.O_RDWR, 0o600))
        self._warned = False
        self._session: PromptSession[str] = PromptSession(
            HTML("<prompt>&gt; </prompt>"),
            history=FileHistory(str(history)),
            completer=_Slash(complete),
            complete_while_typing=True,
            bottom_toolbar=toolbar,
            multiline=True,
            prompt_continuation=_continuation,
            key_bindings=_keys(),
            style=_STYLE,
            input=input,
            output=output,
        )

    def read(self) -> str | None:
        while True:
            try:
                text = self._session.prompt()
            except EOFError:
                return None
            except KeyboardInterrupt:
                if self._session.default_buffer.text:  # it clears the line first
                    self._warned = False
                elif self._warned:
                    raise
                else:
                    note("Ctrl-C again, Ctrl-D or /exit leaves")
                    self._warned = True
                continue
            self._warned = False
            return finished(text)


class _Slash(Completer):
    def __init__(self, complete: Complete) -> None:
        self._complete = complete

    def get_completions(self, document: Document, event: CompleteEvent) -> Iterator[Completion]:
        text = document.text_before_cursor
        if text.startswith("/") and "\n" not in text:
            for found in self._complete(text):
                yield Completion(found, start_position=-len(text))


@contextmanager
def unechoed() -> Iterator[None]:
    """Keys that are pressed within the block wait for the next line, instead of showing in the middle of an answer."""
    try:
        descriptor = sys.stdin.fileno()
        before = termios.tcgetattr(descriptor)
    except (AttributeError, OSError, ValueError, termios.error):  # no terminal
        yield
        return
    quiet = [*before]
    quiet[3] &= ~termios.ECHO
    termios.tcsetattr(descriptor, termios.TCSADRAIN, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.complete_state and completion_is_selected():
            buffer.complete_state = None
        elif unfinished(buffer.text):
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


def _continuation(width: int, line: int, wraps: int) -> AnyFormattedText:
    return "" if wraps else "· ".rjust(width)
