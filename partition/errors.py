"""Errors of the partition room.

PartitionError
├── SpecError      a fact of the architecture is out of range or contradicts another
├── ShardError     a model cannot be cut into this many shards
├── PlanError      another machine's plan for this one cannot be carried out
├── MachineError   a measured figure of a machine or link cannot be true
└── ProfileError   a profile has a figure that cannot be true, or lacks one
"""


class PartitionError(Exception):
    """Base of this room's errors."""


class SpecError(PartitionError):
    """A `ModelSpec` field is out of range; the message gives field, value and limit."""


class ShardError(PartitionError):
    """A model cannot be cut like this; the message gives the number asked for and one that would do."""


class PlanError(PartitionError):
    """A plan that was given is not one of this machine's shard; the message gives field, value and limits."""


class MachineError(PartitionError):
    """A figure of a machine or link is out of range; the message gives machine, figure, value and limits."""


class ProfileError(PartitionError):
    """A profile cannot be used; the message gives field, value and limits."""
