"""Readers: threads that carry a pack's bytes to memory, as policies ask, and whoever waits for them.

A policy (`window`, `expert_cache`) says what is to be read next and to what place of its region of memory. Every block
is checked against its checksum when it comes for the first time, and again after the file was written to. A read that
fails is raised where its block is waited for. Knows threads, memory and the file; not in what order blocks should come,
nor what they are for.
"""

from __future__ import annotations

import atexit
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from shoal.kernels.arrays import Bytes
from shoal.models.weights import Weights
from shoal.offload.direct_io import DirectFile
from shoal.offload.errors import OffloadError, StoreError
from shoal.offload.pack.pack import Pack
from shoal.partition.spec import BlockId

from .window import Passage, Read

READERS = 4
READ_BYTES = 4 << 20  # four such at a time are as fast as anything, and need not wake often (docs/LOG.md)
STUCK_S = 120.0  # nothing has come for so long: the disk is taken for dead
IDLE_S = 5.0
LOOK_S = 1.0
LATELY_S = 2.0
CLOSING_S = 2.0


class Policy(Protocol):
    """Who decides what is read next, and where to."""

    def next_read(self, most_bytes: int) -> Read | None:
        """What to read now, if anything; whoever asks reads it."""
        ...

    def leave(self, passage: Passage) -> None:
        """A passage was used, or failed."""
        ...

    def ended(self, passage: Passage) -> None:
        """A read of the passage has ended."""
        ...


class Region:
    """Memory that a policy governs. `whole`: what comes are whole blocks, to be checked, not parts of one. `slots`: any
    block may lie at any place; else each has its own."""

    def __init__(self, policy: Policy, memory: Bytes, *, whole: bool = True, slots: bool = False) -> None:
        self.policy = policy
        self.memory = memory
        self.whole = whole
        self._slots = slots
        self._views: dict[BlockId | int, tuple[BlockId, Weights]] = {}

    def bytes_of(self, passage: Passage) -> Bytes:
        return self.memory[passage.position : passage.position + passage.nbytes]

    def weights(self, pack: Pack, passage: Passage) -> Weights:
        """Views of a block that is here; made once for each place, as kernels keep pointers in them."""
        place = passage.position if self._slots else passage.block
        block, weights = self._views.get(place, (None, None))
        if weights is None or block != passage.block:
            weights = pack.weights(passage.block, self.bytes_of(passage))
            self._views[place] = passage.block, weights
        return weights


class Readers:
    """Reads for `regions`, the first that has something to read first. One thread waits; `close` and `bytes_per_s` are
    for any thread."""

    def __init__(self, pack: Pack, regions: Sequence[Region]) -> None:
        """Raises StoreError where the pack cannot be opened."""
        self.pack = pack
        self.stall_s = 0.0  # waited for bytes so far
        self._regions = regions
        self._checked: set[BlockId] = set()
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)  # readers wait for something to read
        self._landed = threading.Condition(self._lock)  # the user waits for bytes
        self._latest: deque[tuple[float, int]] = deque()  # when so many bytes came, in the last LATELY_S
        self._latest_bytes = 0
        self._best_bytes_per_s = 0.0
        self._landings = 0
        self._broken: Exception | None = None
        self._closed = False
        self._file = DirectFile(pack.path)
        self._written_ns = self._file.written_ns()
        self._threads = [
            threading.Thread(target=self._run, name=f"shoal-read-{i}", daemon=True) for i in range(READERS)
        ]
        self._running = len(self._threads)
        for thread in self._threads:
            thread.start()
        atexit.register(self.close)  # a thread that is in C++ when Python ends takes the process down

    def lease(self, region: Region, want: Callable[[], Passage | None]) -> Passage:
        """The passage that `want` gives, once it is here. Raises OffloadError when it cannot be read."""
        with self._lock:
            passage = want()
            if passage is not None and passage.error is not None:
                # The error was met ahead of need, maybe long ago: once more.
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

    def give_back(self, region: Region, passage: Passage) -> None:
        """Ends a lease: the place may be used again."""
        with self._lock:
            passage.leases -= 1
            region.policy.leave(passage)
            self._work.notify()

    def change(self, policy: Callable[[], None]) -> None:
        """Calls a policy while no reader does; there may be more to read then."""
        with self._lock:
            policy()
            self._work.notify()

    def once(self, block: BlockId, check: Callable[[], None]) -> None:
        """Calls `check`, which says whether a block is as it was written, unless that is known. Raises what it does."""
        with self._lock:
            known = block in self._checked
        if not known:
            check()
            with self._lock:
                self._checked.add(block)

    def bytes_per_s(self) -> tuple[float, float]:
        """How fast bytes came lately, and at best: at times less is asked for."""
        with self._lock:
            span_s = max(self._lately_s(), 0.1)
            return self._latest_bytes / span_s, self._best_bytes_per_s

    def close(self) -> None:
        """Ends the threads, those in a read after that; idempotent."""
        atexit.unregister(self.close)
        with self._lock:
            self._closed = True
            self._work.notify_all()
            self._landed.notify_all()
        until = time.monotonic() + CLOSING_S
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))

    def _await(self, region: Region, want: Callable[[], Passage | None]) -> Passage:
        """The lock is held, and let go while waiting."""
        seen, silent_s = self._landings, 0.0
        while True:
            if self._closed or self._broken is not None:
                raise StoreError(f"{self.pack.path}: is not read any more") from self._broken
            passage = want()
            if passage is not None and passage.error is not None:
                region.policy.leave(passage)
                self._work.notify()
                # not the passage's own, whose traceback would keep the passage, and its memory, in a ring
                raise type(passage.error)(*passage.error.args)
            if passage is not None and passage.here:
                return passage
            self._work.notify()  # to be wanted may be news
            if not self._landed.wait(LOOK_S):
                silent_s += LOOK_S  # not by the clock: this process may have been stopped for a while
            if self._landings != seen:
                seen, silent_s = self._landings, 0.0
            elif silent_s >= STUCK_S:
                raise StoreError(f"{self.pack.path}: nothing could be read for {STUCK_S:.0f} s")

    def _run(self) -> None:
        """What a reader does until it is closed."""
        try:
            while (job := self._next()) is not None:
                self._carry(*job)
        except Exception as error:  # whatever it was, it is raised where bytes are waited for
            with self._lock:
                self._broken = error
                self._landed.notify_all()
        finally:
            with self._lock:
                self._running -= 1
                if not self._running:
                    self._file.close()

    def _next(self) -> tuple[Region, Bytes, Read] | None:
        """What to read now, waiting until there is something; None when closed."""
        with self._lock:
            while not self._closed:
                for region in self._regions:
                    if (read := region.policy.next_read(READ_BYTES)) is not None:
                        self._work.notify()  # there may be more: each reader wakes the next
                        return region, region.bytes_of(read.passage), read
                self._work.wait(IDLE_S)
        return None

    def _carry(self, region: Region, memory: Bytes, read: Read) -> None:
        """Reads a read to its place; the one that completes a block checks it."""
        passage, start, nbytes = read
        error: Exception | None = None
        written_ns = self._written_ns
        try:
            self._file.read(passage.offset + start, memory[start : start + nbytes])
            written_ns = self._file.written_ns()  # after the read, which may have met what was being written
        except (OSError, EOFError) as caught:
            if isinstance(caught, EOFError):
                self.pack.condemn()
            reason = caught.strerror if isinstance(caught, OSError) else str(caught)
            error = StoreError(
                f"block {passage.block}: {nbytes} bytes from byte {passage.offset + start} of {self.pack.path} "
                f"cannot be read: {reason}"
            )
        with self._lock:
            if written_ns > self._written_ns:
                self._written_ns = written_ns
                self._checked.clear()
            passage.error = passage.error or error
            complete = passage.landed + nbytes == passage.nbytes and passage.error is None
            check = complete and region.whole and passage.block not in self._checked and not passage.left
            if not check:
                self._note(region, read)
        if check:
            try:
                self.pack.check(passage.block, memory)
            except OffloadError as caught:
                self.pack.condemn()
                error = caught.with_traceback(None)
            with self._lock:
                passage.error = error
                if error is None:
                    self._checked.add(passage.block)
                self._note(region, read)

    def _lately_s(self) -> float:
        """How long ago the first of the latest bytes came, 0 if there are none; older ones are forgotten. The lock is
        held."""
        now_s = time.monotonic()
        while self._latest and now_s - self._latest[0][0] >= LATELY_S:
            self._latest_bytes -= self._latest.popleft()[1]
        return now_s - self._latest[0][0] if self._latest else 0.0

    def _count(self, nbytes: int) -> None:
        """So many bytes came just now. The lock is held."""
        self._latest.append((time.monotonic(), nbytes))
        self._latest_bytes += nbytes
        if (span_s := self._lately_s()) >= LATELY_S / 2:  # else it would be a burst
            came_bytes = self._latest_bytes - self._latest[0][1]  # since the first of them
            self._best_bytes_per_s = max(self._best_bytes_per_s, came_bytes / span_s)

    def _note(self, region: Region, read: Read) -> None:
        """The read of a read has ended. The lock is held."""
        passage = read.passage
        passage.landed += read.nbytes
        self._landings += 1
        if passage.error is None:
            self._count(read.nbytes)
        region.policy.ended(passage)
        if passage.left:
            self._work.notify()
        if passage.error is not None or passage.landed == passage.nbytes:
            self._landed.notify_all()
