"""Random groups of 1 to 8 ranks: any family, format, type, shares and cut, in memory or streamed, compute as one rank.

Run by `make test-cluster`; TRIALS says how many groups each family is tried with, SEED which.
"""

from __future__ import annotations

import os
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import tiny
from fakes.group.ranks import Group, Opened, orders, resident
from fakes.packing import build_pack
from fakes.running import FP32, planned, relative_error
from fakes.streaming import streaming_plan

from shoal.engine.collective import Alone
from shoal.engine.executor import Executor
from shoal.engine.rank import Rank
from shoal.models.checkpoint.checkpoint import open_checkpoint
from shoal.models.checkpoint.shard import CheckpointShard
from shoal.models.transformer import Transformer
from shoal.offload.block_store import BlockStore, ResidentStore
from shoal.offload.kv.pool import KvPool
from shoal.offload.window.window_store import WindowStore
from shoal.partition.plan import Plan

pytestmark = pytest.mark.cluster

TRIALS = int(os.environ.get("TRIALS", "2"))
SEED = int(os.environ.get("SEED", "0"))
TOLERANCE = 1e-3
FLOATS, SMALL, LARGE = ["F16", "BF16"], ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"], ["Q4_K", "Q5_K", "Q6_K"]


def random_model(source: np.random.Generator, family: str, path: Path) -> str:
    """Saves a model with eight query heads and eight groups of columns. → what it is"""
    hf = family != "phi3" and source.random() < 0.3
    type = str(source.choice(FLOATS if hf else [*FLOATS, *SMALL, *LARGE]))
    block = 256 if type in LARGE else 32 if type in SMALL else 16
    kv_heads = 8 if family == "olmo2" and source.random() < 0.5 else int(source.choice([1, 2, 4, 8]))
    sizes: dict[str, Any] = {
        "num_attention_heads": 8,
        "num_key_value_heads": kv_heads,
        "hidden_size": 256,
        "intermediate_size": 8 * block,
        "num_hidden_layers": 2,
    }
    known = vars(tiny.config(family))
    if "head_dim" in known and known["head_dim"] is not None:
        sizes["head_dim"] = 32
    if family == "gemma3":
        sizes |= {"layer_types": ["sliding_attention", "full_attention"]}
    if family == "phi3":
        factors = [1.0 + 0.1 * i for i in range(8)]
        sizes["rope_parameters"] = known["rope_parameters"] | {
            "short_factor": factors,
            "long_factor": factors,
        }
    if family in tiny.EXPERT_SIZES:
        sizes |= {tiny.EXPERT_SIZES[family]: 8 * block}
        sizes |= {"num_local_experts" if family == "mixtral" else "num_experts": 8}
    if family == "qwen2_moe":
        sizes |= {"shared_expert_intermediate_size": 8 * block}
    model = tiny.hf_model(family, seed=int(source.integers(1000)), **sizes)
    save = tiny.save_hf if hf else tiny.save_gguf
    save(model, path, type=type)
    return f"{family} {'safetensors' if hf else 'GGUF'} {type}, {kv_heads} KV heads"


def streaming(directory: Path, source: np.random.Generator) -> Opened:
    """Some of the ranks stream, each from a pack of its shard."""

    def opened(part: CheckpointShard, base: Plan) -> tuple[Plan, BlockStore]:
        if part.shard == "whole" or source.random() < 0.3:
            return resident(part, base)
        pack = build_pack(part, directory / str(part.shard.rank))
        plan = streaming_plan(base, part.spec, pack, slots=4, part_tokens=base.part_tokens)
        return plan, WindowStore.open(plan, pack)

    return opened


@pytest.mark.parametrize("trial", range(TRIALS))
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_any_group_computes_as_one(family: str, trial: int, tmp_path: Path) -> None:
    source = np.random.default_rng([SEED, trial, tiny.FAMILIES.index(family)])
    path = tmp_path / "m.gguf"
    what = random_model(source, family, path)
    ranks = int(source.integers(1, 9))
    shares = [] if source.random() < 0.3 else source.choice([1, 1, 2, 3, 7], ranks).tolist()
    how: dict[str, Any] = {
        "experts": str(source.choice(["columns", "whole"])),
        "cut_vocabulary": bool(source.random() < 0.3),
    }
    part_tokens = int(source.choice([7, 32, 1 << 20]))
    streams = bool(source.random() < 0.5)
    what = f"{what}; {ranks} ranks, shares {shares}, {how}, parts of {part_tokens}, streaming {streams}"
    with open_checkpoint(path) as checkpoint:
        base = replace(planned(checkpoint, FP32, 1 << 33), part_tokens=part_tokens)
        spec = checkpoint.spec
        executor = Executor(
            Transformer(spec), base, ResidentStore.load(base, checkpoint), KvPool(spec, base.kv), Alone()
        )
        alone = Rank(executor, clock=lambda: 0.0)
        opened = streaming(tmp_path, source) if streams else resident
        worst = 0.0
        with closing(Group(checkpoint, base, ranks, shares, opened=opened, **how)) as group:
            for order in orders(spec.vocab, seed=trial):
                first, *_ = group.run(order)
                wanted = alone.run(order).logits
                assert len(first.logits) == len(wanted)
                if wanted.size:
                    worst = max(worst, relative_error(first.logits, wanted))
            assert all(member.seen == group.members[0].seen for member in group.members), what
    print(f"{worst:.1e} {what}")
    assert worst <= TOLERANCE, what
