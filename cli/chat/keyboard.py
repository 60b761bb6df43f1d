"""What comes from the keyboard: pastes that stay whole, and what is typed or pasted while an answer comes.

Knows prompt_toolkit's input, and bytes on their way from a terminal. Does not know lines.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prompt_toolkit.input import Input
from prompt_toolkit.input.typeahead import clear_typeahead, get_typeahead, store_typeahead
from prompt_toolkit.input.vt100 import Vt100Input
from prompt_toolkit.input.vt100_parser import Vt100Parser
from prompt_toolkit.key_binding import KeyPress
from prompt_toolkit.keys import Keys
from prompt_toolkit.output import Output

PASTE_BEGINS, PASTE_ENDS = "\x1b[200~", "\x1b[201~"
BURST_S = 0.02  # what follows the end of a paste within this time was not typed
ESCAPE_S = 0.5  # a lone Escape that nothing follows for so long is the key
AGAIN_S = 1.0  # Ctrl-C within this time of the last one means the same
STOP_S = 0.5  # a process that stops itself has done so within this time
BURST_CHARACTERS = 1 << 16


class PasteParser(Vt100Parser):
    """As its base, with two differences: a paste takes time in proportion to its length, and one whose text holds the
    mark that ends pastes does not end there: its rest would be taken for keys, and might be sent or obeyed.

    follows: what has come since, "" for nothing within BURST_S.
    """

    def __init__(self, feed_key_callback: Callable[[KeyPress], None], follows: Callable[[], str]) -> None:
        super().__init__(feed_key_callback)
        self._follows = follows
        self._pieces: list[str] = []
        self._tail = ""  # the last characters, where the mark may have begun

    def feed(self, data: str) -> None:
        if not self._in_bracketed_paste:
            super().feed(data)  # gives the rest to this method when a paste begins
            return
        tail, self._tail = self._tail, ""
        data = tail + data
        end = data.find(PASTE_ENDS)
        if end < 0:
            keep = max(0, len(data) - len(PASTE_ENDS) + 1)
            self._pieces.append(data[:keep])
            self._tail = data[keep:]
            return
        rest = [data[end + len(PASTE_ENDS) :]]
        while more := self._follows():
            rest.append(more)
        inner, typed = _belonging("".join(rest))
        pasted = "".join([*self._pieces, data[:end], inner])
        self._pieces = []
        self._in_bracketed_paste = False
        self.feed_key_callback(KeyPress(Keys.BracketedPaste, pasted))
        super().feed(typed)

    def reset(self, request: bool = False) -> None:
        super().reset(request)
        self._pieces, self._tail = [], ""


def _belonging(text: str) -> tuple[str, str]:
    """What follows the end of a paste in one burst: the part that belongs to it, and the rest.

    A mark that ends a paste belongs to the one before it unless another has begun.
    """
    begins = text.find(PASTE_BEGINS)
    last = text.rfind(PASTE_ENDS, 0, begins if begins >= 0 else len(text))
    if last < 0:
        return "", text
    return PASTE_ENDS + text[:last], text[last + len(PASTE_ENDS) :]


def keep_pastes_whole(keys: Input) -> None:
    """Have the input of a terminal read pastes by PasteParser."""
    if not isinstance(keys, Vt100Input):
        return
    reader = keys.stdin_reader

    def follows() -> str:
        if not select.select([reader.stdin_fd], [], [], BURST_S)[0]:
            return ""
        return reader.read(BURST_CHARACTERS)

    keys.vt100_parser = PasteParser(keys.vt100_parser.feed_key_callback, follows)


class Keyboard:
    """Reads the keyboard while an answer comes, so that nothing fills up: what is typed or pasted waits for the next
    line. Ctrl-C interrupts the main thread, and drops what was waiting."""

    def __init__(self, keys: Input, screen: Output) -> None:
        self._keys = keys
        self._screen = screen
        self._pressed_s = -AGAIN_S

    @contextmanager
    def listening(self) -> Iterator[None]:
        wake, waker = os.pipe()
        with self._keys.raw_mode():
            self._pastes(True)
            thread = threading.Thread(target=self._listen, args=(wake,), name="keyboard", daemon=True)
            try:
                thread.start()
                yield
            finally:
                os.close(waker)  # its other end can be read now, which ends the thread
                try:
                    thread.join()
                finally:  # it may have passed on a last Ctrl-C
                    thread.join()
                    os.close(wake)
                    self._pastes(False)

    def _listen(self, wake: int) -> None:
        keyboard = self._keys.fileno()
        for key in get_typeahead(self._keys):  # read by the prompt, behind the line that it returned
            self._take(key)
        while True:
            ready, _, _ = select.select([keyboard, wake], [], [], ESCAPE_S)
            if wake in ready:
                return
            pressed = self._keys.read_keys() if keyboard in ready else self._keys.flush_keys()
            if self._keys.closed:
                return
            for key in pressed:
                self._take(key)

    def _take(self, key: KeyPress) -> None:
        if key.key == Keys.ControlC:
            self._interrupt()
        elif key.key == Keys.ControlZ:
            self._suspend()
        elif key.key != Keys.CPRResponse:
            store_typeahead(self._keys, [key])

    def _interrupt(self) -> None:
        clear_typeahead(self._keys)
        if not self.still_stopping():
            self._pressed_s = time.monotonic()
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    def still_stopping(self) -> bool:
        """Ctrl-C is pressed: whether that belongs to the last one that stopped an answer, as when the key is held."""
        now = time.monotonic()
        same = now - self._pressed_s < AGAIN_S
        if same:
            self._pressed_s = now
        return same

    def _suspend(self) -> None:
        """As the terminal does on Ctrl-Z; returns when the shell lets this process go on."""
        self._pastes(False)
        with self._keys.cooked_mode():
            os.kill(0, signal.SIGTSTP)  # the whole job
            # The main thread takes the signal, so this one may come here before all are stopped: it would change the
            # terminal first, and find it changed back when the job goes on.
            time.sleep(STOP_S)
        self._pastes(True)

    def _pastes(self, marked: bool) -> None:
        if marked:
            self._screen.enable_bracketed_paste()
        else:
            self._screen.disable_bracketed_paste()
        self._screen.flush()
