"""The engine: the step loop of one model, on rank 0.

    batch  = scheduler.next(now)             which tokens of which sequences
    result = rank.run(batch.order)           moves, reads and computes what every rank of the group does
    tokens = sampled(batch, result.logits)   what follows each text that reached its end
    events = scheduler.commit(batch, tokens) append, finish; told to whoever takes `events`

Knows token ids; text, requests and sockets are elsewhere. `step` runs in one thread; everything else may come from any.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from itertools import islice
from typing import Any

from shoal.kernels.arrays import Floats
from shoal.models.errors import SamplingError
from shoal.models.sampling import Sampled

from .batch import Batch, Chunk
from .executor import Abandoned
from .guess.drafter import Drafter
from .order import Result
from .rank import Rank
from .scheduler import Results, Scheduler
from .sequence import Event, FinishReason, Sequence

log = logging.getLogger(__name__)

STEP_LIMIT_S = 60.0  # that the end of a step is waited for


class Engine:
    """`clock` gives seconds; `drafter` guesses, if there is one. `notify` is called, by any thread and without a lock
    held, when there are events to take."""

    def __init__(
        self,
        rank: Rank,
        scheduler: Scheduler,
        clock: Callable[[], float],
        drafter: Drafter | None = None,
        notify: Callable[[Engine], None] = lambda engine: None,
    ) -> None:
        self.rank = rank
        self.scheduler = scheduler
        self._notify = notify
        self._clock = clock
        self._drafter = drafter
        self._events: list[Event] = []
        self._stepping = threading.RLock()  # held throughout a step
        self._lock = threading.Lock()  # guards scheduler and events; never held while computing

    @property
    def busy(self) -> bool:
        return bool(self.scheduler.running or self.scheduler.waiting)

    # --- requests ------------------------------------------------------------------------------------------

    def submit(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises QueueFull or NeverFits."""
        sequence.times.arrived_s = sequence.times.arrived_s or self._clock()
        self._tell(self.scheduler.submit, sequence)

    def end(self, sequence: Sequence, reason: FinishReason) -> None:
        """End a sequence early; idempotent."""
        self._tell(self.scheduler.end, sequence, reason)

    def expire(self) -> None:
        """End what is past its deadline, also in the middle of a step, which may wait for a disk."""
        self._tell(self.scheduler.expire, self._clock())

    def fail_all(self, error: Exception) -> None:
        """End everything, for instance because the model goes away."""
        self._tell(self.scheduler.fail_all, error)

    def events(self) -> list[Event]:
        """What has happened to sequences since this was last asked, in order."""
        with self._lock:
            taken, self._events = self._events, []
        return taken

    def close(self) -> None:
        """Wait for the end of a step under way and keep the prefix cache on disk, if there is one. Idempotent; nothing
        may be submitted any more."""
        if not self._stepping.acquire(timeout=STEP_LIMIT_S):
            log.warning("a step does not end: its model's KV is not kept on disk")
            return
        try:
            with self._lock:
                known = self.scheduler.cache.known()
            self.rank.close(known)
        finally:
            self._stepping.release()

    # --- steps ---------------------------------------------------------------------------------------------

    def step(self) -> bool:
        """One forward pass. False when there was nothing to do. A failing pass fails its own sequences only."""
        with self._stepping:
            self._draft()
            batch = self._next()
            if batch.empty:
                return False
            try:
                result = self.rank.run(batch.order, lambda: not batch.over)
                self._commit(batch, _sampled(batch, result.logits), result)
            except Abandoned:  # all of it was cancelled, so there is nothing to tell anyone, nor to learn
                pass
            except Exception as error:
                self._tell(self.scheduler.fail, batch.sequences, error)
                raise
            return True

    def _next(self) -> Batch:
        self.expire()
        with self._lock:
            return self.scheduler.next(self._clock())

    def _commit(self, batch: Batch, results: Results, result: Result) -> None:
        times = {"now_s": self._clock(), "read_s": result.read_s, "stall_s": result.stall_s}
        self._tell(self.scheduler.commit, batch, results, result.pages_read, **times)

    def _draft(self) -> None:
        """Let the draft model guess ahead of what decodes. Answers do without one that fails, from then on."""
        if self._drafter is None:
            return
        with self._lock:
            guessing = self.scheduler.guessing
        try:
            self._drafter.offer(guessing, self.scheduler.guesses, self.scheduler.speeds.cost)
        except Exception as error:  # whatever it was, nobody's answer depends on it
            log.warning("the draft model failed and is not asked again: %s: %s", type(error).__name__, error)
            self._drafter = None

    def _tell(self, change: Callable[..., list[Event]], *what: Any, **more: Any) -> None:
        """Change the scheduler, and let others know of what came of it."""
        with self._lock:
            events = change(*what, **more)
            self._events += events
        if events:
            self._notify(self)


def _sampled(batch: Batch, logits: Floats) -> list[list[Sampled] | Exception]:
    """What follows each chunk, from logits (R, vocab); nothing where it does not reach its sequence's end."""
    rows = iter(logits)
    return [_following(chunk, list(islice(rows, chunk.rows_wanted))) for chunk in batch.chunks]


def _following(chunk: Chunk, logits: list[Floats]) -> list[Sampled] | Exception:
    """What follows a chunk: one row of logits (vocab,) after the other, as without a draft, while that is right."""
    found: list[Sampled] = []
    for row, guess in zip(logits, (*chunk.draft, None), strict=False):
        try:
            found.append(chunk.sequence.sampler.sample(row))
        except SamplingError as error:  # e.g. NaN logits: this sequence's trouble alone
            return found or error  # what was found first counts; the next step meets the same error
        if found[-1].token_id != guess:
            break
    return found
