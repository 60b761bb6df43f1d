"""Figures: one quantity of several engines, measured in rounds in which they took turns.

Pure: values in, medians, ratios and a table's cells out. Does not know how anything is measured.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any, Literal

Better = Literal["more", "less", "neither"]


@dataclass
class Figure:
    """One line of the table. `values` has the value of each engine in each round."""

    name: str
    unit: str
    better: Better = "more"
    values: dict[str, list[float]] = field(default_factory=dict)
    weights_gb_per_s: bool = False  # whether tokens/s say how fast weights are read from memory
    at: float = 0.0  # its place on an axis if it is one of several along it
    must: float = 0.0  # the least ratio that is good enough; 0 if none was set

    def note(self, engine: str, value: float) -> None:
        self.values.setdefault(engine, []).append(value)

    def peer(self) -> str | None:
        """The engine that Shoal is compared with, if there is one."""
        return next((engine for engine in self.values if engine != "shoal"), None)

    def ratios(self) -> list[float]:
        """How many times better than the peer Shoal is in each round; empty if there is nothing to compare."""
        if self.better == "neither":
            return []
        ours, theirs = self.values.get("shoal", []), self.values.get(self.peer() or "", [])
        pairs = zip(ours, theirs, strict=False)
        return [a / b if self.better == "more" else b / a for a, b in pairs if a > 0 and b > 0]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Figure:
        return cls(**fields)


def spread(values: list[float]) -> str:
    """The median, and the least and the most if they differ."""
    if not values:
        return ""
    low, high = min(values), max(values)
    if low == high:
        return _digits(low, 4)
    return f"{_digits(median(values), 3)} ({_digits(low, 3)}–{_digits(high, 3)})"


def _digits(value: float, count: int) -> str:
    """The value with `count` significant digits, but with all digits before the point."""
    before = math.floor(math.log10(abs(value))) + 1 if value else 1
    return f"{value:,.{max(0, count - before)}f}"
