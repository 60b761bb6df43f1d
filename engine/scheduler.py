"""The scheduler: which tokens of which sequences make the next step.

Decodes go first; prompts follow in chunks that lengthen a step of decodes only so far (`pacing`). Whose turn it is:
priority, then what was preempted, then the client that was given least, then arrival. A sequence is admitted when the
KV that all are expected to need at once fits (`forecast`); when it turns out not to, the youngest of the lowest
priority is preempted: its pages go to the prefix cache, and it is computed again from its tokens later, with the same
outcome. The oldest of the highest priority is never preempted, and nothing is queued that does not fit alone, so there
is always one that gets on.

Pure: takes and returns values; no thread, tensor or text, and the clock's reading is handed in.
"""

from __future__ import annotations

from collections.abc import Sequence as Ordered

from shoal.engine.guess.speculation import drafts
from shoal.engine.learn.fairness import TokenCounters
from shoal.engine.learn.forecast import AnswerLengths, Growth, peak_tokens
from shoal.engine.learn.pacing import Pacer
from shoal.engine.learn.recalling import ReadCost
from shoal.engine.learn.step_cost import ROW_SHARE, StepCost
from shoal.models.sampling import Sampled
from shoal.offload.kv.prefix_cache import Found, PrefixCache

from .errors import NeverFits, QueueFull
from .sequence import Batch, Chunk, FinishReason, Recall, Sequence

RETRY_S = (0.5, 60.0)  # least and most that a client is told to wait
FIRST_RETRY_S = 5.0  # while no step has been measured
_FOLLOW = 0.2  # how quickly averages follow what is measured

Results = Ordered[Ordered[Sampled] | Exception]


class Scheduler:
    """`sequences` run at once, `queue` more wait; a step holds at most `chunk_tokens` tokens of prompts and
    `guesses` that are guessed ahead, and reads at most `reads` pages of KV from disk. `row_share`: first guess of what
    one more row costs, as in `StepCost`."""

    def __init__(
        self,
        cache: PrefixCache,
        *,
        sequences: int,
        queue: int,
        chunk_tokens: int,
        guesses: int,
        row_share: float = ROW_SHARE,
        reads: int = 1,
    ) -> None:
        self.cache = cache
        self.cost = StepCost(row_share)
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.preemptions = 0
        self.prompt_tokens = 0  # of all prompts admitted so far
        self.cached_tokens = 0  # of these, found in the prefix cache
        self.drafted_tokens = 0  # guessed ahead so far
        self.accepted_tokens = 0  # of these, guessed right
        self._sequences = sequences
        self._queue = queue
        self._chunk_tokens = chunk_tokens
        self.guesses = guesses
        self._reads = reads
        self._read_cost = ReadCost()
        self._pacer = Pacer(chunk_tokens, row_share)
        self._prompt_token_s = 0.0  # time to read one token of a prompt, when nothing else is done
        self._lengths = AnswerLengths()
        self._counters = TokenCounters()
        self._arrivals = 0

    # --- requests ------------------------------------------------------------------------------------------

    def submit(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises QueueFull, or NeverFits when it could never run."""
        if self.cache.pages_of(sequence.limit) > self.cache.pages:
            pool_tokens = self.cache.pages * self.cache.page_tokens
            raise NeverFits(sequence.prompt_tokens, sequence.limit, pool_tokens)
        if (before := len(self.waiting) + len(self.running)) >= self._queue + self._sequences:
            raise QueueFull(before, self._sequences, self._queue, self._retry_after_s())
        sequence.sink.begin(sequence)
        self._arrivals += 1
        sequence.number = self._arrivals
        self._counters.enter(sequence.client)
        self.waiting.append(sequence)

    def cancel(self, sequence: Sequence) -> None:
        """End a sequence with what it has. Does nothing when it has ended already."""
        if not sequence.ended:
            self._finish(sequence, "cancelled")

    def fail(self, sequence: Sequence, error: Exception) -> None:
        """End a sequence with an error. Does nothing when it has ended already."""
        if not sequence.ended:
            self._end(sequence)
            self.cache.drop(sequence.holding)
            sequence.sink.fail(error)

    def expire(self, now_s: float) -> None:
        """End what is past its deadline."""
        for sequence in [s for s in (*self.running, *self.waiting) if s.deadline_s <= now_s]:
            self._finish(sequence, "deadline")

    # --- steps ---------------------------------------------------------------------------------------------

    def next(self, now_s: float) -> Batch:
        """The next step; without chunks when there is nothing to do. Ends what is past its deadline."""
        self.expire(now_s)
        preempted = self.preemptions
        decoding = [
            sequence
            for sequence in sorted(self.running, key=_seniority)
            if sequence.remaining == 1 and self._reserve(sequence, sequence.computed + 1)
        ]
        if self.preemptions == preempted:  # else what made room would come back at once
            self._admit()
        decoding = [sequence for sequence in decoding if sequence.running]
        prompts = [s for s in sorted(self.running, key=self._turn) if s not in decoding]
        budget = self._prompt_budget(len(decoding))
        chunks: list[Chunk] = []
        recalls: list[Recall] = []
        reads = self._most_reads(len(decoding))
        for sequence in prompts:
            if budget > 0 and sequence.running:
                self._adopt(sequence)
                if found := self._on_disk(sequence, max(reads, 1)):  # the others wait for their turn to read
                    if reads > 0 and self._reserve(sequence, found[-1].computed):
                        recalls.append(Recall.of(sequence, found))
                        reads -= len(found)
                    continue
                tokens = min(sequence.remaining, budget)
                if self._reserve(sequence, sequence.computed + tokens):
                    budget -= tokens
                    chunks.append(Chunk.of(sequence, tokens))
        # A row is worth more to who waits for a first token than to who gets one with every step.
        spare = min(self.guesses, budget) if prompts else self.guesses
        decodes = self._decode([sequence for sequence in decoding if sequence.running], spare)
        chunks = [*decodes, *(chunk for chunk in chunks if chunk.sequence.running)]
        recalls = [recall for recall in recalls if recall.sequence.running]
        return Batch(chunks, self.cache.take_moves(), len(decodes), recalls)

    def commit(self, batch: Batch, results: Results, read: Ordered[int] = ()) -> None:
        """Append what was sampled and emit it: for each chunk the tokens that follow it, or what went wrong. `read`:
        how many pages of each recall."""
        for recall, pages in zip(batch.recalls, read, strict=True):
            if pages and not recall.sequence.ended:
                self._take_over(recall.sequence, recall.found[pages - 1].computed)
                self.cache.publish(recall.sequence.holding, recall.sequence.tokens, recall.sequence.computed)
        for chunk, result in zip(batch.chunks, results, strict=True):
            sequence = chunk.sequence
            if sequence.ended:  # cancelled while the step ran
                continue
            if isinstance(result, Exception):
                self.fail(sequence, result)
                continue
            sequence.computed = chunk.end
            before = len(sequence.tokens)
            reason = self._append(sequence, result)
            appended = sequence.tokens[before:]
            self._score(chunk, appended)
            self._charge(chunk, len(appended))
            if reason is None:
                self.cache.publish(sequence.holding, sequence.tokens, sequence.computed)
            else:
                self._finish(sequence, reason)

    def note(self, batch: Batch, seconds: float) -> None:
        """A step took so long, not counting the reads that `note_reads` is told of."""
        rows, decodes = batch.rows, batch.decodes
        if not rows:
            return
        if decodes == len(batch.chunks):
            self.cost.note(rows, seconds)
            self._pacer.rested()
        elif decodes:
            self._pacer.note(rows - decodes, seconds / self.cost.seconds(decodes))
        else:
            before_s = self._prompt_token_s or seconds / rows
            self._prompt_token_s = before_s + _FOLLOW * (seconds / rows - before_s)

    def note_reads(self, pages: int, seconds: float) -> None:
        """Reading so many pages from disk took so long."""
        self._read_cost.note(pages, seconds)

    # --- admission -----------------------------------------------------------------------------------------

    def _admit(self) -> None:
        preempted = self.preemptions
        while self.waiting and self.preemptions == preempted:
            sequence = min(self.waiting, key=self._turn)
            while not self._fits(sequence):
                victim = max(self.running, key=_seniority)
                if victim.priority >= sequence.priority:
                    return
                self._preempt(victim)
            self.waiting.remove(sequence)
            self.running.append(sequence)
            sequence.running = True
            self._adopt(sequence)
            if not sequence.preemptions:
                self.prompt_tokens += sequence.prompt_tokens

    def _fits(self, sequence: Sequence) -> bool:
        """Is there a place, and room for the KV that all are expected to need at once?"""
        if not self.running:
            return True
        if len(self.running) >= self._sequences:
            return False
        size = self.cache.page_tokens
        shared = self.cache.used_pages - sum(other.holding.own_pages for other in self.running)
        growths = [
            self._growth(other, len(other.holding.pages) - other.holding.own_pages) for other in self.running
        ]
        growths.append(self._growth(sequence, self.cache.held_pages(sequence.tokens)))
        return shared * size + peak_tokens(growths) <= self.cache.pages * size

    def _growth(self, sequence: Sequence, shared_pages: int) -> Growth:
        size = self.cache.page_tokens
        # Half a page more, for what its last page leaves empty.
        own = len(sequence.tokens) - shared_pages * size + size // 2
        return Growth(own, self._expected(sequence))

    def _expected(self, sequence: Sequence) -> int:
        """How many more tokens it will probably generate."""
        expected = self._lengths.expected(sequence.generated) - sequence.generated
        return min(expected, sequence.limit - len(sequence.tokens))

    def _adopt(self, sequence: Sequence) -> None:
        """Skip what the prefix cache knows by now, also from sequences that run beside it."""
        computed = self.cache.adopt(sequence.holding, sequence.tokens, sequence.computed)
        self._take_over(sequence, computed)

    def _take_over(self, sequence: Sequence, computed: int) -> None:
        """Count the first `computed` tokens as computed: others did that, or a disk has kept it."""
        if not sequence.preemptions:
            sequence.cached_tokens += computed - sequence.computed
            self.cached_tokens += computed - sequence.computed
        sequence.computed = computed

    def _on_disk(self, sequence: Sequence, most: int) -> list[Found]:
        """Pages, at most `most`, that are better read from disk than computed."""
        found = self.cache.on_disk(sequence.holding, sequence.tokens, sequence.computed, most)
        if not found:
            return found
        tokens = found[-1].computed - sequence.computed
        return found if self._read_cost.pays(len(found), tokens, self._prompt_token_s) else []

    def _most_reads(self, decodes: int) -> int:
        """Pages that may be read from disk beside so many decodes."""
        if decodes and not self.cost.measured:
            return 1
        most = self.cache.free_pages + self._reads
        return min(most, self._read_cost.most_pages(self.cost.seconds(decodes) if decodes else 0.0))

    def _prompt_budget(self, decodes: int) -> int:
        """Tokens of prompts that may go with so many decodes."""
        if not decodes:
            return self._chunk_tokens
        return self._pacer.budget() if self.cost.measured else 0

    def _turn(self, sequence: Sequence) -> tuple[int, int, float, int]:
        """Who comes first has the least."""
        if sequence.preemptions:
            return -sequence.priority, 0, 0.0, sequence.number
        return -sequence.priority, 1, self._counters.given(sequence.client), sequence.number

    def _retry_after_s(self) -> float:
        """When about half of what is to be done now will have been done."""
        if not self.cost.measured:
            return FIRST_RETRY_S
        everything = [*self.running, *self.waiting]
        prompts = sum(sequence.remaining for sequence in everything)
        answers = sum(self._expected(sequence) for sequence in everything)
        backlog_s = prompts * self._prompt_token_s
        backlog_s += answers / self._sequences * self.cost.seconds(self._sequences)
        return min(max(backlog_s / 2, RETRY_S[0]), RETRY_S[1])

    # --- pages ---------------------------------------------------------------------------------------------

    def _reserve(self, sequence: Sequence, tokens: int) -> bool:
        """Pages for so many tokens, if need be from younger sequences; False when it had to go itself."""
        while sequence.running:
            if self.cache.extend(sequence.holding, tokens):
                return True
            self._preempt(max(self.running, key=_seniority))
        return False

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the queue, to be computed again: what is not evicted meanwhile will be found in the cache."""
        self.running.remove(sequence)
        sequence.running = False
        self.cache.release(sequence.holding, sequence.tokens, sequence.computed)
        sequence.computed = 0
        sequence.preemptions += 1
        self.preemptions += 1
        self.waiting.append(sequence)

    # --- guesses -------------------------------------------------------------------------------------------

    @property
    def guessing(self) -> list[Sequence]:
        """Those worth guessing for; nobody while a prompt is read, which gets the rows."""
        return [] if any(s.remaining > 1 for s in self.running) else list(self.running)

    def _decode(self, decoding: list[Sequence], spare: int) -> list[Chunk]:
        """One token of each, and at most `spare` guesses at what follows, as far as there are pages for them."""
        guessing = [(sequence.guesser, sequence.limit - len(sequence.tokens) - 1) for sequence in decoding]
        chunks = []
        for sequence, draft in zip(decoding, drafts(guessing, spare, self.cost), strict=True):
            if not self.cache.extend(sequence.holding, len(sequence.tokens) + len(draft)):
                draft = ()  # nobody makes room for guesses
            chunks.append(Chunk.of(sequence, 1, draft))
        return chunks

    def _score(self, chunk: Chunk, appended: list[int]) -> None:
        sequence, accepted = chunk.sequence, max(0, len(appended) - 1)
        sequence.guesser.score(appended)
        sequence.drafted_tokens += len(chunk.draft)
        sequence.accepted_tokens += accepted
        self.drafted_tokens += len(chunk.draft)
        self.accepted_tokens += accepted

    # --- ends ----------------------------------------------------------------------------------------------

    def _charge(self, chunk: Chunk, generated: int) -> None:
        sequence, prompt_tokens = chunk.sequence, 0
        if not sequence.preemptions:  # what is computed again is nobody's gain
            prompt_tokens = max(0, min(chunk.end, sequence.prompt_tokens) - chunk.start)
        self._counters.charge(sequence.client, prompt_tokens, generated)

    def _append(self, sequence: Sequence, sampled: Ordered[Sampled]) -> FinishReason | None:
        for one in sampled:
            sequence.computed = len(sequence.tokens)
            sequence.tokens.append(one.token_id)
            reason = sequence.sink.accept(one)
            if reason is None and len(sequence.tokens) >= sequence.limit:
                reason = "length"
            if reason is not None:
                return reason
        return None

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        if sequence.generated:
            self._lengths.note(sequence.generated)
        self._end(sequence)
        self.cache.release(sequence.holding, sequence.tokens, sequence.computed)
        sequence.sink.finish(reason, sequence)

    def _end(self, sequence: Sequence) -> None:
        """Before its sink hears of it: a sink that raises must not keep anything."""
        sequence.ended = True
        self._counters.leave(sequence.client)
        (self.running if sequence.running else self.waiting).remove(sequence)
        sequence.running = False


def _seniority(sequence: Sequence) -> tuple[int, int]:
    """Who stays longest has the least."""
    return -sequence.priority, sequence.number
