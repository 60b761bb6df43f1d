"""Probes of one link: messages to a member that it answers at once, and when the answers came.

The thread that hears the member hands the answers over; whoever measures waits for them in another. Knows no sockets.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from shoal.comm.group.errors import ChannelError, ChannelTimeout
from shoal.daemon.cluster.control_messages import Probe, Probed

LINK_PROBED_S = 5.0


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
