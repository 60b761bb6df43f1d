"""Whose turn it is: how much each client has been given, as virtual token counters.

After VTC (Sheng et al. 2024, arXiv 2401.00588): whoever was given least goes first. A client that comes or comes back
starts at the level of the least served, so that idling earns nothing. If its own old level is higher, it keeps that, so
that asking for one thing after the other is no better than asking for all at once. When nobody is left, all accounts
are closed. Pure.
"""

from __future__ import annotations

GENERATED_COST = 2  # of a generated token, in prompt tokens: the paper's weights
REMEMBERED = 1024  # clients without requests, while others have some


class TokenCounters:
    """A counter per client with requests, and of those that had some last."""

    def __init__(self) -> None:
        self._given: dict[str, float] = {}  # those that left last come last
        self._requests: dict[str, int] = {}

    def enter(self, client: str) -> None:
        """One more request of a client."""
        if client not in self._requests:
            least = min((self._given[other] for other in self._requests), default=0.0)
            self._given[client] = max(self._given.get(client, 0.0), least)
        self._requests[client] = self._requests.get(client, 0) + 1

    def leave(self, client: str) -> None:
        """A request of a client has ended."""
        self._requests[client] -= 1
        if self._requests[client]:
            return
        del self._requests[client]
        self._given[client] = self._given.pop(client)
        if not self._requests:
            self._given.clear()
        elif len(self._given) > len(self._requests) + REMEMBERED:
            del self._given[next(other for other in self._given if other not in self._requests)]

    def charge(self, client: str, prompt_tokens: int, generated_tokens: int) -> None:
        self._given[client] += prompt_tokens + GENERATED_COST * generated_tokens

    def given(self, client: str) -> float:
        return self._given[client]
