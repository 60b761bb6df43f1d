"""Regular looks: a thread that looks after everything each half second, however long a step takes.

Knows that a look may fail, and that the others matter no less then. Does not know what they look at.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator

from shoal.comm.log_rate import SeldomLog

log = logging.getLogger(__name__)

EVERY_S = 0.5
LOGGED_S = 60.0  # between failing looks that are logged: one may fail each time


class RegularLooks:
    """Begins at once, and ends when `closed` is set. `looks`: what there is to look at just now."""

    def __init__(self, looks: Callable[[], Iterator[Callable[[], object]]], closed: threading.Event) -> None:
        self._looks = looks
        self._closed = closed
        self._seldom = SeldomLog(log, LOGGED_S)
        threading.Thread(target=self._run, name="shoal-looks", daemon=True).start()

    def _run(self) -> None:
        # No variable of this loop may hold a model: it would stay in memory for as long as the thread waits.
        while not self._closed.wait(EVERY_S):
            self._look_at_each()

    def _look_at_each(self) -> None:
        for look in self._looks():
            try:
                look()
            except Exception as error:
                self._seldom.warning("a regular look failed", error=error)
