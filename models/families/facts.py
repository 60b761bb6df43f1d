"""Typed reading of facts from config.json or GGUF metadata.

Neither is trusted: errors name each value that is missing, not finite or of the wrong type. `ModelSpec` checks
ranges. Does not know what the facts mean.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from shoal.models.errors import CorruptCheckpoint

REQUIRED: Any = object()


class Facts:
    """A mapping from a file. `origin` names the file in messages; `prefix` stands before every key.

    A null counts as absent. For an absent key the value in `defaults` is given, else the call's default; if there is
    neither, CorruptCheckpoint is raised. It is also raised for values that are not what the method promises.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        origin: str,
        prefix: str = "",
        defaults: Mapping[str, Any] | None = None,
    ) -> None:
        self.values = values
        self.origin = origin
        self.prefix = prefix
        self.defaults = defaults or {}

    def has(self, key: str) -> bool:
        return self.values.get(self.prefix + key) is not None

    def integer(self, key: str, default: Any = REQUIRED) -> int:
        value = self._get(key, default)
        if not _integer(value):
            raise self.wrong(key, value, "an integer of 64 bits")
        return int(value)

    def number(self, key: str, default: Any = REQUIRED) -> float:
        value = self._get(key, default)
        if not _finite(value):
            raise self.wrong(key, value, "a finite number")
        return float(value)

    def flag(self, key: str, default: Any = REQUIRED) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, value, "true or false")
        return value

    def text(self, key: str, default: Any = REQUIRED) -> str:
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self.wrong(key, value, "a string")
        return value

    def items(self, key: str, kind: type, default: Any = REQUIRED) -> list[Any]:
        """A list whose items all have this type."""
        value = self._get(key, default)
        if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
            raise self.wrong(key, value, f"a list of {kind.__name__}")
        return value

    def numbers(self, key: str) -> tuple[float, ...]:
        value = self._get(key, REQUIRED)
        if not isinstance(value, list) or not all(_finite(item) for item in value):
            raise self.wrong(key, value, "a list of finite numbers")
        return tuple(float(item) for item in value)

    def part(self, key: str, defaults: Mapping[str, Any] | None = None) -> Facts:
        """The facts of a nested mapping, which is empty if the key is absent."""
        value = self._get(key, {})
        if not isinstance(value, dict):
            raise self.wrong(key, value, "an object")
        return Facts(value, self.origin, defaults=defaults)

    def wrong(self, key: str, value: object, must_be: str) -> CorruptCheckpoint:
        """The error for a value that is not what it must be."""
        shown = repr(value)
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        return CorruptCheckpoint(f"{self.origin}: {self.prefix}{key}={shown}: must be {must_be}")

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(self.prefix + key)
        if value is not None:
            return value
        if key in self.defaults:
            return self.defaults[key]
        if default is REQUIRED:
            raise CorruptCheckpoint(f"{self.origin}: {self.prefix}{key} is missing")
        return default


def _integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 63


def _finite(value: object) -> bool:
    return _integer(value) or (isinstance(value, float) and math.isfinite(value))
