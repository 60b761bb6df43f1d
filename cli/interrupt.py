"""Ctrl-C where Python must not be interrupted."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from .exit_codes import Exit


@contextmanager
def deferred_interrupt() -> Iterator[None]:
    """Ctrl-C within the block raises KeyboardInterrupt at its end; a second one ends the process at once.

    For imports of large libraries, which print tracebacks of their own when they are interrupted.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed = 0

    def remember(*_: object) -> None:
        nonlocal pressed
        pressed += 1
        if pressed > 1:
            if sys.stderr.isatty():
                sys.stderr.write("\x1b[?25h\n")  # a spinner may have hidden the cursor
                sys.stderr.flush()
            os._exit(Exit.INTERRUPTED)

    before = signal.signal(signal.SIGINT, remember)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt
