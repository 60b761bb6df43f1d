"""The engine: the step loop of one model.

    batch  = scheduler.next()            which tokens of which sequences
    hidden = executor.forward(step)      through the blocks of the plan
    tokens = sampler(head(hidden))       one per sequence that reached its end
    scheduler.commit(batch, tokens)      append, finish, emit

Knows token ids; text, requests and sockets are elsewhere. `step` runs in one thread; `submit` and `cancel` may
come from any.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import islice

import torch
from torch import Tensor

from shoal.models.errors import SamplingError
from shoal.models.sampling import Sampled
from shoal.models.step import Step
from shoal.offload.kv import KvPool

from .executor import Executor
from .scheduler import Scheduler
from .sequence import Chunk, Sequence


class Engine:
    """`clock` gives seconds; `tokens_total` counts what was sampled since the start."""

    def __init__(
        self, executor: Executor, kv: KvPool, scheduler: Scheduler, clock: Callable[[], float]
    ) -> None:
        self._executor = executor
        self._kv = kv
        self._scheduler = scheduler
        self._clock = clock
        self._lock = threading.Lock()  # guards the scheduler; never held while computing
        self.tokens_total = 0

    @property
    def running(self) -> int:
        return len(self._scheduler.running)

    @property
    def waiting(self) -> int:
        return len(self._scheduler.waiting)

    @property
    def busy(self) -> bool:
        return bool(self._scheduler.running or self._scheduler.waiting)

    @property
    def kv_used_tokens(self) -> int:
        return (self._kv.table.pages - self._kv.table.free_pages) * self._kv.page_tokens

    def submit(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises DaemonError (`busy`, `resources`)."""
        with self._lock:
            sequence.times.arrived_s = sequence.times.arrived_s or self._clock()
            self._scheduler.submit(sequence)

    def cancel(self, sequence: Sequence) -> None:
        """End a sequence early; idempotent."""
        with self._lock:
            self._scheduler.cancel(sequence)

    def fail_all(self, error: Exception) -> None:
        """End everything, for instance because the model goes away."""
        with self._lock:
            for sequence in [*self._scheduler.running, *self._scheduler.waiting]:
                self._scheduler.fail(sequence, error)

    def step(self) -> bool:
        """One forward pass. False when there was nothing to do. A failing pass fails its own sequences only."""
        with self._lock:
            batch = self._scheduler.next()
            self._note_admission(batch)
        if not batch:
            return False
        began_s, stall_s = self._clock(), self._executor.store.stall_s
        try:
            with torch.inference_mode():
                sampled = self._compute(batch)
            with self._lock:
                self._note_cost(batch, self._clock() - began_s)
                self._note_times(batch, self._executor.store.stall_s - stall_s)
                self.tokens_total += self._scheduler.commit(batch, sampled)
        except Exception as error:  # whatever it was, the daemon serves on and the clients hear of it
            with self._lock:
                for chunk in batch:
                    self._scheduler.fail(chunk.sequence, error)
            raise
        return True

    def _compute(self, batch: list[Chunk]) -> list[list[Sampled | Exception]]:
        step = Step.build((c.tokens, c.start, c.sequence.pages, c.rows_wanted) for c in batch)
        hidden = self._executor.forward(step)
        if not len(step.rows):
            return [[] for _ in batch]
        rows = iter(self._executor.head(hidden).unbind(0))
        return [_sample(chunk, list(islice(rows, chunk.rows_wanted))) for chunk in batch]

    def _note_admission(self, batch: list[Chunk]) -> None:
        now = self._clock()
        for chunk in batch:
            chunk.sequence.times.admitted_s = chunk.sequence.times.admitted_s or now

    def _note_cost(self, batch: list[Chunk], seconds: float) -> None:
        rows = sum(chunk.end - chunk.start + len(chunk.draft) for chunk in batch)
        self._scheduler.speculation.cost.note(rows, seconds)

    def _note_times(self, batch: list[Chunk], stall_s: float) -> None:
        now = self._clock()
        for chunk in batch:
            times = chunk.sequence.times
            times.stall_s += stall_s
            if chunk.samples:
                times.first_token_s = times.first_token_s or now
                times.last_token_s = now


def _sample(chunk: Chunk, logits: list[Tensor]) -> list[Sampled | Exception]:
    """Sample from one row of logits (vocab,) after the other, as without a draft, for as long as it is right."""
    results: list[Sampled | Exception] = []
    for row, guess in zip(logits, (*chunk.draft, None), strict=False):
        try:
            results.append(sampled := chunk.sequence.sampler.sample(row))
        except SamplingError as error:  # e.g. NaN logits: this sequence's trouble alone
            return [*results, error]
        if sampled.token_id != guess:
            break
    return results
