"""How a model is named: a path or a name in the store, with `:q8` or `:q4` behind it where its weights are wanted in
fewer bits than its files have.

Knows spelling only. Where a model is found is `library`, what the bits do to it `offload.pack_layout`.
"""

from __future__ import annotations

from typing import NamedTuple

from shoal.offload.pack_format import Quant

__all__ = ["Quant", "Reference"]

_SUFFIXES: dict[str, Quant] = {"q8": "q8", "q4": "q4"}


class Reference(NamedTuple):
    """`model`: a path or a name in the store."""

    model: str
    quant: Quant = "keep"

    @classmethod
    def parse(cls, text: str) -> Reference:
        model, _, suffix = text.rpartition(":")
        quant = _SUFFIXES.get(suffix)
        return cls(text) if quant is None or not model else cls(model, quant)

    def __str__(self) -> str:
        return self.model if self.quant == "keep" else f"{self.model}:{self.quant}"
