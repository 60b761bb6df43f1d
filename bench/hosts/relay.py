"""A relay for TCP that delays what passes: a cable of any length between two network namespaces.

    python relay.py LISTEN:PORT TARGET:PORT        lines of JSON on standard input change it, each answered by "ok":
    {"delay_s": 0.0002, "jitter_s": 0.05, "bytes_per_s": 0, "cut": false}

Each direction takes `delay_s`, and up to `jitter_s` more, anew for each piece; order is kept. `cut` passes nothing
on, and connections stay open, as with a cable that was pulled. What a relay adds without any delay is about 0.1 ms.
Ends with its input.
"""

from __future__ import annotations

import json
import queue
import random
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass

PIECE_BYTES = 64 << 10
PIECES = 1024  # under way in one direction, at most
LOOK_S = 0.05  # how often a cut relay looks whether it was mended


@dataclass
class Line:
    """What all connections go through."""

    delay_s: float = 0.0
    jitter_s: float = 0.0
    bytes_per_s: float = 0.0  # in each direction; 0 = as fast as it goes
    cut: bool = False


class Direction:
    """From one socket to another."""

    def __init__(self, line: Line, source: socket.socket, target: socket.socket) -> None:
        self._line = line
        self._source = source
        self._target = target
        self._pieces: queue.Queue[tuple[float, bytes]] = queue.Queue(PIECES)
        for work in (self._take, self._give):
            threading.Thread(target=work, daemon=True).start()

    def _take(self) -> None:
        due_s = free_s = 0.0
        while True:
            try:
                piece = self._source.recv(PIECE_BYTES)
            except OSError:
                piece = b""
            now_s = time.monotonic()
            if self._line.bytes_per_s:
                free_s = max(free_s, now_s) + len(piece) / self._line.bytes_per_s
            delay_s = self._line.delay_s + random.random() * self._line.jitter_s
            due_s = max(due_s, max(now_s, free_s) + delay_s)
            self._pieces.put((due_s, piece))
            if not piece:
                return

    def _give(self) -> None:
        while True:
            due_s, piece = self._pieces.get()
            if (wait_s := due_s - time.monotonic()) > 0:
                time.sleep(wait_s)
            while self._line.cut:
                time.sleep(LOOK_S)
            with suppress(OSError):
                if piece:
                    self._target.sendall(piece)
                    continue
            for end in (self._target, self._source):
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
            return


def connect(line: Line, near: socket.socket, target: tuple[str, int]) -> None:
    while line.cut:
        time.sleep(LOOK_S)
    try:
        far = socket.create_connection(target, timeout=5)
    except OSError:
        near.close()
        return
    far.settimeout(None)
    for end in (near, far):
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    Direction(line, near, far)
    Direction(line, far, near)


def address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host, int(port)


def main() -> None:
    sys.setswitchinterval(0.0005)
    line, target = Line(), address(sys.argv[2])
    server = socket.create_server(address(sys.argv[1]), backlog=128)

    def accept() -> None:
        while True:
            near, _ = server.accept()
            threading.Thread(target=connect, args=(line, near, target), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    print("ok", flush=True)
    for text in sys.stdin:
        for name, value in json.loads(text).items():
            setattr(line, name, value)
        print("ok", flush=True)


if __name__ == "__main__":
    main()
