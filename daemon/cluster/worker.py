"""A worker: keeps this machine attached to its head, and serves the shards that the head asks for.

It dials the head, again and again while that is away, and says twice a second how far it is. When the head is gone,
shards are dropped; their weights stay in the cache on disk. A head that says it has forgotten this machine is dialled
rarely, until somebody pairs them anew.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from msgspec.structs import replace

from shoal.comm.errors import CommError
from shoal.comm.group.channel import Channel
from shoal.comm.group.errors import Forgotten
from shoal.comm.group.peers import PairedNode
from shoal.daemon.errors import DaemonError
from shoal.daemon.memory import resident_bytes
from shoal.offload.budget import Budget

from .control_messages import (
    BEAT_S,
    CONTROL_BYTES,
    LAST_WORD_S,
    Alive,
    Attach,
    Beat,
    Dismissed,
    Drop,
    FromHead,
    FromWorker,
    Introduce,
    Left,
    Probe,
    Probed,
    Serve,
    ShardRefused,
)
from .mesh.fellows import Fellows
from .routes.route import HeadRoute
from .served_shard import KeepsShards, ServedShard

log = logging.getLogger(__name__)

HEAD_SILENT_S = 5.0
MOST_SHARDS = 16  # at a time, each of another model
REDIAL_S = (0.2, 2.0)  # between attempts to reach the head: the first, and the longest
FORGOTTEN = (
    "the head no longer knows this machine: pair them again (shoal cluster leave, then join with a new code)"
)
REDIAL_FORGOTTEN_S = 60.0  # once it has said that it does not know this machine: its file may be put back


class Worker:
    """Attached while it lives, or trying to. `attach` makes the facts anew for each attempt."""

    def __init__(
        self,
        head: PairedNode,
        route: HeadRoute,
        attach: Callable[[], Attach],
        keeps: KeepsShards,
        budget: Budget,
    ) -> None:
        self.head = head.name
        self.fingerprint = head.fingerprint  # the head's
        self.attached = False
        self.preparing = False  # it finds out first what it has, and whether its kernels are right
        self.trouble = ""  # why it is not attached
        self.route = route
        self._attach = attach
        self._keeps = keeps
        self._budget = budget
        self._closed = threading.Event()
        self._nudged = threading.Event()
        self._control: Channel | None = None
        self._sending = threading.Lock()
        self._shards: dict[int, ServedShard] = {}
        self._thread = threading.Thread(target=self._run, name="shoal-worker", daemon=True)
        self._thread.start()

    @property
    def shards(self) -> list[ServedShard]:
        return list(self._shards.values())

    def say_farewell(self) -> None:
        """The head need not wait for this machine any more. It is told only if it is there."""
        if (control := self._control) is not None:
            control.send_last(Left(), LAST_WORD_S)

    def dial_now(self) -> None:
        """The head may be there again, or know this machine again."""
        self._nudged.set()

    def close(self) -> None:
        """Leave the head. Idempotent."""
        self._closed.set()
        self._nudged.set()
        if (
            control := self._control
        ) is not None:  # else it is being looked for, which nobody has to wait for
            control.close()
            self._thread.join(timeout=15)

    def _run(self) -> None:
        pause_s, forgotten = REDIAL_S[0], False
        while not self._closed.is_set():
            try:
                self.preparing = True
                facts = self._attach()  # before the head waits for them: they may have to be measured
                self.preparing = False
                control = self._control = self.route.dial("control")
                with control:
                    routes = self.route.now.compared if self.route.now else 1
                    control.send_message(replace(facts, routes=routes))
                    log.info("attached to %s (%s)", self.head, control.remote[0])
                    self.attached, self.trouble, pause_s, forgotten = True, "", REDIAL_S[0], False
                    self._listen(control)
            except (OSError, CommError, DaemonError) as error:
                forgotten = forgotten or isinstance(error, Forgotten)
                trouble = FORGOTTEN if forgotten else str(error)
                if trouble != self.trouble and not self._closed.is_set():
                    log.warning("not attached to %s: %s", self.head, trouble)
                self.trouble = trouble
            finally:
                self.attached = self.preparing = False
                self._drop_all()
                self._control = None
            if self._nudged.wait(REDIAL_FORGOTTEN_S if forgotten else pause_s):
                self._nudged.clear()
                pause_s, forgotten = REDIAL_S[0], False
            else:
                pause_s = min(2 * pause_s, REDIAL_S[1])

    def _listen(self, control: Channel) -> None:
        """Do as the head says until it is gone. Raises OSError or CommError; Forgotten if it says so."""
        gone = threading.Event()
        beating = threading.Thread(target=self._beat, args=(gone,), name="shoal-beat", daemon=True)
        beating.start()
        try:
            while not self._closed.is_set():
                message = control.receive_message(
                    FromHead, timeout_s=HEAD_SILENT_S, limit_bytes=CONTROL_BYTES
                )
                self._do(message)
        finally:
            gone.set()

    def _do(self, message: FromHead) -> None:
        if isinstance(message, Alive):
            return
        if isinstance(message, Dismissed):
            raise Forgotten(FORGOTTEN)
        if isinstance(message, Probe):
            self._tell(Probed(number=message.number, data=bytes(message.reply_bytes)))
        if isinstance(message, Serve):
            for other in [*self._shards.values()]:
                successor = other.request.fetch_only or not message.fetch_only
                if other.request.epoch == message.epoch or (
                    other.request.model == message.model and successor
                ):
                    self._drop(other.request.epoch)
            if len(self._shards) >= MOST_SHARDS:
                refusal = f"it serves {MOST_SHARDS} shards already, which is the most"
                self._tell(ShardRefused(epoch=message.epoch, code="resources", reason=refusal))
                return
            self._shards[message.epoch] = ServedShard(
                message, self.route.dial, self._keeps, self._budget, self._tell, self._fellows(message)
            )
        elif isinstance(message, Introduce):
            if (shard := self._shards.get(message.epoch)) is not None:
                shard.introduce(message)
        elif isinstance(message, Drop):
            self._drop(message.epoch)

    def _fellows(self, request: Serve) -> Fellows | None:
        """Who is let in for a shard; None if nobody is to be."""
        if not request.fellows:
            return None
        try:
            return Fellows(
                self.route.identity,
                self.route.own_host,
                request.epoch,
                request.shard.rank,
                request.fellows,
                self._keeps.lend(request),
            )
        except CommError as error:
            log.warning("the other workers of the group are not met: %s", error)
            return None

    def _drop(self, epoch: int) -> None:
        if (shard := self._shards.pop(epoch, None)) is not None:
            shard.close()

    def _drop_all(self) -> None:
        for epoch in [*self._shards]:
            self._drop(epoch)

    def _beat(self, gone: threading.Event) -> None:
        while not gone.wait(BEAT_S):
            pulse = next((shard.pulse for shard in self.shards if shard.pulse.at_work), None)
            found = pulse or next((shard.pulse for shard in self.shards), None)
            self._tell(
                Beat(
                    epoch=found.epoch if found else 0,
                    steps=found.steps if found else 0,
                    blocks=found.blocks if found else 0,
                    at_work=found.at_work if found else False,
                    moved=sum(shard.moved for shard in self.shards),
                    free_bytes=max(0, self._budget.free_bytes),
                    shard_bytes=sum(shard.held_bytes for shard in self.shards),
                    resident_bytes=resident_bytes(),
                )
            )

    def _tell(self, message: FromWorker) -> None:
        """Never raises: if the head is gone, the thread that listens notices."""
        control = self._control
        if control is None:
            return
        try:
            with self._sending:
                control.send_message(message)
        except (OSError, CommError):
            control.close()
