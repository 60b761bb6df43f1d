"""The rows of the comparison, as data: which scenario, on which model, at which sizes."""

from __future__ import annotations

from dataclasses import dataclass, field

import scenarios
from scenarios import Scenario, Sizes

DEFAULT_MODEL = "smollm2-q4_1"  # from the store; all other models are shapes of `shapes`


@dataclass(frozen=True)
class Row:
    name: str
    model: str
    scenario: Scenario
    sizes: Sizes = field(default_factory=Sizes)


ROWS = (
    Row("speed-smollm2", DEFAULT_MODEL, scenarios.speed),
    Row("speed-llama", "llama-1.1b", scenarios.speed, Sizes(new=32)),
    Row("speed-qwen2", "qwen2-0.5b", scenarios.speed, Sizes(new=32)),
    Row("speed-moe", "olmoe-half", scenarios.speed, Sizes(new=32)),
    Row("long", DEFAULT_MODEL, scenarios.held, Sizes(prompt=7680, new=24)),
    Row(
        "long-plain",
        DEFAULT_MODEL,
        scenarios.held,
        Sizes(prompt=7680, new=24, peer="llama.cpp without flash attention"),
    ),
    Row("streams", DEFAULT_MODEL, scenarios.held, Sizes(prompt=128, new=24, streams=16)),
    Row("streams-llama", "llama-1.1b", scenarios.held, Sizes(prompt=128, new=16, streams=16)),
    Row("turns", DEFAULT_MODEL, scenarios.chat_turns, Sizes(prompt=2000, new=32)),
    Row("interference", DEFAULT_MODEL, scenarios.interference, Sizes(prompt=4000, new=128)),
    Row("memory", DEFAULT_MODEL, scenarios.memory),
    Row("memory-llama", "llama-1.1b", scenarios.memory),
    Row("float", "smollm2-bf16", scenarios.speed, Sizes(new=32, peer="transformers")),
    Row("quality", DEFAULT_MODEL, scenarios.quality),
    Row("quality-llama", "llama-1.1b", scenarios.quality),
    Row("quality-qwen2", "qwen2-0.5b", scenarios.quality),
    Row("quality-moe", "olmoe-half", scenarios.quality),
)


def chosen(names: str) -> list[Row]:
    """The rows whose name begins with one of `names` (comma-separated); all for "". ValueError names the rows."""
    wanted = tuple(name.strip() for name in names.split(",")) if names else ("",)
    for name in wanted:
        if not any(row.name.startswith(name) for row in ROWS):
            raise ValueError(f"no row begins with {name!r}; there are {', '.join(row.name for row in ROWS)}")
    return [row for row in ROWS if row.name.startswith(wanted)]
