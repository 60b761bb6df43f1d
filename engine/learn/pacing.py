"""How many tokens of prompts are read beside running answers without slowing these down too much.

Stall-free batching (Sarathi-Serve, Agrawal et al. 2024, arXiv 2403.02310), its budget found by feedback: what a token
of a prompt costs depends on how much text is before it, on the model and on the machine, so it is not predicted.
Where several wait for a first token, their prompts may take more of a step: else the first answers hold up a crowd, and
prompts in small pieces take longer in all. Pure: callers measure the slowdowns.
"""

from __future__ import annotations

from bisect import bisect_right

from .step_cost import StepSeconds, evenly

SLOWDOWN = 2.5  # a step that also reads a prompt may take so many times one that does not, if people wait for answers
MOST_TOGETHER = 4  # each of so many prompts may add as much to a step
_LOUDEST = (0.5, 1.5)  # the least and the most by which one measurement may change the budget, before damping
_REST_EVERY = 16  # steps with prompts; then comes one without, to measure again what they are compared with


class Pacer:
    """A budget that shrinks when steps take too long and grows when they do not; at most `most` tokens. A step may take
    `slowdown` times one without prompts. The first value is what steps are `expected` to allow, one row of them an
    answer's. `prompts` is how many wait to be read."""

    def __init__(self, most: int, expected: StepSeconds | None = None, slowdown: float = SLOWDOWN) -> None:
        seconds = expected or evenly()
        allowed_s = slowdown * seconds(1)
        self._most = most
        self._slowdown = slowdown
        allowed = bisect_right(range(1, most + 1), allowed_s, key=lambda tokens: seconds(1 + tokens))
        self._tokens = max(1.0, allowed)
        self._since_rest = 0

    def budget(self, prompts: int = 1) -> int:
        """Tokens that may go with the next step, beside answers; 0 when it is time for a step without."""
        if self._since_rest >= _REST_EVERY:
            return 0
        return int(min(self._tokens * _together(prompts), self._most))

    def rested(self) -> None:
        """A step without prompts was measured."""
        self._since_rest = 0

    def note(self, tokens: int, slowdown: float, prompts: int = 1) -> None:
        """A step with so many tokens beside answers took `slowdown` times one without them."""
        self._since_rest += 1
        together = _together(prompts)
        allowed = 1 + (self._slowdown - 1) * together
        change = min(max(allowed / max(slowdown, 1e-9), _LOUDEST[0]), _LOUDEST[1])
        # Fewer tokens than allowed say nothing about more.
        if change < 1 or tokens >= int(self._tokens * together):
            self._tokens = min(max(self._tokens * change**0.5, 1.0), self._most)


def _together(prompts: int) -> int:
    return min(max(prompts, 1), MOST_TOGETHER)
