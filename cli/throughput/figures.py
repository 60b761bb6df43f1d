"""Predicted figures in words."""

from __future__ import annotations

from shoal.partition.amounts import format_duration

_WORTH_SAYING_S = 0.05


def seconds_words(seconds: float) -> str:
    if seconds >= 99.5:
        return format_duration(seconds)
    return f"{seconds:.2g} s" if seconds >= 1 else f"{seconds * 1e3:.0f} ms"


def start_words(load_s: float, pack_s: float) -> str:
    """Until a plan can begin, which may hold nothing that has to be read before; "" if there is nothing to say."""
    if load_s < _WORTH_SAYING_S:
        return f"its pack would be made once, in {seconds_words(pack_s)}" if pack_s else ""
    packed = f", after making its pack once in {seconds_words(pack_s)}" if pack_s else ""
    return f"it would be loaded in {seconds_words(load_s)}{packed}"
