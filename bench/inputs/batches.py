"""Batches to be answered: requests of the lengths of MTBench, some of which begin alike.

Standard library only. Prompts are token ids, so that all engines get the same; answers are as long as asked for.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

PROMPT_TOKENS = 98  # on average, as in MTBench
NEW_TOKENS = 32
SHARED_TOKENS = 64  # of those that begin alike
TOGETHER = 10  # requests that begin alike
VOCAB = 1000  # ids that every model has


def prompts(requests: int, seed: int = 0, shared: int = SHARED_TOKENS) -> list[list[int]]:
    """So many prompts of 66 to 130 tokens, in random order. Half of them begin alike in groups, by `shared` tokens."""
    source = random.Random(seed)

    def tokens(count: int) -> list[int]:
        return [source.randrange(3, VOCAB) for _ in range(count)]

    made: list[list[int]] = []
    while len(made) < requests:
        beginning = tokens(shared)
        for number in range(TOGETHER):
            length = source.randrange(66, 2 * PROMPT_TOKENS - 66 + 1)
            made.append(beginning[: shared * (number % 2)] + tokens(length - shared * (number % 2)))
    source.shuffle(made)
    return made[:requests]


def write(path: Path, wanted: list[list[int]], model: str, new: int = NEW_TOKENS) -> None:
    """A batch in OpenAI's format."""
    with path.open("w", encoding="utf-8") as file:
        for number, prompt in enumerate(wanted):
            body = {"model": model, "prompt": prompt, "max_tokens": new, "temperature": 0, "ignore_eos": True}
            line = {
                "custom_id": f"request-{number}",
                "method": "POST",
                "url": "/v1/completions",
                "body": body,
            }
            file.write(json.dumps(line) + "\n")
