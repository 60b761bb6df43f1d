"""Predicted figures in words."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from shoal.partition.amounts import format_bytes, format_duration


def rate_words(speed: float) -> str:
    """Of something a second."""
    return f"{speed:.0f}" if speed >= 100 else f"{speed:.3g}"


def seconds_words(seconds: float) -> str:
    if seconds >= 99.5:
        return format_duration(seconds)
    return f"{seconds:.2g} s" if seconds >= 1 else f"{seconds * 1e3:.0f} ms"


def peak_words(peak_bytes: Mapping[str, int], machines: Collection[str]) -> str:
    """The largest of the machines', and that of a device beside it."""
    its = [nbytes for name, nbytes in peak_bytes.items() if name in machines]
    of_all = f" ({len(its)} machines)" if len(its) > 1 else ""
    there = [f"{format_bytes(it)} of {name}" for name, it in peak_bytes.items() if name not in machines]
    return ", ".join([format_bytes(max(its)) + of_all, *there])
