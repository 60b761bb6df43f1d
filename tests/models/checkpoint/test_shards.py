"""Shards compute the model: the partials of all ranks, added in the order of ranks, are the whole model's.

Their f32 sums have another order, so max |Δ| ≤ 1e-5 of the partial's scale. That holds for quantised weights too:
inputs are rounded to 16 bits in groups of 32 columns, and a group belongs to one rank. Where it does not (the size of
heads is not a multiple of 32) the tolerance is 1e-4. The logits are the whole model's to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import tiny
from fakes.packing import tiny_checkpoint
from fakes.running import relative_error

from shoal.kernels import WEIGHT_TYPES, gather_rows, home_of
from shoal.kernels.arrays import Bytes, Floats, Ids
from shoal.kernels.band_layout import from_bands
from shoal.kernels.matrix import Matrix
from shoal.models.checkpoint.checkpoint import Checkpoint
from shoal.models.checkpoint.shard import AnyCheckpoint, CheckpointShard
from shoal.models.step import Step
from shoal.models.transformer import Transformer
from shoal.models.weights import Weights
from shoal.offload.kv.pool import KvPool
from shoal.offload.pack.layout import grains_of, part_of
from shoal.partition.memory_layout import PAGE_TOKENS
from shoal.partition.plan import KvPlan
from shoal.partition.slicing import divide
from shoal.partition.spec import BlockId

TOLERANCE = 1e-5
ROUNDED_APART = 1e-4
LENGTH = PAGE_TOKENS + 6
NORMED_WHOLE = {"olmo2", "olmoe"}  # q and k over all heads
CUT = [family for family in tiny.FAMILIES if family not in NORMED_WHOLE]
QUANTISED = [kind.name for kind in WEIGHT_TYPES if kind.quantised]


class Member:
    """What one rank, or a process that has the whole model, computes of each block."""

    def __init__(self, checkpoint: AnyCheckpoint) -> None:
        self.home = home_of("cpu")
        self.spec = checkpoint.spec
        self.checkpoint = checkpoint
        self.model = Transformer(self.spec)
        self.kv = KvPool(self.spec, KvPlan(2, PAGE_TOKENS, "f32", 0))
        self.step = Step.build([([0] * LENGTH, 0, [0, 1], 1)])

    def read(self, kind: str, layer: int, expert: int = -1) -> Weights:
        return self.checkpoint.read_block(BlockId(kind, layer, expert))  # type: ignore[arg-type]

    def embed(self, ids: Ids) -> Floats:
        """The rows that this rank has; zeros for the others."""
        if not self.spec.vocab:
            return np.zeros((len(ids), self.spec.hidden), np.float32)
        shard = self.checkpoint.shard
        first = 0 if shard == "whole" else shard.ranges.vocab.start
        mine = (ids >= first) & (ids < first + self.spec.vocab)
        rows = np.zeros((len(ids), self.spec.hidden), np.float32)
        rows[mine] = gather_rows(self.read("embed", -1).matrix["embed"], ids[mine] - first)
        return self.model.embed(self.home, rows)

    def attend(self, layer: int, hidden: Floats) -> Floats:
        (part,) = self.step.parts
        rotations, pages = self.model.rotations(part), self.kv.layers[layer]
        weights = self.read("attn", layer)
        return self.model.attend(
            self.home, layer, weights, hidden, part.segments, rotations, pages, lambda partial: partial
        )

    def feed_forward(self, layer: int, hidden: Floats) -> Floats:
        if not self.spec.layers[layer].moe:
            return self.model.feed_forward(self.home, layer, self.read("ffn", layer), hidden)
        assert self.spec.moe is not None
        x, routing, shared = self.model.route(self.home, self.read("router", layer), hidden)
        partial = np.zeros_like(x) if shared is None else shared
        experts = {expert: self.read("expert", layer, expert) for expert in self.spec.moe.own}
        self.model.mix(self.home, layer, experts, x, routing, partial)
        return partial

    def head(self, hidden: Floats) -> Floats:
        if not self.spec.vocab:
            return np.empty((len(hidden), 0), np.float32)
        weights = self.read("head", -1)
        if self.spec.tied:
            weights = Weights({"head": self.read("embed", -1).matrix["embed"]}, weights.vector)
        return self.model.head(self.home, weights, hidden)


def group(checkpoint: Checkpoint, ranks: int, shares: Sequence[float] = (), **how: Any) -> list[Member]:
    shards = divide(checkpoint.spec, ranks, grains_of(checkpoint, "keep"), shares, **how)
    return [Member(CheckpointShard(checkpoint, shard)) for shard in shards]


def assert_computes_the_model(
    checkpoint: Checkpoint,
    ranks: int,
    shares: Sequence[float] = (),
    tolerance: float = TOLERANCE,
    **how: Any,
) -> None:
    whole, members = Member(checkpoint), group(checkpoint, ranks, shares, **how)

    def agreed(compute: Callable[[Member], Floats]) -> Floats:
        expected = compute(whole)
        total = sum((compute(member) for member in members), np.zeros_like(expected))
        assert relative_error(total, expected) <= tolerance
        return expected

    spec = checkpoint.spec
    ids = np.random.default_rng(ranks).integers(spec.vocab, size=LENGTH)
    hidden = agreed(lambda member: member.embed(ids))
    for layer in range(len(spec.layers)):
        for kind, compute in (("attn", Member.attend), ("ffn", Member.feed_forward)):
            entered = hidden
            total = agreed(lambda member, c=compute, at=layer, x=entered: c(member, at, x))  # type: ignore[misc]
            last = "router" if kind == "ffn" and spec.layers[layer].moe else kind
            hidden = hidden + whole.model.leave(whole.home, whole.read(last, layer), total)
    logits = np.concatenate([member.head(hidden) for member in members], 1)
    assert np.array_equal(logits, whole.head(hidden))


@contextmanager
def model(directory: Path, family: str, type: str = "F32") -> Iterator[Checkpoint]:
    """A tiny model; quantised ones are large enough to be cut between blocks of 256."""
    sizes: dict[str, Any] = {}
    if type not in ("F32", "F16", "BF16"):
        sizes = {"hidden_size": 512, "intermediate_size": 768, "head_dim": 256, "num_hidden_layers": 1}
        sizes |= {"moe_intermediate_size": 512, "shared_expert_intermediate_size": 512}
        known = vars(tiny.config(family))
        sizes = {name: size for name, size in sizes.items() if known.get(name)}
        sizes |= {} if "head_dim" in sizes else {"hidden_size": 1024}
        if family == "phi3":
            sizes["rope_parameters"] = {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
            }
    with tiny_checkpoint(directory, family, type, **sizes) as checkpoint:
        yield checkpoint


@pytest.mark.parametrize("family", CUT)
def test_partials_add_up_to_the_model(family: str, tmp_path: Path) -> None:
    with tiny_checkpoint(tmp_path, family, "F16") as checkpoint:
        assert checkpoint.spec.kv_heads == 2
        for ranks, shares in ((2, ()), (2, (5, 2)), (3, ()), (4, (1, 1, 2, 2))):
            assert_computes_the_model(checkpoint, ranks, shares, experts="whole")
            if ranks == 2 or not checkpoint.spec.moe:  # the smallest experts have 32 columns
                assert_computes_the_model(checkpoint, ranks, shares, cut_vocabulary=True)


@pytest.mark.parametrize("family", CUT)
def test_also_of_hugging_face_directories(family: str, tmp_path: Path) -> None:
    """They have other tensors fused than GGUF, and each expert in tensors of its own."""
    with tiny_checkpoint(tmp_path, family, hf=True) as checkpoint:
        assert_computes_the_model(checkpoint, 3, experts="whole")
        assert_computes_the_model(checkpoint, 2, cut_vocabulary=True)


@pytest.mark.parametrize(("family", "ranks"), [("qwen3", 3), ("qwen2_moe", 2)])
@pytest.mark.parametrize("type", QUANTISED)
def test_also_of_quantised_files(type: str, family: str, ranks: int, tmp_path: Path) -> None:
    with model(tmp_path, family, type) as checkpoint:
        assert_computes_the_model(checkpoint, ranks)
        assert_computes_the_model(checkpoint, ranks, experts="whole")


def stored(matrix: Matrix) -> Bytes:
    """Its rows as files hold them, uint8 (rows, row bytes)."""
    row_bytes = matrix.type.row_bytes(matrix.cols)
    bands = matrix.data.reshape(-1, matrix.type.band_rows * row_bytes)
    return from_bands(matrix.type, bands)[: matrix.rows]


@pytest.mark.parametrize(
    ("family", "type"),
    [
        *(("qwen3", type) for type in ("F32", "F16", *QUANTISED)),
        ("qwen2_moe", "Q6_K"),
        ("phi3", "Q4_0"),
        ("phi3", "Q5_K"),
    ],
)
def test_bytes_are_those_of_the_whole_model(family: str, type: str, tmp_path: Path) -> None:
    """The ranks' bytes, put beside each other or one below the other, are the model's: nothing is rounded anew. Every
    rank has columns of all experts."""
    beside, below = {"o", "down", "shared_down"}, {"q", "k", "v", "gate", "up", "shared_gate", "shared_up"}
    below |= {"embed", "head"}
    with model(tmp_path, family, type) as checkpoint:
        how: Any = {"cut_vocabulary": True, "experts": "columns"}
        ranks = [part_of(checkpoint, "keep", rank, 2, **how) for rank in range(2)]
        for block in checkpoint.spec.blocks():
            whole = checkpoint.read_block(block).matrix
            holders = [part.read_block(block).matrix for part in ranks if block in part.spec.blocks()]
            assert len(holders) == 2
            for role, matrix in whole.items():
                parts = [stored(holder[role]) for holder in holders]
                if role in ("router", "shared_scale"):
                    assert all(np.array_equal(part, stored(matrix)) for part in parts)
                else:
                    assert role in beside | below
                    assert np.array_equal(np.concatenate(parts, int(role in beside)), stored(matrix)), (
                        block,
                        role,
                    )


def test_biases_of_sums_are_the_first_ranks_and_others_are_cut(tmp_path: Path) -> None:
    with tiny_checkpoint(tmp_path, "llama", hf=True, attention_bias=True, mlp_bias=True) as checkpoint:
        assert_computes_the_model(checkpoint, 2)
        first, second = (part_of(checkpoint, "keep", rank, 2) for rank in range(2))
        for kind in ("attn", "ffn"):
            block = BlockId(kind, 1)
            whole = checkpoint.read_vectors(block)
            mine, others = first.read_vectors(block), second.read_vectors(block)
            assert mine.keys() - others.keys() == whole.keys() & {"o_bias", "down_bias"} != set()
            assert {role: len(vector) for role, vector in others.items()} == second.vector_lengths(block)
            for role in others:
                if role.endswith("_bias"):
                    assert np.array_equal(np.concatenate((mine[role], others[role])), whole[role])
                else:
                    assert np.array_equal(others[role], whole[role])


@pytest.mark.parametrize("family", sorted(NORMED_WHOLE))
def test_weights_of_norms_over_all_heads_are_cut_with_the_heads(family: str, tmp_path: Path) -> None:
    """tests/engine/test_ranks.py tests what they compute, because there ranks sum in the middle of a block."""
    with tiny_checkpoint(tmp_path, family) as checkpoint:
        assert part_of(checkpoint, "keep", 0, 1) is checkpoint
        block, spec = BlockId("attn", 1), checkpoint.spec
        whole = checkpoint.read_vectors(block)
        parts = [part_of(checkpoint, "keep", rank, spec.heads) for rank in range(spec.heads)]
        read = [part.read_vectors(block) for part in parts]
        assert np.array_equal(np.concatenate([one["q_norm"] for one in read]), whole["q_norm"])
        first = [one["k_norm"] for one, part in zip(read, parts, strict=True) if part.spec.norm_share.adds_kv]
        assert np.array_equal(np.concatenate(first), whole["k_norm"])
        for one, part in zip(read, parts, strict=True):
            assert {role: len(vector) for role, vector in one.items()} == part.vector_lengths(block)


@pytest.mark.parametrize("type", ["Q8_0", "Q4_1", "Q6_K"])
def test_blocks_of_columns_that_two_ranks_need_are_whole_with_both(type: str, tmp_path: Path) -> None:
    """Each rank feeds zeros to the columns of the other."""
    wide = 256 if type == "Q6_K" else 64
    sizes = {
        "hidden_size": wide,
        "intermediate_size": 4 * wide,
        "num_attention_heads": 8,
        "num_hidden_layers": 2,
    }
    with tiny_checkpoint(tmp_path, "llama", type, **sizes, num_key_value_heads=4) as checkpoint:
        assert checkpoint.spec.head_dim * 8 == wide
        for ranks in (2, 3, 4):
            apart = checkpoint.spec.head_dim % 32 != 0
            assert_computes_the_model(checkpoint, ranks, tolerance=ROUNDED_APART if apart else TOLERANCE)
        block = BlockId("attn", 1)
        whole = stored(checkpoint.read_block(block).matrix["o"])
        margins = []
        for rank in range(4):
            part = part_of(checkpoint, "keep", rank, 4)
            assert part.shard != "whole"
            kind = part.matrices(block)["o"][0]
            mine = slice(*(kind.bytes_before(column) for column in part.shard.ranges.o_columns))
            assert np.array_equal(stored(part.read_block(block).matrix["o"]), whole[:, mine])
            margins.append(part.spec.o_margins)
        head_pair = 2 * checkpoint.spec.head_dim
        if type == "Q6_K":
            assert margins == [(rank * head_pair, (3 - rank) * head_pair) for rank in range(4)]
        else:
            assert margins == [(0, head_pair), (head_pair, 0)] * 2


def test_blocks_are_not_cut_where_the_pack_has_them(tmp_path: Path) -> None:
    with tiny_checkpoint(tmp_path, "qwen2", "F16") as checkpoint:  # 4 heads of 16, FFN of 96
        assert grains_of(checkpoint, "keep") == (1, 1, 1, 1)
        assert grains_of(checkpoint, "q8") == (32, 32, 1, 1)
        assert [part_of(checkpoint, "q4", rank, 2).spec.ffn for rank in range(2)] == [64, 32]
        assert part_of(checkpoint, "q8", 0, 3).spec.o_margins == (0, 0)
        assert part_of(checkpoint, "q8", 1, 3).spec.o_margins == (0, 16)
        assert part_of(checkpoint, "keep", 1, 3).spec.o_margins == (0, 0)
