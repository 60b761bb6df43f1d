"""What a worker does for one group: it gets its shard's weights, opens them, and follows the head until the group ends.

Knows how a rank is put together from a request. How the head is dialled, and where weights are kept, is the caller's.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, Protocol

from shoal.comm.errors import CommError
from shoal.comm.group.channel import Channel
from shoal.comm.group.group_protocol import Purpose
from shoal.comm.group.sums.star import Spoke
from shoal.daemon.error_codes import translated
from shoal.daemon.errors import DaemonError
from shoal.daemon.library.kv_files import NotKept
from shoal.daemon.memory import keep_freed, return_freed
from shoal.daemon.progress import Progress
from shoal.engine.executor import Executor
from shoal.engine.passed_pages import frame_bytes
from shoal.engine.rank import Rank
from shoal.models.transformer import Transformer
from shoal.offload.block_store import BlockStore
from shoal.offload.budget import Budget
from shoal.offload.errors import BudgetExceeded
from shoal.offload.kv.disk_pages import buffer_bytes
from shoal.offload.kv.disk_slots import KvSlots
from shoal.offload.kv.pool import KvPool
from shoal.offload.pack.pack import Pack

from .control_messages import Epoch, FromWorker, Introduce, Loading, Ready, Serve, ShardRefused
from .follower import Follower
from .meeting import Meeting
from .mesh.fellows import Fellows, ServeWeights
from .pulse import Pulse

log = logging.getLogger(__name__)

Reach = Callable[[], Channel]
"""A new channel for weights to one of the other workers, once it was introduced. Raises OSError or CommError."""

Dial = Callable[[Purpose], Channel]
"""A new channel to the head for a purpose: "data" or "weights". Raises OSError or CommError."""


class OpenedShard(NamedTuple):
    """The weights of a shard, ready to compute (None if they were only to be fetched), and where it keeps KV on disk,
    or why it does not. `pack`: on disk, for the next start; nobody removes it while it is held here."""

    store: BlockStore | None
    kv: KvSlots | NotKept
    pack: Pack | None = None


class KeepsShards(Protocol):
    """See `shard_stores.ShardStores`."""

    def open(self, request: Serve, dial: Dial, progress: Progress, reach: Sequence[Reach]) -> OpenedShard:
        """Opens a shard. Raises DaemonError, OSError, and errors of offload and models."""

    def lend(self, request: Serve) -> ServeWeights | None:
        """What answers other workers of the group, if they may ask."""


class ServedShard:
    """Loads in a thread of its own, then follows in another. `tell` sends a message to the head; it never raises."""

    def __init__(
        self,
        request: Serve,
        dial: Dial,
        shards: KeepsShards,
        budget: Budget,
        tell: Callable[[FromWorker], None],
        fellows: Fellows | None = None,
    ) -> None:
        self.request = request
        self.pulse = Pulse(request.epoch)
        self._dial = dial
        self._shards = shards
        self._budget = budget
        self._tell = tell
        self.fellows = fellows
        self._lock = threading.Lock()
        self._closed = False
        self._channels: list[Channel] = []
        self._opened: OpenedShard | None = None
        self._follower: Follower | None = None
        self._thread = threading.Thread(target=self._load, name="shoal-shard", daemon=True)
        if fellows is not None:
            tell(fellows.listens)
        self._thread.start()

    @property
    def purpose(self) -> str:
        """In the ledger."""
        return f"shard {self.request.epoch} of {self.request.model}"

    def introduce(self, told: Introduce) -> None:
        """Meet the other workers, in a thread of its own, and tell the head whom this one has reached; if there is
        nothing to compute, hear where they are."""
        if (fellows := self.fellows) is not None and self.request.fetch_only:
            fellows.hear(told)
        elif fellows is not None:

            def meet() -> None:
                self._tell(fellows.meet(told))

            threading.Thread(target=meet, name="shoal-introduce", daemon=True).start()

    @property
    def moved(self) -> int:
        """Bytes over its channels so far, to the head and to its fellows."""
        fellows = list(self.fellows.data.values()) if self.fellows is not None else []
        with self._lock:
            return sum(channel.moved for channel in (*self._channels, *fellows))

    @property
    def _buffers(self) -> str:
        """In the ledger, too."""
        return f"KV on its way to disk of {self.purpose}"

    @property
    def held_bytes(self) -> int:
        """What it takes of this machine's budget."""
        return self._budget.held_by(self.purpose) + self._budget.held_by(self._buffers)

    def close(self) -> None:
        """Stop loading or following, and give the memory back. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            channels = list(self._channels)
        for channel in channels:
            channel.close()
        if self.fellows is not None:
            self.fellows.close()
        if self._thread is not threading.current_thread():
            self._thread.join()
        if self._follower is not None:
            self._follower.close()
        if self._opened is not None:
            if self._opened.store is not None:
                self._opened.store.close()
            if isinstance(self._opened.kv, KvSlots):
                self._opened.kv.close([], None)
        self._follower = self._opened = None
        self._budget.release(self.purpose)
        self._budget.release(self._buffers)
        return_freed()

    def _load(self) -> None:
        epoch = self.request.epoch
        try:
            self._start()
            if self._opened is not None and isinstance(self._opened.kv, KvSlots):
                self._opened.kv.resized = self._tell_ready
            self._tell_ready()
        except Exception as error:
            refusal = translated(error)
            if not self._closed:
                log.warning("the shard of %s cannot be served: %s", self.request.model, refusal)
                self._tell(ShardRefused(epoch=epoch, code=refusal.code, reason=str(refusal)[:2000]))

    def _start(self) -> None:
        plan, spec = self.request.plan, self.request.spec
        if plan.peak_bytes < 0:
            raise DaemonError("bad_request", f"a plan that takes {plan.peak_bytes} bytes")
        if not self.request.fetch_only:
            self._budget.hold(self.purpose, plan.peak_bytes)
        reach: list[Reach] = []
        if (fellows := self.fellows) is not None:
            nearest = sorted(fellows.ranks, key=lambda it: abs(it - fellows.rank))
            reach = [partial(fellows.reach, rank) for rank in nearest]
        opened = self._opened = self._shards.open(self.request, self._dialled, self._progress, reach)
        store = opened.store
        if store is None:
            return
        opened = self._opened = opened._replace(kv=self._with_buffers(opened.kv))
        data = self._dialled("data")
        shard = self.request.shard
        spoke = Spoke(
            data,
            self.request.epoch,
            self.request.wire,
            rank=shard.rank,
            ranks=shard.ranks,
            fellows=self.fellows.data if self.fellows is not None else {},
            most_bytes=max(4 * plan.step_rows * spec.hidden, frame_bytes(spec, plan.kv.dtype)),
        )
        kv, wanted = (opened.kv if isinstance(opened.kv, KvSlots) else None), self.request.kv_on_disk
        pool, meeting = KvPool(spec, plan.kv), Meeting(spoke, self.pulse)
        rows = shard.ranges.vocab if spec.vocab else None
        executor = Executor(Transformer(spec), plan, store, pool, meeting, vocab=rows)
        keep_freed()
        slots = wanted.slots if wanted is not None and kv is not None else 0
        rank = Rank(executor, lambda: 0.0, kv)
        self._follower = Follower(rank, spoke, self.pulse, self._ended, slots)
        self._follower.start()

    def _with_buffers(self, kv: KvSlots | NotKept) -> KvSlots | NotKept:
        """The same, if there is memory for the pages that wait to be written."""
        if isinstance(kv, KvSlots):
            try:
                self._budget.hold(self._buffers, buffer_bytes(kv.page_bytes))
            except BudgetExceeded as error:
                kv.close([], None)
                return NotKept(str(error))
        return kv

    def _tell_ready(self) -> None:
        opened = self._opened
        if opened is None or self._closed:
            return
        kv = opened.kv
        slots, trouble = (kv.slots, "") if isinstance(kv, KvSlots) else (0, kv.why)
        peak_bytes = self.request.plan.peak_bytes
        ready = Ready(
            epoch=self.request.epoch, peak_bytes=peak_bytes, kv_slots=slots, kv_trouble=trouble[:2000]
        )
        self._tell(ready)

    def _dialled(self, purpose: Purpose) -> Channel:
        channel = self._dial(purpose)
        with self._lock:
            self._channels.append(channel)
            closed = self._closed
        if closed:
            channel.close()
            raise CommError("the group has ended")
        channel.send_message(Epoch(epoch=self.request.epoch))
        return channel

    def _progress(self, doing: str, done: int, total: int) -> None:
        if self._closed:
            raise CommError("the group has ended")  # or whoever closes would wait until all is loaded
        self._tell(Loading(epoch=self.request.epoch, done=done, total=total))

    def _ended(self, reason: str) -> None:
        if not self._closed:
            self._tell(ShardRefused(epoch=self.request.epoch, code="internal", reason=reason[:2000]))
