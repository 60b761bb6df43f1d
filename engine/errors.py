"""Errors of the engine room: why a sequence is not queued. They carry numbers; whoever asked puts them in words.

EngineError
├── NeverFits    its KV could not be held even alone
└── QueueFull    too many run or wait
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
