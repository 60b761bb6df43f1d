"""A member: one worker as its head sees it. What it has, whether it comes on, and how far it is with a shard.

Knows its control channel and every other channel to the same machine, so that all can be closed at once. Does not know
what is computed, nor the other members. One that does not read holds nobody up: it is spoken to in a thread of its own.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from shoal.comm.errors import CommError
from shoal.comm.group.channel import Channel
from shoal.comm.group.group_protocol import FELLOWS, PAGES, VOCABULARY
from shoal.comm.group.streams import Address
from shoal.partition.machines import LinkSpeed

from .control_messages import (
    BEAT_S,
    CONTROL_BYTES,
    FROZEN_S,
    LAST_WORD_S,
    SILENT_S,
    Alive,
    Attach,
    Beat,
    Dismissed,
    Drop,
    FromHead,
    FromWorker,
    Left,
    Listens,
    Loading,
    Met,
    Probed,
    Ready,
    Serve,
    ShardRefused,
)
from .links.link_probes import PROBE_ANSWER_S, Probes, link_speed
from .pulse import Watched
from .speed import NodeSpeed

PROBE_S = 1.0
MOST_UNSENT = 64  # messages that wait for a member that does not read

Telling = Callable[[Listens | Met], None]
"""Is told what a member says of its fellows, in the thread that hears the member."""

log = logging.getLogger(__name__)


class Member:
    """`lost` is called once, when the member is gone for whatever reason. Any thread may call the methods."""

    def __init__(
        self,
        channel: Channel,
        attach: Attach,
        lost: Callable[[Member, str], None],
        clock: Callable[[], float],
        certificate: bytes = b"",
    ) -> None:
        assert channel.peer is not None
        self.fingerprint = channel.peer
        self.certificate = certificate
        self.meets_fellows = FELLOWS in channel.agreed.features
        self.exchanges_pages = PAGES in channel.agreed.features
        self.divides_vocabulary = VOCABULARY in channel.agreed.features
        self.facts = attach
        self.beat = Beat(free_bytes=attach.memory_bytes)
        self.link = LinkSpeed(0.0, 1.0)  # once it is measured
        self.reason = ""  # why it is gone
        self.gone_for_good = False  # as it says itself
        self.probes = Probes(
            partial(channel.send_message, timeout_s=PROBE_ANSWER_S), lambda: self.reason, clock
        )
        self._control = channel
        self._channels: list[Channel] = [channel]
        self._lost = lost
        self._clock = clock
        self._heard_s = clock()
        self._watched = Watched()
        self._lock = threading.Lock()
        self._answers: dict[int, Loading | Ready | ShardRefused] = {}
        self._asked: dict[int, Serve] = {}
        self._told: dict[int, Telling] = {}
        self._unsent: queue.Queue[FromHead] = queue.Queue(MOST_UNSENT)

    @property
    def name(self) -> str:
        return self.facts.name

    @property
    def speed(self) -> NodeSpeed:
        facts = self.facts
        return NodeSpeed(facts.memory_bytes_per_s, facts.flops, facts.disk_bytes_per_s, facts.measured)

    @property
    def address(self) -> str:
        """At which it is, as the system says."""
        return self._control.remote[0]

    @property
    def own_address(self) -> Address:
        """Of this machine, at which it has come in."""
        return self._control.local

    @property
    def silent_s(self) -> float:
        """For how long nothing has been heard from it."""
        return self._clock() - self._heard_s

    def room_bytes(self, *models: str) -> int:
        """What it has for a shard if those of `models` are dropped: all that shards of other models and its own work
        leave."""
        room = min(self.facts.memory_bytes, self.beat.free_bytes + self.beat.shard_bytes)
        with self._lock:
            others = [asked for asked in self._asked.values() if asked.model not in models]
        return max(0, room - sum(asked.held_bytes for asked in others))

    def add(self, channel: Channel) -> None:
        """Another channel to the same machine, to be closed with it."""
        with self._lock:
            if not self.reason:
                self._channels = [*(it for it in self._channels if not it.closed), channel]
                return
        channel.close()

    def excuse(self, seconds: float) -> None:
        """For so long nobody here has listened to it."""
        self._heard_s = min(self._clock(), self._heard_s + seconds)
        self._watched.excuse(seconds)

    def look(self) -> None:
        """Give it up if it is silent, or its compute thread is frozen."""
        beat = self.beat
        pulse = (beat.epoch, beat.steps, beat.blocks, beat.at_work)
        still_s = self._watched.still_s(pulse, self._clock())
        if self.silent_s > SILENT_S:
            self.leave(f"nothing has been heard from it for {self.silent_s:.1f} s")
        elif beat.at_work and still_s > FROZEN_S:
            self.leave(f"it has not come further for {FROZEN_S:.1f} s in the middle of a step")

    def leave(self, reason: str) -> None:
        """Close every channel to it. Idempotent."""
        with self._lock:
            if self.reason:
                return
            self.reason = reason
            channels, self._channels = self._channels, []
        for channel in channels:
            channel.close()
        with suppress(queue.Full):  # then whoever speaks is not waiting for more
            self._unsent.put_nowait(Alive())
        self.probes.wake()
        self._lost(self, reason)

    def measure(self) -> None:
        """Find out how long a small message takes to it, and how fast many bytes are sent. Before `run`. Raises OSError
        or CommError."""
        self.link = link_speed(lambda data: self.probes.trip_s(data, self._hear), PROBE_S)

    def run(self) -> None:
        """Hear it until it is gone; the caller's thread is used for that. Another one speaks to it meanwhile."""
        threading.Thread(target=self._speak, name="shoal-member", daemon=True).start()
        try:
            while not self.reason:
                self._hear()
        except (OSError, CommError) as error:
            self.leave(str(error))

    def _hear(self) -> None:
        """Take in its next message. Raises OSError or CommError."""
        message: FromWorker = self._control.receive_message(
            FromWorker, timeout_s=SILENT_S, limit_bytes=CONTROL_BYTES
        )
        self._heard_s = self._clock()
        if isinstance(message, Beat):
            self.beat = message
        elif isinstance(message, Probed):
            self.probes.heard(message)
        elif isinstance(message, Left):
            self.gone_for_good = True
            self.leave("it has left the cluster")
        elif isinstance(message, Listens | Met):
            with self._lock:
                told = self._told.get(message.epoch)
            if told is not None:
                told(message)
        elif not isinstance(message, Attach):
            with self._lock:
                if message.epoch in self._answers:
                    self._answers[message.epoch] = message

    def _speak(self) -> None:
        """Send what there is for it, and a beat whenever there is nothing."""
        try:
            while not self.reason:
                try:
                    message = self._unsent.get(timeout=BEAT_S)
                except queue.Empty:
                    message = Alive()
                if self.reason:
                    return
                self._control.send_message(message)
        except (OSError, CommError) as error:
            self.leave(str(error))
        finally:
            self.leave("nothing can be sent to it")

    def send(self, message: FromHead) -> None:
        """Does not wait, and never raises: if it cannot be sent, the member is gone. In the order of the calls."""
        try:
            self._unsent.put_nowait(message)
        except queue.Full:
            self.leave(f"it has not read the latest {MOST_UNSENT} messages")

    def say_farewell(self) -> None:
        """It is forgotten, and hears that if it reads. Never raises."""
        self._control.send_last(Dismissed(), LAST_WORD_S)

    def serve(self, request: Serve, told: Telling = lambda message: None) -> None:
        """Ask it to load a shard; `loading` tells how that goes, and `told` what it says of its fellows."""
        with self._lock:
            self._told[request.epoch] = told
            self._answers[request.epoch] = Loading(epoch=request.epoch, done=0, total=0)
            self._asked[request.epoch] = request
        self.send(request)

    def drop(self, epoch: int) -> None:
        """It need not serve that shard any more."""
        with self._lock:
            self._answers.pop(epoch, None)
            self._asked.pop(epoch, None)
            self._told.pop(epoch, None)
        self.send(Drop(epoch=epoch))

    def loading(self, epoch: int) -> Loading | Ready | ShardRefused | None:
        """How far it is with a shard; None if it is gone."""
        with self._lock:
            return None if self.reason else self._answers.get(epoch)
