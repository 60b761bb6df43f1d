"""One exchange of frames with several ranks at once, while it lasts.

Knows the links of a rank and what is under way on them; not what an exchange is for.
"""

from __future__ import annotations

import select
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from ..errors import ChannelError
from ..watching import Watching, watching
from .framed import Framed
from .frames import MAX_ORDER_BYTES, MAX_REASON_BYTES, WRAP, FrameKind, Header
from .star_errors import Departed, GivenUp
from .wire_types import Octets

AHEAD_FRAMES = 8  # of rank 0 that are kept for later
STALLED_S = 1.5  # nothing comes from a rank that rank 0 has heard already
SWAP_LOOK_S = 0.25  # between looks at clock and streams
_BOTH = select.POLLIN | select.POLLOUT
_LATER = WRAP // 2  # numbers that are farther back than that are ahead
_FROM_OTHERS = (FrameKind.PART, FrameKind.FAILED, FrameKind.CUT_OFF)

RankFrames = Mapping[int, tuple[FrameKind, Octets]]  # by rank


class RankLinks:
    """The links of rank `rank`, and what outlasts one exchange. `patience_s`: how long nothing may come. `most_bytes`:
    of a frame that rank 0 sends for later. `heard(rank, seconds, nbytes)`: a part came, so long after the beginning.
    """

    def __init__(
        self,
        rank: int,
        links: dict[int, Framed],
        epoch: int,
        patience_s: float,
        most_bytes: int = 0,
        heard: Callable[[int, float, int], None] | None = None,
    ) -> None:
        self.rank, self.links, self.epoch = rank, links, epoch
        self.patience_s = patience_s
        self.most_bytes = max(most_bytes, MAX_ORDER_BYTES)
        self.heard = heard
        self.largest = MAX_REASON_BYTES  # payload that may still come of an order that was given up
        self.ahead: deque[tuple[Header, Octets]] = deque()  # frames of rank 0 that came early
        self.later: Octets | None = None  # the payload of one that is coming
        self.awaited: dict[int, float] = {}  # ranks that rank 0 waits for just now, and since when
        self.broken: dict[int, str] = {}  # ranks that cannot be heard any more, and why
        self.watching: Watching | None = None  # for several streams at once

    def add(self, rank: int, link: Framed) -> None:
        """A link to another rank."""
        self.links[rank] = link
        if self.watching is not None:
            link.stream.watch()

    def heard_of(self, rank: int) -> None:
        """Rank 0 waits for this one no longer. Another thread reads whom it waits for."""
        self.awaited = {it: since_s for it, since_s in self.awaited.items() if it != rank}

    def watch(self) -> None:
        """From now on look for bytes before sleeping, on all links. For a rank whose thread has a processor."""
        self.watching = watching()
        for link in self.links.values():
            link.stream.watch()


class OneSwap:
    """One exchange, while it lasts."""

    def __init__(self, of: RankLinks, number: int, place: int, into: RankFrames) -> None:
        self._of = of
        self._links = of.links
        self._number, self._place = number, place
        self._waiting = dict(into)
        self._sending: set[int] = set()
        self._held: set[int] = set()  # ranks that are at a later order already
        self._began_s = time.perf_counter()
        self._moved_s: dict[int, float] = {}  # when bytes last came from ranks, or went to them
        self._reasons: dict[int, Octets] = {}
        self._told: set[int] = set()  # ranks of which rank 0 was told that they cannot be heard

    def run(self, stuck: Mapping[int, Exception | None]) -> None:
        of = self._of
        for kind, due in self._waiting.values():
            if kind == FrameKind.PART:
                of.largest = max(of.largest, len(due))
        for rank, error in stuck.items():
            if error is None:
                self._sending.add(rank)
            else:
                self._failed(rank, error)
        if of.ahead:
            self._take_ahead()
        if not self._waiting and not self._sending:
            return
        if not self._sending and len(self._waiting) == 1 and (not of.rank or 0 in self._waiting):
            self._receive_one(*self._waiting)
        else:
            self._receive_all()

    # --- one stream -----------------------------------------------------------------------------------------

    def _receive_one(self, rank: int) -> None:
        """Only this rank is waited for, and it is the only one that could tell why not to."""
        link, patience_s = self._links[rank], self._of.patience_s
        ends_s = 0.0
        try:
            while True:
                link.await_header(patience_s)
                if not link.accepted:
                    self._open(rank, link)
                link.await_payload(patience_s)
                self._complete(rank, link)
                if not self._waiting:
                    return
                ends_s = ends_s or time.monotonic() + patience_s
                if time.monotonic() > ends_s:
                    raise ChannelError(f"only parts of older orders came for {patience_s:.0f} s")
        except (OSError, ChannelError) as error:
            raise Departed(rank, str(error)) from error

    # --- several streams ------------------------------------------------------------------------------------

    def _receive_all(self) -> None:
        poll = select.poll()
        watched: dict[int, int] = {}  # descriptors, by rank
        masks: dict[int, int] = {}
        now_s = time.monotonic()
        self._moved_s = dict.fromkeys(self._links, now_s)
        self._ahead_since_s = 0.0
        for rank in self._readable():
            if self._links[rank].pending:
                self._read(rank)
        for rank in [rank for rank in self._of.broken if rank in self._waiting]:
            self._cut_off(rank)
        while self._waiting or self._sending:
            self._watch(poll, watched, masks)
            ready = self._ready(watched)
            if self._of.watching is not None and not ready:
                self._of.watching.look_at_all((it, masks[rank]) for rank, it in watched.items())
            found = dict(poll.poll(0 if ready else 1000 * SWAP_LOOK_S))
            for rank, descriptor in watched.items():
                events = _BOTH if rank in ready else found.get(descriptor, 0)
                if rank in self._sending and events & ~(select.POLLIN & ~self._links[rank].stream.room_event):
                    self._push(rank)
                if rank in self._readable() and events & ~select.POLLOUT:
                    self._read(rank)
            self._look_at_clock()

    def _ready(self, watched: Iterable[int]) -> set[int]:
        """Ranks with which one can go on, though `poll` may not say so."""
        readable, sending = self._readable(), self._sending
        return {rank for rank in watched if self._links[rank].stream.ready(rank in readable, rank in sending)}

    def _readable(self) -> set[int]:
        """Ranks whose frames are taken now."""
        ranks = {rank for rank in self._waiting if rank not in self._held and rank not in self._of.broken}
        if self._of.rank and len(self._of.ahead) < AHEAD_FRAMES:
            ranks.add(0)
        return ranks

    def _watch(self, poll: select.poll, watched: dict[int, int], masks: dict[int, int]) -> None:
        """Have `poll` look at the streams that matter now, and at no others: an end is always reported."""
        readable = self._readable()
        for rank, link in self._links.items():
            mask = (select.POLLIN if rank in readable else 0) | (
                link.stream.room_event if rank in self._sending else 0
            )
            descriptor = link.stream.fileno() if mask else -1
            if mask and (link.stream.closed or descriptor < 0):
                self._failed(rank, ChannelError("the channel was closed"))
                mask = 0
            if mask == masks.get(rank, 0):
                continue
            if mask:
                watched[rank] = descriptor
                poll.register(descriptor, mask)
            else:
                poll.unregister(watched.pop(rank))
            masks[rank] = mask

    def _look_at_clock(self) -> None:
        of, now_s = self._of, time.monotonic()
        if of.ahead and not self._ahead_since_s:
            self._ahead_since_s = now_s
        late = [rank for rank in self._waiting if now_s - self._moved_s[rank] > of.patience_s]
        stuck = [rank for rank in self._sending if now_s - self._moved_s[rank] > of.patience_s]
        if not of.rank:
            for rank in (*late, *stuck):
                raise Departed(rank, f"nothing came for {of.patience_s:.0f} s")
            return
        if now_s - max(self._moved_s.values()) > of.patience_s:
            raise Departed(0, f"nothing came for {of.patience_s:.0f} s")
        if not self._ahead_since_s:
            return
        # Rank 0 has got everything, and gone on: so have all others sent what was due.
        for rank in {*self._waiting, *self._sending} - {0} - self._of.broken.keys():
            if now_s - max(self._ahead_since_s, self._moved_s[rank]) > STALLED_S:
                self._failed(rank, ChannelError(f"nothing came for {STALLED_S:.0f} s"))

    def _push(self, rank: int) -> None:
        link = self._links[rank]
        before = link.pushed
        try:
            if link.push():
                self._sending.discard(rank)
                if rank not in self._waiting:
                    self._of.heard_of(rank)
            else:
                self._sending.add(rank)
            if link.pushed > before:
                self._moved_s[rank] = time.monotonic()
        except (OSError, ChannelError) as error:
            self._failed(rank, error)

    def _read(self, rank: int) -> None:
        """Take what has come from a rank, as far as it is wanted."""
        link = self._links[rank]
        try:
            while rank in self._readable():
                if not link.header_some():
                    return
                if not link.accepted:
                    self._open(rank, link)
                    if rank in self._held:
                        return
                if not link.payload_some():
                    self._moved_s[rank] = time.monotonic()
                    return
                self._complete(rank, link)
        except (OSError, ChannelError) as error:
            self._failed(rank, error)

    def _failed(self, rank: int, error: Exception) -> None:
        """A stream is of no use any more. Rank 0 decides what follows."""
        if not self._of.rank or not rank:
            raise Departed(rank, str(error)) from error
        self._sending.discard(rank)
        if rank not in self._of.broken:
            self._of.broken[rank] = str(error)
            if rank in self._waiting:
                self._cut_off(rank)

    def _cut_off(self, rank: int) -> None:
        """Tell rank 0 that a rank cannot be heard. What it decides comes in place of parts."""
        if rank in self._told:
            return
        self._told.add(rank)
        reason = self._of.broken[rank].encode()[:MAX_REASON_BYTES]
        self._links[0].begin(FrameKind.CUT_OFF, self._number, rank, reason)
        self._push(0)

    # --- frames ---------------------------------------------------------------------------------------------

    def _open(self, rank: int, link: Framed) -> None:
        """Decide where the payload of the frame goes whose header has come. Raises ChannelError, or GivenUp."""
        header = link.header
        assert header is not None
        if header.epoch != self._of.epoch:
            raise ChannelError(f"epoch {header.epoch} came, this is {self._of.epoch}")
        if self._of.rank and not rank:
            self._open_of_rank_0(header, link)
            return
        if header.kind not in _FROM_OTHERS:
            raise ChannelError(f"a frame {header}: a part was to come")
        age = (self._number - header.number) % WRAP
        if age >= _LATER:
            if not self._of.rank:
                raise ChannelError(f"a frame {header}: there is no such order yet")
            self._held.add(rank)
            return
        if header.kind == FrameKind.PART and not age:
            self._check_part(rank, header)
            link.accept(self._waiting[rank][1])
            return
        most = self._of.largest if header.kind == FrameKind.PART else MAX_REASON_BYTES
        if header.nbytes > most:
            raise ChannelError(f"a frame of {header.nbytes} bytes: at most {most} were to come")
        if header.kind == FrameKind.CUT_OFF and (self._of.rank or header.place not in self._links):
            raise ChannelError(f"a frame {header}: a part was to come")
        payload = np.empty(header.nbytes, np.uint8)
        self._reasons[rank] = payload
        link.accept(payload)

    def _check_part(self, rank: int, header: Header) -> None:
        if header.place != self._place:
            raise ChannelError(f"exchange {header.place} came, {self._place} was to come")
        nbytes = len(self._waiting[rank][1])
        if header.nbytes != nbytes:
            raise ChannelError(f"a part of {header.nbytes} bytes: {nbytes} were to come")

    def _open_of_rank_0(self, header: Header, link: Framed) -> None:
        if self._gives_up(header):
            link.finish()
            self._of.ahead.clear()  # all of this order
            raise GivenUp
        if 0 in self._waiting:
            self._check_due(header)
            link.accept(self._waiting[0][1])
            return
        if header.nbytes > self._of.most_bytes:
            raise ChannelError(f"a frame {header}: at most {self._of.most_bytes} bytes were to come")
        self._of.later = np.empty(header.nbytes, np.uint8)
        link.accept(self._of.later)

    def _gives_up(self, header: Header) -> bool:
        return (header.kind, header.number, header.nbytes) == (FrameKind.GIVE_UP, self._number, 0)

    def _check_due(self, header: Header) -> None:
        """Whether a frame of rank 0 is the one that this exchange waits for."""
        kind, into = self._waiting[0]
        due = Header(kind, self._of.epoch, self._number, self._place, len(into))
        if header != due:
            raise ChannelError(f"a frame {header}: {due} was to come")

    def _take_ahead(self) -> None:
        """What rank 0 sent before this exchange began."""
        frames = self._of.ahead
        if any(self._gives_up(header) for header, _ in frames):
            while not self._gives_up(frames.popleft()[0]):
                pass
            raise GivenUp
        if 0 not in self._waiting:
            return
        try:
            self._take(*self._of.ahead.popleft())
        except ChannelError as error:
            raise Departed(0, str(error)) from error

    def _take(self, header: Header, payload: Octets) -> None:
        """A frame of rank 0 that came before it was waited for. Raises ChannelError."""
        self._check_due(header)
        self._waiting.pop(0)[1][...] = payload

    def _complete(self, rank: int, link: Framed) -> None:
        """A whole frame has come."""
        header = link.finish()
        if self._of.rank and not rank:
            later, self._of.later = self._of.later, None
            if later is None:
                del self._waiting[0]
            elif 0 in self._waiting and not self._of.ahead:
                self._take(header, later)
            else:
                self._of.ahead.append((header, later))
            return
        if header.kind == FrameKind.PART:
            if (header.number, header.place) == (self._number, self._place) and rank in self._waiting:
                nbytes = len(self._waiting.pop(rank)[1])
                self._of.heard_of(rank)
                if self._of.heard is not None:
                    self._of.heard(rank, time.perf_counter() - self._began_s, nbytes)
            return
        reason = self._reasons.pop(rank, np.empty(0, np.uint8)).tobytes().decode("utf-8", "replace")
        if header.kind == FrameKind.CUT_OFF:
            raise Departed(header.place, f"rank {rank} hears nothing of it: {reason}", unheard_by=rank)
        if header.number != self._number:
            return  # it could not go on with an order that is given up
        if not self._of.rank:
            raise Departed(rank, reason, failed=True)
        self._of.broken[rank] = reason  # rank 0 is told by itself
        self._sending.discard(rank)
