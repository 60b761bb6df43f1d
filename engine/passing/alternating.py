"""Two groups of rows take turns through the layers: while the CPU attends for one of them, a device computes the other.

Attention of answers reads K and V, for which a host's memory has more room than a device's; all else multiplies by
weights, which pass through the device once for both groups, or by a text's own K and V, which the device has for a
moment (`looking_back`). A group gives way when its queries are on their way to the host, so that the device has
something to do until they have been looked at. The host waits twice in a layer of each group: for its queries, and for
what its router says; and for K and V that come from the device. (VSLPipe: Yuan et al. 2025, "MoE-Lens", arXiv
2504.09345; CGOPipe: Cao et al. 2024, "MoE-Lightning", arXiv 2411.11217.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest

from shoal.kernels import ComputeHome
from shoal.kernels.arrays import Bytes, Hidden
from shoal.kernels.attention_operands import KvPages, Rotation
from shoal.kernels.compute_home import carried
from shoal.models.step import Part, Step
from shoal.models.transformer import Transformer
from shoal.models.weights import Weights
from shoal.offload.block_store import BlockStore
from shoal.offload.kv.pool import KvPool
from shoal.partition.memory_layout import lent_pages
from shoal.partition.plan import Plan
from shoal.partition.spec import BlockId

from .looking_back import RowsHere, RowsThere, dealt
from .passing_weights import PassingWeights


class Alternating:
    """Of a plan whose blocks pass through a device. `home_of` gives the home of a device. Raises HomeFull and
    HomeLost."""

    def __init__(
        self,
        model: Transformer,
        plan: Plan,
        store: BlockStore,
        kv: KvPool,
        home_of: Callable[[str], ComputeHome],
    ) -> None:
        self.home = home_of(plan.device)
        self._model = model
        self._plan = plan
        self._kv = kv
        self._cpu = home_of("cpu")
        self._passing = PassingWeights(plan, store, self.home)
        layers = range(len(model.spec.layers))
        self._layers = [(BlockId("attn", layer), *model.spec.ffn_blocks(layer)) for layer in layers]
        self._here = {its[0]: store.coming(its[0]).weights for its in self._layers}  # vectors, which stay

    @property
    def trouble(self) -> str:
        """See `PassingWeights`."""
        return self._passing.trouble

    def let_go(self) -> None:
        """It runs no step any more."""
        self._passing.let_go()

    def through_layers(
        self,
        step: Step,
        rotations: Sequence[list[Rotation]],
        hidden: Hidden,
        go_on: Callable[[float], None],
    ) -> Hidden:
        """hidden (T, C) → of the rows that the step asks for (R, C), all in the device's home. Each part of the step is
        a group. `go_on` is told which share of the step is done, and raises what ends it."""
        rows = [self.home.rows(hidden, its) for its in step.split(len(step.tokens))]
        groups = [self._group(*its) for its in zip(rows, step.parts, rotations, strict=True)]
        self._passing.begin(len(groups))
        for layer, _ in enumerate(zip_longest(*groups)):
            go_on(layer / len(self._layers))
        wanted = self.home.rows(hidden, step.rows)  # nobody needs the others any more
        if len(step.rows):
            self._feed(self._layers[-1], wanted)
        self._passing.end()
        return wanted

    def _group(self, hidden: Hidden, part: Part, rotations: list[Rotation]) -> Iterator[None]:
        """Takes hidden (T, C) through all layers, up to the last attention. Gives way where the CPU is to attend."""
        most_pages = lent_pages(self._plan.context_tokens, self._plan.chunk_tokens)
        looks = dealt(part, rotations, self._plan.attending_rows, most_pages)
        for blocks in self._layers:
            attention, *feeding = blocks
            there = self._passing.lend(attention)
            asked = self._model.asked(self.home, there, hidden, lambda x: x)
            for_host = [self._for_host(asked, its) for its in looks.here]
            kv = self._kv.layers[attention.layer]
            # Taken before it gives way, so that copies need not wait for what the other group begins.
            lent = [self.home.lent_pages((its.held, *kv.data.shape[1:])) for its in looks.there]
            yield
            self._bring(kv, looks.there, lent)
            found_here = [
                (its.rows, self._look_here(attention, each, its))
                for its, each in zip(looks.here, for_host, strict=True)
            ]
            found = [
                (its.rows, self._look_there(attention.layer, there, asked, its, pages))
                for its, pages in zip(looks.there, lent, strict=True)
            ]
            leaving = [self._leaving(its, pages) for its, pages in zip(looks.there, lent, strict=True)]
            mixed = self._joined(asked[0], [*found, *found_here])
            self._add(hidden, there, self._model.attended(self.home, attention.layer, there, mixed))
            self._passing.lent(attention)
            self._keep(kv, looks.there, leaving)
            del asked, for_host, lent, found_here, found, leaving, mixed  # what comes now has their room
            if blocks is not self._layers[-1]:
                self._feed(blocks, hidden)
                self._passing.lent(*feeding)

    def _for_host(self, asked: Sequence[Hidden], its: RowsHere) -> list[Hidden]:
        """What these rows of a group asked, on its way to the host."""
        rows = [self.home.rows(x, its.rows) for x in asked]
        self.home.prefetch(*rows)
        return rows

    def _look_here(self, attention: BlockId, asked: Sequence[Hidden], its: RowsHere) -> Hidden:
        """What these rows asked (t, …) → what the host found, (t, H*D) in the device's home."""
        q, k, v = (carried(x, self.home, self._cpu) for x in asked)
        layer, here = attention.layer, self._here[attention]
        kv = self._kv.layers[layer]
        mixed = self._model.look_back(self._cpu, layer, here, q, k, v, its.segments, its.rotations, kv)
        return carried(mixed, self._cpu, self.home)

    def _look_there(
        self, layer: int, weights: Weights, asked: Sequence[Hidden], its: RowsThere, pages: Bytes
    ) -> Hidden:
        """What the group asked (T, …), and pages of these rows' texts → what the device finds for them, (t, H*D)."""
        home, kv = self.home, self._kv.layers[layer]
        q, k, v = (home.rows(x, its.rows) for x in asked)
        lent = KvPages(kv.layout, kv.heads, pages)
        return self._model.look_back(home, layer, weights, q, k, v, its.segments, its.rotations, lent)

    def _bring(self, kv: KvPages, texts: Sequence[RowsThere], lent: Sequence[Bytes]) -> None:
        """What these texts have of K and V begins to come."""
        for its, pages in zip(texts, lent, strict=True):
            if len(its.coming):
                self.home.pages_in(pages, [kv.data[page] for page in its.coming])

    def _leaving(self, its: RowsThere, pages: Bytes) -> Hidden:
        """Those of them that leave, on their way."""
        leaving = self.home.rows(pages, slice(its.held - len(its.leaving), its.held))
        self.home.prefetch(leaving)
        return leaving

    def _keep(self, kv: KvPages, texts: Sequence[RowsThere], leaving: Sequence[Hidden]) -> None:
        """What has left, where it belongs on the host."""
        for its, pages in zip(texts, leaving, strict=True):
            kv.data[its.leaving] = self.home.fetch(pages)

    def _joined(self, asked: Hidden, found: Sequence[tuple[slice, Hidden]]) -> Hidden:
        """(T, H*D) of parts that are all of its rows."""
        if len(found) == 1:
            return found[0][1]
        joined = self.home.zeros_like(asked)
        for rows, part in found:
            self.home.add(self.home.rows(joined, rows), part)
        return joined

    def _feed(self, blocks: Sequence[BlockId], hidden: Hidden) -> None:
        """Adds the feed-forward part of a layer, or its mixture, to hidden (T, C)."""
        block = blocks[1]
        home, there = self.home, self._passing.lend(block)
        if block.kind != "router":
            self._add(hidden, there, self._model.feed_forward(home, block.layer, there, hidden))
            return
        partial = home.zeros_like(hidden)
        x, routing, shared = self._model.route(home, there, hidden)
        used = [BlockId("expert", block.layer, expert) for expert in routing.used]
        experts = {it.expert: self._passing.lend(it) for it in used}
        self._model.mix(home, block.layer, experts, x, routing, partial)
        if shared is not None:
            home.add(partial, shared)
        self._add(hidden, there, partial)

    def _add(self, hidden: Hidden, weights: Weights, partial: Hidden) -> None:
        self.home.add(hidden, self._model.leave(self.home, weights, partial))
