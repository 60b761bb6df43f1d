"""How long a small message takes between two machines, and how fast many bytes are sent: by questions and answers."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress

from shoal.comm.errors import CommError
from shoal.comm.group.channel import Channel
from shoal.daemon.cluster.control_messages import CONTROL_BYTES, PROBE_BYTES, HeadAt, Probe, Probed
from shoal.partition.machines import LinkSpeed

TRIPS = 8
FIRST_PROBE_BYTES = 16 << 10
LEAST_PART = 0.1  # of the time that a message takes is that of its bytes
MEASURING_S = 30.0  # that all addresses of a head may take, one after the other
PROBED_S = 2.0  # that an answer may take
MAX_PROBES = 256  # that are answered on one channel


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
    number = 0

    def probe(data: bytes) -> float:
        nonlocal number
        number += 1
        began_s = time.monotonic()
        channel.send_message(Probe(number=number, data=data), PROBED_S)
        while channel.receive_message(Probed, PROBED_S).number != number:
            pass
        return time.monotonic() - began_s

    return link_speed(probe, seconds)


def answer_probes(channel: Channel, here: HeadAt | None = None) -> None:
    """Say where this head is, if it is one, and answer until the other side has had enough and closes the channel."""
    ends_s = time.monotonic() + MEASURING_S
    with channel, suppress(OSError, CommError):
        if here is not None:
            channel.send_message(here, PROBED_S)
        for _ in range(MAX_PROBES):
            probe: Probe = channel.receive_message(Probe, ends_s - time.monotonic(), CONTROL_BYTES)
            channel.send_message(Probed(number=probe.number), PROBED_S)
