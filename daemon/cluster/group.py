"""A group: this machine and some workers that compute one model together, each a rank with its shard.

Forms it (asks every worker to load its shard, sends it the weights that it lacks, waits for its data channel) and ends
it. Knows shards and plans as data; what chose them, and what is done when a member is lost, is elsewhere.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations, count
from typing import Protocol

from shoal.comm.group.channel import Channel
from shoal.comm.group.sums.manners import Manners
from shoal.comm.group.sums.star import Hub
from shoal.comm.group.sums.star_errors import Departed
from shoal.comm.group.sums.wire_types import WireType
from shoal.daemon.errors import DaemonError
from shoal.daemon.library.kv_files import MOST_SLOTS, group_fingerprint, rank_fingerprint
from shoal.daemon.loading.grouping import GroupFailed
from shoal.daemon.progress import Progress, no_progress
from shoal.engine.passed_pages import frame_bytes
from shoal.offload.pack.manifest import Quant
from shoal.partition.machines import LinkSpeed
from shoal.partition.plan import Plan
from shoal.partition.slicing import Range, Shard
from shoal.partition.spec import ModelSpec

from .control_messages import BEAT_S, FROZEN_S, KvOnDisk, Loading, Ready, Serve, ShardRefused
from .meeting import Led, Meeting
from .member import Member
from .mesh.introductions import Introductions
from .pulse import Pulse, Watched
from .roster import Contribution, Roster

log = logging.getLogger(__name__)

SHARD_MOTIONLESS_S = 60.0  # without coming further, a worker that loads a shard is not waited for
FORM_LOOK_S = 0.2
FIRST_WIRE: WireType = "f32"  # until it is decided how sums are made

_epochs = count(1 + secrets.randbelow(1 << 30))  # so that those of an earlier process are not met again


@dataclass(frozen=True)
class Seat:
    """What one member is to be in a group. `spec` and `plan` are those of its shard."""

    member: Member
    shard: Shard
    spec: ModelSpec
    plan: Plan


def _brought_bytes(seat: Seat) -> int:
    """The most that a rank brings at once besides partials: K and V of a layer of a page, or its part of logits."""
    return max(frame_bytes(seat.spec, seat.plan.kv.dtype), 4 * seat.plan.logit_rows * seat.spec.vocab)


Settle = Callable[[Mapping[tuple[int, int], LinkSpeed]], Manners]
"""How sums are made, by the links between ranks other than 0, of those that have met."""


class SendsWeights(Protocol):
    """`trouble`: why the head cannot send them, if that is its own fault. `key`: names the model's files."""

    trouble: DaemonError | None
    key: str

    def serve(self, channel: Channel, shard: Shard) -> None:
        """Answers a worker's requests for the weights of its shard until the channel ends."""


class Group:
    """Ranks 1, 2, … are `seats`. Members load until `form` returns; then `collective` and `others` are rank 0's.

    `own_bytes` are the weights of rank 0. `kv_heads`: those of all ranks. `kv_store`: 32 bytes that differ if anything
    differs that the group's KV depends on; b"" if it is not to be kept on disk. If the group is for `prompts_only`,
    rank 0 keeps all of it.
    """

    def __init__(
        self,
        roster: Roster,
        model: str,
        seats: Sequence[Seat],
        quant: Quant,
        weights: SendsWeights,
        own_bytes: int = 0,
        settle: Settle = lambda links: Manners(),
        kv_store: bytes = b"",
        kv_heads: Sequence[Range] = (),
        *,
        prompts_only: bool = False,
    ) -> None:
        self.kv_heads = kv_heads
        self.prompts_only = prompts_only
        self.epoch = next(_epochs)
        self.seats = seats
        self._roster = roster
        self._model = model
        self._quant = quant
        self._weights = weights
        self._own_bytes = own_bytes
        self._settle = settle
        self._kv_store = kv_store
        self._hub: Hub | None = None
        self._data: dict[str, Channel] = {}
        self._arrived = threading.Condition()
        self.introductions = Introductions(self.epoch, [seat.member for seat in seats], self._wake)
        self._closed = False
        self._blamed = False
        self._watched = [Watched() for _ in seats]
        self.pulse = Pulse(self.epoch)

    def fetch(self) -> None:
        """Have all members fetch what they lack of their shards, and end: so a group that is formed later need not wait
        for it. Raises GroupFailed."""
        self.begin(fetch_only=True)
        try:
            self._await(lambda: True, no_progress)
        finally:
            self.close()

    def begin(self, *, fetch_only: bool = False) -> None:
        """Ask all members to load their shards."""
        self._roster.expect(self.epoch, self)
        keeps = self._kv_store and not (self.prompts_only or fetch_only)
        for rank, seat in enumerate(self.seats, 1):
            request = Serve(
                epoch=self.epoch,
                model=self._model,
                shard=seat.shard,
                spec=seat.spec,
                plan=seat.plan,
                quant=self._quant,
                wire=FIRST_WIRE,
                fellows=self.introductions.fellows(rank),
                kv_on_disk=KvOnDisk(store=self._kv_store.hex(), slots=MOST_SLOTS) if keeps else None,
                fetch_only=fetch_only,
                files=self._weights.key,
            )
            seat.member.serve(request, partial(self.introductions.heard, rank))

    def form(self, progress: Progress) -> None:
        """Wait until all members are ready. Raises DaemonError when one is gone, refuses or does not come further."""
        self._await(lambda: self._complete() and self.introductions.over, progress)
        streams = [self._data[seat.member.fingerprint] for seat in self.seats]
        most = max(_brought_bytes(seat) for seat in self.seats)
        columns = [seat.spec.vocab for seat in self.seats]
        hub = self._hub = Hub(streams, self.epoch, FIRST_WIRE, most_collected=most, columns=columns)
        self._decide(hub)
        self.collective = Meeting(hub, self.pulse)
        self.others = Led(hub)

    def _await(self, complete: Callable[[], bool], progress: Progress) -> None:
        """Until all have loaded, and it is complete besides."""
        moved_s, before = time.monotonic(), (-1, 0)
        while True:
            states = [(seat.member, seat.member.loading(self.epoch)) for seat in self.seats]
            for member, state in states:
                if state is None:
                    self._roster.faults.lost(member.fingerprint)
                    raise GroupFailed("busy", f"{member.name} was lost: {member.reason}", retry_after_s=1.0)
                if isinstance(state, ShardRefused):
                    if (trouble := self._weights.trouble) is not None:
                        raise trouble
                    self._roster.faults.refused(member.fingerprint)
                    raise GroupFailed("resources", f"{member.name} cannot take its part: {state.reason}")
            loading = [state for _, state in states if isinstance(state, Loading)]
            done = sum(state.done for state in loading)
            if not loading and complete():
                return
            if (now := (done, len(loading) + len(self._data))) != before:
                moved_s, before = time.monotonic(), now
                progress("sending", done, sum(state.total for state in loading))
            if time.monotonic() - moved_s > SHARD_MOTIONLESS_S:
                late = [
                    m
                    for m, state in states
                    if not isinstance(state, Ready) or m.fingerprint not in self._data
                ]
                for member in late:
                    self._roster.faults.refused(member.fingerprint)
                names = ", ".join(member.name for member in late)
                raise GroupFailed(
                    "busy", f"{names} loads its part and has not come further for {SHARD_MOTIONLESS_S:.0f} s"
                )
            with self._arrived:
                self._arrived.wait(FORM_LOOK_S)

    def _decide(self, hub: Hub) -> None:
        """How sums are made, now that it is known which workers reach each other."""
        met, links = self.introductions.links, {}
        if self.introductions.useful:
            for (low, one), (high, other) in combinations(
                enumerate((seat.member for seat in self.seats), 1), 2
            ):
                self._roster.pairs.note(one, other, met.get((low, high)))
                if (link := self._roster.pairs.between(one, other)) is not None:
                    links[low, high] = link
        for said in self.introductions.apart:
            log.info("%s: sums go by way of this machine", said)
        manners = self._settle(links)
        if manners != hub.manners:
            try:
                hub.decide(manners)
            except Departed as error:
                self.blame(error.rank)
                name = self.seats[error.rank - 1].member.name
                raise GroupFailed("busy", f"{name} was lost: {error.reason}", retry_after_s=1.0) from error
        log.info("%s: sums: %s", self._model, manners.describe())

    @property
    def sums(self) -> str:
        return self.manners.describe() if self.manners is not None else ""

    @property
    def manners(self) -> Manners | None:
        """How sums are made, once it is complete."""
        return self._hub.manners if self._hub is not None else None

    def _wake(self) -> None:
        with self._arrived:
            self._arrived.notify_all()

    def blame(self, rank: int) -> None:
        """That rank was lost in the middle of a step. If only another one does not hear it, neither is at fault: the
        next group makes its sums by way of this machine."""
        self._blamed = True
        member = self.seats[rank - 1].member
        if self._hub is not None and (deaf := self._hub.unheard.get(rank)) and not member.reason:
            self._roster.pairs.part(member, self.seats[deaf - 1].member)
            return
        self._roster.faults.lost(member.fingerprint)

    @property
    def names(self) -> list[str]:
        return [seat.member.name for seat in self.seats]

    @property
    def fingerprints(self) -> list[str]:
        return [seat.member.fingerprint for seat in self.seats]

    @property
    def plans(self) -> list[Plan]:
        return [seat.plan for seat in self.seats]

    @property
    def kv_key(self) -> bytes:
        """Once it is complete. Where the wire rounds, KV depends on how sums are made, too (but the number of rows from
        which on, which is another one at every start, does not count). That is known only now. Workers find KV by
        digests under a secret of this rank's store, so theirs need no other name."""
        store, manners = self._kv_store, self.manners
        if store and manners is not None and manners.rounds:
            store = group_fingerprint(store, (), [str(manners.few), str(manners.many)])
        return rank_fingerprint(store, 0) if store else b""

    @property
    def kv_slots(self) -> int:
        states = [seat.member.loading(self.epoch) for seat in self.seats]
        return min((state.kv_slots for state in states if isinstance(state, Ready)), default=0)

    @property
    def kv_trouble(self) -> str:
        states = [(seat.member.name, seat.member.loading(self.epoch)) for seat in self.seats]
        said = (f"{name}: {it.kv_trouble}" for name, it in states if isinstance(it, Ready) and it.kv_trouble)
        return "; ".join(said)

    @property
    def whole(self) -> bool:
        """Whether all members are still there, and none was lost in a step."""
        return not self._blamed and not any(seat.member.reason for seat in self.seats)

    def close(self) -> None:
        """End it: members drop their shards. Idempotent."""
        with self._arrived:
            if self._closed:
                return
            self._closed = True
            channels = list(self._data.values())
        self._roster.forget_group(self.epoch)
        for channel in channels:
            channel.close()
        for seat in self.seats:
            seat.member.drop(self.epoch)

    def watch(self, now_s: float) -> None:
        awaited = self._hub.awaited if self._hub is not None and not self._closed else {}
        for rank, since_s in awaited.items():
            member = self.seats[rank - 1].member
            beat, channel = member.beat, self._data[member.fingerprint]
            # Its thread comes further, or bytes do: those that it sends, or that this machine gets, on a slow link.
            pulse = (beat.epoch, beat.steps, beat.blocks, beat.at_work, beat.moved, channel.moved)
            still_s = self._watched[rank - 1].still_s(pulse, now_s)
            # What a beat tells may be old by a beat.
            if now_s - since_s > FROZEN_S and still_s > FROZEN_S - BEAT_S and not beat.at_work:
                member.leave(f"the others have waited for its part for {now_s - since_s:.1f} s")

    def contribution(self, member: Member) -> Contribution | None:
        seat = self._seat(member)
        if seat is None:
            return None
        whole = self._own_bytes + sum(it.plan.weights_bytes for it in self.seats)
        waits = self._hub.waits[self.seats.index(seat)].summary() if self._hub is not None else None
        return Contribution(self._model, seat.plan.weights_bytes / max(1, whole), waits)

    def data(self, member: Member, channel: Channel) -> None:
        with self._arrived:
            if not self._closed and member.fingerprint not in self._data and self._seat(member):
                self._data[member.fingerprint] = channel
                self._arrived.notify_all()
                return
        channel.close()

    def weights(self, member: Member, channel: Channel) -> None:
        seat = self._seat(member)
        if seat is None or self._closed:
            channel.close()
            return
        self._weights.serve(channel, seat.shard)

    def _seat(self, member: Member) -> Seat | None:
        return next((seat for seat in self.seats if seat.member is member), None)

    def _complete(self) -> bool:
        with self._arrived:
            return len(self._data) == len(self.seats)
