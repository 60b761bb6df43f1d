"""The roster: which workers are attached to this head now.

Channels come from the listener, which has checked who is at their other end. Those for control make a member. Those for
data and weights belong to a group that is being formed, and are handed to it. A thread looks whether members come on.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from msgspec.structs import replace

from shoal.comm.errors import CommError
from shoal.comm.group.channel import Channel
from shoal.comm.group.sums.part_waits import WaitSummary
from shoal.daemon.installed import package_version

from .control_messages import BEAT_S, CONTROL_BYTES, Attach, Epoch, HeadAt
from .faults import Faults
from .links.link_probes import answer_probes
from .member import Member
from .mesh.pair_links import PairLinks

log = logging.getLogger(__name__)

FIRST_WORD_S = 5.0
ROSTER_LOOK_S = 0.25
ARRIVE_S = 10.0  # from the head's start, within which workers that can come have come
ARRIVE_LOOK_S = 0.05


class Contribution(NamedTuple):
    """What a member does in a group. `share` is of the model's weights; `waits` is how long the head waits for its
    parts, None if it has not."""

    model: str
    share: float
    waits: WaitSummary | None


class Joining(Protocol):
    """A group whose members dial in. `data` and `weights` take over the channel."""

    def watch(self, now_s: float) -> None:
        """Give up members that the others wait for in vain. Called every `ROSTER_LOOK_S`."""

    def contribution(self, member: Member) -> Contribution | None:
        """None if it has no part in the group."""

    def data(self, member: Member, channel: Channel) -> None:
        """Orders and sums of this member go over the channel."""

    def weights(self, member: Member, channel: Channel) -> None:
        """Answers the member's requests for weights until the channel ends."""


class Known(Protocol):
    """What a head knows of its workers and of itself."""

    def paired(self) -> Sequence[str]:
        """Fingerprints of those that may attach, in the order in which they joined."""
        ...

    def worker(self, fingerprint: str) -> tuple[str, bytes]:
        """As this head calls it, and its certificate; "" = as it calls itself, b"" = nobody knows."""
        ...

    def prepares(self, fingerprint: str) -> bool:
        """Whether a worker that is not attached has joined just now."""
        ...

    def addresses(self) -> list[str]:
        """At which this head can be reached."""
        ...

    def forget(self, fingerprint: str) -> None:
        """This worker comes no more."""


class NobodyKnown:
    """See `Known`."""

    def paired(self) -> Sequence[str]:
        return ()

    def worker(self, fingerprint: str) -> tuple[str, bytes]:
        return "", b""

    def prepares(self, fingerprint: str) -> bool:
        return False

    def addresses(self) -> list[str]:
        return []

    def forget(self, fingerprint: str) -> None:
        pass


class Roster:
    """The members of now, and the groups that are formed of them. Any thread may call it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._members: dict[str, Member] = {}
        self._groups: dict[int, Joining] = {}
        self.faults = Faults(clock)
        self.pairs = PairLinks()
        self._came = 0  # how many members have come
        self._arrived_s = clock() + ARRIVE_S
        self.known: Known = NobodyKnown()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        threading.Thread(target=self._look, name="shoal-roster", daemon=True).start()

    @property
    def members(self) -> list[Member]:
        """In the order in which they joined, so that each gets the shard again of which it has weights and KV."""
        with self._lock:
            found = list(self._members.values())
        place = {fingerprint: place for place, fingerprint in enumerate(self.known.paired())}
        return sorted(found, key=lambda member: place.get(member.fingerprint, len(place)))

    @property
    def usable(self) -> list[Member]:
        """Those that groups may be formed of now."""
        return [member for member in self.members if not self.faults.passed_over(member.fingerprint)]

    def awaited(self, count: int) -> list[Member]:
        """`usable`. A head that has just started waits until so many are attached, if so many are paired: they look for
        it all the time, but need some seconds."""
        while len(self.members) < count <= len(self.known.paired()) and self._clock() < self._arrived_s:
            if self._closed.wait(ARRIVE_LOOK_S):
                break
        return self.usable

    @property
    def absent(self) -> list[str]:
        """Of each that may attach and is not: in words."""
        with self._lock:
            away = [it for it in self.known.paired() if it not in self._members]
        return [
            f"{self.known.worker(it)[0] or it[:8]} "
            + ("has joined just now and is still preparing" if self.known.prepares(it) else "is away")
            for it in away
        ]

    @property
    def arrivals(self) -> int:
        """Changes whenever a member has come, or may be used again."""
        return self._came + self.faults.over

    def expect(self, epoch: int, group: Joining) -> None:
        """Channels of this epoch are the group's."""
        with self._lock:
            self._groups[epoch] = group

    def forget_group(self, epoch: int) -> None:
        with self._lock:
            self._groups.pop(epoch, None)

    def contributions(self, member: Member) -> list[Contribution]:
        """In which groups it takes part."""
        with self._lock:
            groups = list(self._groups.values())
        return [found for group in groups if (found := group.contribution(member)) is not None]

    def take(self, channel: Channel) -> None:
        """Serve a channel of a paired worker until it ends, in the caller's thread."""
        try:
            if channel.purpose == "control":
                self._attach(channel)
            elif channel.purpose == "measure":
                answer_probes(
                    channel, HeadAt(addresses=self.known.addresses()[:64], version=package_version())
                )
            else:
                self._hand_over(channel)
        except (OSError, CommError) as error:
            log.info("a channel ended early: %s", error)
            channel.close()

    def tell_forgotten(self, fingerprint: str) -> None:
        """If that worker is attached, it hears that it need not come again. Who forgets it closes its channels."""
        with self._lock:
            member = self._members.get(fingerprint)
        if member is not None:
            member.say_farewell()

    def dismiss(self, fingerprint: str, reason: str) -> None:
        """Close every channel to a worker, if it is attached."""
        with self._lock:
            member = self._members.get(fingerprint)
        if member is not None:
            member.leave(reason)

    def close(self) -> None:
        self._closed.set()
        for member in self.members:
            member.leave("the head is stopping")

    def _attach(self, channel: Channel) -> None:
        attach = channel.receive_message(Attach, timeout_s=FIRST_WORD_S, limit_bytes=CONTROL_BYTES)
        assert channel.peer is not None
        # It may have restarted before its loss was noticed.
        self.dismiss(channel.peer, "it has attached again")
        name, certificate = self.known.worker(channel.peer)
        if name:
            attach = replace(attach, name=name)
        member = Member(channel, attach, self._left, self._clock, certificate)
        member.measure()
        self.pairs.forget(member.fingerprint)
        with self._lock:
            self._members[channel.peer] = member
            self._came += 1
        if self._closed.is_set():
            member.leave("the head is stopping")
        log.info("%s is attached (%s, %d threads)", member.name, member.address, attach.threads)
        member.run()

    def _hand_over(self, channel: Channel) -> None:
        word = channel.receive_message(Epoch, timeout_s=FIRST_WORD_S, limit_bytes=CONTROL_BYTES)
        with self._lock:
            member = self._members.get(channel.peer or "")
            group = self._groups.get(word.epoch)
        if member is None or group is None:
            log.info("a channel for epoch %d, which is not current, is refused", word.epoch)
            channel.close()
            return
        member.add(channel)
        (group.data if channel.purpose == "data" else group.weights)(member, channel)

    def _left(self, member: Member, reason: str) -> None:
        with self._lock:
            if self._members.get(member.fingerprint) is member:
                del self._members[member.fingerprint]
        log.warning("%s is gone: %s", member.name, reason)
        if member.gone_for_good:
            self.known.forget(member.fingerprint)

    def _look_at(self, members: Sequence[Member]) -> None:
        for member in members:
            member.look()
        with self._lock:
            groups = list(self._groups.values())
        for group in groups:
            group.watch(self._clock())

    def _look(self) -> None:
        """Look for members that are silent or frozen. Waits for none of them."""
        looked_s = self._clock()
        while not self._closed.wait(ROSTER_LOOK_S):
            members = self.members
            now_s = self._clock()
            late_s, looked_s = now_s - looked_s - ROSTER_LOOK_S, now_s
            if late_s > BEAT_S:  # this machine was asleep or very busy, and has read no beats meanwhile
                for member in members:
                    member.excuse(late_s)
            else:
                self._look_at(members)
