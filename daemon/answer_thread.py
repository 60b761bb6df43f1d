"""Answering: the thread that turns the events of engines into messages of requests.

It runs beside the compute thread, so that neither a long list of stop strings nor a slow taker of messages lengthens a
step. Knows which answer belongs to which sequence; not models or sockets.
"""

from __future__ import annotations

import logging
import threading

from shoal.engine.engine import Engine
from shoal.engine.sequence import Sequence, SequenceEvent

from .answer import Answer

log = logging.getLogger(__name__)

QUIET_S = 1.0  # how long the thread sleeps before it looks again by itself


class Answering:
    """The answers under way. Engines get `hear` as their `notify`."""

    def __init__(self) -> None:
        self._answers: dict[Sequence, Answer] = {}
        self._engines: dict[Engine, None] = {}  # with events to take; as a set, but in order
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="shoal-answers", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def open(self, sequence: Sequence, answer: Answer) -> None:
        """From now on `answer` gets the events of the sequence, which is about to be submitted."""
        with self._changed:
            self._answers[sequence] = answer

    def forget(self, sequence: Sequence) -> None:
        """The sequence was refused or has ended: it has no more events."""
        with self._changed:
            self._answers.pop(sequence, None)
            self._changed.notify_all()

    def hear(self, engine: Engine) -> None:
        """An engine has events to take."""
        with self._changed:
            self._engines[engine] = None
            self._changed.notify_all()

    def wait(self, timeout_s: float) -> None:
        """Wait until every answer is over, at most so long."""
        with self._changed:
            self._changed.wait_for(lambda: not self._answers, timeout_s)

    def close(self, timeout_s: float) -> None:
        """Pass on the events that are left, then end. Idempotent."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)

    def _run(self) -> None:
        while self._tell_next():
            pass

    def _tell_next(self) -> bool:
        """Pass on the events of one engine, if one has any; False at the end.

        A method of its own: a variable of the loop would keep the last engine in memory while there are no events.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._engines or self._closed, QUIET_S)
            if not self._engines:
                return not self._closed
            engine = next(iter(self._engines))
            del self._engines[engine]
        for event in engine.events():
            self._tell(engine, event)
        return True

    def _tell(self, engine: Engine, event: SequenceEvent) -> None:
        answer = self._answers.get(event.sequence)
        if answer is None:
            return
        try:
            if answer.take(event):
                engine.end(event.sequence, "stop")
        except Exception as error:  # the other answers go on
            log.exception("an answer failed")
            engine.end(event.sequence, "cancelled")
            try:
                answer.fail(error)
            except Exception:
                log.exception("and could not say so")
        if answer.over:
            self.forget(event.sequence)
