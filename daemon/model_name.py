"""How a model is named: a path or a name in the store, followed by `:q8` or `:q4` if its weights are wanted in fewer
bits than its files have. Also how a rank's part of it is named.

Knows spelling, and that what is there under a name is what it means. `library.library` finds models;
`offload.pack.layout` knows what the bits mean.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from shoal.offload.pack.manifest import Quant

from .errors import DaemonError

__all__ = ["Quant", "Reference", "ShardName", "misplaced_suffix"]

_SUFFIXES: dict[str, Quant] = {"q8": "q8", "q4": "q4"}


class Reference(NamedTuple):
    """`model`: a path or a name in the store."""

    model: str
    quant: Quant = "keep"

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Raises DaemonError `bad_request` where a file is called like another one in fewer bits."""
        model, _, suffix = text.rpartition(":")
        quant = _SUFFIXES.get(suffix)
        if quant is None or not model:
            return cls(text)
        if not _is_there(text):
            return cls(model, quant)
        if _is_there(model):
            raise DaemonError(
                "bad_request",
                f"{text[:300]} is a file, and {model[:300]} in {quant[1]} bits is called the same",
                "give one of the two another name",
            )
        return cls(text)

    def __str__(self) -> str:
        return self.model if self.quant == "keep" else f"{self.model}:{self.quant}"


def misplaced_suffix(text: str, names: Collection[str] = ()) -> str:
    """What to say of a name or path that nothing is called, where something is called so without what follows its
    colon: one of `names`, or a file. "" if nothing is."""
    model, _, suffix = text.rpartition(":")
    if not model or not (model in names or _is_there(model)):
        return ""
    if suffix in _SUFFIXES:
        return f"there is {model[:300]}, which is named without :{suffix} here"
    what = "a name" if model in names else model[:300]
    return f"only {' and '.join(f':{known}' for known in _SUFFIXES)} can follow {what}"


class ShardName(NamedTuple):
    """What rank `rank` (from 0) of `ranks` holds of a model; written 2/3, counted from 1. A single rank holds all."""

    rank: int = 0
    ranks: int = 1

    @classmethod
    def parse(cls, text: str) -> ShardName:
        """Raises DaemonError `bad_request`."""
        number, slash, ranks = text.partition("/")
        if not (slash and _is_number(number) and _is_number(ranks)):
            raise DaemonError("bad_request", f"{text!r} is not a shard", "write 2/3 for the second of three")
        shard = cls(int(number) - 1, int(ranks))
        if not shard.ranks:
            raise DaemonError("bad_request", f"{text}: there must be 1 rank or more", "such as 2/3")
        if not 0 <= shard.rank < shard.ranks:
            raise DaemonError(
                "bad_request",
                f"{text}: must be from 1/{shard.ranks} to {shard.ranks}/{shard.ranks}",
                "such as 2/3",
            )
        return shard

    def __str__(self) -> str:
        return f"{self.rank + 1}/{self.ranks}"


WHOLE = ShardName()


def _is_there(path: str) -> bool:
    try:
        return Path(path).expanduser().exists()
    except (OSError, RuntimeError, ValueError):
        return False


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 10
