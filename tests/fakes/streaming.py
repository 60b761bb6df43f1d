"""Helpers: a tiny model's pack, plans that stream parts of it, and both run side by side."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

import numpy as np
from fakes import tiny
from fakes.packing import build_pack
from fakes.running import FP32, Running

from shoal.engine.collective import Alone
from shoal.engine.executor import Executor
from shoal.kernels.arrays import Floats
from shoal.models.checkpoint.checkpoint import open_checkpoint
from shoal.models.transformer import Transformer
from shoal.offload.block_store import ResidentStore
from shoal.offload.kv.pool import KvPool
from shoal.offload.pack.manifest import Quant
from shoal.offload.pack.pack import Pack
from shoal.offload.window.pinned import PackReader
from shoal.offload.window.window_store import WindowStore
from shoal.partition.plan import BlockPlan, Plan
from shoal.partition.spec import BlockId, ModelSpec

Pinned = Callable[[BlockId], bool]
MODELS = {
    "tied": ("llama", {}),
    "untied": ("qwen2", {"vocab_size": 301}),
    "normed": ("gemma3", {}),
    "mixture": ("qwen3_moe", {}),
    "shared": ("qwen2_moe", {"num_hidden_layers": 2}),
}


def packed(
    directory: Path, family: str, seed: int = 0, quant: Quant = "keep", **overrides: object
) -> tuple[Path, Pack]:
    """A tiny model as a Hugging Face directory, and its pack."""
    path = directory / "model"
    tiny.save_hf(tiny.hf_model(family, seed=seed, **overrides), path)
    with open_checkpoint(path) as checkpoint:
        return path, build_pack(checkpoint, directory / "pack", quant)


def streaming_plan(
    base: Plan,
    spec: ModelSpec,
    pack: Pack,
    *,
    pinned: Pinned = lambda block: False,
    spare_bytes: int = 0,
    slots: int = 4,
    part_tokens: int = 1 << 30,
) -> Plan:
    """A plan with all blocks on disk except the pinned ones. The window holds the largest, and `spare_bytes` more."""
    body = [block for block in spec.blocks() if block.kind != "head"]
    heads = sorted(block for block in pack.blocks if block.kind == "head")
    blocks = [
        BlockPlan(block, pack.blocks[block].nbytes, "ram" if pinned(block) else "disk")
        for block in [*body, *heads]
    ]
    passing = [b.nbytes for b in blocks if b.tier == "disk" and b.block.kind not in ("embed", "expert")]
    return replace(
        base,
        blocks=tuple(blocks),
        window_bytes=max(passing, default=0) + spare_bytes,
        expert_slots=slots if any(b.tier == "disk" and b.block.kind == "expert" for b in blocks) else 0,
        part_tokens=part_tokens,
    )


def open_packed(plan: Plan, pack: Pack) -> WindowStore | ResidentStore:
    return WindowStore.open(plan, pack) if plan.streams else ResidentStore.load(plan, PackReader(pack))


class Streaming(Running):
    """A model whose weights come from its pack; all at once if all are pinned. To be closed."""

    def __init__(self, path: Path, pack: Pack, **choices: object) -> None:
        with open_checkpoint(path) as checkpoint:
            spec = checkpoint.spec
        base = Running(path, FP32).plan
        self.spec = spec
        self.plan = streaming_plan(base, spec, pack, **choices)  # type: ignore[arg-type]
        self.kv = KvPool(spec, self.plan.kv)
        self.store = open_packed(self.plan, pack)
        model = Transformer(spec)
        self.executor = Executor(model, self.plan, self.store, self.kv, Alone())

    def __enter__(self) -> Streaming:
        return self

    def __exit__(self, *_: object) -> None:
        self.store.close()


def texts(vocab: int, lengths: Collection[int]) -> list[list[int]]:
    generator = np.random.default_rng(1)
    return [generator.integers(0, vocab, n).tolist() for n in lengths]


def run(running: Running, ids: list[int]) -> Floats:
    """Logits of a prompt in two steps, and then of three tokens one by one."""
    return running.logits(ids, [len(ids) - 13, 10])
