"""What the workers of all engines share: a loop that answers calls, and prompts that are the same for all.

An engine runs in a process of its own, and stays there over the rounds, so that engines can take turns. Calls come as
lines of JSON on stdin, {"call": name, "with": {…}}; each is answered by a line on stdout, {"result": …} or
{"error": text}.
Standard library only: the peers' environments have little else. `engines` is the caller's side.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
import traceback
from typing import Any, Protocol


class Engine(Protocol):
    """What the scenarios call. Times are in seconds, each with the number of tokens that it was spent on."""

    def load(self, model: str, context: int, streams: int, threads: int, memory: int = 0) -> dict[str, Any]:
        """Load a model for `streams` sequences of up to `context` tokens; returns facts about the engine.

        `memory` is the bytes it may use, 0 for all there are; an engine that has no such option finds its limit itself.
        """
        ...

    def begin(self, streams: int, tokens: int, seed: int) -> dict[str, float]:
        """Prefill that many random prompts, each up to its first new token: {"seconds", "tokens"}."""
        ...

    def dictate(self, prompt: list[int], answer: list[int]) -> dict[str, float]:
        """The same for one sequence whose next tokens are those of `answer`, whatever the model says. Not all engines
        can do this."""
        ...

    def advance(self, tokens: int) -> dict[str, float]:
        """Decode that many tokens of every sequence: {"seconds", "tokens"}."""
        ...

    def end(self) -> None:
        """Forget the sequences."""
        ...


def prompts(streams: int, tokens: int, vocab: int, seed: int) -> list[list[int]]:
    """The same random token ids for every engine."""
    source = random.Random(seed)
    return [[source.randrange(vocab) for _ in range(tokens)] for _ in range(streams)]


def serve(engine: object) -> None:
    """Answer calls with the methods of `engine` until stdin ends. Everything else that is printed goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        call = json.loads(line)
        started_s = time.perf_counter()
        try:
            result = getattr(engine, call["call"])(**call["with"])
            if isinstance(result, dict):
                result.setdefault("seconds", time.perf_counter() - started_s)
            answer = {"result": result}
        except Exception as error:  # the caller decides what to do about it
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)
