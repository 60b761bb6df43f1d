"""The scheduler: which tokens of which sequences make the next step.

Decodes go first, then prefill chunks within a token budget. Chunks end at fixed positions (multiples of
`chunk_tokens`), so a sequence is cut the same way whoever runs beside it, and its arithmetic with it.
Pure: takes and returns values; no clock, thread, tensor or text.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Ordered

from shoal.comm.messages import FinishReason
from shoal.models.sampling import Sampled
from shoal.offload.pages import PageTable

from .errors import DaemonError
from .sequence import Chunk, Sequence
from .speculation import Speculation


class Scheduler:
    """Admits in order of arrival, when a place and the pages for the whole sequence are free."""

    def __init__(
        self,
        table: PageTable,
        *,
        page_tokens: int,
        sequences: int,
        queue: int,
        chunk_tokens: int,
        speculation: Speculation,
    ) -> None:
        self._table = table
        self._page_tokens = page_tokens
        self._sequences = sequences
        self._queue = queue
        self._chunk_tokens = chunk_tokens
        self.speculation = speculation
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def submit(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises DaemonError `busy` when the queue is full, `resources` when it can never run."""
        pages = self._pages_of(sequence)
        if pages > self._table.pages:
            raise DaemonError(
                "resources",
                f"the request may reach {sequence.limit} tokens, the KV pool holds "
                f"{self._table.pages * self._page_tokens}",
                "lower max_tokens, or give the model more --memory",
            )
        if len(self.waiting) + len(self.running) >= self._queue + self._sequences:
            raise DaemonError(
                "busy", f"{len(self.waiting)} requests are waiting", "try again later", retry_after_s=1.0
            )
        sequence.sink.begin(sequence)
        self.waiting.append(sequence)

    def next(self) -> list[Chunk]:
        """The next step's chunks; empty when there is nothing to do. Newly admitted sequences get their pages."""
        self._admit()
        decodes = [s for s in self.running if s.remaining == 1]
        prefills = [s for s in self.running if s.remaining > 1]
        batch: list[Chunk] = []
        budget = self._chunk_tokens
        for sequence in prefills:
            start = sequence.computed
            end = min(len(sequence.tokens), (start // self._chunk_tokens + 1) * self._chunk_tokens)
            if end - start > budget:
                break
            budget -= end - start
            batch.append(Chunk(sequence, start, end))
        rows = len(decodes) + sum(chunk.end - chunk.start for chunk in batch)
        drafts = self.speculation.drafts(rows, [(s.guesser, s.limit - len(s.tokens) - 1) for s in decodes])
        return [
            *(Chunk(s, s.computed, s.computed + 1, draft) for s, draft in zip(decodes, drafts, strict=True)),
            *batch,
        ]

    def commit(self, batch: Ordered[Chunk], sampled: Ordered[Ordered[Sampled | Exception]]) -> int:
        """Append and emit what was sampled: for every chunk, as much as its draft was right for, and one more.

        Returns how many tokens that were.
        """
        total = 0
        for chunk, results in zip(batch, sampled, strict=True):
            sequence = chunk.sequence
            if sequence.ended:  # cancelled while the step ran
                continue
            sequence.computed = chunk.end
            sequence.times.drafted_tokens += len(chunk.draft)
            sequence.guesser.score([result.token_id for result in results if isinstance(result, Sampled)])
            for count, result in enumerate(results):
                if isinstance(result, Exception):
                    self.fail(sequence, result)
                    break
                total += 1
                sequence.computed = len(sequence.tokens)
                sequence.tokens.append(result.token_id)
                sequence.times.accepted_tokens += count > 0
                reason = sequence.sink.accept(result)
                if reason is None and len(sequence.tokens) >= sequence.limit:
                    reason = "length"
                if reason is not None:
                    self._finish(sequence, reason)
                    break
        return total

    def cancel(self, sequence: Sequence) -> None:
        """End a sequence with what it has. Does nothing when it has ended already."""
        if not sequence.ended:
            self._finish(sequence, "cancelled")

    def fail(self, sequence: Sequence, error: Exception) -> None:
        """End a sequence with an error. Does nothing when it has ended already."""
        if not sequence.ended:
            self._end(sequence)
            sequence.sink.fail(error)

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self._sequences:
            pages = self._table.take(self._pages_of(self.waiting[0]))
            if pages is None:
                return
            sequence = self.waiting.popleft()
            sequence.pages = pages
            self.running.append(sequence)

    def _pages_of(self, sequence: Sequence) -> int:
        return -(-sequence.limit // self._page_tokens)

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        self._end(sequence)
        sequence.sink.finish(reason, sequence.times)

    def _end(self, sequence: Sequence) -> None:
        """Before its sink hears of it: a sink that raises must not keep pages."""
        sequence.ended = True
        if sequence in self.running:
            self.running.remove(sequence)
            self._table.give_back(sequence.pages)
        else:
            self.waiting.remove(sequence)
