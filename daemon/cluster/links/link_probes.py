"""Probes of one link: how long a small message takes between two machines, and how fast many bytes are sent.

The other side answers them at once. Over a channel that is there for nothing else, whoever measures reads the answers
(`measured`). Over one that is used for more, the thread that hears the other side hands them over, and another may
wait for them (`Probes`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress

from shoal.comm.errors import CommError
from shoal.comm.group.channel import Channel
from shoal.comm.group.errors import ChannelError, ChannelTimeout
from shoal.daemon.cluster.control_messages import CONTROL_BYTES, PROBE_BYTES, HeadAt, Probe, Probed
from shoal.partition.machines import LinkSpeed

TRIPS = 8
FIRST_PROBE_BYTES = 16 << 10
LEAST_PART = 0.1  # of the time that a message takes is that of its bytes
MEASURING_S = 30.0  # that all addresses of a head may take, one after the other
PROBED_S = 2.0  # that an answer may take
MAX_PROBES = 256  # that are answered on one channel
LINK_PROBED_S = 5.0  # that another thread waits for an answer
PROBE_ANSWER_S = 10.0  # and the one that hears it, whatever else is said meanwhile


class Probes:
    """`send` sends a probe; if it cannot, `gone` tells why. Any thread may call the methods."""

    def __init__(
        self, send: Callable[[Probe], None], gone: Callable[[], str], clock: Callable[[], float]
    ) -> None:
        self._send = send
        self._gone = gone
        self._clock = clock
        self._changed = threading.Condition()
        self._number = 0
        self._began_s: dict[int, float] = {}  # probes under way
        self._ended: dict[int, tuple[float, int]] = {}  # seconds, and bytes of the answer

    def begin(self, data: bytes = b"", reply_bytes: int = 0) -> int:
        """Sends a probe that is to be answered with so many bytes. → its number, for `took_s`"""
        with self._changed:
            self._number += 1
            number = self._number
            self._began_s[number] = self._clock()
        self._send(Probe(number=number, data=data, reply_bytes=reply_bytes))
        return number

    def heard(self, answer: Probed) -> None:
        """An answer has come. One to a probe that nobody waits for is none."""
        with self._changed:
            if (began_s := self._began_s.get(answer.number)) is not None:
                self._ended[answer.number] = self._clock() - began_s, len(answer.data)
                self._changed.notify_all()

    def wake(self) -> None:
        """The member is gone: nobody need wait any longer."""
        with self._changed:
            self._changed.notify_all()

    def answered(self, number: int) -> bool:
        return number in self._ended

    def took_s(self, number: int, reply_bytes: int = 0) -> float:
        """Seconds from `begin` until all of the answer was there. Raises ChannelError."""
        with self._changed:
            try:
                self._changed.wait_for(lambda: number in self._ended or self._gone(), LINK_PROBED_S)
                if number not in self._ended:
                    if reason := self._gone():
                        raise ChannelError(reason)
                    raise ChannelTimeout(f"no answer for {LINK_PROBED_S:.0f} s")
                seconds, nbytes = self._ended[number]
            finally:
                self._began_s.pop(number, None)
                self._ended.pop(number, None)
        if nbytes != reply_bytes:
            raise ChannelError(f"an answer of {nbytes} bytes: {reply_bytes} were to come")
        return seconds

    def trip_s(self, data: bytes, hear: Callable[[], None]) -> float:
        """Seconds until the other side has answered to so many bytes, for the thread that hears it: `hear` takes in its
        next message. Raises what that raises."""
        number, began_s = self.begin(data), self._clock()
        while not self.answered(number):
            hear()
            if self._clock() - began_s > PROBE_ANSWER_S:
                raise ChannelTimeout("it does not answer")
        return self.took_s(number)


def link_speed(
    probe: Callable[[bytes], float], seconds: float, clock: Callable[[], float] = time.monotonic
) -> LinkSpeed:
    """`probe` → seconds until the other side has answered to so many bytes; it is called for `seconds` at most, and
    then once more at most. Raises what it raises."""
    ends_s = clock() + seconds
    trips = [probe(b"")]
    while len(trips) < TRIPS and clock() < ends_s:
        trips.append(probe(b""))
    latency_s = min(trips) / 2
    size, ends_s = FIRST_PROBE_BYTES, clock() + seconds
    while True:
        took_s = probe(bytes(size))
        # On an unsteady link some bytes take no longer than none: the largest message counts, and a part of its time.
        speed = size / max(took_s - 2 * latency_s, LEAST_PART * took_s, 1e-6)
        if clock() >= ends_s or (size == PROBE_BYTES and took_s < seconds / 8):
            return LinkSpeed(latency_s, speed)  # one more would say nothing new, or take too long
        size = min(PROBE_BYTES, 4 * size)


def measured(channel: Channel, seconds: float) -> LinkSpeed:
    """Of a channel whose other side runs `answer_probes`, and has said where it is if it is a head.
    Raises CommError and OSError."""
    probes = Probes(lambda probe: channel.send_message(probe, PROBED_S), str, time.monotonic)

    def hear() -> None:
        probes.heard(channel.receive_message(Probed, PROBED_S))

    return link_speed(lambda data: probes.trip_s(data, hear), seconds)


def answer_probes(channel: Channel, here: HeadAt | None = None) -> None:
    """Say where this head is, if it is one, and answer until the other side has had enough and closes the channel."""
    ends_s = time.monotonic() + MEASURING_S
    with channel, suppress(OSError, CommError):
        if here is not None:
            channel.send_message(here, PROBED_S)
        for _ in range(MAX_PROBES):
            probe: Probe = channel.receive_message(Probe, ends_s - time.monotonic(), CONTROL_BYTES)
            channel.send_message(Probed(number=probe.number), PROBED_S)
