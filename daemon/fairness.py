"""Whose turn it is: how much each client has been given, as virtual token counters.

After VTC (Sheng et al. 2024, arXiv 2401.00588): whoever was given least goes first, and a client that comes (back)
starts at the level of the least served, so that idling saves nothing up. Pure.
"""

from __future__ import annotations

GENERATED_COST = 2  # of a generated token, in prompt tokens: the paper's weights


class TokenCounters:
    """A counter per client with requests; the others are forgotten, so clients that come and go cost nothing."""

    def __init__(self) -> None:
        self._given: dict[str, float] = {}
        self._requests: dict[str, int] = {}

    def enter(self, client: str) -> None:
        """One more request of a client."""
        if client not in self._given:
            self._given[client] = min(self._given.values(), default=0.0)
        self._requests[client] = self._requests.get(client, 0) + 1

    def leave(self, client: str) -> None:
        """A request of a client has ended."""
        self._requests[client] -= 1
        if not self._requests[client]:
            del self._requests[client], self._given[client]

    def charge(self, client: str, prompt_tokens: int, generated_tokens: int) -> None:
        self._given[client] += prompt_tokens + GENERATED_COST * generated_tokens

    def given(self, client: str) -> float:
        return self._given[client]
