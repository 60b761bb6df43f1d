"""Whole models over every way to add sums: all ranks see the same bits, and logits are what one rank computes.

|Δlogit|, teacher-forced, as a share of the largest logit: f32 ≤ 1e-3, as for any group. bf16 ≤ 5e-2 and int8 ≤ 8e-2 for
these tiny models of random weights. In mixtures rounding also changes which experts are chosen, on all ranks alike, so
there is no such bound for them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from fakes import tiny
from fakes.group.circles import Circle
from fakes.group.ranks import Group, Member, Together, orders
from fakes.running import Running, relative_error

from shoal.comm.group.sums.manners import SumTopology
from shoal.comm.group.sums.wire_types import WireType
from shoal.engine.order import Order
from shoal.engine.rank import Rank
from shoal.kernels.arrays import Floats
from shoal.models.checkpoint.checkpoint import open_checkpoint

BOUNDS: dict[WireType, float] = {"f32": 1e-3, "bf16": 5e-2, "int8": 8e-2}


class Streamed(Member):
    """Meets the others over frames, as machines do."""

    def __init__(self, together: Together, rank: int, circle: Circle) -> None:
        super().__init__(together, rank)
        self._end = circle.members[rank]

    def _sum(self, partial: Floats) -> Floats:
        total = self._end.allreduce(partial)
        self.seen.append(total.tobytes())
        return total

    def gather(self, columns: Floats) -> Floats:
        return self._end.gather(columns)

    def broadcast(self, rows: Floats | None, shape: tuple[int, int]) -> Floats:
        found = self._end.broadcast(rows, shape)
        self.seen.append(found.tobytes())
        return found.copy()


@pytest.fixture(scope="module", params=["qwen2", "qwen3_moe", "olmo2"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {tiny.EXPERT_SIZES[request.param]: 64} if request.param in tiny.EXPERT_SIZES else {}
    model = tiny.hf_model(request.param, seed=3, **sizes)
    return tiny.save_gguf(model, tmp_path_factory.mktemp(request.param) / "m.gguf", type="F16")


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("wire", ["f32", "bf16", "int8"])
@pytest.mark.parametrize("topology", ["star", "exchange", "sliced"])
def test_every_way_to_add_computes_the_model(
    topology: SumTopology, wire: WireType, ranks: int, path: Path
) -> None:
    running = Running(path)
    work = orders(running.spec.vocab, seed=ranks)
    alone = Rank(running.executor, clock=lambda: 0.0)
    circle = Circle(ranks, topology, wire)
    with open_checkpoint(path) as checkpoint:
        cut = topology == "exchange"
        group = Group(
            checkpoint,
            running.plan,
            ranks,
            member=lambda together, rank: Streamed(together, rank, circle),
            cut_vocabulary=cut,
        )
        for order in work:
            expected = alone.run(order).logits
            found = _together(circle, group, order)
            assert np.isfinite(found).all()
            if expected.size and (wire == "f32" or running.spec.moe is None):
                assert relative_error(found, expected) <= BOUNDS[wire]
        assert group.members[0].seen
        assert all(member.seen == group.members[0].seen for member in group.members)


def _together(circle: Circle, group: Group, order: Order) -> Floats:
    circle.hub.begin(b"order")
    for spoke in circle.spokes:
        spoke.next()
    first, *_ = group.run(order)
    circle.hub.end()
    return first.logits
