"""Shares that stay as they were: a model is not cut anew because a machine was measured to be a little quicker.

Another cut means that weights are sent again, and that KV on disk is not found. What was used last is kept in a file,
by model and machines.
"""

from __future__ import annotations

import logging
from pathlib import Path

import msgspec

log = logging.getLogger(__name__)

STEADY = 0.15  # no share is kept that is further from the best one, as a part of that
MOST_KEPT = 64  # the longest unused go first

Shares = tuple[float, ...]


class SteadyShares:
    """`path`: the file; None = what is used is not kept."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path

    def near(self, key: str, best: Shares) -> Shares:
        """The shares that were used last for `key`, if they are near to the `best` ones; else these."""
        kept = self._read().get(key, best)
        if len(kept) != len(best) or any(abs(a - b) > STEADY * b for a, b in zip(kept, best, strict=True)):
            return best
        return kept

    def use(self, key: str, shares: Shares) -> None:
        """Note that they are used now. What cannot be kept is chosen anew next time."""
        if self._path is None:
            return
        kept = self._read()
        kept.pop(key, None)
        latest = [*kept.items(), (key, shares)][-MOST_KEPT:]
        try:
            fresh = self._path.with_name(self._path.name + ".new")
            fresh.write_bytes(msgspec.json.encode(dict(latest)))
            fresh.replace(self._path)
        except OSError as error:
            log.warning("%s cannot be written: %s", self._path, error)

    def _read(self) -> dict[str, Shares]:
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=dict[str, Shares]) if self._path else {}
        except (OSError, msgspec.MsgspecError):
            return {}
