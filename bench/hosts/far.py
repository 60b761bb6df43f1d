"""Hosts that are far from each other: namespaces whose packets all take a while.

    with far(4, 0.005) as namespaces:
        …    in each process: `enter(namespaces[rank])`; the host of rank 2 is `address(2)`

Every host has a TUN device. One process takes the packets of all, keeps each for the delay and hands it on, so TCP
itself sees the distance (a relay of connections hides it: the kernel at each end is answered at once). Wants root.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hosts import network

DEVICE = "far0"
NETWORK = "10.76.0"
MTU = 16 << 10
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_CLONE_NEWNET = 0x40000000


def address(rank: int) -> str:
    return f"{NETWORK}.{rank + 1}"


def enter(namespace: str) -> None:
    """This thread's sockets are made there from now on, and those of threads that it starts. Raises OSError."""
    with Path("/run/netns", namespace).open("rb") as opened:
        if ctypes.CDLL(None, use_errno=True).setns(opened.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"{namespace} cannot be entered")


@contextmanager
def far(hosts: int, delay_s: float) -> Iterator[list[str]]:
    """Namespaces of so many hosts; a packet takes so long from any one to any other. Raises NetworkError."""
    names = [f"far-{os.getpid()}-{host}" for host in range(hosts)]
    router = None
    try:
        for name in names:
            network.make_host(name)
        command = [sys.executable, "-m", "hosts.far", str(delay_s), *names]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        router = subprocess.Popen(command, env=environment, text=True, **pipes)
        if router.stdout.readline() != "ok\n":
            raise network.NetworkError("no TUN devices can be made here")
        yield names
    finally:
        if router:
            router.kill()
            router.wait()
        for name in set(names) & set(network.namespaces()):
            network.remove(name)


def _device(namespace: str, host: int) -> int:
    """Its end here."""
    enter(namespace)
    device = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH", DEVICE.encode(), _IFF_TUN | _IFF_NO_PI))
    network.ip("addr", "add", f"{address(host)}/24", "dev", DEVICE, inside=namespace)
    network.ip("link", "set", DEVICE, "mtu", str(MTU), "up", inside=namespace)
    return device


def route(delay_s: float, namespaces: list[str]) -> None:
    """For ever."""
    devices = [_device(name, host) for host, name in enumerate(namespaces)]
    print("ok", flush=True)
    under_way: deque[tuple[float, bytes]] = deque()
    while True:
        wait_s = max(0.0, under_way[0][0] - time.monotonic()) if under_way else None
        for device in select.select(devices, [], [], wait_s)[0]:
            under_way.append((time.monotonic() + delay_s, os.read(device, MTU)))
        while under_way and under_way[0][0] <= time.monotonic():
            packet = under_way.popleft()[1]
            to = packet[19] - 1  # the last byte of an IPv4 packet's destination
            if packet[0] >> 4 == 4 and 0 <= to < len(devices):
                os.write(devices[to], packet)


if __name__ == "__main__":
    route(float(sys.argv[1]), sys.argv[2:])
