"""The cache of experts: which are in memory, and which one goes when another is needed. Pure policy.

Routing is not cyclic: some experts are chosen far more often than others. An expert's score is how often it was used;
older uses count less. The expert with the lowest score goes, where each is as it was when a step passed its layer: what
this step has used would count more otherwise than what it is about to use. Of equal scores it is the one used last, as
its layer comes again last. So prompts that pass all experts leave as many in place as can stay, and those that
are used often; what they need a place for takes that of what they have passed. What is known of earlier runs is where
scores begin, and the most used experts are read before anybody asks. The experts of the next layer can be guessed; they
are read when there is nothing else to read, as long as most guesses come true. This module knows slots, all of one
size, and scores. It reads nothing and holds no lock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from heapq import heappop, heappush
from types import MappingProxyType

from shoal.partition.spec import BlockId

from .window import Extent, Passage, Read

HALF_LIFE_STEPS = 64.0  # a use that many steps ago counts half
LARGEST_WEIGHT = 1e100
# The score of an expert that every step has used for long.
STEADY_USES = 1 / (1 - 2 ** (-1 / HALF_LIFE_STEPS))
SCORE_DECIMALS = 2  # decimals of scores that are compared; one use adds 1
TRUST = 0.5  # the share of guesses that must come true for guesses to be read ahead
TRUST_MEMORY = 0.05  # the weight of the newest guesses in that share
AHEAD = 32  # experts of a layer are leased or read ahead; for more, often used ones would have to go

NEARLY_ALL, A_FEW = 7 / 8, 8  # of a layer's experts a prompt uses; answers of some streams use half
NO_LAYER = -1

_Candidate = tuple[float, int, BlockId]  # a score, minus the time when it was used last


class ExpertCache:
    """Experts in `slots` places of `slot_bytes`. At most `slots` may be leased at a time. `known`: in which share of
    earlier steps each was used."""

    def __init__(
        self,
        slots: int,
        slot_bytes: int,
        experts: Sequence[Extent],
        ahead: int = AHEAD,
        known: Mapping[BlockId, float] = MappingProxyType({}),
    ) -> None:
        self._extents = {extent.block: extent for extent in experts}
        self._slot_bytes = slot_bytes
        self._free = list(range(slots - 1, -1, -1))
        self._held: dict[BlockId, Passage] = {}
        self._expected: dict[BlockId, int] = {}  # what will be acquired, and its place in that order
        self._missing: list[BlockId] = []  # expected but not on its way yet; the next one is last
        self._likely: list[BlockId] = []  # guesses for afterwards, the likeliest first
        self._trust = 1.0  # the share of guesses that came true
        self._ahead = ahead
        self._done = 0  # how many of the expected ones have been used
        self._wanted = -1  # the place of the one that is waited for
        self._reading: Passage | None = None  # the one of which only a part has been asked for
        self._scores = {block: STEADY_USES * known[block] for block in self._extents if known.get(block)}
        often = sorted(self._scores, key=lambda block: -self._scores[block])
        # To be read while there is nothing else to read; the next one is last.
        self._known = often[:slots][::-1]
        self._used: dict[BlockId, int] = {}  # when an expert was used last
        # Candidates to go, of each layer. Stale entries are passed over.
        self._heaps: dict[int, list[_Candidate]] = {}
        self._passed: dict[int, float] = {}  # the weight of a use when a layer's experts were expected last
        self._behind = NO_LAYER  # the layer of a step that uses nearly all experts of it
        self._clock = 0
        self._weight = 1.0  # of a use now; it grows, so that older ones need not shrink
        self._sizes = Counter(extent.block.layer for extent in experts)
        self._growth = 2.0 ** (1 / (HALF_LIFE_STEPS * max(1, len(self._sizes))))

    def expect(self, blocks: Sequence[BlockId]) -> None:
        """The caller will acquire these next, in this order, and no others that were expected before."""
        self._weight *= self._growth
        if self._weight > LARGEST_WEIGHT:
            self._rescale()
        for block in self._expected:
            if (passage := self._held.get(block)) is not None and passage.error is not None:
                self._discard(passage)  # the step that wanted it is over: read it again
        self._expected = {block: i for i, block in enumerate(blocks) if block in self._extents}
        self._done, self._wanted = 0, -1
        for block in self._expected:
            self._scores[block] = self._scores.get(block, 0.0) + self._weight
        for block in blocks:  # also where all that are wanted lie elsewhere
            self._passed[block.layer] = self._weight
        layer = blocks[0].layer if blocks else NO_LAYER
        used, whole = len(self._expected), self._sizes[layer]
        self._behind = layer if used >= A_FEW and used > NEARLY_ALL * whole else NO_LAYER
        if self._likely:
            came_true = sum(map(self._expected.__contains__, self._likely)) / len(self._likely)
            self._trust += TRUST_MEMORY * (came_true - self._trust)
        self._likely = []
        if self._reading is not None and self._reading.block not in self._expected:
            self._discard(self._reading)  # a guess that was wrong
        self._missing = [block for block in reversed(self._expected) if block not in self._held]

    def guess(self, blocks: Sequence[BlockId]) -> None:
        """The caller may acquire these after the expected ones; the likeliest comes first."""
        self._likely = [block for block in blocks if block in self._extents][: self._ahead]

    def want(self, block: BlockId) -> Passage | None:
        """The passage of an expert; None while there is no slot for it."""
        passage = self._held.get(block)
        if passage is None and block not in self._missing:
            self._expected.setdefault(block, -1)
            self._missing.append(block)
        self._wanted = self._expected.get(block, -1)
        return None if passage is None or passage.left else passage

    @property
    def idle(self) -> bool:
        """Whether nothing is missing, and nothing that is likely or known."""
        return (
            self._reading is None
            and not self._missing
            and not (self._known and self._free)
            and (self._trust < TRUST or all(block in self._held for block in self._likely))
        )

    def next_read(self, most_bytes: int) -> Read | None:
        """What to read now; None when nothing is missing or no slot is free."""
        if self._reading is None:
            chosen = self._next_missing() or self._next_likely() or self._next_known()
            if chosen is None:
                return None
            block, slot = chosen
            extent = self._extents[block]
            self._reading = Passage(block, extent.offset, slot * self._slot_bytes, extent.nbytes)
            self._held[block] = self._reading
        passage = self._reading
        read = passage.ask(most_bytes)
        if passage.asked == passage.nbytes:
            self._reading = None
        return read

    def leave(self, passage: Passage) -> None:
        """The expert has been used, or its read failed."""
        if passage.error is not None:
            self._discard(passage)
            return
        self._clock += 1
        self._used[passage.block] = self._clock
        self._done += self._expected.pop(passage.block, -1) >= 0
        self._offer(passage.block)

    def ended(self, passage: Passage) -> None:
        """A read of the passage has ended."""
        block = passage.block
        if passage.here:
            self._offer(block)  # now, since it may never be acquired
        elif passage.left or (passage.error is not None and block not in self._expected):
            self._discard(passage)
            if passage.error is not None:
                # Otherwise it would be tried for ever.
                self._likely = [other for other in self._likely if other != block]
            elif block in self._expected and block not in self._held:
                self._miss(block)  # a guess that was dropped too soon

    def _discard(self, passage: Passage) -> None:
        """An expert that failed or is not needed gives its slot back, once no read writes there."""
        passage.left = True
        if passage is self._reading:
            self._reading = None
        if passage.quiet and self._held.get(passage.block) is passage:
            self._evict(passage.block)

    def _next_missing(self) -> tuple[BlockId, int] | None:
        """The next expected expert to read, and a slot for it."""
        if not self._missing:
            return None
        order = self._expected[self._missing[-1]]
        if order >= max(self._done + self._ahead, self._wanted + 1):
            return None
        if not self._free:
            self._let_one_go()
        if not self._free:
            self._let_later_go(order)
        return (self._missing.pop(), self._free.pop()) if self._free else None

    def _next_likely(self) -> tuple[BlockId, int] | None:
        """The next guessed expert to read, and a slot for it."""
        block = next((block for block in self._likely if block not in self._held), None)
        if block is None or self._missing or self._trust < TRUST:
            return None
        if not self._free:
            self._let_one_go()
        return (block, self._free.pop()) if self._free else None

    def _next_known(self) -> tuple[BlockId, int] | None:
        """The next expert to read that was used often before, as long as a slot is free that nobody has needed."""
        while self._known and self._free:
            block = self._known.pop()
            if block not in self._held and block not in self._expected:
                return block, self._free.pop()
        return None

    def _let_one_go(self) -> None:
        """Evicts the one with the lowest score of those that are neither expected nor likely, if there is one: of those
        behind this step where it uses nearly all of each layer, since it is about to use the others."""
        behind = [heap for layer, heap in self._heaps.items() if layer <= self._behind]
        for heaps in (behind, self._heaps.values()):
            if lowest := [found for heap in heaps if (found := self._lowest(heap)) is not None]:
                *_, block = min(lowest)
                self._evict(block)  # its entry is stale now
                return

    def _lowest(self, heap: list[_Candidate]) -> _Candidate | None:
        """Of a layer, the first that can go."""
        needed: list[BlockId] = []
        found = None
        while heap and found is None:
            score, used, block = heap[0]
            passage = self._held.get(block)
            if passage is None or not passage.idle:
                heappop(heap)
            elif score != self._scores.get(block, 0.0):
                heappop(heap)
                self._offer(block)
            elif block in self._expected or block in self._likely:
                heappop(heap)
                needed.append(block)
            else:
                found = round(score / self._passed.get(block.layer, 1.0), SCORE_DECIMALS), used, block
        for block in needed:
            self._offer(block)
        return found

    def _let_later_go(self, order: int) -> None:
        """Evicts a guess, or else the expected expert that is needed last, if that is after the `order`-th."""
        for block in (*reversed(self._likely), *reversed(self._expected)):
            passage = self._held.get(block)
            later = self._expected.get(block, order + 1) > order
            if later and passage is not None and passage.idle:
                self._evict(block)
                if block in self._expected:
                    self._miss(block)
                return

    def _miss(self, block: BlockId) -> None:
        """An expected expert is not on its way any more."""
        self._missing.append(block)
        self._missing.sort(key=self._expected.__getitem__, reverse=True)

    def _offer(self, block: BlockId) -> None:
        """Enters an expert among the candidates to go."""
        heap = self._heaps.setdefault(block.layer, [])
        if len(heap) > 8 * self._sizes[block.layer] + 64:  # most are stale
            self._offer_again()
            heap = self._heaps[block.layer]
        heappush(heap, self._candidate(block))

    def _candidate(self, block: BlockId) -> _Candidate:
        return self._scores.get(block, 0.0), -self._used.get(block, 0), block

    def _evict(self, block: BlockId) -> None:
        self._free.append(self._held.pop(block).position // self._slot_bytes)

    def _rescale(self) -> None:
        self._scores = {block: score / self._weight for block, score in self._scores.items()}
        self._passed = {layer: weight / self._weight for layer, weight in self._passed.items()}
        self._weight = 1.0
        self._offer_again()

    def _offer_again(self) -> None:
        self._heaps = {layer: [] for layer in self._heaps}
        for block, passage in self._held.items():
            if passage.idle:
                heappush(self._heaps.setdefault(block.layer, []), self._candidate(block))
