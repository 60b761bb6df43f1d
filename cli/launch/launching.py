"""Starts workers on several hosts at once, and tells of each whether it is attached.

Knows the head's daemon, which gives a join code for each host. How a host is reached is `over_ssh`'s.
"""

from __future__ import annotations

import ipaddress
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace

from shoal.client import Client
from shoal.comm.cluster_messages import NodeStatus
from shoal.comm.errors import CommError
from shoal.comm.home import Home
from shoal.daemon.cluster.routes.listening import real_hosts
from shoal.daemon.cluster.routes.own_addresses import (
    DEFAULT_PORT,
    own_addresses,
    parse_address,
    reachable,
    spelled,
)
from shoal.daemon.errors import DaemonError
from shoal.daemon.installed import package_version
from shoal.partition.amounts import counted, format_bytes

from .hosts_file import Host
from .over_ssh import Outcome, join_over_ssh, ssh_command

HOSTS_AT_ONCE = 8
ATTACH_S = 60.0  # a worker measures its own speed before it attaches for the first time
ATTACH_LOOK_S = 0.25


class Launch:
    """`limit_s` bounds what ssh takes for one host."""

    def __init__(self, home: Home, limit_s: float) -> None:
        self._home = home
        self._limit_s = limit_s
        self._given_up = threading.Event()
        self.caveat = ""  # why other machines may not reach this one, once it is known
        self._addresses: list[str] = []
        self._head = ""

    def run(self, hosts: Sequence[Host]) -> Iterator[tuple[Outcome, str]]:
        """What became of each host, and that in words, as they are done. Raises CommError if the daemon lets nobody
        join."""
        with self._client() as client:
            invitation = client.invite()
            self.caveat = invitation.caveat
            self._addresses = for_others(invitation.addresses)
            self._head = client.nodes().nodes[0].fingerprint
        pool = ThreadPoolExecutor(HOSTS_AT_ONCE, thread_name_prefix="shoal-launch")
        try:
            for done in as_completed([pool.submit(self._one, host) for host in hosts]):
                yield done.result()
        finally:
            self._given_up.set()
            pool.shutdown(cancel_futures=True)

    def _one(self, host: Host) -> tuple[Outcome, str]:
        try:
            outcome = self._joined(host)
            if outcome.trouble:
                return outcome, outcome.trouble
            node = self._attached(outcome.fingerprint)
        except (CommError, DaemonError) as error:
            return Outcome(host, trouble=str(error)), str(error)
        if node is None:
            said = "it is paired with this head, which has forgotten it: shoal cluster leave there helps"
        elif not node.attached:
            said = f"it has joined, but has not attached within {ATTACH_S:.0f} s: shoal logs there says why"
        else:
            return outcome, _said(outcome, node)
        return replace(outcome, trouble=said), said

    def _joined(self, host: Host) -> Outcome:
        command = ssh_command(host, self._addresses, self._head)
        outcome = Outcome(host)
        for _ in range(2):  # while many hosts fail quickly, newer codes may push out that of a slow one
            with self._client() as client:
                code = client.invite().code
            outcome = join_over_ssh(host, command, code, self._limit_s, self._given_up)
            if "no such join code" not in outcome.trouble:
                break
        return outcome

    def _attached(self, fingerprint: str) -> NodeStatus | None:
        """The machine as the head sees it, once it is attached or the time is over; None if the head does not know
        it."""
        ends_s = time.monotonic() + ATTACH_S
        with self._client() as client:
            while True:
                node = next((it for it in client.nodes().nodes if it.fingerprint == fingerprint), None)
                if node is None or node.attached or time.monotonic() > ends_s:
                    return node
                if self._given_up.wait(ATTACH_LOOK_S):
                    return node

    def _client(self) -> Client:
        return Client(self._home.address)


def planned(hosts: Sequence[Host], home: Home, runs: bool) -> Iterator[list[str]]:
    """The commands that `run` would use. If no daemon `runs`, with the addresses that it would listen at by default."""
    head = "FINGERPRINT"
    there = [spelled((host, DEFAULT_PORT)) for host in real_hosts(own_addresses())]
    if runs:
        with Client(home.address) as client:
            found = client.nodes()
        if found.listening or found.closed:
            there = reachable([parse_address(text) for text in (*found.listening, *found.closed)])
        if found.nodes:
            head = found.nodes[0].fingerprint
    addresses = for_others(there)
    for host in hosts:
        yield ssh_command(host, addresses, head)


def for_others(addresses: Sequence[str]) -> list[str]:
    """Without this machine's loopback, unless it has no other address."""
    return [it for it in addresses if not _is_loopback(it)] or list(addresses)


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(parse_address(address)[0]).is_loopback
    except ValueError:  # a name
        return False


def _said(outcome: Outcome, node: NodeStatus) -> str:
    said = "was in the cluster already" if outcome.before else "has joined"
    if node.name != outcome.host.name:
        said += f" as {node.name}"
    said += f": {counted(node.threads, 'thread')}, {format_bytes(node.memory_bytes)}"
    host = outcome.host
    if node.threads > (host.threads or node.threads) or node.memory_bytes > (
        host.memory or node.memory_bytes
    ):
        said += ", more than the file says, as its daemon was started so: shoal stop there, then launch again"
    if node.version != package_version():
        said += f"; it runs Shoal {node.version}, this machine {package_version()}"
    return said
