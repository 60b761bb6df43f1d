"""Reader threads, which carry a file's bytes to memory as policies ask, and the wait for those bytes.

A policy (`window`, `expert_cache`) says what to read next, and to which place in its region of memory. Every block is
checked against its checksum when it comes for the first time, and again after somebody wrote to the file. When a read
fails, whoever waits for its block gets the error. This module knows threads, memory and the file. It knows neither the
order of blocks nor what they are for.
"""

from __future__ import annotations

import atexit
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from shoal.kernels.arrays import Bytes
from shoal.models.weights import Weights
from shoal.offload.direct_io import DirectFile
from shoal.offload.errors import OffloadError, StoreError
from shoal.offload.pack.pack import Pack
from shoal.partition.spec import BlockId

from .window import Passage, Read

READERS = 4
READ_BYTES = 4 << 20  # two such reads at a time are as fast as anything, and wake seldom (docs/LOG.md)
# Another read begins while no more than this is on its way. Reads that go on at a time end at a time: with more of
# them, what is wanted first comes late.
MOST_COMING_BYTES = READ_BYTES
STUCK_S = 120.0  # when nothing has come for so long, the disk is taken for dead
IDLE_S = 5.0
SILENT_LOOK_S = 1.0
LATELY_S = 2.0
CLOSING_S = 2.0


class BlockFile(Protocol):
    """The file that is read: a pack's."""

    @property
    def path(self) -> Path: ...

    def check(self, block: BlockId, memory: Bytes) -> None:
        """Raises OffloadError if these are not the bytes of the block."""
        ...

    def condemn(self) -> None:
        """Its bytes were found altered or missing."""
        ...


class Policy(Protocol):
    """Decides what is read next, and where to."""

    def next_read(self, most_bytes: int) -> Read | None:
        """What to read now, if anything. Whoever asks must read it."""
        ...

    @property
    def idle(self) -> bool:
        """Whether `next_read` has nothing, as far as can be seen without choosing."""
        ...

    def leave(self, passage: Passage) -> None:
        """A passage has been used, or it failed."""
        ...

    def ended(self, passage: Passage) -> None:
        """A read of the passage has ended."""
        ...


class Region:
    """Memory that a policy governs. `whole`: passages are whole blocks, which can be checked. `slots`: any block may
    lie at any place; otherwise each block has a place of its own."""

    def __init__(self, policy: Policy, memory: Bytes, *, whole: bool = True, slots: bool = False) -> None:
        self.policy = policy
        self.memory = memory
        self.whole = whole
        self._slots = slots
        self._views: dict[BlockId | int, tuple[BlockId, Weights]] = {}

    def bytes_of(self, passage: Passage) -> Bytes:
        return self.memory[passage.position : passage.position + passage.nbytes]

    def weights(self, pack: Pack, passage: Passage) -> Weights:
        """Views of a block that is here. They are made once for each place, because kernels keep pointers in them."""
        place = passage.position if self._slots else passage.block
        block, weights = self._views.get(place, (None, None))
        if weights is None or block != passage.block:
            weights = pack.weights(passage.block, self.bytes_of(passage))
            self._views[place] = passage.block, weights
        return weights


class Readers:
    """Read for `regions`; an earlier region that has something to read goes first. One thread waits for bytes; any
    thread may call `close` and `bytes_per_s`."""

    def __init__(self, source: BlockFile, regions: Sequence[Region]) -> None:
        """Raises StoreError where the file cannot be opened."""
        self._source = source
        self.stall_s = 0.0  # time waited for bytes so far
        self._regions = regions
        self._checked: set[BlockId] = set()
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)  # readers wait for something to read
        self._landed = threading.Condition(self._lock)  # the user waits for bytes
        self._latest: deque[tuple[float, int]] = deque()  # (when, how many) bytes came, in the last LATELY_S
        self._latest_bytes = 0
        self._best_bytes_per_s = 0.0
        self._landings = 0
        self._coming_bytes = 0  # of reads that go on
        self._broken: Exception | None = None
        self._closed = False
        self._file = DirectFile(source.path)
        self._written_ns = self._file.written_ns()
        self._threads = [
            threading.Thread(target=self._run, name=f"shoal-read-{i}", daemon=True) for i in range(READERS)
        ]
        self._running = len(self._threads)
        for thread in self._threads:
            thread.start()
        atexit.register(self.close)  # a thread in C++ while Python ends would crash the process

    def lease(self, region: Region, want: Callable[[], Passage | None]) -> Passage:
        """Waits until the passage that `want` gives is here. Raises OffloadError when it cannot be read."""
        (passage,) = self.lease_all(region, [want])
        return passage

    def lease_all(self, region: Region, wants: Sequence[Callable[[], Passage | None]]) -> list[Passage]:
        """The same for several: all of them, or none. Readers go on when it waits, not between one and the next."""
        leased: list[Passage] = []
        with self._lock:
            try:
                for want in wants:
                    leased.append(self._leased(region, want))
            except BaseException:
                self._leave(region, leased)
                raise
        return leased

    def give_back(self, region: Region, passages: Sequence[Passage]) -> None:
        """Ends leases, so that the places can be used again."""
        with self._lock:
            self._leave(region, passages)

    def change(self, policy: Callable[[], None]) -> None:
        """Calls `policy` while no reader is in one, then wakes a reader, because there may be more to read."""
        with self._lock:
            policy()
            self._wake()

    def once(self, block: BlockId, check: Callable[[], None]) -> None:
        """Calls `check` unless the block is known to be as it was written. Raises what `check` raises."""
        with self._lock:
            known = block in self._checked
        if not known:
            check()
            with self._lock:
                self._checked.add(block)

    def bytes_per_s(self) -> tuple[float, float]:
        """How fast bytes have come lately, and the best speed so far, since there is not always much to read."""
        with self._lock:
            span_s = max(self._lately_s(), 0.1)
            return self._latest_bytes / span_s, self._best_bytes_per_s

    def close(self) -> None:
        """Ends the threads; one that is in a read ends after it. Idempotent."""
        atexit.unregister(self.close)
        with self._lock:
            self._closed = True
            self._work.notify_all()
            self._landed.notify_all()
        until = time.monotonic() + CLOSING_S
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))

    def _leased(self, region: Region, want: Callable[[], Passage | None]) -> Passage:
        """The caller holds the lock."""
        passage = want()
        if passage is not None and passage.error is not None:
            # This read failed ahead of need, perhaps long ago, so it is tried once more.
            region.policy.leave(passage)
            passage = want()
        if passage is None or not passage.here:
            began_s = time.perf_counter()
            try:
                passage = self._await(region, want)
            finally:
                self.stall_s += time.perf_counter() - began_s
        passage.leases += 1
        return passage

    def _leave(self, region: Region, passages: Sequence[Passage]) -> None:
        """The caller holds the lock."""
        for passage in passages:
            passage.leases -= 1
            region.policy.leave(passage)
        self._wake()

    def _await(self, region: Region, want: Callable[[], Passage | None]) -> Passage:
        """Waits until the passage is here. The caller holds the lock, which is released while waiting."""
        seen, silent_s = self._landings, 0.0
        while True:
            if self._closed or self._broken is not None:
                raise StoreError(f"{self._source.path}: is not read any more") from self._broken
            passage = want()
            if passage is not None and passage.error is not None:
                region.policy.leave(passage)
                self._wake()
                # A copy, because the traceback of the original would keep the passage and its memory in a cycle.
                raise type(passage.error)(*passage.error.args)
            if passage is not None and passage.here:
                return passage
            self._wake()  # wanting it may have given readers something to do
            if not self._landed.wait(SILENT_LOOK_S):
                silent_s += SILENT_LOOK_S  # not by the clock, as this process may have been stopped meanwhile
            if self._landings != seen:
                seen, silent_s = self._landings, 0.0
            elif silent_s >= STUCK_S:
                raise StoreError(f"{self._source.path}: nothing could be read for {STUCK_S:.0f} s")

    def _wake(self) -> None:
        """Wakes a reader if there may be something to read: one that finds nothing has the lock meanwhile, and the
        interpreter, for which the others wait. The lock is held."""
        if self._coming_bytes <= MOST_COMING_BYTES and not all(it.policy.idle for it in self._regions):
            self._work.notify()

    def _run(self) -> None:
        """The loop of a reader thread."""
        try:
            while (job := self._next()) is not None:
                self._carry(*job)
        except Exception as error:  # whatever it is, whoever waits for bytes gets it
            with self._lock:
                self._broken = error
                self._landed.notify_all()
        finally:
            with self._lock:
                self._running -= 1
                if not self._running:
                    self._file.close()

    def _next(self) -> tuple[Region, Bytes, Read] | None:
        """Waits until there is something to read, and gives it; None when closed."""
        with self._lock:
            while not self._closed:
                for region in self._regions if self._coming_bytes <= MOST_COMING_BYTES else ():
                    if (read := region.policy.next_read(READ_BYTES)) is not None:
                        self._coming_bytes += read.nbytes
                        self._wake()  # each reader wakes the next, as there may be more
                        return region, region.bytes_of(read.passage), read
                self._work.wait(IDLE_S)
        return None

    def _carry(self, region: Region, memory: Bytes, read: Read) -> None:
        """Carries out a read. The reader that completes a block checks it."""
        passage, start, nbytes = read
        error: Exception | None = None
        written_ns = self._written_ns
        try:
            self._file.read(passage.offset + start, memory[start : start + nbytes])
            written_ns = self._file.written_ns()  # asked after the read, which may have seen new bytes
        except (OSError, EOFError) as caught:
            if isinstance(caught, EOFError):
                self._source.condemn()
            reason = caught.strerror if isinstance(caught, OSError) else str(caught)
            error = StoreError(
                f"block {passage.block}: {nbytes} bytes from byte {passage.offset + start} of {self._source.path} "
                f"cannot be read: {reason}"
            )
        with self._lock:
            self._coming_bytes -= nbytes
            if written_ns > self._written_ns:
                self._written_ns = written_ns
                self._checked.clear()
            passage.error = passage.error or error
            complete = passage.landed + nbytes == passage.nbytes and passage.error is None
            check = complete and region.whole and passage.block not in self._checked and not passage.left
            if not check:
                self._note(region, read)
            else:
                self._wake()  # another one can go on meanwhile
        if check:
            try:
                self._source.check(passage.block, memory)
            except OffloadError as caught:
                self._source.condemn()
                error = caught.with_traceback(None)
            with self._lock:
                passage.error = error
                if error is None:
                    self._checked.add(passage.block)
                self._note(region, read)

    def _lately_s(self) -> float:
        """How long ago the first of the latest bytes came; 0 if there are none. Forgets older ones, under the lock."""
        now_s = time.monotonic()
        while self._latest and now_s - self._latest[0][0] >= LATELY_S:
            self._latest_bytes -= self._latest.popleft()[1]
        return now_s - self._latest[0][0] if self._latest else 0.0

    def _count(self, nbytes: int) -> None:
        """Note that bytes came just now. The lock is held."""
        self._latest.append((time.monotonic(), nbytes))
        self._latest_bytes += nbytes
        if (span_s := self._lately_s()) >= LATELY_S / 2:  # a shorter time might be a burst
            came_bytes = self._latest_bytes - self._latest[0][1]  # after the first of them
            self._best_bytes_per_s = max(self._best_bytes_per_s, came_bytes / span_s)

    def _note(self, region: Region, read: Read) -> None:
        """Note that a read has ended. The lock is held."""
        passage = read.passage
        passage.landed += read.nbytes
        self._landings += 1
        if passage.error is None:
            self._count(read.nbytes)
        region.policy.ended(passage)
        if passage.left:
            self._wake()
        if passage.error is not None or passage.landed == passage.nbytes:
            self._landed.notify_all()
