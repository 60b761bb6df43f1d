"""Long steps of a group are computed in halves, whose sums travel while the other half is computed: that changes no
bit, and whatever goes wrong in the middle is the same as without.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import tiny
from fakes.group.ranks import Group
from fakes.running import Running

from shoal.engine.order import Order, Segment
from shoal.engine.sums_ahead import SumsAhead
from shoal.kernels.arrays import Floats
from shoal.models.checkpoint.checkpoint import open_checkpoint

PATIENCE_S = 10.0


def long_orders(vocab: int) -> list[Order]:
    """Two texts in one step of 103 rows, so that the second half begins in the first text; what follows both of them
    in a short step; and a long step that nobody wants rows of."""
    source = np.random.default_rng(7)
    first, second = (source.integers(vocab, size=size).tolist() for size in (80, 30))
    return [
        Order([Segment(first[:75], 0, [0, 1], 3), Segment(second[:28], 0, [2], 1)]),
        Order([Segment(first[75:76], 75, [0, 1], 1), Segment(second[28:], 28, [2], 2)]),
        Order([Segment(first, 0, [3, 4], 0)]),
    ]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_halves_give_the_same_bits(family: str, tmp_path: Path) -> None:
    sizes = {tiny.EXPERT_SIZES[family]: 64} if family in tiny.EXPERT_SIZES else {}
    path = tiny.save_gguf(tiny.hf_model(family, seed=3, **sizes), tmp_path / "m.gguf", type="F16")
    running = Running(path)
    work = long_orders(running.spec.vocab)
    logits: list[list[bytes]] = []
    with open_checkpoint(path) as checkpoint:
        for least in (32, 1 << 30):
            group = Group(checkpoint, replace(running.plan, overlap_rows=least), 2)
            logits.append([group.run(order)[0].logits.tobytes() for order in work])
            assert all(member.seen == group.members[0].seen for member in group.members)
            started = {member.started for member in group.members}
            assert started == {0} if least > 1000 else min(started) > 2 * len(running.spec.layers)
            group.close()
    assert logits[0] == logits[1]


@pytest.fixture
def ahead() -> Iterator[tuple[SumsAhead, threading.Event, list[float]]]:
    """Sums, which wait for an event, and what was asked for."""
    goes, asked = threading.Event(), list[float]()

    def double(partial: Floats) -> Floats:
        asked.append(float(partial[0, 0]))
        assert goes.wait(PATIENCE_S)
        if partial[0, 0] < 0:
            raise ValueError("negative")
        return partial * 2

    made = SumsAhead(double)
    yield made, goes, asked
    goes.set()
    made.close()


def rows(value: float) -> Floats:
    return np.full((1, 2), value, np.float32)


def test_sums_are_made_in_their_order(ahead: Any) -> None:
    sums, goes, asked = ahead
    totals = [sums.start(rows(value)) for value in range(5)]
    assert not any(total.done() for total in totals)
    goes.set()
    assert [total.result(PATIENCE_S)[0, 0] for total in totals] == [0, 2, 4, 6, 8]
    assert asked == [0, 1, 2, 3, 4]


def test_after_one_that_failed_no_sum_is_made(ahead: Any) -> None:
    sums, goes, asked = ahead
    goes.set()
    totals = [sums.start(rows(value)) for value in (1, -1, 3)]
    assert totals[0].result(PATIENCE_S)[0, 0] == 2
    for total in totals[1:]:
        with pytest.raises(ValueError, match="negative"):
            total.result(PATIENCE_S)
    assert asked == [1, -1]


def test_closing_waits_for_the_sum_under_way_and_drops_the_rest(ahead: Any) -> None:
    sums, goes, asked = ahead
    totals = [sums.start(rows(value)) for value in (1, 2)]
    while not asked:
        time.sleep(0.001)

    def let_go() -> None:
        while not sums._closed:
            time.sleep(0.001)
        goes.set()

    threading.Thread(target=let_go, daemon=True).start()
    sums.close()
    assert totals[0].result(0)[0, 0] == 2
    assert totals[1].cancelled()
    assert asked == [1]
