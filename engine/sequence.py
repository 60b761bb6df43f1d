"""A sequence: one request's tokens on their way through the engine, and the events that say how it goes.

Knows token ids, its sampler and how far it has come. Does not know text, stop strings or messages.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from shoal.models.sampling import Sampled, Sampler
from shoal.offload.kv.prefix_cache import Holding

from .guess.speculation import Guesser

EndReason = Literal["stop", "length", "cancelled", "deadline"]


@dataclass
class Times:
    """Clock readings in seconds; 0 = has not happened. And what the steps held that took that time."""

    arrived_s: float = 0.0
    admitted_s: float = 0.0
    first_token_s: float = 0.0
    last_token_s: float = 0.0
    stall_s: float = 0.0
    prompt_rows: int = 0  # of the steps until its first token, with those of whoever was beside it
    steps: int = 0  # after its first token
    rows: int = 0  # of these steps, likewise


@dataclass(eq=False)
class Sequence:
    """`tokens` are the prompt and the answer so far; KV of the first `computed` of them is stored.

    stop_ids: tokens that end it. client: whose request it is. priority: higher goes first. deadline_s: clock reading at
    which it ends with what it has.
    """

    tokens: list[int]
    limit: int  # length at which it ends, prompt included
    sampler: Sampler
    stop_ids: frozenset[int] = frozenset()
    client: str = ""
    priority: int = 0
    deadline_s: float = math.inf
    times: Times = field(default_factory=Times)
    computed: int = 0
    holding: Holding = field(default_factory=Holding)
    number: int = 0  # in order of arrival
    cached_tokens: int = 0  # of the prompt; they did not have to be computed
    drafted_tokens: int = 0  # guessed ahead
    accepted_tokens: int = 0  # guessed right
    crowd: int = 0  # how many prompts as long as the longest were to be read at once at most, it among them
    preemptions: int = 0
    restarts: int = 0  # how often it was computed anew from its first token: preempted, or with other ropes
    running: bool = False  # False: it waits, or has ended
    ended: bool = False
    prompt_tokens: int = field(init=False)
    guesser: Guesser = field(init=False)

    def __post_init__(self) -> None:
        self.prompt_tokens = len(self.tokens)
        self.guesser = Guesser(self.tokens)

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_tokens

    @property
    def remaining(self) -> int:
        """Tokens that have to pass through the model before the next one can be sampled."""
        return len(self.tokens) - self.computed


class Standing(NamedTuple):
    """How far a sequence is on its way to its next token.

    place: in the queue, 1 = next; 0 = it runs, or is about to. waiting: how many are in the queue. done, total: tokens
    of its text, which is the prompt until the first token has come.
    """

    place: int
    waiting: int
    done: int
    total: int


class Queued(NamedTuple):
    """The sequence waits for its turn."""

    sequence: Sequence


class Emitted(NamedTuple):
    """These tokens follow; they were sampled at the clock reading `at_s`."""

    sequence: Sequence
    sampled: list[Sampled]
    at_s: float


class Ended(NamedTuple):
    """The sequence has ended. This is its last event."""

    sequence: Sequence
    reason: EndReason


class Failed(NamedTuple):
    """The sequence has ended with an error. This is its last event."""

    sequence: Sequence
    error: Exception


SequenceEvent = Queued | Emitted | Ended | Failed
