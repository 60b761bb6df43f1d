"""The rows of the comparisons, as data: which scenario, on which model, at which sizes, and how good it must be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from harness import batch_scenarios, offload_scenarios, scenarios
from harness.scenarios import Scenario, Sizes

DEFAULT_MODEL = "smollm2-q4_1"  # from the store; the other models are shapes of `shapes`, except WIDE_MODEL
WIDE_MODEL = "smollm2-wide"  # the default model, made larger by `widen`


@dataclass(frozen=True)
class Row:
    name: str
    model: str
    scenario: Scenario
    sizes: Sizes = field(default_factory=Sizes)
    form: Literal["gguf", "directory", "hollow"] = "gguf"
    type: str = ""  # the model is the default one, requantised by llama.cpp
    # Least ratios, by the beginning of a figure's name.
    must: Mapping[str, float] = field(default_factory=dict)


ROWS = (
    Row("speed-smollm2", DEFAULT_MODEL, scenarios.speed),
    Row("speed-llama", "llama-1.1b", scenarios.speed, Sizes(new=32)),
    Row("speed-qwen2", "qwen2-0.5b", scenarios.speed, Sizes(new=32)),
    Row("speed-moe", "olmoe-half", scenarios.speed, Sizes(new=32)),
    Row("speed-llama-3b", "llama-3b-q4_k_m", scenarios.speed, Sizes(new=16)),
    Row("long", DEFAULT_MODEL, scenarios.long_context, Sizes(prompt=7680, new=24)),
    Row(
        "long-plain",
        DEFAULT_MODEL,
        scenarios.long_context,
        Sizes(prompt=7680, new=24, peer="llama.cpp without flash attention"),
    ),
    Row("streams", DEFAULT_MODEL, scenarios.speed, Sizes(prompt=128, new=24, streams=16)),
    Row("streams-llama", "llama-1.1b", scenarios.speed, Sizes(prompt=128, new=16, streams=16)),
    Row("streams-moe", "olmoe-half", scenarios.speed, Sizes(prompt=128, new=16, streams=16)),
    Row("streams-llama-3b", "llama-3b-q4_k_m", scenarios.speed, Sizes(prompt=128, new=8, streams=16)),
    Row("batch", DEFAULT_MODEL, batch_scenarios.offline, Sizes(prompt=97, new=32, streams=32, requests=500)),
    *(
        Row(
            f"batch-moe{type}",
            f"olmoe-half{type}",
            batch_scenarios.offline,
            Sizes(prompt=97, new=32, streams=32, requests=500),
        )
        for type in ("", "-q8_0", "-bf16")  # the first is Q4_K_M
    ),
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

TYPES = ("Q4_K_M", "Q4_0", "Q5_K_M", "Q6_K", "Q8_0", "IQ4_NL")  # the default model has Q4_1
ROWS += tuple(
    Row(f"{name}-{type}", f"smollm2-{type.lower()}", scenarios.speed, sizes, type=type)
    for name, sizes in (("speed", Sizes()), ("streams", Sizes(prompt=128, new=24, streams=16)))
    for type in TYPES
)

# What Linux reads ahead by default; machines in data centres often have other settings.
AHEAD_KB = 128
_FLOOR = {"time per token against": 1 / 1.15, "peak memory against": 1.0}

OFFLOAD_ROWS = (
    Row(
        "dense",
        "llama-3b",
        offload_scenarios.disk_bound,
        Sizes(new=4, peer="accelerate", cap_gb=2.5),
        form="directory",
        must={**_FLOOR, "time per token": 1 / 0.55, "TTFT": 1 / 0.6},
    ),
    Row(
        "gguf",
        "smollm2-1.7b",
        offload_scenarios.disk_bound,
        Sizes(prompt=64, new=16, cap_share=0.6),
        must={**_FLOOR, "time per token": 1 / 0.2},
    ),
    Row(
        "gguf-7b",
        "mistral-7b",
        offload_scenarios.disk_bound,
        Sizes(prompt=64, new=6, cap_share=0.6),
        must={**_FLOOR, "time per token": 1 / 0.2},
    ),
    Row(
        "budgets",
        "llama-3b",
        offload_scenarios.budgets,
        Sizes(prompt=64, new=4),
        form="directory",
        must={"time per token at": 0.8, "time per token at 110%": 1.0, "peak memory": 1.0},
    ),
    Row(
        "streams",
        "llama-3b",
        offload_scenarios.crowd,
        Sizes(prompt=64, new=4, streams=8, cap_gb=2.5),
        form="directory",
        must={"8 streams": 6.0},
    ),
    Row(
        "guessing",
        WIDE_MODEL,
        offload_scenarios.guessing,
        Sizes(new=96, cap_share=0.5),
        must={"guessing ahead": 2.0},
    ),
    Row(
        "moe",
        "qwen3-30b-a3b",
        offload_scenarios.disk_bound,
        Sizes(prompt=64, new=8, cap_gb=6.0, dictated=True),
        must={"peak memory against": 1.0, "time per token": 3.0, "time per token against": 0.0},
    ),
    Row(
        "large",
        "llama-70b",
        offload_scenarios.disk_bound,
        Sizes(prompt=64, new=3, peer="", cap_gb=3.1),
        form="hollow",
        must=_FLOOR,
    ),
)


OFFLOAD_ROWS += tuple(
    replace(row, name=f"{AHEAD_KB}k-{row.name}", sizes=replace(row.sizes, peer_read_ahead_kb=AHEAD_KB))
    for row in OFFLOAD_ROWS
    if row.name in ("gguf", "gguf-7b", "moe")
)


def chosen(names: str, rows: Sequence[Row] = ROWS) -> list[Row]:
    """The rows with these names (comma-separated). A name that no row has stands for all that begin with it, so "" for
    all rows. ValueError lists the rows."""
    found: set[str] = set()
    for name in map(str.strip, names.split(",")):
        called = {row.name for row in rows if row.name == name} or {
            row.name for row in rows if row.name.startswith(name)
        }
        if not called:
            raise ValueError(f"no row begins with {name!r}; there are {', '.join(row.name for row in rows)}")
        found |= called
    return [row for row in rows if row.name in found]
