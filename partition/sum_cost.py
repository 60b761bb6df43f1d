"""What it costs ranks to add their partials, by how they do it and what goes over the wire.

    star       everybody sends to rank 0, which adds and sends the sum back: one round trip, and all bytes pass the
               port of rank 0
    exchange   everybody sends to everybody and adds: one way, and all bytes pass every port
    sliced     each rank adds some of the rows: two ways, but only two parts of the bytes pass each port. For prompts

Every cost is a latency and a time per byte; a link or a port that is shared is as fast as what it has to carry all
together. Pure arithmetic over measured figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations
from typing import Literal, NamedTuple

from .hardware_guesses import ADD_S, BYTE_S, DECODE_S, ENCODE_S, HANDED_S, MESSAGE_S
from .machines import FixedCosts, Links, Machine, StepRows, link_between
from .spec import ModelSpec

Topology = Literal["star", "exchange", "sliced"]
Wire = Literal["f32", "bf16", "int8"]

WIRE_BYTES: dict[Wire, float] = {
    "f32": 4,
    "bf16": 2,
    "int8": 1 + 4 / 32,
}  # of a number, with its part of a scale


WAYS: dict[Topology, int] = {"star": 2, "exchange": 1, "sliced": 2}  # that a sum goes, one after the other


class Means(NamedTuple):
    """How sums are made, and their numbers sent."""

    topology: Topology
    wire: Wire


class SumPlan(NamedTuple):
    """Sums of fewer than `many_rows` rows are made by `few`, others by `many`."""

    few: Means
    many: Means
    many_rows: int


def sums_of(spec: ModelSpec) -> int:
    """How many a step has: in each layer after attention, after the feed-forward, and of the squares of q and k where
    all of its heads are normalised together."""
    return (3 if spec.qk_norm == "full" else 2) * len(spec.layers)


def sent_s(spec: ModelSpec, fixed: FixedCosts, means: Means | None, rows: float) -> float:
    """What these sums cost besides the link and their messages; `means`: None if there are none."""
    return sums_of(spec) * WAYS[means.topology] * (fixed.way_s + rows * fixed.way_token_s) if means else 0.0


def ends_s(network: Network, spec: ModelSpec, means: Means, step: StepRows, gathered: float) -> float:
    """Seconds until all ranks have the rows of a step, and rank 0 the logits: rank 0 sends its rows, or all add theirs
    and send their logits. `gathered`: the largest share of the vocabulary that is not rank 0's."""
    if not gathered:
        return network.broadcast_s(step.all_rows, spec.hidden)
    logits_s = network.gathered_s(4 * step.logits * spec.vocab * gathered)
    return network.sum_s(means, step.all_rows, spec.hidden) + logits_s


def sums_s(network: Network, spec: ModelSpec, means: Means | None, step: StepRows, gathered: float) -> float:
    """Seconds of all that goes over the network in a step, with the work it makes."""
    if means is None:
        return 0.0
    layers, rows = len(spec.layers), step.all_rows
    seconds = 2 * layers * network.sum_s(means, rows, spec.hidden)
    seconds += ends_s(network, spec, means, step, gathered)
    if spec.qk_norm == "full":  # the squares of q and of k
        seconds += layers * network.sum_s(means._replace(wire="f32"), rows, 2)
    return seconds


def overlapped_s(
    network: Network, spec: ModelSpec, means: Means, rows: int, attn_s: float, ffn_s: float
) -> float:
    """Seconds of a step's blocks and their sums if it is computed in halves: of every block, the sums of both halves or
    computing both, with the work that sums make, whatever takes longer; then the last sum. `attn_s`, `ffn_s`: of the
    blocks of all layers."""
    layers, half = len(spec.layers), -(-rows // 2)
    both_s = 2 * layers * network.sum_s(means, half, spec.hidden)
    busy_s = 2 * layers * network.busy_s(means, half, spec.hidden)
    attending_s = max(attn_s + busy_s, both_s)
    if spec.qk_norm == "full":  # the squares of q and k wait for the sum before them
        squares_s = 2 * layers * network.sum_s(means._replace(wire="f32"), half, 2)
        attending_s = attn_s + both_s + squares_s
    return attending_s + max(ffn_s + busy_s, both_s) + network.sum_s(means, half, spec.hidden)


class Network:
    """The links among the machines of one group. `places`: which machines are ranks 0, 1, …

    Not every pair need have been measured: a star needs only the links of rank 0, exchange and sliced need all.
    """

    def __init__(self, machines: Sequence[Machine], links: Links, places: Sequence[int]) -> None:
        self.ranks = len(places)
        between = {
            (one, other): link_between(links, places[one], places[other])
            for one, other in permutations(range(self.ranks), 2)
        }
        self.reached = all(between[0, rank] for rank in range(1, self.ranks))
        self._whole = all(between.values())
        self._links = {pair: link for pair, link in between.items() if link}
        self._ports = [
            machines[place].port_bytes_per_s
            or max((link.bytes_per_s for pair, link in self._links.items() if pair[0] == rank), default=1.0)
            for rank, place in enumerate(places)
        ]
        self._from_hub = self._way([(0, rank) for rank in range(1, self.ranks)])
        self._to_all = self._way([pair for pair in between if self._whole])

    def can(self, topology: Topology) -> bool:
        """Whether the links that it needs are known."""
        return self.reached if topology == "star" else self._whole

    def network_s(self, topology: Topology, nbytes: float, rows: int = 1) -> float:
        """Seconds that partials of `nbytes` each, in so many rows, are on their way until all have the sum."""
        others = self.ranks - 1
        if topology == "star":
            way = self._from_hub
            return 2 * (way.latency_s + way.seconds(nbytes, others))
        way = self._to_all
        if topology == "exchange":
            return way.latency_s + way.seconds(nbytes, others)
        slice_bytes = nbytes * -(-rows // self.ranks) / rows
        return 2 * (way.latency_s + way.seconds(slice_bytes, others))

    def sum_s(self, means: Means, rows: int, numbers: int) -> float:
        """Seconds of one sum of partials (rows, numbers), with the work that it makes."""
        network_s = self.network_s(means.topology, WIRE_BYTES[means.wire] * rows * numbers, rows)
        return network_s + self.work_s(means, rows, numbers)

    def work_s(self, means: Means, rows: int, numbers: int) -> float:
        """Seconds of processor time that the busiest rank spends on one sum of partials (rows, numbers)."""
        others, count = self.ranks - 1, rows * numbers
        encode_s, decode_s = ENCODE_S[means.wire], DECODE_S[means.wire]
        if means.topology == "star":  # a spoke encodes; the hub decodes, adds, encodes; all decode
            work = 2 * encode_s + others * (decode_s + ADD_S) + decode_s
            messages = 2 * others
        elif means.topology == "exchange":
            work = encode_s + others * (decode_s + ADD_S) + decode_s
            messages = 2 * others
        else:
            share = -(-rows // self.ranks) / rows
            work = (1 + share) * encode_s + others * share * (decode_s + ADD_S) + decode_s
            messages = 4 * others
        return messages * MESSAGE_S + count * work

    def busy_s(self, means: Means, rows: int, numbers: int) -> float:
        """The same of a thread that makes sums while another one computes, with what goes over the network: bytes that
        are encrypted or copied, which is all that holds up a link that is quicker than that."""
        others, nbytes = self.ranks - 1, WIRE_BYTES[means.wire] * rows * numbers
        passing = others * nbytes
        if means.topology == "sliced":
            passing *= 2 * -(-rows // self.ranks) / rows
        way = self._from_hub if means.topology == "star" else self._to_all
        return HANDED_S + self.work_s(means, rows, numbers) + passing * min(BYTE_S, way.link_byte_s)

    def best(self, means: Sequence[Means], rows: int, numbers: int) -> Means | None:
        """The fastest of `means` for sums of this shape; of equal ones the first. None if none is possible."""
        possible = (it for it in means if self.can(it.topology))
        return min(possible, key=lambda it: self.sum_s(it, rows, numbers), default=None)

    def plan(self, means: Sequence[Means], rows: int, numbers: int) -> SumPlan | None:
        """How sums of one row are made, how those of so many, and from how many on in the second way: the first power
        of two at which that is no slower."""
        few, many = self.best(means, 1, numbers), self.best(means, rows, numbers)
        if few is None or many is None:
            return None
        least = 1
        while least < rows and self.sum_s(many, least, numbers) > self.sum_s(few, least, numbers):
            least *= 2
        return SumPlan(few, many, min(least, rows))

    def broadcast_s(self, rows: int, numbers: int) -> float:
        """Seconds until all have rows that rank 0 had, in f32."""
        others = self.ranks - 1
        way = self._from_hub
        return way.latency_s + way.seconds(4 * rows * numbers, others) + 2 * others * MESSAGE_S

    def gathered_s(self, nbytes: float) -> float:
        """Seconds until rank 0 has so many bytes of each of the others, which say first how many there are."""
        others = self.ranks - 1
        way = self._from_hub
        return way.latency_s + way.seconds(nbytes, others) + 4 * others * MESSAGE_S

    def dealt_s(self, nbytes: float) -> float:
        """Seconds in which rank 0 passes so many bytes to each of the others, or they to it, in one of many messages
        that follow each other."""
        return self._from_hub.seconds(nbytes, self.ranks - 1)

    def hop_s(self, sender: int, receiver: int, nbytes: float) -> float | None:
        """Seconds of a message from one rank to another; None if they cannot reach each other."""
        link = self._links.get((sender, receiver))
        return link and link.latency_s + nbytes / link.bytes_per_s + 2 * MESSAGE_S

    def _way(self, pairs: Sequence[tuple[int, int]]) -> _Way:
        """Messages of one size along all these links at once."""
        links = [self._links[pair] for pair in pairs if pair in self._links]
        ports = [self._ports[pair[0]] for pair in pairs]
        return _Way(
            max((link.latency_s for link in links), default=0.0),
            max((1 / link.bytes_per_s for link in links), default=0.0),
            max((1 / port for port in ports), default=0.0),
        )


class _Way(NamedTuple):
    latency_s: float
    link_byte_s: float  # of the slowest link
    port_byte_s: float  # of the slowest port

    def seconds(self, nbytes: float, messages: int) -> float:
        """Of one message over each link, `messages` of them through one port."""
        return nbytes * max(self.link_byte_s, messages * self.port_byte_s)
