"""Answering: the thread that turns the events of engines into messages of requests.

It runs beside the compute thread, so that neither a long list of stop strings nor a slow taker of messages lengthens a
step. Knows which answer belongs to which sequence; not models or sockets.
"""

from __future__ import annotations

import logging
import threading
from queue import SimpleQueue

from shoal.engine.engine import Engine
from shoal.engine.sequence import Sequence, SequenceEvent
from shoal.models.errors import ModelError

from .answer import Answer

log = logging.getLogger(__name__)


class Answering:
    """The answers under way. Engines get `hear` as their `notify`."""

    def __init__(self) -> None:
        self._answers: dict[Sequence, Answer] = {}
        self._fewer = threading.Condition()  # guards the answers
        # Engines with events to take, None at the end. Each time that one was put in it had at least one new event,
        # so the queue is bounded as its events are.
        self._heard: SimpleQueue[Engine | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="shoal-answers", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def open(self, sequence: Sequence, answer: Answer) -> None:
        """From now on `answer` gets the events of the sequence, which is about to be submitted."""
        with self._fewer:
            self._answers[sequence] = answer

    def forget(self, sequence: Sequence) -> None:
        """The sequence was refused or has ended: it has no more events."""
        with self._fewer:
            self._answers.pop(sequence, None)
            self._fewer.notify_all()

    def hear(self, engine: Engine) -> None:
        """An engine has events to take."""
        self._heard.put(engine)

    def wait(self, timeout_s: float) -> None:
        """Wait until every answer is over, at most so long."""
        with self._fewer:
            self._fewer.wait_for(lambda: not self._answers, timeout_s)

    def close(self, timeout_s: float) -> None:
        """Pass on the events that are left, then end. Idempotent."""
        self._heard.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)

    def _run(self) -> None:
        # No variable of this loop may hold an engine: it would keep the last model in memory while nothing happens.
        while self._tell(self._heard.get()):
            pass

    def _tell(self, engine: Engine | None) -> bool:
        """Pass on the events of an engine; False at the end."""
        if engine is None:
            return False
        for event in engine.events():
            self._tell_one(engine, event)
        return True

    def _tell_one(self, engine: Engine, event: SequenceEvent) -> None:
        answer = self._answers.get(event.sequence)
        if answer is None:
            return
        try:
            if answer.take(event):
                engine.end(event.sequence, "stop")
        except Exception as error:  # the other answers go on
            if isinstance(error, ModelError):  # the fault of the model's files
                log.warning("an answer failed: %s", error)
            else:
                log.exception("an answer failed")
            engine.end(event.sequence, "cancelled")
            try:
                answer.fail(error)
            except Exception:
                log.exception("and could not say so")
        if answer.over:
            self.forget(event.sequence)
