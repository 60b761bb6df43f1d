"""What caches keep is measured as in steps: time passes between products, which does not count."""

from __future__ import annotations

import time
from typing import Any

import pytest

from shoal.daemon.throughput import cache_laws


class SlowHome:
    """Each product takes a millisecond."""

    def __init__(self) -> None:
        self.began_s: list[float] = []
        self.ended_s: list[float] = []

    def linears(self, x: Any, weights: Any) -> None:
        self.began_s.append(time.perf_counter())
        time.sleep(1e-3)
        self.ended_s.append(time.perf_counter())


def test_time_passes_between_products_and_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_laws, "_BEFORE", 2)
    home = SlowHome()
    took_s = cache_laws._round_s(home, None, [None] * 5)  # type: ignore[arg-type, list-item]
    took = [ended - began for began, ended in zip(home.began_s, home.ended_s, strict=True)]
    gaps = [began - ended for began, ended in zip(home.began_s[1:], home.ended_s, strict=False)]
    assert len(took) == 5 * (2 + 2)
    assert took_s == pytest.approx(sum(took[10:]) / 10, rel=0.3)
    assert all(gap >= one for gap, one in zip(gaps[5:], took[5:], strict=False))
    assert min(gaps[:4]) < 1e-3
