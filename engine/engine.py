"""The engine: the step loop of one model, on rank 0.

    batch  = scheduler.next(now)               which tokens of which sequences
    result = rank.run(batch.order)             every rank of the group moves, reads and computes the same
    tokens = sampled(batch, result.logits)     what follows each text that was read to its end
    events = scheduler.commit(batch, tokens)   append, finish; `Engine.events` hands them out

Knows token ids; text, requests and sockets are elsewhere. One thread calls `step`; any thread may call the rest.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice

from shoal.kernels.arrays import Floats
from shoal.kernels.errors import HomeFull, HomeLost
from shoal.models.errors import SamplingError
from shoal.models.sampling import Sampled
from shoal.offload.kv.disk_pages import FLUSH_LIMIT_S
from shoal.offload.kv.prefix_cache import PrefixCache

from .batch import Batch, Chunk
from .errors import DeviceGone, DeviceTooFull, RankLost
from .executor import Abandoned
from .guess.drafter import Drafter
from .learn.speeds import Speeds
from .order import Result
from .rank import Rank
from .scheduler import Scheduler
from .sequence import EndReason, Sequence, SequenceEvent, Standing

log = logging.getLogger(__name__)

STEP_LIMIT_S = 60.0  # `close` and `suspend` wait so long for the end of a step
SETTLE_S = 0.1  # of time that nobody needs are used at once
EXCHANGING = 0.05  # of the time, at most, experts change places while somebody waits


class Engine:
    """`clock` gives seconds; `drafter` guesses, if there is one. `notify` is called when there are events to take: by
    any thread, also in the middle of a step, but never while the scheduler is locked. `compute_on` sets the threads of
    a step before it."""

    def __init__(
        self,
        rank: Rank,
        scheduler: Scheduler,
        clock: Callable[[], float],
        drafter: Drafter | None = None,
        notify: Callable[[Engine], None] = lambda engine: None,
        compute_on: Callable[[int], None] | None = None,
    ) -> None:
        self.rank = rank
        self.scheduler = scheduler
        self._notify = notify
        self._compute_on = compute_on
        self._clock = clock
        self._drafter = drafter
        self._events: list[SequenceEvent] = []
        self.lost: RankLost | None = None  # until `start_anew` there are no steps
        self._ended = False  # by `close`
        self._under_way: tuple[Batch, float] | None = None  # the step, and which share of it is done
        self._exchanges_from_s = 0.0  # on the clock: until then no experts change places between steps
        self._stepping = threading.Lock()  # held throughout a step
        self._lock = threading.Lock()  # guards scheduler and events; never held while anything is computed

    @property
    def busy(self) -> bool:
        return bool(self.scheduler.running or self.scheduler.waiting)

    # --- requests ------------------------------------------------------------------------------------------

    def submit(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises QueueFull or NeverFits."""
        sequence.times.arrived_s = sequence.times.arrived_s or self._clock()
        with self._changing() as events:
            events += self.scheduler.submit(sequence)

    def end(self, sequence: Sequence, reason: EndReason) -> None:
        """End a sequence early; idempotent."""
        with self._changing() as events:
            events += self.scheduler.end(sequence, reason)

    def expire(self) -> None:
        """End what is past its deadline, also in the middle of a step, which may wait for a disk. If that fails, all
        sequences do: else it would fail again and again, and none of them would get on."""
        try:
            with self._changing() as events:
                events += self.scheduler.expire(self._clock())
        except Exception as error:
            self.fail_all(error)
            raise

    def fail_all(self, error: Exception) -> None:
        """End everything with an error, for instance because the model is unloaded."""
        with self._changing() as events:
            events += self.scheduler.fail_all(error)

    def standing(self, sequence: Sequence) -> Standing:
        """How far a sequence is, with what the step under way has done for it. Never waits for a step."""
        with self._lock:
            found, step = self.scheduler.standing(sequence), self._under_way
            if step is None or not sequence.running:
                return found
            batch, share = step
            return found._replace(done=max(found.done, batch.done(sequence, share)))

    def events(self) -> list[SequenceEvent]:
        """What has happened to sequences since the last call, in order."""
        with self._lock:
            taken, self._events = self._events, []
        return taken

    def close(self, keep_s: float = FLUSH_LIMIT_S) -> None:
        """Wait for the end of a step under way and keep the prefix cache on disk, if there is one, as far as it can be
        written in `keep_s`. There are no steps any more, unless it goes on with `start_anew`. Idempotent."""
        if not self._stepping.acquire(timeout=STEP_LIMIT_S):
            log.warning("a step does not end: its model's KV is not kept on disk")
            return
        try:
            with self._lock:
                known = self.scheduler.cache.known()
            self._ended = True
            self.rank.close(known, keep_s)
        finally:
            self._stepping.release()

    def suspend(self, why: RankLost) -> bool:
        """Wait for the end of a step under way; after it there is none until `start_anew`. If a rank was lost in it,
        that is why. False if it does not end: then it goes on."""
        if not self._stepping.acquire(timeout=STEP_LIMIT_S):
            return False
        try:
            self.lost = self.lost or why
        finally:
            self._stepping.release()
        return True

    def start_anew(self, rank: Rank, cache: PrefixCache, speeds: Speeds) -> None:
        """Go on with another rank 0 and its pages: the KV of all texts is gone and will be computed again."""
        with self._stepping, self._changing() as events:
            self.rank = rank
            self.lost, self._ended = None, False
            events += self.scheduler.start_anew(cache, speeds, rank.executor.plan.guesses)

    @contextmanager
    def _changing(self) -> Iterator[list[SequenceEvent]]:
        """Lock the scheduler for a change. Its events are added to the list; if there are any, `notify` is called."""
        added = False
        try:
            with self._lock:
                before = len(self._events)
                try:
                    yield self._events
                finally:
                    added = len(self._events) > before
        finally:  # also if the change failed halfway: what has ended until then has ended
            if added:
                self._notify(self)

    # --- steps ---------------------------------------------------------------------------------------------

    def step(self) -> bool:
        """One forward pass. False when there was nothing to do. A failing pass fails its own sequences only. Raises
        RankLost if a rank or a device is lost, also while experts change places after the pass: then none fails."""
        with self._stepping:
            if self.lost is not None:
                return False
            self._draft()
            batch = self._next()
            if batch.empty:
                return False
            if self._compute_on is not None:
                self._compute_on(self._threads(batch))
            try:
                result = self.rank.run(batch.order, lambda share: self._goes_on(batch, share))
                self._commit(batch, result)
            except Abandoned:  # all of its sequences have ended, so nobody is told anything
                pass
            except RankLost as error:  # its texts go on with who is left: see `start_anew`
                self.lost = error
                raise
            except (HomeLost, HomeFull) as error:  # as above, without the device or with less of it
                kind = DeviceGone if isinstance(error, HomeLost) else DeviceTooFull
                self.lost = kind(str(error))
                raise self.lost from error.with_traceback(None)  # whose frames have what the device had
            except Exception as error:
                with self._changing() as events:
                    events += self.scheduler.fail(batch.sequences, error)
                raise
            finally:
                self._under_way = None
                if self._compute_on is not None and not self.busy:  # whoever computes next has all threads
                    self._compute_on(self.rank.executor.plan.threads)
            self._exchange_between_steps()
            return True

    def _exchange_between_steps(self) -> None:
        """A pair of experts changes places, if that is worth it, and so seldom that it takes little of the time."""
        began_s = self._clock()
        if began_s >= self._exchanges_from_s:
            self._exchange()
            ended_s = self._clock()
            self._exchanges_from_s = ended_s + (ended_s - began_s) / EXCHANGING

    def settle(self) -> None:
        """Where there is nothing to compute: move experts to where they are used, but not for long, since somebody may
        come. Raises RankLost as `step` does."""
        if not self._stepping.acquire(blocking=False):
            return
        ends_s = self._clock() + SETTLE_S
        try:
            while self._clock() < ends_s and not (self.busy or self.lost or self._ended):
                if not self._exchange():
                    return
        finally:
            self._stepping.release()

    def _exchange(self) -> bool:
        """Whether a pair of experts changed places. Raises RankLost if that fails: all is to be read anew then."""
        try:
            return self.rank.executor.exchange_experts()
        except Exception as error:  # halfway: some matrices of an expert may be another's now
            why = str(error) if isinstance(error, HomeLost) else f"experts stuck halfway: {error!r}"
            self.lost = DeviceGone(why)
            raise self.lost from error.with_traceback(None)

    def _threads(self, batch: Batch) -> int:
        """With which it is computed: no bit of it depends on that."""
        rival, usual = self.scheduler.speeds.rival, self.rank.executor.plan.threads
        if rival is None:
            return usual
        prompts = len(batch.chunks) > batch.decodes
        return rival.threads(batch.rows, prompts=prompts, waiting=bool(self.scheduler.waiting))

    def _goes_on(self, batch: Batch, share: float) -> bool:
        """Note which share of the step is done. → whether anybody still wants it"""
        self._under_way = batch, share
        return not batch.over

    def _next(self) -> Batch:
        """The next batch. If the scheduler fails, all sequences do: none of them would ever get on."""
        self.expire()
        try:
            with self._lock:
                return self.scheduler.next(self._clock())
        except Exception as error:
            self.fail_all(error)
            raise

    def _commit(self, batch: Batch, result: Result) -> None:
        sampled = _sampled(batch, result.logits)
        times = {"now_s": self._clock(), "read_s": result.read_s, "stall_s": result.stall_s}
        with self._changing() as events:
            events.extend(self.scheduler.commit(batch, sampled, result.pages_read, **times))

    def _draft(self) -> None:
        """Let the draft model guess what the decoding sequences say next. If it fails, it is not asked again."""
        if self._drafter is None:
            return
        with self._lock:
            guessing = self.scheduler.guessing
        try:
            self._drafter.offer(guessing, self.scheduler.guesses, self.scheduler.speeds.cost)
        except Exception as error:  # no answer depends on it
            log.warning("the draft model failed and is not asked again: %s: %s", type(error).__name__, error)
            self._drafter = None


def _sampled(batch: Batch, logits: Floats) -> list[list[Sampled] | Exception]:
    """The tokens that follow each chunk, from logits (R, vocab): none where the chunk ends before its sequence does."""
    rows = iter(logits)
    return [_following(chunk, list(islice(rows, chunk.rows_wanted))) for chunk in batch.chunks]


def _following(chunk: Chunk, logits: list[Floats]) -> list[Sampled] | Exception:
    """The tokens that follow a chunk, one for each row of logits (vocab,) as long as the draft before it was right.

    They are sampled row by row, as they would be without a draft.
    """
    found: list[Sampled] = []
    for row, guess in zip(logits, (*chunk.draft, None), strict=False):
        try:
            found.append(chunk.sequence.sampler.sample(row))
        except SamplingError as error:  # NaN logits, for instance: no other sequence is concerned
            return found or error  # the tokens before it count, and the next step meets the same error
        if found[-1].token_id != guess:
            break
    return found
