"""The schedule of weights that pass through a device: what takes longest decides, and two groups hide the rest."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.partition.throughput.placing.two_groups import (
    ComingBlock,
    Feeding,
    Layer,
    LayerTurn,
    PassingPiece,
    Tail,
    alternate,
    step_ends,
)

LAYERS = 24
NOTHING = Tail(0.0, 0.0, None, 0.0, 0.0, 0.0)


def layers(groups: int, device_s: float, weights_s: float, host_s: float) -> list[Layer]:
    """Each takes so many seconds of each, in all groups together."""
    feeding = Feeding(0.0, 0.0, 0.0, 0.0, 0.0, 0.9 * device_s / groups, 0.0)
    turn = LayerTurn(0.1 * device_s / groups, 0.0, host_s / groups, 0.0, 0.0, 0.0, feeding)
    last = turn._replace(feeding=None)
    comes: dict[PassingPiece, list[ComingBlock]] = {
        "attn": [ComingBlock(0.1 * weights_s)], "router": [ComingBlock(0.0)], "experts": [ComingBlock(0.9 * weights_s)]
    }  # fmt: skip
    return [Layer(comes, ((turn if it < LAYERS - 1 else last),) * groups) for it in range(LAYERS)]


@pytest.mark.parametrize(
    ("device_s", "weights_s", "host_s"),
    [(1.0, 0.3, 0.5), (0.3, 1.0, 0.5), (0.4, 0.5, 1.0), (1.0, 1.0, 0.9), (0.0, 1.0, 1.0), (1.0, 0.0, 0.0)],
)
def test_a_step_takes_what_takes_longest(device_s: float, weights_s: float, host_s: float) -> None:
    longest = LAYERS * max(device_s, weights_s, host_s)
    two = alternate(layers(2, device_s, weights_s, host_s), NOTHING)
    assert 0.95 * longest <= two.step_s <= 1.06 * longest
    one = alternate(layers(1, device_s, weights_s, host_s), NOTHING)
    assert one.step_s >= 0.95 * LAYERS * max(weights_s, device_s + host_s)
    assert two.step_s <= 1.06 * one.step_s


times = st.floats(0.01, 10)


@given(times, times, times, st.floats(1.1, 3), st.integers(0, 2))
def test_nothing_gets_quicker_by_what_takes_longer(
    device_s: float, weights_s: float, host_s: float, more: float, which: int
) -> None:
    three = [device_s, weights_s, host_s]
    before = alternate(layers(2, *three), NOTHING)
    three[which] *= more
    after = alternate(layers(2, *three), NOTHING)
    assert after.step_s >= before.step_s * (1 - 1e-9)
    assert after.step_s >= max(after.device_s, after.weights_s, after.host_s) * (1 - 1e-9)


def test_the_first_step_waits_for_its_weights() -> None:
    ends = step_ends(layers(2, 0.1, 1.0, 0.1), NOTHING, 0.0, 3)
    assert ends[0] == pytest.approx(LAYERS * 1.0, rel=0.05)
    assert ends[1] - ends[0] == pytest.approx(LAYERS * 1.0, rel=0.02)
    assert ends[2] - ends[1] == pytest.approx(LAYERS * 1.0, rel=1e-9)
