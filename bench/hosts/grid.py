"""A head alone against the same head with one more node, over a grid of nodes and links: what adding a node costs.

The head decides by itself whether it uses the node. Both heads stay up and answer in turn, so what else the machine
does disturbs both.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from statistics import median

from hosts.group import Group, waited
from hosts.host import Host
from hosts.lab import Lab
from hosts.limits import Limits

WEIGHT = 64
DECIDE_S = 3.0  # after a node has come, until the head has looked whether that is faster
SPEEDS = (1.0, 0.4, 0.1)  # of a processor
DELAYS_S = (0.0, 0.001, 0.01)  # there and back; 0 = what a cable between namespaces has
RATES = (0.0, 12.5e6, 1.25e6)  # bytes/s: as fast as memory, 100 and 10 Mbit/s


@dataclass(frozen=True)
class Cell:
    """One node and its link."""

    speed: float
    rtt_s: float
    bytes_per_s: float

    def __str__(self) -> str:
        rate = f"{8 * self.bytes_per_s / 1e6:g} Mbit/s" if self.bytes_per_s else "fast"
        return f"{self.speed:g} of a processor, {1000 * self.rtt_s:g} ms, {rate}"


@dataclass
class Costs:
    """Of each round: alone, and with the node. `ranks` is what the head decided, `coming_s` how long a short request
    took that came just then. `before` are the two heads' ratios before there was a node: not quite 1."""

    cell: Cell
    ranks: int
    why: str
    coming_s: float
    before: tuple[float, float]
    token_s: list[tuple[float, float]] = field(default_factory=list)
    first_s: list[tuple[float, float]] = field(default_factory=list)

    def ratios(self) -> tuple[float, float]:
        """How much longer a token, and a first token, take with the node; 1 = as long."""
        token, first = (median(b / a for a, b in pairs) for pairs in (self.token_s, self.first_s))
        return token / self.before[0], first / self.before[1]


def cells() -> list[Cell]:
    return [Cell(*it) for it in product(SPEEDS, DELAYS_S, RATES)]


class Grid:
    """Two heads, and one node after the other."""

    def __init__(self, lab: Lab, model: Path, seed: int = 0) -> None:
        self._lab = lab
        self._source = random.Random(seed)
        limits = Limits(processors="0", weight=WEIGHT)
        self.alone, self.head = (Group(lab.host(name, limits), []) for name in ("alone", "head"))
        for group in (self.alone, self.head):
            group.load(model)
            self._ask(group, 16, 4)
        self._count = 0

    def measure(self, cell: Cell, prompt: int, new: int, rounds: int) -> Costs:
        before = Costs(cell, 1, "", 0.0, (1.0, 1.0))
        self._rounds(before, prompt, new, rounds)
        node = self._node(cell)
        node.join(self.head.head)
        self.head.attached(1)
        time.sleep(DECIDE_S)
        coming_s, _ = self._ask(self.head, 16, 2)
        status = self.head.client.status().models[0]
        costs = Costs(cell, status.ranks, status.machines_why, coming_s, before.ratios())
        self._rounds(costs, prompt, new, rounds)
        node.shoal("stop")
        self.head.head.shoal("cluster", "forget", node.name)
        waited(lambda: self.head.client.status().models[0].ranks == 1, 30.0, "the head has not gone on alone")
        self._ask(self.head, 16, 2)
        return costs

    def _rounds(self, costs: Costs, prompt: int, new: int, rounds: int) -> None:
        for number in range(rounds):
            turns = (self.alone, self.head) if number % 2 else (self.head, self.alone)
            ids = self._prompt(
                prompt
            )  # the same for both: how much of a text is guessed right depends on the text
            got = {group.head.name: _asked(group, ids, new) for group in turns}
            (alone_first, alone_token), (first, token) = got["alone"], got["head"]
            costs.first_s.append((alone_first, first))
            costs.token_s.append((alone_token, token))

    def _node(self, cell: Cell) -> Host:
        self._count += 1
        name = f"node{self._count}"
        limits = Limits(processors="1", processor_time=cell.speed if cell.speed < 1 else 0, weight=WEIGHT)
        if not cell.rtt_s:
            return self._lab.host(name, limits, bytes_per_s=cell.bytes_per_s)
        host, relay = self._lab.relayed(name, self.head.head, limits, bytes_per_s=cell.bytes_per_s)
        relay.set(delay_s=cell.rtt_s / 2)
        return host

    def _prompt(self, tokens: int) -> list[int]:
        return [self._source.randrange(1000) for _ in range(tokens)]

    def _ask(self, group: Group, prompt: int, new: int) -> tuple[float, float]:
        return _asked(group, self._prompt(prompt), new)


def _asked(group: Group, prompt: list[int], new: int) -> tuple[float, float]:
    answer = group.ask(prompt, new)
    assert not answer.error, answer.error
    return answer.first_s, answer.token_s
