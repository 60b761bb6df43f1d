"""How many tokens of prompts are read beside running answers without slowing these down too much.

Stall-free batching (Sarathi-Serve, Agrawal et al. 2024, arXiv 2403.02310), its budget found by feedback: what a token
of a prompt costs depends on how much text is before it, on the model and on the machine, so it is not predicted.
Pure: callers measure the slowdowns.
"""

from __future__ import annotations

from .step_cost import ROW_SHARE

SLOWDOWN = (
    2.5  # a step that also reads prompts may take so many times one that does not, if people wait for answers
)
_LOUDEST = (0.5, 1.5)  # the least and the most by which one measurement may change the budget, before damping
_REST_EVERY = 16  # steps with prompts; then comes one without, to measure again what they are compared with


class Pacer:
    """A budget that shrinks when steps take too long and grows when they do not; at most `most` tokens. A step may take
    `slowdown` times one without prompts. The first value assumes that every further row costs `row_share` of a step of
    one row."""

    def __init__(self, most: int, row_share: float = ROW_SHARE, slowdown: float = SLOWDOWN) -> None:
        self._most = most
        self._slowdown = slowdown
        self._tokens = min((slowdown - 1) / row_share, most)
        self._since_rest = 0

    def budget(self) -> int:
        """Tokens that may go with the next step, beside answers; 0 when it is time for a step without."""
        return 0 if self._since_rest >= _REST_EVERY else int(self._tokens)

    def rested(self) -> None:
        """A step without prompts was measured."""
        self._since_rest = 0

    def note(self, tokens: int, slowdown: float) -> None:
        """A step with so many tokens beside answers took `slowdown` times one without them."""
        self._since_rest += 1
        change = min(max(self._slowdown / max(slowdown, 1e-9), _LOUDEST[0]), _LOUDEST[1])
        if change < 1 or tokens >= int(self._tokens):  # fewer tokens than allowed say nothing about more
            self._tokens = min(max(self._tokens * change**0.5, 1.0), self._most)
