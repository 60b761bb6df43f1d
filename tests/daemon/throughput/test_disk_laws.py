"""What disk and processor keep of their speed beside each other, on a disk that changes its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from shoal.daemon.throughput import disk_laws
from shoal.daemon.throughput.disk_laws import TURNS, contention


@pytest.mark.parametrize("flips", [TURNS, 2, 1000], ids=["in the middle", "early", "never"])
def test_a_disk_that_changes_its_speed_is_no_contention(flips: int, monkeypatch: pytest.MonkeyPatch) -> None:
    passed = 0

    def passing(path: Path, seconds: float, *_: object) -> float:
        """Every second time together; slower from some time on."""
        nonlocal passed
        passed += 1
        began: Callable[[], object] = _[-1]  # type: ignore[assignment]
        began()
        return 2e9 * (0.9 if passed % 2 == 0 else 1.0) * (0.6 if passed > flips else 1.0)

    pace = iter([1.0, 1.25] * (TURNS + 1))
    monkeypatch.setattr(disk_laws, "passing_speed", passing)
    monkeypatch.setattr(disk_laws, "_pace_s", lambda compute, seconds: next(pace))
    found = contention(Path("any"), lambda: None)
    assert found.disk_keeps == pytest.approx(0.9)
    assert found.compute_keeps == pytest.approx(0.8)
