"""The scheduler: which tokens of which sequences make the next step.

Decodes go first. Prompts follow in chunks that may lengthen a step of decodes only so much (`learn.pacing`).
`admission` decides who is let in, and when. If the pool runs out of pages nevertheless, the youngest of the lowest
priority is preempted: its pages go to the prefix cache, and later it is computed again from its tokens, with the same
result. The oldest of the highest priority is never preempted, and a sequence that would not fit alone is not queued, so
one of them always gets on.

Pure: no thread, tensor or text; callers pass the clock's reading. What happens to sequences is returned as events, and
somebody else passes them on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Ordered
from dataclasses import dataclass, field

from shoal.models.sampling import Sampled
from shoal.offload.kv.prefix_cache import Found, Holding, PrefixCache
from shoal.partition.spec import RopeSpec, grows_to, length_class

from .admission import Admission
from .batch import Batch, Chunk, Recall
from .guess.speculation import drafts
from .learn.pacing import SLOWDOWN
from .learn.rival import Rival
from .learn.speeds import Speeds
from .learn.step_cost import StepSeconds
from .sequence import Emitted, Ended, EndReason, Failed, Queued, Sequence, SequenceEvent, Standing

SHARED_PAGE = 4  # a prompt waits for 1/n of a page, at least, that another computes just now

Results = Ordered[Ordered[Sampled] | Exception]


@dataclass
class Totals:
    """Counts since the model was loaded."""

    preemptions: int = 0
    prompt_tokens: int = 0  # of all prompts admitted
    cached_tokens: int = 0  # of these, found in the prefix cache
    generated_tokens: int = 0
    drafted_tokens: int = 0  # guessed ahead
    accepted_tokens: int = 0  # of these, guessed right


@dataclass
class _Room:
    """What a step can still hold of prompts, and those that it computes tokens of."""

    tokens: int
    reads: int  # pages from disk
    begun: list[Sequence] = field(default_factory=list)


class Scheduler:
    """At most `sequences` run at once and `queue` more wait. A step holds at most `chunk_tokens` tokens of prompts and
    `guesses` guessed tokens. `reads`: pages of KV that it may read from disk beyond those that are free. `expected`:
    what steps are thought to take before any was measured, as in `StepCost`; `slowdown`, `rival`: as in `Speeds`.
    `ropes`: those of the model. They may depend on how long a text is."""

    def __init__(
        self,
        cache: PrefixCache,
        *,
        sequences: int,
        queue: int,
        chunk_tokens: int,
        guesses: int,
        expected: StepSeconds | None = None,
        slowdown: float = SLOWDOWN,
        reads: int = 1,
        rival: Rival | None = None,
        ropes: Ordered[RopeSpec] = (),
    ) -> None:
        self.cache = cache
        self._ropes = [rope for rope in ropes if rope.by_length]
        self.guesses = guesses
        self.speeds = Speeds(chunk_tokens, expected, reads, slowdown, rival)
        self.admission = Admission(cache, self.speeds, sequences=sequences, queue=queue)
        self.running: list[Sequence] = []
        self.totals = Totals()

    @property
    def waiting(self) -> list[Sequence]:
        return self.admission.waiting

    # --- requests ------------------------------------------------------------------------------------------

    def submit(self, sequence: Sequence) -> list[SequenceEvent]:
        """Queue a sequence. Raises QueueFull, or NeverFits when it could never run."""
        sequence.holding.length = length_class(self._ropes, len(sequence.tokens))
        displaced = self.admission.enter(sequence, self.running)
        events: list[SequenceEvent] = [Queued(sequence)]
        if displaced is not None:
            events += self.fail([displaced[0]], displaced[1])
        return events

    def end(self, sequence: Sequence, reason: EndReason) -> list[SequenceEvent]:
        """End a sequence with what it has, unless it has ended already."""
        if sequence.ended:
            return []
        self.admission.note_length(sequence.generated)
        self.cache.release(sequence.holding, sequence.tokens, sequence.computed)
        # Last: if anything before fails, it has not ended, and whoever fails it tells its client.
        self._leave(sequence)
        return [Ended(sequence, reason)]

    def standing(self, sequence: Sequence) -> Standing:
        """How far it is. What is known from earlier texts counts as done once it runs."""
        place = 0 if sequence.running or sequence.ended else self.admission.place(sequence)
        if place == 1 and not self.running:  # the next step takes it
            place = 0
        return Standing(place, len(self.waiting), sequence.computed, len(sequence.tokens))

    def fail(self, sequences: Iterable[Sequence], error: Exception) -> list[SequenceEvent]:
        """End sequences with an error, those that have not ended already."""
        failing = [sequence for sequence in sequences if not sequence.ended]
        for sequence in failing:
            self._leave(sequence)
            self.cache.drop(sequence.holding)
        return [Failed(sequence, error) for sequence in failing]

    def fail_all(self, error: Exception) -> list[SequenceEvent]:
        return self.fail([*self.running, *self.waiting], error)

    def expire(self, now_s: float) -> list[SequenceEvent]:
        """End what is past its deadline."""
        late = [s for s in (*self.running, *self.waiting) if s.deadline_s <= now_s]
        return [event for sequence in late for event in self.end(sequence, "deadline")]

    def _leave(self, sequence: Sequence) -> None:
        sequence.ended = True
        self.admission.leave(sequence)
        if sequence.running and sequence.remaining > 1:  # not read: it does not count as one of a crowd
            for other in self.running:
                other.crowd = 0
        (self.running if sequence.running else self.waiting).remove(sequence)
        sequence.running = False

    # --- the next step -------------------------------------------------------------------------------------

    def next(self, now_s: float) -> Batch:
        """The next step; an empty one when there is nothing to do."""
        preempted = self.totals.preemptions
        decoding = self._decoding()
        if self.totals.preemptions == preempted:  # else what was preempted would come back at once
            self._admit()
        decodes = sum(sequence.running for sequence in decoding)
        prompts = [s for s in sorted(self.running, key=self.admission.turn) if s not in decoding]
        reads = self.speeds.most_reads(decodes, self.cache.free_pages)
        unread = [sequence.remaining for sequence in prompts]
        for sequence in prompts:  # the last of a crowd is read as fast as the first; one far longer is not
            sequence.crowd = max(sequence.crowd, sum(unread) // max(unread))
        crowd = max([len(prompts), *(sequence.crowd for sequence in prompts)])
        room = _Room(self.speeds.prompt_tokens(decodes, crowd), reads)
        parts = [part for sequence in prompts if (part := self._part(sequence, room))]
        # Whoever waits for a first token comes before those that get a token with every step.
        spare = min(self.guesses, room.tokens) if prompts else self.guesses
        chunks = self._decode([sequence for sequence in decoding if sequence.running], spare)
        return Batch.of(now_s, chunks, parts, self.cache.take_moves())

    def _decoding(self) -> list[Sequence]:
        """Sequences that are to get their next token, the oldest first; each has a page for it."""
        return [
            sequence
            for sequence in sorted(self.running, key=_seniority)
            if sequence.remaining == 1 and self._reserve(sequence, sequence.computed + 1)
        ]

    def _admit(self) -> None:
        """Let in whoever is next while there is room, or until somebody has to make room by being preempted."""
        preempted = self.totals.preemptions
        while self.waiting and self.totals.preemptions == preempted:
            sequence = min(self.waiting, key=self.admission.turn)
            while not self.admission.fits(sequence, self.running):
                victim = max(self.running, key=_seniority)
                if victim.priority >= sequence.priority:
                    return
                self._preempt(victim)
            self.running.append(sequence)  # before it leaves the others: `busy` is asked for without the lock
            self.waiting.remove(sequence)
            sequence.running = True
            self._adopt(sequence)
            if not sequence.restarts:
                self.totals.prompt_tokens += sequence.prompt_tokens

    def _part(self, sequence: Sequence, room: _Room) -> Chunk | Recall | None:
        """What the step does for a prompt; `room` shrinks by it."""
        if room.tokens <= 0 or not sequence.running:
            return None
        self._adopt(sequence)
        if found := self._on_disk(sequence, max(room.reads, 1)):  # if it may not read in this step, it waits
            if room.reads <= 0 or not self._reserve(sequence, found[-1].computed):
                return None
            room.reads -= len(found)
            return Recall.of(sequence, found)
        if any(self._shares(sequence, other) for other in room.begun):
            return None
        tokens = min(sequence.remaining, room.tokens)
        if not self._reserve(sequence, sequence.computed + tokens):
            return None
        room.tokens -= tokens
        room.begun.append(sequence)
        return Chunk.of(sequence, tokens)

    def _shares(self, sequence: Sequence, other: Sequence) -> bool:
        """Whether `other` is computing a page, and will fill it, of which `sequence` can use much as soon as it is
        full: if both computed it, one of them would do so for nothing."""
        size, path, others = self.cache.page_tokens, sequence.holding.path, other.holding.path
        first = len(path) * size
        useful = max(sequence.computed, first) + max(1, size // SHARED_PAGE)
        if useful > first + size or useful >= len(sequence.tokens) or len(other.tokens) < first + size:
            return False
        if other.holding.length != sequence.holding.length or len(others) != len(path):
            return False
        return others[-1:] == path[-1:] and other.tokens[first:useful] == sequence.tokens[first:useful]

    def _decode(self, decoding: list[Sequence], spare: int) -> list[Chunk]:
        """One token of each, and after these at most `spare` guesses in all, as far as there are pages for guesses."""
        guessing = [(sequence.guesser, self._most_guesses(sequence)) for sequence in decoding]
        chunks = []
        for sequence, draft in zip(decoding, drafts(guessing, spare, self.speeds.cost), strict=True):
            if not self.cache.extend(sequence.holding, len(sequence.tokens) + len(draft)):
                draft = ()  # nobody makes room for guesses
            chunks.append(Chunk.of(sequence, 1, draft))
        return chunks

    def _most_guesses(self, sequence: Sequence) -> int:
        """How many guesses could all be right: the text must not get too long with them, nor need other ropes."""
        ends = min(sequence.limit - 1, grows_to(self._ropes, sequence.holding.length))
        return ends - len(sequence.tokens)

    @property
    def guessing(self) -> list[Sequence]:
        """The sequences that a draft model should guess for: none while a prompt is read, since that needs the rows."""
        return [] if any(s.remaining > 1 for s in self.running) else list(self.running)

    # --- pages ---------------------------------------------------------------------------------------------

    def _adopt(self, sequence: Sequence) -> None:
        """Take over what the prefix cache knows of its text by now, also from sequences that run beside it."""
        computed = self.cache.adopt(sequence.holding, sequence.tokens, sequence.computed)
        self._take_over(sequence, computed)

    def _take_over(self, sequence: Sequence, computed: int) -> None:
        """Count the first `computed` tokens as computed: their KV came from the prefix cache or from disk."""
        if not sequence.restarts:
            sequence.cached_tokens += computed - sequence.computed
            self.totals.cached_tokens += computed - sequence.computed
        sequence.computed = computed

    def _on_disk(self, sequence: Sequence, most: int) -> list[Found]:
        """At most `most` pages of its text that are sooner read from disk than computed."""
        found = self.cache.on_disk(sequence.holding, sequence.tokens, sequence.computed, most)
        if found and self.speeds.reading_pays(len(found), found[-1].computed - sequence.computed):
            return found
        return []

    def _reserve(self, sequence: Sequence, tokens: int) -> bool:
        """Give it pages for so many tokens, if need be by preempting others; False if it was itself preempted."""
        while sequence.running:
            if self.cache.extend(sequence.holding, tokens):
                return True
            self._preempt(max(self.running, key=_seniority))
        return False

    def _preempt(self, sequence: Sequence) -> None:
        """Put it back into the queue, to be computed again, except for what it then finds in the prefix cache."""
        self.waiting.append(sequence)  # before it leaves the others, as in `_admit`
        self.running.remove(sequence)
        sequence.running = False
        self._restart(sequence)
        sequence.preemptions += 1
        self.totals.preemptions += 1

    def _restart(self, sequence: Sequence) -> None:
        """Have it computed again from its first token, except for what it then finds in the prefix cache."""
        self.cache.release(sequence.holding, sequence.tokens, sequence.computed)
        sequence.computed = 0
        sequence.restarts += 1

    def start_anew(self, cache: PrefixCache, speeds: Speeds, guesses: int) -> list[SequenceEvent]:
        """The KV of all texts is gone, and from now on pages are those of `cache`. Whoever runs waits to be computed
        again; nothing that was emitted changes. What would not fit even alone fails. What was learnt of speeds is
        forgotten, too."""
        self.cache = self.admission.cache = cache
        self.speeds = self.admission.speeds = speeds
        self.guesses = guesses
        for sequence in [*self.running]:
            self.waiting.append(sequence)
            self.running.remove(sequence)
            sequence.running = False
            sequence.restarts += 1
        for sequence in self.waiting:
            sequence.holding = Holding(length=sequence.holding.length)
            sequence.computed = 0
        events: list[SequenceEvent] = []
        for sequence in [*self.waiting]:
            if (error := self.admission.unfit(sequence)) is not None:
                events += self.fail([sequence], error)
        return events

    # --- the results of a step -----------------------------------------------------------------------------

    def commit(
        self,
        batch: Batch,
        results: Results,
        pages_read: Ordered[int],
        *,
        now_s: float,
        read_s: float = 0.0,
        stall_s: float = 0.0,
    ) -> Iterator[SequenceEvent]:
        """Append what was sampled. `results`: for each chunk the tokens that follow it, or an error. `pages_read`: how
        many pages of each recall could be read. That took `read_s` of the step; for `stall_s` it waited for weights.

        Works while events are taken from it, so that those before a failure are not lost: they have happened."""
        prompts, rows = len(batch.chunks) - batch.decodes, batch.rows
        took_s = max(0.0, now_s - batch.began_s - read_s)
        self.speeds.note(rows, batch.decodes, prompts, took_s)
        if rows == batch.decodes == 1:
            self.speeds.token_times.note(took_s, batch.chunks[0].start)
        self.speeds.note_reads(sum(pages_read), read_s)
        for recall, pages in zip(batch.recalls, pages_read, strict=True):
            self._recalled(recall, pages, batch.began_s)
        for chunk, result in zip(batch.chunks, results, strict=True):
            times = chunk.sequence.times
            times.admitted_s = times.admitted_s or batch.began_s
            times.stall_s += stall_s
            if times.first_token_s:
                times.steps += 1
                times.rows += rows
            else:
                times.prompt_rows += rows
            if not chunk.sequence.ended:  # else it was cancelled while the step ran
                yield from self._append(chunk, result, now_s)

    def _recalled(self, recall: Recall, pages: int, began_s: float) -> None:
        sequence = recall.sequence
        sequence.times.admitted_s = sequence.times.admitted_s or began_s
        if pages and not sequence.ended:
            self._take_over(sequence, recall.found[pages - 1].computed)
            self.cache.publish(sequence.holding, sequence.tokens, sequence.computed)

    def _append(
        self, chunk: Chunk, result: Ordered[Sampled] | Exception, now_s: float
    ) -> list[SequenceEvent]:
        """Append to a sequence the tokens that follow its chunk; it may end with them."""
        sequence = chunk.sequence
        if isinstance(result, Exception):
            return self.fail([sequence], result)
        if chunk.samples:
            sequence.times.first_token_s = sequence.times.first_token_s or now_s
            sequence.times.last_token_s = now_s
        sequence.computed = chunk.end
        before = len(sequence.tokens)
        emitted: list[Sampled] = []
        reason: EndReason | None = None
        for one in result:
            sequence.computed = len(sequence.tokens)
            sequence.tokens.append(one.token_id)
            if one.token_id in sequence.stop_ids:
                reason = "stop"
                break
            emitted.append(one)
            if len(sequence.tokens) >= sequence.limit:
                reason = "length"
                break
        self._account(chunk, sequence.tokens[before:])
        events: list[SequenceEvent] = [Emitted(sequence, emitted, now_s)] if emitted else []
        if reason is not None:
            return events + self.end(sequence, reason)
        self.cache.publish(sequence.holding, sequence.tokens, sequence.computed)
        if len(sequence.tokens) > grows_to(self._ropes, sequence.holding.length):
            self._restart(sequence)  # so that all keys are turned anew, as transformers does
            sequence.holding.length = length_class(self._ropes, len(sequence.tokens))
        return events

    def _account(self, chunk: Chunk, appended: list[int]) -> None:
        """Count what the sequence was given, and which guesses were right."""
        sequence, accepted = chunk.sequence, max(0, len(appended) - 1)
        prompt_tokens = 0
        if not sequence.restarts:  # its client is not charged twice
            prompt_tokens = max(0, min(chunk.end, sequence.prompt_tokens) - chunk.start)
        self.admission.charge(sequence, prompt_tokens, len(appended))
        sequence.guesser.score(appended)
        sequence.drafted_tokens += len(chunk.draft)
        sequence.accepted_tokens += accepted
        self.totals.generated_tokens += len(appended)
        self.totals.drafted_tokens += len(chunk.draft)
        self.totals.accepted_tokens += accepted


def _seniority(sequence: Sequence) -> tuple[int, int]:
    """A key to sort by: whoever is preempted last has the least."""
    return -sequence.priority, sequence.number
