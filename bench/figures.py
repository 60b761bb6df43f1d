"""Figures: one quantity, measured of several engines over rounds that took turns.

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
    """One line of the table. `values` has an engine's value of each round."""

    name: str
    unit: str
    better: Better = "more"
    values: dict[str, list[float]] = field(default_factory=dict)
    weights_gb_per_s: bool = False  # tokens/s that can be read as weights read from memory
    at: float = 0.0  # where it is one of several along an axis, its place there
    must: float = 0.0  # the least ratio that is good enough; 0 where none was set

    def note(self, engine: str, value: float) -> None:
        self.values.setdefault(engine, []).append(value)

    def peer(self) -> str | None:
        """The engine that Shoal is compared with, if any."""
        return next((engine for engine in self.values if engine != "shoal"), None)

    def ratios(self) -> list[float]:
        """Round by round, how many times better Shoal is than the peer; empty when there is nothing to compare."""
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
    """The median, and the least and most where they differ."""
    if not values:
        return ""
    low, high = min(values), max(values)
    if low == high:
        return _digits(low, 4)
    return f"{_digits(median(values), 3)} ({_digits(low, 3)}–{_digits(high, 3)})"


def _digits(value: float, count: int) -> str:
    """With so many digits that count, and none of an integer left out."""
    before = math.floor(math.log10(abs(value))) + 1 if value else 1
    return f"{value:,.{max(0, count - before)}f}"
