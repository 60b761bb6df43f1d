"""Amounts as people read them: of bytes, and of things that are counted. Every room that says one says it like this."""

from __future__ import annotations


def format_bytes(count: float) -> str:
    """Three digits and a decimal unit (1 GB = 10⁹ bytes, as disks and networks have it): '98.4 MB'."""
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB", "PB"):
        if value < 999.5 or unit == "PB":
            break
        value /= 1000
    return f"{int(value)} B" if unit == "B" else f"{value:.3g} {unit}"


def counted(number: int, what: str) -> str:
    """'1 turn', '2,000 tokens'."""
    return f"{number:,} {what}" + ("" if number == 1 else "s")
