"""Typed reading of facts from config.json or GGUF metadata.

Neither is trusted: errors name each value that is missing, not finite or of the wrong type. `ModelSpec` checks
ranges. Knows which values nobody asked for. Does not know what the facts mean.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from shoal.models.errors import CorruptCheckpoint, UnsupportedCheckpoint
from shoal.models.texts import Texts

REQUIRED: Any = object()
# A GGUF file says no more than the original configuration, so what transformers does with that is what the model means.
UNLIKE_LLAMA_CPP = "is used, as in transformers; llama.cpp does not use it with this architecture"


class Facts:
    """A mapping from a file. `origin` names the file in messages; `prefix` stands before every key.

    A null counts as absent. For an absent key the value in `defaults` is given, else the call's default; if there is
    neither, CorruptCheckpoint is raised. It is also raised for values that are not what the method promises.

    said: what is odd about the values, each in one line; `part` shares it.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        origin: str,
        prefix: str = "",
        defaults: Mapping[str, Any] | None = None,
        said: list[str] | None = None,
    ) -> None:
        self.values = values
        self.origin = origin
        self.prefix = prefix
        self.defaults = defaults or {}
        self.said = [] if said is None else said
        self._asked: set[str] = set()

    def has(self, key: str) -> bool:
        self._asked.add(key)
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
        return Facts(value, self.origin, defaults=defaults, said=self.said)

    def unasked(self) -> dict[str, Any]:
        """The values, without the prefix, that no method was asked for."""
        own = {key.removeprefix(self.prefix): key for key in self.values if key.startswith(self.prefix)}
        return {
            key: self.values[name]
            for key, name in own.items()
            if key not in self._asked and self.values[name] is not None
        }

    def say(self, key: str, what: str) -> None:
        """Adds a line about this value to `said`."""
        shown = _shown(self.values.get(self.prefix + key))
        self.said.append(f"{self.origin}: {self.prefix}{key}={shown} {what}")

    def wrong(self, key: str, value: object, must_be: str) -> CorruptCheckpoint:
        """The error for a value that is not what it must be."""
        return CorruptCheckpoint(f"{self.origin}: {self.prefix}{key}={_shown(value)}: must be {must_be}")

    def unsupported(self, key: str) -> UnsupportedCheckpoint:
        """The error for a value with which Shoal cannot compute."""
        shown = _shown(self.values.get(self.prefix + key))
        return UnsupportedCheckpoint(f"{self.origin}: {self.prefix}{key}={shown} is not supported")

    def _get(self, key: str, default: Any) -> Any:
        self._asked.add(key)
        value = self.values.get(self.prefix + key)
        if value is not None:
            return value
        if key in self.defaults:
            return self.defaults[key]
        if default is REQUIRED:
            raise CorruptCheckpoint(f"{self.origin}: {self.prefix}{key} is missing")
        return default


def _shown(value: object) -> str:
    shown = f"{len(value)} strings" if isinstance(value, Texts) else repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."


def _integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 63


def _finite(value: object) -> bool:
    return _integer(value) or (isinstance(value, float) and math.isfinite(value))
