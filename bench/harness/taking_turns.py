"""What a sum takes ranks of one machine, by what each computes between two.

They pass bytes on through memory and are awake when those come, which no probe of a link is: it tells 52 to 70 µs where
a sum takes some 60. More ranks than processors take turns: a sum waits until the last rank has had a processor, and for
the hub to get one. So it is tried, by ranks that multiply weights as they come from memory and add a small row, again
and again.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import accumulate
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from sum_trips import HERE, TOPOLOGIES, WAIT_S, channels

from shoal import kernels
from shoal.comm.group.channel import Channel
from shoal.comm.group.node_identity import NodeIdentity
from shoal.comm.group.sums.manners import Manner, Manners, SumTopology
from shoal.comm.group.sums.star import Hub, Spoke
from shoal.partition.group_choice import Choice
from shoal.partition.sum_cost import Means, Network, sent_s, sums_of
from shoal.partition.throughput.group_plans import links_of, machines_of
from shoal.partition.throughput.laws import interpolated
from shoal.partition.throughput.prediction import Job, Prediction
from shoal.partition.throughput.profile import Profile
from shoal.partition.throughput.weights_of import Weighed

from .own_profiles import processors_of
from .weights import COLUMNS, weights

MATRIX_BYTES, WEIGHTS_BYTES = 1 << 20, 256 << 20
PRODUCTS = (0, 1, 2, 4, 8, 16, 32, 64)  # between two sums
CASE_S, SUMS, TRIALS = 0.2, (20, 300), 3
TRIED_S = 240.0  # at most, in all
GUESS_S = 5e-4, 2e-4  # of a round with nothing computed, and of each product


Numbers = np.ndarray[Any, np.dtype[np.float32]]
RoundTimes = dict[tuple[int, str], float]
"""Seconds of a round, by the products in it and how all add; "": they do not."""


class Waits(NamedTuple):
    """What a sum takes in a round of all ranks, besides what they compute one after the other (`compute_s`, each)."""

    compute_s: tuple[float, ...]
    sum_s: tuple[float, ...]

    def after(self, compute_s: float) -> float:
        """Behind so many seconds of each rank."""
        return interpolated(compute_s, self.compute_s, self.sum_s)


SumWaits = Mapping[SumTopology, Waits]


def tried(ranks: int, processors: int) -> SumWaits:
    """Of so many ranks with one thread each."""
    spawned = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as directory:
        for rank in range(ranks):
            NodeIdentity.of(Path(directory) / str(rank), f"rank{rank}")
        wires = [spawned.Pipe() for _ in range(ranks)]
        processes = [
            spawned.Process(target=_rank, args=(directory, rank, ranks, wire), daemon=True)
            for rank, (_, wire) in enumerate(wires)
        ]
        try:
            for process, (_, far) in zip(processes, wires, strict=True):
                process.start()
                far.close()
            ports = {rank: _heard(near) for rank, (near, _) in enumerate(wires)}
            for near, _ in wires:
                near.send(ports)
            found: RoundTimes = _heard(wires[0][0])
            for process in processes:
                process.join(WAIT_S)
        finally:
            for process in processes:
                if process.pid is not None:
                    process.kill()
                    process.join()
    turns = max(1.0, ranks / processors)
    computed = [found[count, ""] if count else 0.0 for count in PRODUCTS]  # by all, as they take turns
    waits = {}
    for topology in TOPOLOGIES:
        took = [found[count, topology] - it for count, it in zip(PRODUCTS, computed, strict=True)]
        waits[topology] = Waits(tuple(it / turns for it in computed), tuple(accumulate(took, max)))
    return waits


def _heard(wire: Connection) -> Any:
    """Raises EOFError or ConnectionResetError if the process at the other end has died, TimeoutError if it says
    nothing."""
    if not wire.poll(TRIED_S):
        raise TimeoutError(f"a rank has said nothing for {TRIED_S:.0f} s")
    return wire.recv()


def in_turns(
    usual: Prediction,
    choice: Choice,
    profile: Profile,
    model: Weighed,
    job: Job,
    turns: float,
    waits: SumWaits,
) -> Prediction:
    """What is predicted of a group, if each processor has so many of its ranks (at least one): its sums take what was
    tried instead of what links and messages would. Those of a prompt have many rows, so only waiting for a turn counts;
    and where it is read in halves or in several steps, they are others. `usual`: what links and laws tell."""
    machines = machines_of(profile, model, "f16", job.distinct)
    sums, plain = sums_of(model.spec), 2 * len(model.spec.layers)  # and those that are of hidden states
    network = Network(machines, links_of(profile), range(len(machines)))
    assert machines[0].laws is not None
    fixed, figures = machines[0].laws.fixed(choice.ranks[0].share), choice.figures

    def further_s(seconds: float, means: Means | None, rows: int) -> float:
        assert means is not None
        linked_s = plain * network.sum_s(means, 1, model.spec.hidden) + (sums - plain) * network.sum_s(
            means, 1, 2
        )
        usual_s = linked_s + sent_s(model.spec, fixed, means, rows)
        computing_s = max(0.0, seconds - usual_s)
        return sums * waits[means.topology].after(computing_s / (sums * turns)) - usual_s

    first_s = 0.0
    if turns > 1 and job.prompt_tokens < min(figures.overlap_rows, 1 + figures.chunk_tokens):
        first_s = further_s(usual.ttft_s, figures.prompt, job.prompt_tokens)
    rows, step_s = job.batch * (1 + job.guesses), usual.token_s * job.step_tokens
    step_more_s, moved_s = (
        further_s(step_s, figures.decode, rows),
        sent_s(model.spec, fixed, figures.decode, rows),
    )
    slower = 1 + step_more_s / step_s
    parts = dict(usual.parts)
    parts["overhead"] -= moved_s
    parts["network"] += step_more_s + moved_s
    return replace(
        usual,
        ttft_s=usual.ttft_s + first_s,
        token_s=usual.token_s * slower,
        tokens_per_s=usual.tokens_per_s / slower,
        band=(usual.band[0] / slower, usual.band[1] / slower),
        parts=parts,
        binding=max(parts, key=lambda part: parts[part]),
        prompt_parts={**usual.prompt_parts, "network": usual.prompt_parts["network"] + first_s},
    )


def _rank(directory: str, rank: int, ranks: int, wire: Connection) -> None:
    """Rank 0 sends what it measured into `wire`."""
    os.sched_setaffinity(0, processors_of(rank, 1))
    found = channels(directory, rank, ranks, wire, True, HERE)
    compute, partial = _work(rank), np.ones((1, COLUMNS // 4), np.float32)
    if not rank:
        wire.send(_lead([found[it] for it in range(1, ranks)], compute, partial))
        return
    fellows = {it: channel for it, channel in found.items() if it}
    spoke = Spoke(found[0], 1, rank=rank, ranks=ranks, fellows=fellows, most_bytes=1 << 24)
    spoke.watch()
    while order := spoke.next():
        if order == b"end":
            return
        count, rounds, adds = np.frombuffer(order, np.int32)
        _round(compute, spoke.allreduce, partial, int(count), int(rounds), adds=bool(adds))


def _lead(workers: list[Channel], compute: Callable[[int], None], partial: Numbers) -> RoundTimes:
    took: dict[tuple[int, str], list[float]] = {}
    hub = Hub(workers, 1)
    hub.watch()
    for _ in range(TRIALS):
        for count in PRODUCTS:
            rounds = round(min(SUMS[1], max(SUMS[0], CASE_S / (GUESS_S[0] + count * GUESS_S[1]))))
            for kind in ("", *TOPOLOGIES):
                manner = Manner(kind or "star")
                hub.decide(Manners(manner, manner))
                hub.begin(np.array([count, rounds, bool(kind)], np.int32).tobytes())
                began_s = time.perf_counter()
                _round(compute, hub.allreduce, partial, count, rounds, adds=bool(kind))
                took.setdefault((count, kind), []).append((time.perf_counter() - began_s) / rounds)
                hub.end()
    hub.begin(b"end")
    return {case: median(seconds) for case, seconds in took.items()}


def _round(
    compute: Callable[[int], None],
    add: Callable[[Numbers], object],
    partial: Numbers,
    count: int,
    rounds: int,
    *,
    adds: bool,
) -> None:
    for _ in range(rounds):
        compute(count)
        if adds:
            add(partial)
    add(partial)  # the time is that of the last one


def _work(seed: int) -> Callable[[int], None]:
    """Multiplies a row by so many matrices that no cache has."""
    kernels.set_threads(1)
    home, source = kernels.home_of("cpu"), random.Random(seed)
    each = weights(WEIGHTS_BYTES, MATRIX_BYTES)
    x = home.place(np.ones((1, COLUMNS), np.float32))
    order: list[int] = []

    def compute(count: int) -> None:
        for _ in range(count):
            if not order:
                order.extend(source.sample(range(len(each)), len(each)))
            home.linears(x, each[order.pop()])

    compute(len(each))
    return compute
