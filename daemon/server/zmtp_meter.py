"""How large the ZMTP messages are that a client is sending, before libzmq has given them out.

libzmq bounds a frame, but collects any number of frames before it gives out their message. Frames can be counted also
under CURVE, where each is encrypted and looks like the last of its message.
Knows the framing of ZMTP 3 (RFC 23). Does not keep or change any bytes.
"""

from __future__ import annotations

GREETING_BYTES = 64
MORE, LONG, COMMAND = 1, 2, 4  # flags of a frame
CURVE_BYTES = 33  # that encryption adds to a frame
FRAME_BYTES = 64  # that libzmq takes for a frame besides its content
MAX_MESSAGE_FRAMES = 64  # the protocol has fewer; who exceeds those a little is told so


class ZmtpMeter:
    """Walks over what one client sends. `unfinished_bytes`: what has come of a message whose end has not. `weight`:
    what libzmq has taken for all other messages, since the beginning. `encrypted`: weight includes commands."""

    def __init__(self, limit_bytes: int) -> None:
        self.unfinished_bytes = 0
        self.weight = 0
        self.encrypted = False
        self.expected_bytes = 0  # until the next header
        # Of a frame; a message may have twice as much, and is then refused by name.
        self._limit_bytes = limit_bytes
        self._header = b""  # the beginning of one whose end has not come
        self._greeted = False
        self._frames = 0  # of this message, with the one that is coming
        self._announced_bytes = 0  # of this message, likewise
        self._more = False

    def take(self, data: bytes) -> str | None:
        """Walk over the next bytes. Returns what is wrong with them, if that is enough to part."""
        at = 0
        if self._header:
            data = self._header + data
            self._header = b""
        while True:
            step = min(self.expected_bytes, len(data) - at)
            at += step
            self.expected_bytes -= step
            if self.expected_bytes:
                break
            if not self._more:
                self.weight += weight(self._frames, self._announced_bytes)
                self._frames = self._announced_bytes = 0
            if at == len(data):
                break
            size = self._header_bytes(data[at])
            if len(data) - at < size:
                self._header = data[at:]
                break
            problem = self._begin(data[at : at + size])
            if problem is not None:
                return problem
            at += size
        self.unfinished_bytes = self._announced_bytes - self.expected_bytes
        return None

    def _header_bytes(self, first: int) -> int:
        if not self._greeted:
            return GREETING_BYTES
        return 9 if first & LONG else 2

    def _begin(self, header: bytes) -> str | None:
        """Take a frame's header, or the greeting."""
        if not self._greeted:
            self._greeted = True
            self.encrypted = header[12:17] == b"CURVE"
            good = header[0] == 0xFF and header[9] == 0x7F and header[10] >= 3
            return None if good else "something else than ZeroMQ, or a version before 4.0"
        flags, size = header[0], int.from_bytes(header[1:], "big")
        if flags & ~(MORE | LONG | COMMAND):
            return "malformed frames"
        self.expected_bytes = size
        if self.encrypted:
            size = max(0, size - CURVE_BYTES)
        if size > self._limit_bytes:
            return f"a frame of {size} bytes: must be at most {self._limit_bytes}"
        if flags & COMMAND:
            return None
        self._more = bool(flags & MORE)
        self._frames += 1
        self._announced_bytes += size
        if self._frames > MAX_MESSAGE_FRAMES or self._announced_bytes > 2 * self._limit_bytes:
            return f"a message of {self._frames} frames, {self._announced_bytes} bytes"
        return None


def weight(frames: int, content_bytes: int) -> int:
    """What libzmq takes for a message."""
    return FRAME_BYTES * frames + content_bytes
