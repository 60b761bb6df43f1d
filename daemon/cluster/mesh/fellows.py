"""A worker's fellows: the other workers of one group, as far as the head has introduced them.

Listens for exactly these, by their certificates, at the address at which this machine reaches its head, until the group
ends. The higher rank dials the lower one for sums. Channels for weights may be dialled in either direction. Whoever is
not reached in time is told to the head, which then does without.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

from shoal.comm.errors import CommError
from shoal.comm.group.channel import Channel
from shoal.comm.group.dialing import dial
from shoal.comm.group.errors import ChannelError
from shoal.comm.group.group_protocol import Purpose
from shoal.comm.group.introduced import Introduced
from shoal.comm.group.listener import GroupListener
from shoal.comm.group.node_identity import NodeIdentity
from shoal.comm.group.streams import Address
from shoal.daemon.cluster.control_messages import (
    CONTROL_BYTES,
    Epoch,
    Fellow,
    FellowMet,
    Introduce,
    Listens,
    Met,
)
from shoal.daemon.cluster.links.link_probes import answer_probes, measured
from shoal.daemon.cluster.routes.own_addresses import parse_address, spelled
from shoal.daemon.errors import DaemonError
from shoal.partition.machines import LinkSpeed

FELLOW_DIAL_S = 3.0
MEET_S = 4.0  # until all are there, from the introduction on
MEASURE_FELLOW_S = 0.1  # for each of the two figures
FELLOW_WORD_S = 5.0
DOOR_S = 1.0
INTRODUCED_S = 10.0  # until the head has said where the others are

ServeWeights = Callable[[int, Channel], None]
"""Answers questions of the fellow of this rank for weights until the channel ends."""

log = logging.getLogger(__name__)


class Fellows:
    """This worker is `rank` of the group `epoch`; `host`: its own address to listen at. Channels for weights are closed
    unless `serve_weights` takes them."""

    def __init__(
        self,
        identity: NodeIdentity,
        host: str,
        epoch: int,
        rank: int,
        fellows: Sequence[Fellow],
        serve_weights: ServeWeights | None = None,
    ) -> None:
        self.epoch, self.rank = epoch, rank
        self.ranks = sorted({fellow.rank for fellow in fellows})
        self.data: dict[int, Channel] = {}  # for sums, by rank; all are there once the head was told so
        self._identity = identity
        self._known = Introduced({fellow.rank: fellow.certificate for fellow in fellows})
        self._serve_weights = serve_weights
        self._addresses: dict[int, list[Address]] = {}
        self._measuring = threading.Lock()  # one link at a time
        self._arrived = threading.Condition()
        self._closed = False
        self._listener: GroupListener | None = None
        try:
            self._listener = GroupListener(identity, self._known, [(host, 0)])
        except (OSError, CommError) as error:
            log.warning("other workers of the group cannot reach this machine: %s", error)
            return
        threading.Thread(target=self._let_in, args=(self._listener,), name="shoal-door", daemon=True).start()

    @property
    def listens(self) -> Listens:
        """For the head."""
        addresses = self._listener.addresses if self._listener is not None else ()
        return Listens(epoch=self.epoch, addresses=[spelled(it) for it in addresses if "%" not in it[0]][:8])

    def hear(self, told: Introduce) -> None:
        """Where they are."""
        with self._arrived:
            for fellow in told.fellows:
                if fellow.rank in self.ranks:
                    self._addresses[fellow.rank] = _addresses(fellow.addresses)
            self._arrived.notify_all()

    def reach(self, rank: int) -> Channel:
        """A new channel for weights to a fellow, once it was introduced. Raises CommError and OSError."""
        with self._arrived:
            self._arrived.wait_for(lambda: self._closed or rank in self._addresses, INTRODUCED_S)
        return self.dial(rank, "weights")

    def meet(self, told: Introduce) -> Met:
        """Dial and wait; blocks for `MEET_S` and a moment at most. What was reached, and what was not."""
        ends_s = time.monotonic() + MEET_S
        self.hear(told)
        ranks = self.ranks
        found: dict[int, FellowMet] = {}

        def reach(rank: int) -> None:
            met = self._reach(rank, ends_s)
            with self._arrived:
                found[rank] = met
                self._arrived.notify_all()

        for rank in ranks:
            if rank < self.rank:
                threading.Thread(target=reach, args=(rank,), name="shoal-meet", daemon=True).start()
        with self._arrived:
            while not self._closed and (left_s := ends_s - time.monotonic()) > 0:
                if all(rank in (found if rank < self.rank else self.data) for rank in ranks):
                    break
                self._arrived.wait(left_s)
            for rank in ranks:
                if rank > self.rank and rank in self.data:
                    found[rank] = FellowMet(rank=rank)
                elif rank not in found:
                    found[rank] = FellowMet(rank=rank, trouble="it did not come in time")
            return Met(epoch=self.epoch, fellows=[found[rank] for rank in sorted(found)])

    def dial(self, rank: int, purpose: Purpose, timeout_s: float = FELLOW_DIAL_S) -> Channel:
        """A new channel to a fellow, for "measure", or for "data" or "weights" of this group. Raises CommError and
        OSError."""
        peer = next(
            (it.fingerprint for it in self._known.listed() if self._known.rank(it.fingerprint) == rank), ""
        )
        addresses = self._addresses.get(rank, [])
        if not addresses:
            raise ChannelError(f"rank {rank} has said no address")
        channel = dial(self._identity, self._known, peer, purpose, addresses, timeout_s)
        if purpose != "measure":
            channel.send_message(Epoch(epoch=self.epoch))
        return channel

    def close(self) -> None:
        """Listen no more, and close every channel. Idempotent."""
        with self._arrived:
            self._closed = True
            listener, self._listener = self._listener, None
            self._arrived.notify_all()
        self._known.close()
        if listener is not None:
            listener.close()

    def _reach(self, rank: int, ends_s: float) -> FellowMet:
        """A channel for sums to a fellow, over a link that is measured first."""
        try:
            link = self._link(rank, ends_s)
            channel = self.dial(rank, "data", max(0.1, ends_s - time.monotonic()))
        except (CommError, OSError) as error:
            log.info("rank %d of the group is not reached: %s", rank, error)
            return FellowMet(rank=rank, trouble=str(error)[:1000])
        self._keep(rank, channel)
        return FellowMet(rank=rank, latency_s=link.latency_s, bytes_per_s=link.bytes_per_s)

    def _link(self, rank: int, ends_s: float) -> LinkSpeed:
        with self.dial(rank, "measure", min(FELLOW_DIAL_S, ends_s - time.monotonic())) as channel:
            self._addresses[rank] = [channel.remote]  # where it answers; nothing else is tried from now on
            with self._measuring:
                return measured(channel, MEASURE_FELLOW_S)

    def _keep(self, rank: int, channel: Channel) -> None:
        with self._arrived:
            if self._closed or rank in self.data:
                channel.close()
            else:
                self.data[rank] = channel
            self._arrived.notify_all()

    def _let_in(self, listener: GroupListener) -> None:
        while self._listener is listener:
            if (channel := listener.accept(DOOR_S)) is not None:
                threading.Thread(target=self._take, args=(channel,), name="shoal-fellow", daemon=True).start()

    def _take(self, channel: Channel) -> None:
        """Serve a fellow's channel, in the caller's thread."""
        try:
            assert channel.peer is not None
            rank = self._known.rank(channel.peer)
            if channel.purpose == "measure":
                answer_probes(channel)
                return
            word: Epoch = channel.receive_message(Epoch, FELLOW_WORD_S, CONTROL_BYTES)
            if word.epoch != self.epoch:
                raise ChannelError(f"a channel for epoch {word.epoch}, this is {self.epoch}")
            if channel.purpose == "data" and rank > self.rank:
                self._keep(rank, channel)
            elif channel.purpose == "weights" and self._serve_weights is not None:
                self._serve_weights(rank, channel)
            else:
                raise ChannelError(f"a channel for {channel.purpose} from rank {rank} is of no use")
        except (OSError, CommError) as error:
            log.info("a fellow's channel ended early: %s", error)
            channel.close()


def _addresses(told: Sequence[str]) -> list[Address]:
    found = []
    for text in told:
        try:
            found.append(parse_address(text, with_host=True))
        except DaemonError:
            continue
    return found
