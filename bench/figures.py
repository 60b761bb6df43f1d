"""Figures: one quantity, measured of several engines over rounds that took turns.

Pure: values in, medians, ratios and a table's cells out. Does not know how anything is measured.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any, Literal

Better = Literal["more", "less"]


@dataclass
class Figure:
    """One line of the table. `values` has an engine's value of each round, `per_token_bytes` the weights read."""

    name: str
    unit: str
    better: Better = "more"
    values: dict[str, list[float]] = field(default_factory=dict)
    weights_gb_per_s: bool = False  # tokens/s that can be read as weights read from memory

    def note(self, engine: str, value: float) -> None:
        self.values.setdefault(engine, []).append(value)

    def peer(self) -> str | None:
        """The engine that Shoal is compared with, if any."""
        return next((engine for engine in self.values if engine != "shoal"), None)

    def ratios(self) -> list[float]:
        """Round by round, how many times better Shoal is than the peer; empty without a peer."""
        ours, theirs = self.values.get("shoal", []), self.values.get(self.peer() or "", [])
        pairs = zip(ours, theirs, strict=False)
        return [a / b if self.better == "more" else b / a for a, b in pairs if a > 0 and b > 0]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Figure:
        return cls(**fields)


def spread(values: list[float]) -> str:
    """The median, and the least and most where they differ, to three digits."""
    if not values:
        return ""
    middle, low, high = (_short(value) for value in (median(values), min(values), max(values)))
    return middle if low == high else f"{middle} ({low}–{high})"


def _short(value: float) -> str:
    for digits in range(3):
        if abs(value) >= 10 ** (2 - digits):
            return f"{value:,.{digits}f}"
    return f"{value:.3g}"
