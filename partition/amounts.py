"""Amounts as people read and write them: of bytes, of seconds, and of things that are counted. Every room says them
like this.

Decimal units (1 GB = 10⁹ bytes) as disks and networks have them; binary ones (1 GiB = 2³⁰) are read, too.
"""

from __future__ import annotations

import math
import re

_UNITS = {
    "": 1,
    "b": 1,
    **{prefix + suffix: 1000**n for n, prefix in enumerate("kmgt", 1) for suffix in ("", "b")},
    **{prefix + "ib": 1024**n for n, prefix in enumerate("kmgt", 1)},
}
_AMOUNT = re.compile(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([a-z]*)\s*", re.IGNORECASE)


def format_bytes(count: float) -> str:
    """Three digits and a decimal unit (1 GB = 10⁹ bytes, as disks and networks have it): '98.4 MB'."""
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB", "PB"):
        if value < 999.5 or unit == "PB":
            break
        value /= 1000
    if unit == "B":
        return f"{int(value)} B"
    return f"{value:,.0f} {unit}" if value >= 999.5 else f"{value:.3g} {unit}"


def rounded_up(nbytes: float) -> float:
    """To the three digits that `format_bytes` says of it, so that who gets so many has enough."""
    step = 10.0 ** (math.floor(math.log10(max(nbytes, 1.0))) - 2)
    return math.ceil(nbytes / step) * step


def counted(number: int, what: str) -> str:
    """'1 turn', '2,000 tokens'."""
    return f"{number:,} {what}" + ("" if number == 1 else "s")


def format_rate(speed: float) -> str:
    """Of something a second, three digits: '0.0148', '1260'."""
    return f"{speed:.0f}" if speed >= 100 else f"{speed:.3g}"


def meets(speed: float, target: float) -> bool:
    """Whether it is as fast, by the figures that are said of both: nobody is told that 0.05 is less than 0.05."""
    return float(format_rate(speed)) >= float(format_rate(target))


def format_delay(seconds: float) -> str:
    """Of milliseconds what counts: '0.21 ms', '54 ms', '1.2 s'."""
    if seconds >= 1:
        return f"{seconds:.2g} s"
    milliseconds = 1e3 * seconds
    return f"{milliseconds:.0f} ms" if milliseconds >= 9.95 else f"{milliseconds:.2g} ms"


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


def read_bytes(text: str) -> int | None:
    """'3GB', '512 MiB' or '1000000' as bytes; None if it is no amount."""
    match = _AMOUNT.fullmatch(text)
    if match is None or match[2].lower() not in _UNITS:
        return None
    amount = float(match[1]) * _UNITS[match[2].lower()]
    return int(amount) if amount < math.inf else None
