"""What is predicted of a plan, as data, and how far it may be off."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import hypot
from typing import Literal, NamedTuple

Binding = Literal["memory", "compute", "disk", "link", "network", "overhead"]

# How far laws may be off, by what takes the time: with laws that were measured on the machine, and with a few figures
# that somebody wrote down. A kernel that computes takes up to a tenth more or less in a step than alone, again and
# again, and between the sizes of tables; one that reads memory with several threads up to a sixth; a window's blocks
# are not as even as those that were tried, contention differs from step to step, and disks change their speed within
# seconds; links are shared; an interpreter's calls take what caches leave. How far what was measured lay from itself
# when it was measured again comes on top (`Repeats`). The band of a prediction is as wide as both to both sides.
MEASURED: Mapping[Binding, float] = {
    "memory": 0.15,
    "compute": 0.10,
    "disk": 0.20,
    "link": 0.20,
    "network": 0.25,
    "overhead": 0.25,
}
# Of three measurements the outer ones lie so many times nearer to the middle than nine in ten others do.
_OF_REPEATS = 2.0
STATED: Mapping[Binding, float] = {
    "memory": 0.25,
    "compute": 0.35,
    "disk": 0.25,
    "link": 0.25,
    "network": 0.35,
    "overhead": 0.50,
}


class Job(NamedTuple):
    """What a machine is asked for: `batch` streams at once, each with a prompt of `prompt_tokens` and an answer of
    `new_tokens`. In each step each stream guesses `guesses` tokens ahead; one is right with this `chance` if those
    before it were. `distinct`: of the experts that several tokens would choose independently, the share that they do
    choose, where it is known of a model and its texts. `fresh`: of the pages for its K and V, the share that nobody has
    used before: all, until the pool has once been full."""

    prompt_tokens: int = 512
    new_tokens: int = 128
    batch: int = 1
    guesses: int = 0
    chance: float = 0.0
    distinct: float | None = None
    fresh: float = 1.0

    @property
    def context_tokens(self) -> int:
        """Of each stream at its end."""
        return self.prompt_tokens + self.new_tokens

    @property
    def step_tokens(self) -> float:
        """That a stream gets from a step, on average: its own, and guesses up to the first wrong one."""
        return sum(self.chance**place for place in range(self.guesses + 1))


@dataclass(frozen=True)
class Prediction:
    """What a plan is predicted to do. Seconds, unless it says otherwise.

    `ttft_s`: until every stream has its first token. `token_s`: between two tokens of a stream: a step, if nothing is
    guessed.
    `tokens_per_s`: of all streams together, once they have their first; `band`: between which it lies.
    `peak_bytes`: by machine and device. `stall_share`: of a step that is spent waiting for the disk. `parts`: seconds
    of a step by what takes them, as if nothing ran beside anything else; `prompt_parts`: of all steps until the first
    token. `load_s`: until it can begin.
    """

    ttft_s: float
    token_s: float
    tokens_per_s: float
    band: tuple[float, float]
    peak_bytes: Mapping[str, int]
    stall_share: float
    binding: Binding
    parts: Mapping[Binding, float]
    load_s: float
    prompt_parts: Mapping[Binding, float] = field(default_factory=dict)
    pack_s: float = 0.0  # to make the pack, once, if it is not there

    def total_s(self, job: Job) -> float:
        """Of all of the job, from its prompt to its last token."""
        return self.ttft_s + (job.new_tokens - 1) * self.token_s


def uncertainty(parts: Mapping[Binding, float], measured: bool, apart: Mapping[Binding, float]) -> float:
    """By which part of a prediction the truth may differ: that of each of its parts, as much as they weigh. `apart`:
    how far measurements of a part lay from their middle."""
    widths, whole = MEASURED if measured else STATED, sum(parts.values())

    def width(part: Binding) -> float:
        return hypot(widths[part], _OF_REPEATS * apart.get(part, 0.0))

    if whole <= 0:
        return width("overhead")
    return sum(width(part) * seconds for part, seconds in parts.items()) / whole
