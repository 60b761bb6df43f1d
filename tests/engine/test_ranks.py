"""Ranks of a group compute the model together: bit for bit the same on every rank, and what one rank alone computes.

Sums over ranks are in another order than sums within one, so logits differ by rounding: |Δ| ≤ 1e-3 of their scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import tiny
from fakes.group.ranks import Group, Turns, orders
from fakes.homes import NATIVE
from fakes.running import Running, relative_error

from shoal.engine.order import Order
from shoal.engine.rank import Rank
from shoal.kernels.arrays import Floats
from shoal.models.checkpoint.checkpoint import open_checkpoint
from shoal.offload.pack.layout import grains_of
from shoal.partition.slicing import divide

TOLERANCE = 1e-3


def alone(running: Running, work: Sequence[Order]) -> list[Floats]:
    rank = Rank(running.executor, clock=lambda: 0.0)
    return [rank.run(order).logits for order in work]


def assert_together_as_alone(
    path: Path, ranks: int, shares: Sequence[float] = (), part_tokens: int = 1 << 30, **how: Any
) -> None:
    running = Running(path)
    work = orders(running.spec.vocab, seed=ranks)
    expected = alone(running, work)
    with open_checkpoint(path) as checkpoint:
        group = Group(checkpoint, replace(running.plan, part_tokens=part_tokens), ranks, shares, **how)
        for order, wanted in zip(work, expected, strict=True):
            first, *others = group.run(order)
            assert len(first.logits) == len(wanted)
            if wanted.size:
                assert relative_error(first.logits, wanted) <= TOLERANCE
            assert all(not other.logits.size for other in others)
    assert group.members[0].seen
    assert all(member.seen == group.members[0].seen for member in group.members)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize(("ranks", "shares"), [(2, ()), (3, (1, 5, 2)), (4, ())])
def test_every_family_is_computed_together(
    family: str, ranks: int, shares: Sequence[float], tmp_path: Path
) -> None:
    """With heads (four ranks share two KV heads) and columns divided, evenly and not. Rank 0 has embedding and head,
    and the others do not see the token ids; or these are divided, too. Experts are cut by columns, or stay whole."""
    sizes = {tiny.EXPERT_SIZES[family]: 64} if family in tiny.EXPERT_SIZES else {}  # four times 16 columns
    path = tiny.save_gguf(tiny.hf_model(family, seed=3, **sizes), tmp_path / "m.gguf", type="F16")
    assert_together_as_alone(path, ranks, shares)
    assert_together_as_alone(path, ranks, shares, cut_vocabulary=True, experts="whole")


@pytest.mark.parametrize("experts", ["columns", "whole"])
@pytest.mark.parametrize("type", ["Q4_0", "Q8_0", "Q5_1", "IQ4_NL"])
@pytest.mark.parametrize("family", tiny.EXPERT_SIZES)
def test_quantised_weights_are_divided_between_blocks(
    family: str, type: str, experts: str, tmp_path: Path
) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 192, tiny.EXPERT_SIZES[family]: 96}
    path = tiny.save_gguf(tiny.hf_model(family, seed=5, **sizes), tmp_path / "m.gguf", type=type)
    assert_together_as_alone(path, 2, experts=experts)


def test_experts_of_large_blocks_are_divided_between_them(tmp_path: Path) -> None:
    """Three blocks of 256 columns for two ranks: one has two of them."""
    sizes = {"hidden_size": 256, "head_dim": 64, "moe_intermediate_size": 768, "num_hidden_layers": 1}
    path = tiny.save_gguf(tiny.hf_model("qwen3_moe", seed=5, **sizes), tmp_path / "m.gguf", type="Q4_K")
    with open_checkpoint(path) as checkpoint:
        parts = divide(checkpoint.spec, 2, grains_of(checkpoint, "keep"))
        assert [part.ranges.expert_ffn.size for part in parts] == [512, 256]
    assert_together_as_alone(path, 2)


@pytest.mark.parametrize("part_tokens", [1, 16])
def test_a_step_in_parts_sums_part_by_part(part_tokens: int, tmp_path: Path) -> None:
    path = tiny.save_gguf(tiny.hf_model("qwen2_moe", seed=5), tmp_path / "m.gguf", type="F16")
    assert_together_as_alone(path, 2, part_tokens=part_tokens)


def nearly_equal_experts(model: Any) -> None:
    """Makes all experts score alike but for rounding."""
    with torch.no_grad():
        for layer in model.model.layers:
            weight = layer.mlp.gate.weight
            weight.copy_(weight[:1] * (1 + 6e-8 * torch.arange(len(weight))[:, None]))


@pytest.mark.parametrize("family", tiny.EXPERT_SIZES)
def test_ranks_with_other_kernels_choose_the_same_experts(family: str, tmp_path: Path) -> None:
    """Though each decides by itself, and only rounding tells experts apart."""
    model = tiny.hf_model(family, seed=5)
    nearly_equal_experts(model)
    path = tiny.save_hf(model, tmp_path / "m")
    running = Running(path)
    machines = [NATIVE[-1], NATIVE[0], *NATIVE[1:-1], "reference"]  # the plainest first
    with open_checkpoint(path) as checkpoint:
        for kernels in pairwise(machines):
            homes: list[Any] = [Turns(name) for name in kernels]
            group = Group(checkpoint, running.plan, 2, homes=homes)
            for order in orders(running.spec.vocab, seed=2):
                group.run(order)
            mine, others = (home.chosen for home in homes)
            assert mine == others
            assert {expert for used, _ in mine for expert in used} != set(mine[0][0][:2]), (
                "not all choose the same"
            )
            assert group.members[0].seen == group.members[1].seen


def test_a_rank_whose_experts_nobody_asks_for_adds_nothing(tmp_path: Path) -> None:
    """One token has fewer experts than there are ranks."""
    path = tiny.save_gguf(tiny.hf_model("qwen3_moe", seed=5, num_experts=8), tmp_path / "m.gguf", type="F16")
    assert_together_as_alone(path, 4, experts="whole")
