"""Rank 0 that has a whole model and computes by itself, except for long orders: those a group computes with it.

So prompts are read by several machines, and answers do not wait for their network. The pool of rank 0 has K and V of
all heads; what the others have of their heads is a copy, page by page. Before a long order they are sent the pages that
it reads and that have changed since; after it, rank 0 gets those that it wrote. Everything else (pages that are copied,
kept on disk, shared) is the business of rank 0's pool alone. The others may have fewer pages: an order that needs more
is rank 0's own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from math import inf

from shoal.kernels.arrays import Floats
from shoal.offload.kv.disk_pages import KvDisk
from shoal.offload.kv.prefix_cache import Copy
from shoal.partition.memory_layout import PAGE_TOKENS
from shoal.partition.slicing import Range

from .copied_pages import CopiedPages
from .errors import RankLost
from .executor import Executor, StillWanted
from .leader import Others
from .learn.group_worth import GroupWorth
from .learn.step_cost import StepSeconds
from .order import Order, Result, Segment
from .order_bytes import order_bytes
from .passed_pages import HeadsElsewhere
from .rank import Rank, computed

log = logging.getLogger(__name__)


class Assisted(Rank):
    """`share` is rank 0's part in the group, whose pool lies in that of `executor`; its plan says which orders are
    long. `kv_heads`: those of ranks 0, 1, … `pages`: how many each of the others has. `expected`: seconds that steps by
    their rows are thought to take alone; if the group is slower, it is not used for a while. `lost` is told which rank
    was lost; then it is never used again."""

    def __init__(
        self,
        executor: Executor,
        clock: Callable[[], float],
        share: Executor,
        others: Others,
        kv_heads: Sequence[Range],
        pages: int,
        disk: KvDisk | None = None,
        expected: StepSeconds = lambda rows: inf,
        lost: Callable[[int], None] = lambda rank: None,
    ) -> None:
        super().__init__(executor, clock, disk)
        self._share = share
        self._others = others
        self._elsewhere = HeadsElsewhere(share, executor.kv, kv_heads)
        self._worth = GroupWorth(expected)
        self._lost = lost
        self._alone = False  # since a rank was lost
        self._copied = CopiedPages(pages)
        self._alike: set[int] = set()  # pages of which all others have the same K and V

    def run(self, order: Order, wanted: StillWanted = lambda share: True) -> Result:
        self._alike.difference_update(
            (move.target for move in order.moves if isinstance(move, Copy)),
            *(reading.pages for reading in order.readings),
        )
        return super().run(order, wanted)

    def _compute(self, segments: Sequence[Segment], wanted: StillWanted) -> Floats:
        written = {page for it in segments for page in it.pages[it.start // PAGE_TOKENS : _pages(_end(it))]}
        read = {page for it in segments for page in it.pages[: _pages(it.start)]}
        lacked = read - self._alike
        self._alike -= written
        rows = sum(len(it.tokens) for it in segments)
        if (
            self._alone
            or not self._share.plan.worth_a_group(rows, len(lacked) + len(written))
            or not self._copied.place(sorted(read | written))
        ):
            return super()._compute(segments, wanted)
        self._alike.intersection_update(self._copied.places)
        order = Order(segments, sent=sorted(lacked), returned=sorted(written))
        together = self._worth.pays
        began_s = self._clock()
        logits = self._in_group(order, wanted) if together else super()._compute(segments, wanted)
        self._worth.note(rows, self._clock() - began_s, together=together)
        if self._worth.pays != together:
            other = "with the other machines" if not together else "alone"
            log.info("the next long step is computed %s, to see which is faster", other)
        return logits

    def _in_group(self, order: Order, wanted: StillWanted) -> Floats:
        """Together, or alone if a rank is lost."""
        try:
            return self._together(order, wanted)
        except RankLost as error:  # all that it needs is here
            log.warning("%s: this machine goes on alone", error)
            self._alone = True
            self._lost(error.rank)
            return super()._compute(order.segments, wanted)

    def _together(self, order: Order, wanted: StillWanted) -> Floats:
        """Raises RankLost besides what a rank alone raises."""
        self._others.begin(order_bytes(self._for_others(order)))
        try:
            self._elsewhere.send(order.sent, wanted)
            logits = computed(self._share, order.segments, wanted)
            self._elsewhere.fetch(order.returned, wanted)
        except BaseException:
            self._others.give_up()
            raise
        self._others.end()
        self._alike.update(order.sent, order.returned)
        return logits

    def _for_others(self, order: Order) -> Order:
        """The order with the others' numbers of its pages."""
        places = self._copied.places
        segments = [
            it._replace(pages=[places[page] for page in it.pages[: _pages(_end(it))]])
            for it in order.segments
        ]
        sent, returned = ([places[page] for page in pages] for pages in (order.sent, order.returned))
        return Order(segments, sent=sent, returned=returned)


def _end(segment: Segment) -> int:
    return segment.start + len(segment.tokens)


def _pages(tokens: int) -> int:
    """How many pages so many tokens take."""
    return -(-tokens // PAGE_TOKENS)
