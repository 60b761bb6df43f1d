"""Speeds of links that are made up: steady ones, and some whose delay changes from message to message."""

from __future__ import annotations

import random

import pytest

from shoal.daemon.cluster.control_messages import PROBE_BYTES
from shoal.daemon.cluster.links.link_probes import link_speed

SECONDS = 1.0


class Link:
    """Each message takes the delay there and back, the time of its bytes, and up to `jitter_s` more."""

    def __init__(self, delay_s: float, bytes_per_s: float, jitter_s: float = 0.0, seed: int = 0) -> None:
        self.now_s = 0.0
        self._delay_s, self._bytes_per_s, self._jitter_s = delay_s, bytes_per_s, jitter_s
        self._source = random.Random(seed)

    def probe(self, data: bytes) -> float:
        took_s = 2 * self._delay_s + len(data) / self._bytes_per_s + self._source.random() * self._jitter_s
        self.now_s += took_s
        return took_s

    def speed(self) -> tuple[float, float]:
        found = link_speed(self.probe, SECONDS, lambda: self.now_s)
        return found.latency_s, found.bytes_per_s


@pytest.mark.parametrize("delay_s", [2e-5, 1e-3, 0.03])
@pytest.mark.parametrize("bytes_per_s", [1e5, 1.25e6, 1.25e8, 1e9])
def test_a_steady_link_is_measured_as_it_is(delay_s: float, bytes_per_s: float) -> None:
    latency_s, speed = Link(delay_s, bytes_per_s).speed()
    assert latency_s == pytest.approx(delay_s)
    most = PROBE_BYTES / (2 * delay_s) / 0.1  # no probe tells more than that
    assert speed == pytest.approx(min(bytes_per_s, most), rel=0.15)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("jitter_s", [0.001, 0.02, 0.054])
def test_an_unsteady_link_is_never_taken_for_a_very_fast_one(jitter_s: float, seed: int) -> None:
    """A busy machine, too, answers one message late and the next at once."""
    _, speed = Link(2e-4, 1.25e7, jitter_s, seed).speed()
    assert speed < 12 * 1.25e7


def test_measuring_takes_as_long_as_it_may() -> None:
    link = Link(0.01, 1e4)  # the first probe takes 1.6 s
    link.speed()
    assert link.now_s < SECONDS + 2
