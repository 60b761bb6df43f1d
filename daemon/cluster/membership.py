"""This machine's place in a cluster: alone, its head, or a worker; and what users ask and are told about that.

Knows who it is and with whom it is paired (files below the home), and starts what follows from that: a listener and a
roster for a head, an attached worker for a worker. Nothing of it exists until somebody says `shoal cluster`.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import combinations
from pathlib import Path

from msgspec.structs import replace

from shoal import kernels
from shoal.comm.cluster_messages import (
    Forget,
    Invitation,
    Invite,
    MeasureLinks,
    NodeRole,
    Nodes,
    NodesReply,
    NodeStatus,
    PairStatus,
    Rejoin,
)
from shoal.comm.errors import CommError
from shoal.comm.group.errors import NotPaired
from shoal.comm.group.join_code import CODE_S, Codes
from shoal.comm.group.node_identity import NodeIdentity
from shoal.comm.group.peers import PairedNode, Peers
from shoal.comm.messages import Ok
from shoal.daemon.backend import ClusterReply, ClusterRequest
from shoal.daemon.config import NodeConfig
from shoal.daemon.errors import DaemonError
from shoal.daemon.installed import package_version
from shoal.daemon.memory import resident_bytes
from shoal.daemon.private_files import private_dir
from shoal.offload.budget import Budget
from shoal.partition.throughput.profile import Device

from .control_messages import Attach
from .links.link_test import longest_waits, measure_links
from .member import Member
from .roster import Roster
from .routes.listening import DEFAULT_LISTEN, Listening
from .routes.local_network import Announcer, LocalNetwork, announced
from .routes.own_addresses import OwnAddress, caveat, own_addresses, reachable, spelled
from .routes.route import HeadRoute
from .served_shard import KeepsShards
from .speed import NodeSpeed
from .worker import Worker

log = logging.getLogger(__name__)

ACCEPT_S = 0.5  # and then it is seen whether others than before are awaited
PREPARING_S = 60.0  # within which a machine that has just joined attaches, slow ones, too


class Membership:
    """`directory` holds key, certificate and peers. `speed` measures this machine, and `device` says what is known of
    it. `computing` names the models that compute now (for people). `network`: where a head says that it is there;
    None = nowhere. `own`: its addresses."""

    def __init__(
        self,
        directory: Path,
        config: NodeConfig,
        budget: Budget,
        roster: Roster,
        shards: KeepsShards,
        speed: Callable[[], NodeSpeed],
        computing: Callable[[], Sequence[str]] = lambda: (),
        network: LocalNetwork | None = None,
        own: Callable[[], Sequence[OwnAddress]] = own_addresses,
        device: Callable[[], Device | None] = lambda: None,
    ) -> None:
        self._directory = directory
        self._config = config
        self._budget = budget
        self._roster = roster
        self._shards = shards
        self._speed = speed
        self._computing = computing
        self._network = network
        self._own = own
        self._device = device
        self._announcer: Announcer | None = None
        self._lock = threading.RLock()
        self._codes = Codes()
        self._listening: Listening | None = None
        self._worker: Worker | None = None
        self._closed = False
        self._peers = Peers(directory)
        self._last_paired: list[str] = []
        # When each was paired; not of those that were before this process, or that have attached since.
        self._paired_s: dict[str, float] | None = None
        roster.known = self

    @property
    def role(self) -> NodeRole:
        if self._head() is not None:
            return "worker"
        return "head" if self._listens() else "alone"

    def start(self) -> None:
        """Begin with what the files say. What cannot be done is logged: the daemon serves alone then."""
        try:
            self.follow_files()
        except (DaemonError, CommError, OSError) as error:
            log.error("the cluster is not joined: %s", error)

    def answer(self, request: ClusterRequest) -> ClusterReply:
        """Raises DaemonError."""
        try:
            match request:
                case Invite():
                    return self._invite(request.listen)
                case Nodes():
                    return self._nodes()
                case MeasureLinks():
                    self._check_head()
                    return measure_links(self._roster, self._computing)
                case Forget():
                    gone = self._peers.named(request.node)
                    if (worker := self._worker) is not None and worker.fingerprint == gone.fingerprint:
                        worker.say_farewell()
                    self._roster.tell_forgotten(gone.fingerprint)
                    with suppress(NotPaired):  # it has left by itself meanwhile
                        self._peers.forget(gone.fingerprint)
                    self._roster.dismiss(gone.fingerprint, "it was forgotten")
                    self.follow_files()
                    self._follow_members()
                    return Ok()
                case Rejoin():
                    self.follow_files()
                    return Ok()
        except (CommError, OSError) as error:
            raise DaemonError(
                "not_found" if isinstance(error, NotPaired) else "bad_request", str(error)
            ) from error

    def close(self) -> None:
        """Leave everybody. Idempotent."""
        with self._lock:
            self._closed = True
            worker, self._worker = self._worker, None
        self._listen_no_more()
        self._roster.close()
        if worker is not None:
            worker.close()

    # --- the head ------------------------------------------------------------------------------------------

    def _invite(self, listen: Sequence[str]) -> Invitation:
        with self._lock:
            if (head := self._head()) is not None:
                hint = "shoal cluster leave first"
                raise DaemonError("bad_request", f"this machine is a worker of {head.name}", hint)
            wanted = list(listen) or self._listens() or [DEFAULT_LISTEN]
            if self._listening is None or (listen and wanted != self._listens()):
                self._listen(wanted)
            code = self._codes.new()
            self._follow_members()
            addresses = self._reachable()
            return Invitation(
                code=code,
                addresses=addresses,
                seconds=CODE_S,
                announced=self._network is not None and bool(announced(addresses)),
                caveat=caveat(addresses),
            )

    def _check_head(self) -> None:
        if self.role == "worker":
            raise DaemonError("bad_request", "this machine is a worker: its head measures links")
        if self.role == "alone":
            hint = "shoal cluster init makes it the head of one"
            raise DaemonError("bad_request", "this machine is in no cluster", hint)

    def _listen(self, wanted: Sequence[str]) -> None:
        self._listen_no_more()
        identity = self._identity()
        listening = self._listening = Listening(identity, self._peers, wanted, self._codes, self._own)
        threading.Thread(target=self._accept, args=(listening,), name="shoal-accept", daemon=True).start()
        if self._network is not None:
            self._announcer = Announcer(self._network, identity, self._reachable)
        (self._directory / "listen").write_text("".join(f"{text}\n" for text in wanted))
        log.info("machines may attach at %s", ", ".join(map(spelled, listening.addresses)))

    def _listen_no_more(self) -> None:
        announcer, self._announcer = self._announcer, None
        listening, self._listening = self._listening, None
        if announcer is not None:
            announcer.close()
        if listening is not None:
            listening.close()

    def _accept(self, listening: Listening) -> None:
        """Give every channel that comes a thread of its own, as long as this is where the head listens."""
        while self._listening is listening:
            if (channel := listening.accept(ACCEPT_S)) is not None:
                threading.Thread(
                    target=self._roster.take, args=(channel,), name="shoal-channel", daemon=True
                ).start()
            self._follow_members()

    def _follow_members(self) -> None:
        """Listen where it is needed: who is missing may come by any way, who is there stays on his."""
        if (listening := self._listening) is None:
            return
        paired = set(self.paired())
        members = self._roster.members
        self._note_newcomers(paired, members)
        awaited = self._codes.any_good or bool(paired - {member.fingerprint for member in members})
        if listening.follow(awaited=awaited, used=[member.own_address for member in members]):
            there = ", ".join(map(spelled, listening.addresses))
            log.info("machines may attach at %s", there or "no address")
            if (announcer := self._announcer) is not None:
                announcer.look()

    def _note_newcomers(self, paired: Collection[str], members: Sequence[Member]) -> None:
        before, long_ago, now_s = self._paired_s, -math.inf, time.monotonic()
        found = {it: before.get(it, now_s) if before is not None else long_ago for it in paired}
        self._paired_s = found | {it.fingerprint: long_ago for it in members}

    def prepares(self, fingerprint: str) -> bool:
        """See `Known`."""
        return time.monotonic() - (self._paired_s or {}).get(fingerprint, -math.inf) < PREPARING_S

    def paired(self) -> list[str]:
        """See `Known`; as last known if the file is damaged: the listener complains about that."""
        with suppress(CommError):
            self._last_paired = [peer.fingerprint for peer in self._peers.listed()]
        return self._last_paired

    def worker(self, fingerprint: str) -> tuple[str, bytes]:
        """See `Known`. Raises NotPaired."""
        peer = self._peers.get(fingerprint)
        return peer.name, peer.certificate

    def addresses(self) -> list[str]:
        """At which this head would be reached if it awaited somebody."""
        return listening.all_reachable if (listening := self._listening) is not None else []

    def forget(self, fingerprint: str) -> None:
        """See `Known`. It may be forgotten already."""
        try:
            self._peers.forget(fingerprint)
        except NotPaired:
            return
        except CommError as error:
            log.warning("a worker that has left is not forgotten: %s", error)
        self._follow_members()

    def _reachable(self) -> list[str]:
        return reachable(listening.addresses) if (listening := self._listening) is not None else []

    def _listens(self) -> list[str]:
        try:
            return (self._directory / "listen").read_text().split()
        except OSError:
            return []

    # --- a worker ------------------------------------------------------------------------------------------

    def _head(self) -> PairedNode | None:
        return next((peer for peer in self._peers.listed() if peer.role == "head"), None)

    def _attach(self) -> Attach:
        speed = self._speed()
        return Attach(
            name=self._identity().name,
            version=package_version(),
            kernels=kernels.home(),
            threads=self._config.thread_count,
            memory_bytes=max(0, self._budget.free_bytes),
            memory_bytes_per_s=speed.memory_bytes_per_s,
            flops=speed.flops,
            disk_bytes_per_s=speed.disk_bytes_per_s,
            measured=speed.measured,
            device=self._device(),
        )

    def follow_files(self) -> None:
        """Be what the files say: they change when this machine joins or leaves. Raises DaemonError, CommError and
        OSError."""
        with self._lock:
            if self._closed:
                return
            head = self._head()
            if self._worker is not None and (head is None or head.fingerprint != self._worker.fingerprint):
                self._worker.close()
                self._worker = None
            if head is not None and self._worker is None:
                look = partial(self._network.find, head.fingerprint) if self._network is not None else list
                route = HeadRoute(self._identity(), self._peers, head.fingerprint, look)
                self._worker = Worker(head, route, self._attach, self._shards, self._budget)
            elif self._worker is not None:
                self._worker.dial_now()
            elif head is None and self._listens() and self._listening is None:
                self._listen(self._listens())
            elif self._listening is not None and not self._listens():  # it is no head any more
                self._listen_no_more()

    # --- both ----------------------------------------------------------------------------------------------

    def _identity(self) -> NodeIdentity:
        private_dir(self._directory)
        return NodeIdentity.of(self._directory)

    def _nodes(self) -> NodesReply:
        if self.role == "alone":
            return NodesReply(role="alone", nodes=[])
        identity, worker = self._identity(), self._worker
        own = NodeStatus(
            name=identity.name,
            fingerprint=identity.fingerprint,
            role=self.role,
            attached=worker.attached if worker is not None else True,
            preparing=worker.preparing if worker is not None else False,
            version=package_version(),
            kernels=kernels.home(),
            threads=self._config.thread_count,
            memory_bytes=self._budget.limit_bytes,
            free_bytes=max(0, self._budget.free_bytes),
            resident_bytes=resident_bytes(),
            models=[shard.request.model for shard in worker.shards] if worker is not None else [],
            trouble=worker.trouble if worker is not None else "",
        )
        members = {member.fingerprint: member for member in self._roster.members}
        others = [self._status(peer, members.get(peer.fingerprint)) for peer in self._peers.listed()]
        pairs = list(self._pairs())
        if (listening := self._listening) is None:
            return NodesReply(role=self.role, nodes=[own, *others], pairs=pairs)
        now = [spelled(address) for address in listening.addresses]
        open_now = reachable(listening.addresses)
        closed = [text for text in listening.all_reachable if text not in open_now]
        return NodesReply(role=self.role, nodes=[own, *others], listening=now, closed=closed, pairs=pairs)

    def _pairs(self) -> Iterator[PairStatus]:
        for one, other in combinations(self._roster.members, 2):
            if (link := self._roster.pairs.between(one, other)) is not None:
                between = [one.fingerprint, other.fingerprint]
                yield PairStatus(between=between, rtt_s=2 * link.latency_s, bytes_per_s=link.bytes_per_s)

    def _status(self, peer: PairedNode, member: Member | None) -> NodeStatus:
        if member is None:
            worker = self._worker if peer.role == "head" else None
            status = NodeStatus(
                name=peer.name,
                fingerprint=peer.fingerprint,
                role=peer.role,
                attached=False,
                preparing=self.prepares(peer.fingerprint),
            )
            if worker is None or not worker.attached or (route := worker.route.now) is None:
                return status
            return replace(
                status,
                attached=True,
                address=spelled(route.address),
                rtt_s=route.rtt_s,
                bytes_per_s=route.bytes_per_s,
                routes=route.compared,
                version=route.head_version,
            )
        part, waits = self._roster.contributions(member), longest_waits(self._roster, member)
        return NodeStatus(
            name=peer.name,
            fingerprint=peer.fingerprint,
            role=peer.role,
            attached=True,
            address=member.address,
            rtt_s=2 * member.link.latency_s,
            bytes_per_s=member.link.bytes_per_s,
            routes=member.facts.routes,
            version=member.facts.version,
            kernels=member.facts.kernels,
            threads=member.facts.threads,
            memory_bytes=member.facts.memory_bytes,
            free_bytes=member.beat.free_bytes,
            resident_bytes=member.beat.resident_bytes,
            silent_s=member.silent_s,
            steps=member.beat.steps,
            models=[it.model for it in part],
            shares=[it.share for it in part],
            wait_s=waits.median_s if waits is not None else 0.0,
            longest_wait_s=waits.longest_s if waits is not None else 0.0,
            memory_bytes_per_s=member.speed.memory_bytes_per_s,
            flops=member.speed.flops,
            disk_bytes_per_s=member.speed.disk_bytes_per_s,
        )
