"""Models for measurements on a graphics card: shapes, and loading them without a file of their size.

Weights are made while they are read (`inputs.hollow`), so neither a disk nor a page cache has to hold them.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from engines.engine_shoal import Shoal
from inputs import hollow
from inputs.shapes import SHAPES, Shape

from shoal.daemon.loading import runnable

# Qwen3-30B-A3B as it is published, in bfloat16; an 8B model in 4 bits; and both so small that a laptop runs them.
MIXTURE = replace(SHAPES["qwen3-30b-a3b"], name="qwen3-30b-a3b-bf16", mix="BF16")
DENSE = SHAPES["llama-8b"]
SMALL_MIXTURE = replace(
    MIXTURE, name="small-mixture", layers=3, hidden=256, heads=4, kv_heads=2, ffn=256, vocab=1024, head=64,
    experts=16, active=4, context=2048,
)  # fmt: skip
SMALL_DENSE = replace(
    DENSE, name="small-dense", layers=3, hidden=256, heads=4, kv_heads=2, ffn=512, vocab=1024, context=2048
)


def weights_bytes(shape: Shape) -> int:
    from synthetic import nbytes

    return sum(map(nbytes, shape.tensors()))


def written(shape: Shape, directory: Path) -> Path:
    """The file of a model, which has everything but weights."""
    return hollow.cached(shape, directory, None, lambda done, total: None)


def loaded(shape: Shape, directory: Path, **how: Any) -> tuple[Shoal, dict[str, Any]]:
    """An engine with the model, and what it says of itself. `how`: as `Shoal.load`."""
    path = written(shape, directory)
    runnable.open_checkpoint = hollow.filled  # type: ignore[attr-defined]
    engine = Shoal()
    return engine, engine.load(model=str(path), **how)
