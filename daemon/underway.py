"""A request that the engine has: how to end it, and what it waits for.

Knows its sequence and its model. Does not know messages other than `stage`, nor who asks.
"""

from __future__ import annotations

from collections import deque

from shoal.comm.messages import Stage
from shoal.daemon.loading.loaded_model import LoadedModel
from shoal.engine.sequence import Sequence

LATELY = 10  # stages over which a speed is measured


class Underway:
    """One submitted request. `cancel` may be called from any thread, `stage` from one at a time."""

    def __init__(self, model: LoadedModel, sequence: Sequence) -> None:
        self._model = model
        self._sequence = sequence
        self._lately: deque[tuple[float, int]] = deque(maxlen=LATELY)  # clock readings, tokens read by then

    def cancel(self) -> None:
        """End it with what it has. Idempotent."""
        self._model.engine.end(self._sequence, "cancelled")

    def stage(self) -> Stage | None:
        """What it waits for just now: its turn, its prompt, a disk; None = the next token. Never blocks for long."""
        sequence = self._sequence
        standing = self._model.engine.standing(sequence)
        if standing.place:
            self._lately.clear()
            return Stage(doing="queued", done=standing.place, total=standing.waiting)
        reading = self._model.stage()
        unread = sequence.remaining
        if sequence.generated and unread <= 1:
            return reading
        if reading is not None and unread <= self._model.plan.chunk_tokens:
            return reading  # one pass over the disk takes it all, and blocks say more about a pass than tokens do
        return Stage(
            doing="prompt",
            done=standing.done,
            total=standing.total,
            tokens_per_s=self._tokens_per_s(standing.done),
            bytes_per_s=reading.bytes_per_s if reading else 0.0,
        )

    def _tokens_per_s(self, done: int) -> float:
        """How fast its text was read lately; 0 = not known yet."""
        now_s = self._model.clock()
        self._lately.append((now_s, done))
        first_s, before = self._lately[0]
        return (done - before) / (now_s - first_s) if now_s > first_s else 0.0
