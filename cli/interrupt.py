"""The keyboard while a verb works: Ctrl-C where Python must not be interrupted, and keys that are not to show."""

from __future__ import annotations

import os
import signal
import sys
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from .exit_codes import Exit

_quieted: list[tuple[int, list[Any]]] = []  # terminals that do not echo just now, and their modes before


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
            for descriptor, modes in reversed(_quieted):
                termios.tcsetattr(descriptor, termios.TCSADRAIN, modes)
            os._exit(Exit.INTERRUPTED)

    before = signal.signal(signal.SIGINT, remember)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """SIGTERM, and SIGHUP of a terminal that was closed, raise SystemExit within the block, so that it can tidy up."""

    def end(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, was in before.items():
        if was is not signal.SIG_IGN:  # as nohup has it
            signal.signal(number, end)
    try:
        yield
    finally:
        for number, was in before.items():
            signal.signal(number, was)


@contextmanager
def unechoed() -> Iterator[None]:
    """Keys that are pressed within the block wait for whoever reads next, instead of showing in what is printed."""
    try:
        descriptor = sys.stdin.fileno()
        before = termios.tcgetattr(descriptor) if _in_front(descriptor) else None
    except (AttributeError, OSError, ValueError, termios.error):  # no terminal
        before = None
    if before is None:
        yield
        return
    quiet = [*before]
    quiet[3] &= ~termios.ECHO
    _quieted.append((descriptor, before))
    termios.tcsetattr(descriptor, termios.TCSADRAIN, quiet)
    try:
        yield
    finally:
        _quieted.pop()
        with suppress(OSError, termios.error):  # it may be gone
            if _in_front(descriptor):
                termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def _in_front(descriptor: int) -> bool:
    """Whether the terminal is this job's now: one in the background would be stopped for changing it."""
    try:
        return os.tcgetpgrp(descriptor) == os.getpgrp()
    except OSError:  # it is not the terminal of this session, so it stops nobody
        return True
