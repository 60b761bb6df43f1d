"""One, two and four hosts with a slow disk and too little memory each: seconds for a token, together against alone.

All have the same cap, of which a model's shard fits half at most; each reads from its disk at the same limited speed,
whatever the others do. A rank streams its own shard, so together they read faster.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

from hosts.group import Group
from hosts.lab import Lab
from hosts.limits import Limits

WEIGHT = 16


@dataclass
class Disks:
    """So many ranks, and what was measured of them."""

    ranks: int
    group: Group
    token_s: list[float] = field(default_factory=list)
    first_s: list[float] = field(default_factory=list)
    why: str = ""

    def measure(self, prompt: int, new: int) -> None:
        seed = int(time.monotonic() * 1000) % 1000
        answer = self.group.ask([(seed + 7 * n) % 1000 for n in range(prompt)], new)
        assert not answer.error, answer.error
        self.token_s.append(answer.token_s)
        self.first_s.append(answer.first_s)


def group_of(
    lab: Lab, name: str, ranks: int, model: Path, *, memory_bytes: int, read_bytes_per_s: int, processors: int
) -> Disks:
    """Ranks take turns on the processors: two on each where there are four."""
    hosts = []
    for rank in range(ranks):
        limits = Limits(
            processors=str(rank % processors),
            memory_bytes=memory_bytes,
            read_bytes_per_s=read_bytes_per_s,
            weight=WEIGHT,
        )
        hosts.append(lab.host(f"{name}{rank}", limits))
    group = Group(hosts[0], hosts[1:])
    loaded = group.load(model, ranks=ranks)
    assert loaded.ranks == ranks, loaded.plan
    return Disks(ranks, group, why=f"{loaded.plan}; {loaded.machines_why}")
