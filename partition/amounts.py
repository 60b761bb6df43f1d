"""Amounts as people read them: of bytes, of seconds, and of things that are counted. Every room says them like this."""

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


def format_duration(seconds: float) -> str:
    """'45 s', '3 min 20 s', '2 h 5 min', '4 d 3 h'."""
    whole = max(0, int(seconds))
    for unit, size, lower, lower_size in (
        ("d", 86400, "h", 3600),
        ("h", 3600, "min", 60),
        ("min", 60, "s", 1),
    ):
        if whole >= size:
            rest = whole % size // lower_size
            return f"{whole // size} {unit} {rest} {lower}" if rest else f"{whole // size} {unit}"
    return f"{whole} s"
