"""What all messages of the protocol have in common: their base, and types of fields that several use."""

from __future__ import annotations

from typing import Annotated, dataclass_transform

from msgspec import Meta, Struct

NonNegative = Annotated[int, Meta(ge=0)]
Name = Annotated[str, Meta(max_length=4096)]


@dataclass_transform(frozen_default=True, kw_only_default=True)  # what subclasses inherit, for type checkers
class Message(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Base of all bodies."""
