"""Errors of the engine room: why a sequence is not queued. They carry numbers; whoever asked puts them in words.

EngineError
├── NeverFits    its KV could not be held even alone
├── QueueFull    too many run or wait
├── OrderError   an order that no sound rank 0 gives
└── RankLost     a rank of the group is gone, and with it its part of all KV
    └── DeviceGone  the device is gone that computed some blocks of this rank
        └── DeviceTooFull  it has no room for what it was to compute
"""

from __future__ import annotations

from shoal.partition.amounts import counted


class EngineError(Exception):
    """Root of this room's errors."""


class NeverFits(EngineError):
    """A sequence of `prompt_tokens` that may reach `limit` tokens; the pool holds `pool_tokens`."""

    def __init__(self, prompt_tokens: int, limit: int, pool_tokens: int) -> None:
        super().__init__(
            f"a prompt of {counted(prompt_tokens, 'token')} may reach {limit}, the KV pool holds {pool_tokens}"
        )


class QueueFull(EngineError):
    """`before` sequences run or wait; at most `sequences` run and `queue` wait."""

    def __init__(self, before: int, sequences: int, queue: int, retry_after_s: float) -> None:
        super().__init__(f"{before} requests run or wait, the limit is {sequences} and {queue}")
        self.retry_after_s = retry_after_s


class OrderError(EngineError):
    """An order whose numbers do not fit the plan."""


class RankLost(EngineError):
    """A rank of the group failed or is gone: the step cannot be completed, and what the ranks hold is of no use."""

    def __init__(self, rank: int, reason: str) -> None:
        super().__init__(f"rank {rank} is lost: {reason}")
        self.rank = rank
        self.reason = reason


class DeviceGone(RankLost):
    """The device that computed some blocks of rank 0 is gone, with their weights and KV."""

    def __init__(self, reason: str) -> None:
        super().__init__(0, reason)
        self.args = (reason,)


class DeviceTooFull(DeviceGone):
    """The device that computes some blocks of rank 0 had no room in a step. What it holds is of no use any more: the
    same step would fail again."""
