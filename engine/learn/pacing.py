"""How many tokens of prompts are read beside running answers without slowing these down too much.

Stall-free batching (Sarathi-Serve, Agrawal et al. 2024, arXiv 2403.02310), its budget found by feedback: what a token
of a prompt costs depends on how much text is before it, on the model and on the machine, so it is not predicted.
Where several wait for a first token, their prompts may take more of a step, within reason: else the first answers hold
up a crowd, whose members all get less than they do. Pure: callers measure the slowdowns.
"""

from __future__ import annotations

import math
from bisect import bisect_right

from .step_cost import StepSeconds, evenly

SLOWDOWN = 2.5  # a step that also reads a prompt may take so many times one that does not, if people wait for answers
FEW_TOGETHER = 4  # each of so many prompts may add as much to a step as one, however long that takes
MOST_TOGETHER = 16  # each of so many may, as long as the step takes less than …
CROWD_STEP_S = 1.0
_LOUDEST = (0.5, 2.0)  # by which a measurement may change what a token was found to take, before damping
_REST_EVERY = 16  # steps with prompts; then comes one without, to measure again what they are compared with


class Pacer:
    """A budget of at most `most` tokens. A step may take `slowdown` times one without prompts. The first value is what
    steps are `expected` to allow, one row of them an answer's, to a few prompts at most. `prompts` is how many wait to
    be read, `alone_s` what the step would take without any."""

    def __init__(self, most: int, expected: StepSeconds | None = None, slowdown: float = SLOWDOWN) -> None:
        seconds = expected or evenly()
        allowed_s = slowdown * seconds(1)
        self._most = most
        self._added = slowdown - 1  # by one prompt, in steps without
        self._first = max(
            1, bisect_right(range(1, most + 1), allowed_s, key=lambda tokens: seconds(1 + tokens))
        )
        self._token_s = 0.0  # that one of them adds to a step; 0 = not measured yet
        self._since_rest = 0

    def budget(self, prompts: int, alone_s: float) -> int:
        """Tokens that may go with the next step, beside answers; 0 when it is time for a step without."""
        return self._allowed(prompts, alone_s) if self._since_rest < _REST_EVERY else 0

    def rested(self) -> None:
        """A step without prompts was measured."""
        self._since_rest = 0

    def note(self, tokens: int, seconds: float, prompts: int, alone_s: float) -> None:
        """A step with so many tokens beside answers took so long."""
        self._since_rest += 1
        if math.isinf(self._added):
            return
        added_s, each_s = self._added_s(prompts, alone_s), self._each_s(alone_s)
        # Fewer tokens than allowed say nothing about more.
        if tokens >= self._allowed(prompts, alone_s) or seconds > alone_s + added_s:
            change = (seconds - alone_s) / tokens / each_s
            if self._token_s or change < 1:  # a guess that was too low is given up at once
                change = min(max(change, _LOUDEST[0]), _LOUDEST[1]) ** 0.5
            least_s = min(each_s, added_s / self._most)  # it would not be tried whether less is true
            self._token_s = min(max(each_s * change, least_s), added_s)

    def _allowed(self, prompts: int, alone_s: float) -> int:
        if math.isinf(self._added):
            return self._most
        if not self._token_s:  # many together would make a wrong guess a long step
            prompts = min(prompts, FEW_TOGETHER)
        return int(min(max(self._added_s(prompts, alone_s) / self._each_s(alone_s), 1), self._most))

    def _each_s(self, alone_s: float) -> float:
        """How long a token is thought to lengthen a step."""
        return self._token_s or self._added_s(1, alone_s) / self._first

    def _added_s(self, prompts: int, alone_s: float) -> float:
        """How long all of them may lengthen a step."""
        one_s = self._added * max(alone_s, 1e-9)
        few_s, all_s = (one_s * min(max(prompts, 1), most) for most in (FEW_TOGETHER, MOST_TOGETHER))
        return max(few_s, min(all_s, CROWD_STEP_S - alone_s))
