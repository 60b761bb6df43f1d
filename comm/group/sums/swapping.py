"""One rank's side of exchanges of frames: sends to some ranks and receives from some, all at once.

Everybody may send before anybody reads, however large the frames are: what a stream does not take waits, and whatever
comes is read meanwhile. A rank other than 0 always listens to rank 0, too, which alone gives orders up, and reads ahead
what it sends for later. A rank that cannot hear another one tells rank 0, and waits for what that decides.

Knows frames; not what is in them, nor what an exchange is for.
"""

from __future__ import annotations

import select
import time

import numpy as np

from ..errors import ChannelError
from .frames import MAX_ORDER_BYTES, FrameKind, Header
from .one_swap import SWAP_LOOK_S, OneSwap, RankFrames, RankLinks
from .star_errors import Departed
from .wire_types import Octets

TELL_S = 10.0  # until everybody has taken a word that is no part of an exchange


class Swapper(RankLinks):
    """Raises GivenUp when rank 0 gives the order up, and Departed with the rank that it cannot go on with: at a rank
    other than 0, only rank 0."""

    def swap(self, number: int, place: int, out: RankFrames, into: RankFrames) -> None:
        """Send the frames `out` of this exchange of an order, and fill `into` with those that are due."""
        try:
            if not self.rank:
                self.awaited = dict.fromkeys(into or out, time.monotonic())
            stuck: dict[int, Exception | None] = {}  # ranks to which not all went at once, and why
            for rank, (kind, payload) in out.items():
                try:
                    if rank not in self.broken and not self.links[rank].send(kind, number, place, payload):
                        stuck[rank] = None
                except (OSError, ChannelError) as error:
                    stuck[rank] = error
            if stuck or self.ahead or (into and not self._received(number, place, into)):
                if not into:
                    self.awaited = {rank: since_s for rank, since_s in self.awaited.items() if rank in stuck}
                OneSwap(self, number, place, into).run(stuck)
            self.awaited = {}
        except BaseException:
            for rank, link in self.links.items():
                # What comes for later is still wanted.
                link.interrupt(incoming=rank > 0 or self.later is None)
            raise

    def _received(self, number: int, place: int, into: RankFrames) -> bool:
        """Whether the one frame that is due came, from the one rank that could say that it will not."""
        if len(into) > 1 or (self.rank and 0 not in into):
            return False
        ((rank, (kind, payload)),) = into.items()
        began_s = time.perf_counter()
        try:
            if not self.links[rank].receive(kind, number, place, payload, self.patience_s):
                return False
        except (OSError, ChannelError) as error:
            raise Departed(rank, str(error)) from error
        if kind == FrameKind.PART:
            self.largest = max(self.largest, len(payload))
            if self.heard is not None:
                self.heard(rank, time.perf_counter() - began_s, len(payload))
        return True

    def next(self) -> tuple[Header, Octets]:
        """Rank 0's next frame that is no part of an exchange, of at most `most_bytes`; waits for `patience_s`."""
        if self.ahead:
            return self.ahead.popleft()
        link = self.links[0]
        if self.later is not None:  # it began to come while others were waited for
            payload, self.later = self.later, None
            link.await_payload(self.patience_s)
            return link.finish(), payload
        header = link.await_header(self.patience_s)
        if header.epoch != self.epoch:
            raise ChannelError(f"epoch {header.epoch} came, this is {self.epoch}")
        if header.nbytes > MAX_ORDER_BYTES:
            raise ChannelError(f"a frame {header}: at most {MAX_ORDER_BYTES} bytes were to come")
        payload = np.empty(header.nbytes, np.uint8)
        link.accept(payload)
        link.await_payload(self.patience_s)
        return link.finish(), payload

    def tell(self, number: int, place: int, kind: FrameKind, payload: bytes = b"") -> None:
        """Send a frame to everybody as far as that goes, whoever is gone."""
        ends_s = time.monotonic() + TELL_S
        left = dict(self.links)
        if not self.rank:
            self.awaited = dict.fromkeys(left, time.monotonic())
        for link in left.values():
            link.begin(kind, number, place, payload)
        while left and time.monotonic() < ends_s:
            for rank, link in [*left.items()]:
                try:
                    gone = link.push()
                except (OSError, ChannelError):
                    gone = True
                if gone:
                    del left[rank]
                    self.heard_of(rank)
            if left:
                poll = select.poll()
                for link in left.values():
                    if (descriptor := link.stream.fileno()) >= 0:
                        poll.register(descriptor, link.stream.room_event)
                poll.poll(1000 * SWAP_LOOK_S)
        self.awaited = {}
