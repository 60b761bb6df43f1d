"""The engine: the step loop of one model.

    batch  = scheduler.next(now)         which tokens of which sequences
    hidden = executor.forward(step)      through the blocks of the plan
    tokens = sampler(head(hidden))       for each sequence that reached its end
    scheduler.commit(batch, tokens)      append, finish, emit

Knows token ids; text, requests and sockets are elsewhere. `step` runs in one thread; `submit` and `cancel` may
come from any.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import islice

import torch

from shoal.models.errors import SamplingError
from shoal.models.sampling import Sampled
from shoal.models.step import Step
from shoal.offload.kv import KvPool

from .drafter import Drafter
from .executor import Executor
from .scheduler import Scheduler
from .sequence import Batch, Chunk, Sequence


class Engine:
    """`clock` gives seconds; `drafter` guesses, if there is one; `tokens_total` counts what was sampled so far."""

    def __init__(
        self,
        executor: Executor,
        kv: KvPool,
        scheduler: Scheduler,
        clock: Callable[[], float],
        drafter: Drafter | None = None,
    ) -> None:
        self._executor = executor
        self._kv = kv
        self.scheduler = scheduler
        self._clock = clock
        self._drafter = drafter
        self._lock = threading.Lock()  # guards the scheduler; never held while computing
        self.tokens_total = 0

    @property
    def busy(self) -> bool:
        return bool(self.scheduler.running or self.scheduler.waiting)

    def submit(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises DaemonError (`busy`, `resources`)."""
        with self._lock:
            sequence.times.arrived_s = sequence.times.arrived_s or self._clock()
            self.scheduler.submit(sequence)

    def cancel(self, sequence: Sequence) -> None:
        """End a sequence early; idempotent."""
        with self._lock:
            self.scheduler.cancel(sequence)

    def fail_all(self, error: Exception) -> None:
        """End everything, for instance because the model goes away."""
        with self._lock:
            for sequence in [*self.scheduler.running, *self.scheduler.waiting]:
                self.scheduler.fail(sequence, error)

    def step(self) -> bool:
        """One forward pass. False when there was nothing to do. A failing pass fails its own sequences only."""
        if self._drafter is not None:
            self._draft(self._drafter)
        began_s = self._clock()
        with self._lock:
            batch = self.scheduler.next(began_s)
        if not batch.chunks:
            return False
        stall_s = self._executor.store.stall_s
        try:
            with torch.inference_mode():
                results = self._compute(batch)
            with self._lock:
                ended_s = self._clock()
                self._note(batch, results, began_s, ended_s, self._executor.store.stall_s - stall_s)
                self.scheduler.commit(batch, results)
                self.scheduler.note(batch, ended_s - began_s)
        except Exception as error:  # whatever it was, the daemon serves on and the clients hear of it
            with self._lock:
                for chunk in batch.chunks:
                    self.scheduler.fail(chunk.sequence, error)
            raise
        return True

    def _draft(self, drafter: Drafter) -> None:
        """Let the draft model guess ahead of what decodes. If it fails, so do these."""
        with self._lock:
            decoding = [sequence for sequence in self.scheduler.running if sequence.remaining == 1]
        try:
            drafter.offer(decoding, self.scheduler.guesses, self.scheduler.cost)
        except Exception as error:
            with self._lock:
                for sequence in decoding:
                    self.scheduler.fail(sequence, error)
            raise

    def _compute(self, batch: Batch) -> list[list[Sampled] | Exception]:
        """What follows each chunk; nothing where it does not reach its sequence's end."""
        for copy in batch.copies:
            self._kv.copy_page(copy.source, copy.target)
        step = Step.build(
            ((c.tokens, c.start, c.pages, c.rows_wanted) for c in batch.chunks),
            self._executor.plan.part_tokens,
        )
        hidden = self._executor.forward(step)
        if not len(hidden):
            return [[] for _ in batch.chunks]
        rows = iter(self._executor.head(hidden).unbind(0))
        return [_sample(chunk, list(islice(rows, chunk.rows_wanted))) for chunk in batch.chunks]

    def _note(
        self,
        batch: Batch,
        results: list[list[Sampled] | Exception],
        began_s: float,
        ended_s: float,
        stall_s: float,
    ) -> None:
        for chunk, result in zip(batch.chunks, results, strict=True):
            times = chunk.sequence.times
            times.admitted_s = times.admitted_s or began_s
            times.stall_s += stall_s
            if chunk.samples:
                times.first_token_s = times.first_token_s or ended_s
                times.last_token_s = ended_s
                self.tokens_total += 0 if isinstance(result, Exception) else len(result)


def _sample(chunk: Chunk, logits: list[torch.Tensor]) -> list[Sampled] | Exception:
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
