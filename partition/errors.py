"""Errors of the partition room.

PartitionError
├── SpecError      a fact of the architecture is out of range or contradicts another
└── PlanError      no plan fits (carries the figure that would)
"""


class PartitionError(Exception):
    """Root of this room's errors."""


class SpecError(PartitionError):
    """A `ModelSpec` field is out of range; the message gives field, value and limit."""


class PlanError(PartitionError):
    """The request cannot be planned within its limits; the message gives the figure needed, as does `least_bytes`."""

    def __init__(self, message: str, least_bytes: int) -> None:
        super().__init__(message)
        self.least_bytes = least_bytes
