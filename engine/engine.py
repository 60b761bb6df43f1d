"""The engine: the step loop of one model.

    batch  = scheduler.next(now)         which tokens of which sequences
    moves and recalls                    pages of KV: copied, saved on disk, read from there
    hidden = executor.forward(step)      through the blocks of the plan
    tokens = sampler(head(hidden))       for each sequence that reached its end
    scheduler.commit(batch, tokens)      append, finish, emit

Knows token ids; text, requests and sockets are elsewhere. `step` runs in one thread; `submit` and `cancel` may
come from any.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from itertools import islice

from shoal.engine.guess.drafter import Drafter
from shoal.kernels.arrays import Floats
from shoal.models.errors import SamplingError
from shoal.models.sampling import Sampled
from shoal.models.step import Step
from shoal.offload.kv.disk import KvDisk
from shoal.offload.kv.pool import KvPool

from .executor import Abandoned, Executor
from .scheduler import Scheduler
from .sequence import Batch, Chunk, Recall, Sequence

log = logging.getLogger(__name__)

STEP_LIMIT_S = 60.0  # that the end of a step is waited for


class Engine:
    """`clock` gives seconds; `drafter` guesses, if there is one; `disk` keeps KV that leaves memory, if there is one;
    `tokens_total` counts what was sampled so far."""

    def __init__(
        self,
        executor: Executor,
        kv: KvPool,
        scheduler: Scheduler,
        clock: Callable[[], float],
        drafter: Drafter | None = None,
        disk: KvDisk | None = None,
    ) -> None:
        self._executor = executor
        self._kv = kv
        self.scheduler = scheduler
        self._clock = clock
        self._drafter = drafter
        self.disk = disk
        self._stepping = threading.RLock()  # held throughout a step
        self._lock = threading.Lock()  # guards the scheduler; never held while computing
        self.tokens_total = 0

    @property
    def busy(self) -> bool:
        return bool(self.scheduler.running or self.scheduler.waiting)

    def submit(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises QueueFull or NeverFits."""
        with self._lock:
            sequence.times.arrived_s = sequence.times.arrived_s or self._clock()
            self.scheduler.submit(sequence)

    def cancel(self, sequence: Sequence) -> None:
        """End a sequence early; idempotent."""
        with self._lock:
            self.scheduler.cancel(sequence)

    def expire(self) -> None:
        """End what is past its deadline, also in the middle of a step, which may wait for a disk."""
        with self._lock:
            self.scheduler.expire(self._clock())

    def fail_all(self, error: Exception) -> None:
        """End everything, for instance because the model goes away."""
        with self._lock:
            for sequence in [*self.scheduler.running, *self.scheduler.waiting]:
                self.scheduler.fail(sequence, error)

    def close(self) -> None:
        """Wait for the end of a step under way and keep the prefix cache on disk, if there is one. Idempotent; nothing
        may be submitted any more."""
        if not self._stepping.acquire(timeout=STEP_LIMIT_S):
            log.warning("a step does not end: its model's KV is not kept on disk")
            return
        try:
            if self.disk is not None:
                with self._lock:
                    known = self.scheduler.cache.known()
                self.disk.close(known, self._kv.page)
        finally:
            self._stepping.release()

    def step(self) -> bool:
        """One forward pass. False when there was nothing to do. A failing pass fails its own sequences only."""
        with self._stepping:
            if self._drafter is not None:
                self._draft(self._drafter)
            began_s = self._clock()
            with self._lock:
                batch = self.scheduler.next(began_s)
            if batch.empty:
                return False
            try:
                self._run(batch, began_s)
            except Exception as error:  # whatever it was, the daemon serves on and the clients hear of it
                with self._lock:
                    for sequence in batch.sequences:
                        self.scheduler.fail(sequence, error)
                raise
            return True

    def _run(self, batch: Batch, began_s: float) -> None:
        stall_s = self._executor.store.stall_s
        self._kv.move(batch.moves, self.disk)
        moved_s = self._clock()
        read = self._recall(batch.recalls)
        read_s = self._clock()
        try:
            results = self._compute(batch) if batch.chunks else []
        except Abandoned:  # all of it was cancelled, so there is nothing to tell anyone, nor to learn
            return
        with self._lock:
            ended_s = self._clock()
            self._note(batch, results, began_s, ended_s, self._executor.store.stall_s - stall_s)
            self.scheduler.commit(batch, results, read)
            self.scheduler.note(batch, ended_s - began_s - (read_s - moved_s))
            if any(read):
                self.scheduler.note_reads(sum(read), read_s - moved_s)

    def _draft(self, drafter: Drafter) -> None:
        """Let the draft model guess ahead of what decodes. Answers do without one that fails, from then on."""
        with self._lock:
            guessing = self.scheduler.guessing
        try:
            drafter.offer(guessing, self.scheduler.guesses, self.scheduler.cost)
        except Exception as error:  # whatever it was, nobody's answer depends on it
            log.warning("the draft model failed and is not asked again: %s: %s", type(error).__name__, error)
            self._drafter = None

    def _recall(self, recalls: list[Recall]) -> list[int]:
        """How many pages of each could be read."""
        read: list[int] = []
        for recall in recalls:
            assert self.disk is not None
            pages = [self._kv.page(page) for page in recall.pages]
            read.append(self.disk.read([found.entry for found in recall.found], pages))
        return read

    def _compute(self, batch: Batch) -> list[list[Sampled] | Exception]:
        """What follows each chunk; nothing where it does not reach its sequence's end."""
        step = Step.build(
            ((c.tokens, c.start, c.pages, c.rows_wanted) for c in batch.chunks),
            self._executor.plan.part_tokens,
        )
        hidden = self._executor.forward(step, lambda: not batch.over)
        if not len(step.rows):
            return [[] for _ in batch.chunks]
        rows = iter(self._executor.head(hidden))
        return [_sample(chunk, list(islice(rows, chunk.rows_wanted))) for chunk in batch.chunks]

    def _note(
        self,
        batch: Batch,
        results: list[list[Sampled] | Exception],
        began_s: float,
        ended_s: float,
        stall_s: float,
    ) -> None:
        for recall in batch.recalls:
            recall.sequence.times.admitted_s = recall.sequence.times.admitted_s or began_s
        for chunk, result in zip(batch.chunks, results, strict=True):
            times = chunk.sequence.times
            times.admitted_s = times.admitted_s or began_s
            times.stall_s += stall_s
            if chunk.samples:
                times.first_token_s = times.first_token_s or ended_s
                times.last_token_s = ended_s
                self.tokens_total += 0 if isinstance(result, Exception) else len(result)


def _sample(chunk: Chunk, logits: list[Floats]) -> list[Sampled] | Exception:
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
