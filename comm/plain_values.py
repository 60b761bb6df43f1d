"""Free-form values of messages, which end up in templates: what may be in them, how many, and how deep.

Knows what JSON can express. Does not know which fields are free-form; `outline` bounds their bytes before decoding.
"""

from __future__ import annotations

from typing import Any

# Templates and JSON schemas stay far below both.
MAX_DEPTH = 32
MAX_FREE_VALUES = 100_000
_INTS = range(-(1 << 63), 1 << 64)  # that msgpack has
_SHOWN_BITS = 200


def check_plain(value: Any, path: str) -> None:
    """ValueError, naming the place below `path`, unless `value` is what JSON could express, within the bounds."""
    seen, level = 1, [(value, path)]
    for _ in range(MAX_DEPTH + 1):
        below: list[tuple[Any, str]] = []
        for item, where in level:
            if isinstance(item, dict | list):
                seen += len(item)
                if seen > MAX_FREE_VALUES:
                    raise ValueError(f"{path}: must hold at most {MAX_FREE_VALUES} values")
            if isinstance(item, dict):
                for key, inner in item.items():
                    if not isinstance(key, str):
                        raise ValueError(f"{where}: keys must be str, not {type(key).__name__}")
                    below.append((inner, f"{where}.{key[:40]!r}"))
            elif isinstance(item, list):
                below.extend((inner, f"{where}[{index}]") for index, inner in enumerate(item))
            elif not (item is None or isinstance(item, bool | int | float | str)):
                found = type(item).__name__
                raise ValueError(f"{where}: must be null, bool, number, str, array or map, not {found}")
            elif isinstance(item, int) and item not in _INTS:
                shown = f"={item}" if item.bit_length() <= _SHOWN_BITS else ""
                raise ValueError(f"{where}{shown}: must be from -2**63 to 2**64 - 1")
        if not below:
            return
        level = below
    raise ValueError(f"{path}: must be nested at most {MAX_DEPTH} deep")
