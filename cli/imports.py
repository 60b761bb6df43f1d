"""Importing the engine within a verb, so that verbs which do without it start at once."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from .interrupt import deferred_interrupt


@contextmanager
def engine_imports() -> Iterator[None]:
    """Around imports of what computes: Ctrl-C waits for their end, and the garbage collector keeps off.

    It would walk through a thousand growing modules, an eighth of the time they take, and again whenever it looks at
    everything later, 0.15 s in the middle of a stream. What was imported stays, so it need not look.
    """
    gc.disable()
    try:
        with deferred_interrupt():
            yield
    finally:
        gc.freeze()
        gc.enable()
