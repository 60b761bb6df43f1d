"""The chat's line: typed with editing, history and completion, or read plainly when stdin is no terminal.

Knows keys and prompt_toolkit, and which marks in typed text are not part of what is meant; pasted text has none. Does
not know what the commands do.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, Protocol

from prompt_toolkit import PromptSession
from prompt_toolkit.buffer import Buffer
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.filters import completion_is_selected, is_searching
from prompt_toolkit.formatted_text import HTML, AnyFormattedText
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.input import Input
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.keys import Keys
from prompt_toolkit.output import Output
from prompt_toolkit.search import accept_search
from prompt_toolkit.styles import Style

from shoal.cli.interrupt import unechoed
from shoal.cli.terminal.output import note

from .conversation import QUOTES, encodable, finished, quoted, unfinished
from .keyboard import Keyboard, keep_pastes_whole

Complete = Callable[[str], Iterable[str]]
"""Everything that may stand in place of the text so far, which begins with '/'."""

# Of a text; longer ones are not kept in the file that each chat begins by reading.
REMEMBERED_CHARACTERS = 100_000
_STYLE = Style.from_dict({"bottom-toolbar": "noreverse fg:ansibrightblack", "prompt": "bold"})


class Said(NamedTuple):
    """What the user says next. `literal`: a text whatever it begins with, because it was pasted, or quoted."""

    text: str
    literal: bool = False


class Reader(Protocol):
    def read(self) -> Said | None:
        """What the user says next; None at the end. Raises KeyboardInterrupt when the user insists on leaving."""

    def listening(self) -> AbstractContextManager[None]:
        """While what was said is answered: keys that are pressed do not show, and wait."""
        ...


class PlainReader:
    """Lines of stdin, without prompt or echo."""

    def __init__(self) -> None:
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="surrogateescape")

    def read(self) -> Said | None:
        lines: list[str] = []
        for line in iter(sys.stdin.readline, ""):
            lines.append(line.removesuffix("\n"))
            if not unfinished("\n".join(lines)):
                break
        if not lines:
            return None
        typed = "\n".join(lines)
        return Said(_utf8(finished(typed)), literal=quoted(typed))

    def listening(self) -> AbstractContextManager[None]:
        return unechoed()


class LineReader:
    """An editable line. Enter sends; Alt-Enter, a typed backslash before Enter or an open \"\"\" block goes on."""

    def __init__(
        self,
        history: Path,
        complete: Complete,
        toolbar: Callable[[], str],
        *,
        input: Input | None = None,
        output: Output | None = None,
    ) -> None:
        self._warned = False
        self._line = _Line()
        self._session: PromptSession[str] = PromptSession(
            HTML("<prompt>&gt; </prompt>"),
            history=_history(history),
            completer=_Slash(complete),
            complete_while_typing=True,
            bottom_toolbar=toolbar,
            multiline=True,
            prompt_continuation=_continuation,
            key_bindings=_keys(self._line),
            style=_STYLE,
            enable_suspend=True,
            input=input,
            output=output,
        )
        self._session.default_buffer.on_text_changed += self._line.changed
        self._input = self._session.input
        keep_pastes_whole(self._input)
        self._keyboard = Keyboard(self._input, self._session.output)

    def read(self) -> Said | None:
        while True:
            self._line.begin()
            try:
                text = _utf8(self._session.prompt())
            except EOFError:
                return None
            except KeyboardInterrupt:
                # The first one clears the line; one that stopped an answer is not the first of the two that leave.
                if self._session.default_buffer.text or self._keyboard.still_stopping():
                    self._warned = False
                elif self._warned:
                    raise
                else:
                    note("Ctrl-C again, Ctrl-D or /exit leaves")
                    self._warned = True
                continue
            self._warned = False
            return Said(text, self._line.literal)

    def listening(self) -> AbstractContextManager[None]:
        return self._keyboard.listening()

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Within the block the terminal leaves every key to this reader, between two lines, too."""
        with self._input.raw_mode():
            yield


class _Line:
    """How the line that is being edited began: that decides what it means."""

    def __init__(self) -> None:
        self._literals: set[str] = set()  # said earlier; the history has their text only
        self.begin()

    def begin(self) -> None:
        self._place = 1  # of the line in the history, from its end: older ones come in while one types
        self.literal = False  # its first character was pasted
        self.block = False  # it began with quotation marks as they are typed
        self._pasted_quotes = 0  # they end no block

    def pasted(self, buffer: Buffer, text: str) -> None:
        """`text` is about to be pasted."""
        if not buffer.document.text_before_cursor.strip():
            self.literal, self.block = True, False
        self._pasted_quotes += text.count(QUOTES)

    def changed(self, buffer: Buffer) -> None:
        place = len(buffer._working_lines) - buffer.working_index
        if place != self._place:
            self._place, self.block = place, False
            self.literal = buffer.text in self._literals
        elif not buffer.text:
            self.literal = self.block = False
        if buffer.text.strip() == QUOTES and not self.literal:
            self.block = True

    def goes_on(self, event: KeyPressEvent) -> bool:
        """Whether Enter is to end a line of a text that has more; it removes the mark that says so."""
        buffer, before = event.current_buffer, event.previous_key_sequence
        if self.block:
            return (buffer.text.count(QUOTES) - self._pasted_quotes) % 2 == 1
        if not (before and before[-1].key == "\\" and buffer.document.char_before_cursor == "\\"):
            return False
        buffer.delete_before_cursor()
        return True

    def send(self, buffer: Buffer) -> None:
        """End the line; the history gets the text that is meant."""
        if self.block and quoted(buffer.text):
            text = finished(buffer.text)
            buffer.document = Document(text)
            self.literal = True
        if self.literal:
            self._literals.add(buffer.text)
        buffer.validate_and_handle()


class _Slash(Completer):
    def __init__(self, complete: Complete) -> None:
        self._complete = complete

    def get_completions(self, document: Document, event: CompleteEvent) -> Iterator[Completion]:
        text = document.text_before_cursor
        if text.startswith("/") and "\n" not in text:
            for found in self._complete(text):
                yield Completion(found, start_position=-len(text))


class _FileHistory(FileHistory):
    """As its base; a file that cannot be read or written any more is done without."""

    def load_history_strings(self) -> Iterable[str]:
        with suppress(OSError):
            yield from super().load_history_strings()

    def store_string(self, string: str) -> None:
        if len(string) <= REMEMBERED_CHARACTERS:
            with suppress(OSError):
                super().store_string(string)


def _history(path: Path) -> History:
    """The lines said in earlier chats, in a file that only this user can read; without such a file, this chat's."""
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NONBLOCK, 0o600)
        with os.fdopen(descriptor) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise OSError(0, "not a regular file")
    except OSError as error:
        note(f"{path}: {error.strerror}; this chat's lines are not remembered")
        return InMemoryHistory()
    return _FileHistory(str(path))


def _keys(line: _Line) -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter", filter=~is_searching)
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.complete_state and completion_is_selected():
            buffer.complete_state = None
        elif line.goes_on(event):
            buffer.insert_text("\n")
        else:
            line.send(buffer)

    @keys.add("enter", filter=is_searching)
    def _(event: KeyPressEvent) -> None:
        """As in a shell: what was found is sent. What was not leaves the line as it was."""
        wanted = event.current_buffer.text
        accept_search()
        found = event.app.current_buffer
        if wanted and wanted.lower() in found.text.lower():
            line.send(found)

    @keys.add("escape", "enter", filter=~is_searching)
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add(Keys.BracketedPaste, filter=~is_searching)
    def _(event: KeyPressEvent) -> None:
        # Terminals send a carriage return for the end of a line, some of them both characters.
        text = event.data.replace("\r\n", "\n").replace("\r", "\n")
        line.pasted(event.current_buffer, text)
        event.current_buffer.insert_text(text)

    return keys


def _continuation(width: int, line: int, wraps: int) -> AnyFormattedText:
    return "" if wraps else "· ".rjust(width)


def _utf8(text: str) -> str:
    """`text`, with bytes replaced that were no UTF-8; the user is told."""
    known = encodable(text)
    if known != text:
        note("what you said had bytes that are no UTF-8 text; each stands as � now")
    return known
