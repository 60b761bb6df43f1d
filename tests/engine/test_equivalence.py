"""Shoal's logits against `transformers`, family by family, from both kinds of checkpoint.

fp32, prefill in chunks and then decode with KV: max |Δ| ≤ 1e-3 of the logit scale (in practice about 1e-6).
"""

from __future__ import annotations

import random
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from fakes import tiny
from fakes.running import Running, relative_error
from inputs.upcycle import upcycle

TOLERANCE = 1e-3
LENGTH = 45


def tokens(vocab: int, seed: int, length: int = LENGTH) -> list[int]:
    return random.Random(seed).choices(range(vocab), k=length)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("seed", [0, 1])
def test_hf_checkpoint(family: str, seed: int, tmp_path: Path) -> None:
    model = tiny.hf_model(family, seed=seed)
    tiny.save_hf(model, tmp_path / "m", sharded=seed == 1)
    running = Running(tmp_path / "m")
    ids = tokens(running.spec.vocab, seed)
    expected = tiny.logits(model, ids)
    for prefill in ([30], [7, 1, 20], []):
        assert relative_error(running.logits(ids, prefill), expected) <= TOLERANCE


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_gguf_checkpoint(family: str, tmp_path: Path) -> None:
    model = tiny.hf_model(family, seed=3)
    tiny.save_gguf(model, tmp_path / "m.gguf", type="F32")
    running = Running(tmp_path / "m.gguf")
    ids = tokens(running.spec.vocab, 3)
    assert relative_error(running.logits(ids, [30]), tiny.logits(model, ids)) <= TOLERANCE


TYPES = ["Q4_0", "Q4_1", "Q5_0", "Q8_0", "IQ4_NL", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]


# Which kernels multiply a type, a dense model and a mixture show; the two others, once in each kind of blocks.
@pytest.mark.parametrize(
    ("family", "type"),
    [*product(["llama", "mixtral"], TYPES), *product(["qwen3", "qwen2_moe"], ["Q4_0", "Q4_K"])],
)
def test_quantised_gguf_checkpoint(family: str, type: str, tmp_path: Path) -> None:
    """Against `transformers` on the weights that were stored: inputs are rounded too, but finely."""
    wide = 256 if type.endswith("_K") else 64
    sizes = dict.fromkeys(("hidden_size", "intermediate_size", "moe_intermediate_size"), wide)
    sizes |= {"shared_expert_intermediate_size": 2 * wide, "head_dim": wide // 4}
    known = vars(tiny.config(family))
    model = tiny.hf_model(family, seed=11, **{name: size for name, size in sizes.items() if known.get(name)})
    tiny.save_gguf(model, tmp_path / "m.gguf", type=type)
    running = Running(tmp_path / "m.gguf")
    ids = tokens(running.spec.vocab, 11)
    for prefill in ([30], [7, 30]):
        assert relative_error(running.logits(ids, prefill), tiny.logits(model, ids)) <= TOLERANCE


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_sequences_do_not_disturb_each_other(family: str, tmp_path: Path) -> None:
    """Three sequences at different positions in one step give the logits that each gives alone, to the bit."""
    tiny.save_hf(tiny.hf_model(family, seed=5), tmp_path / "m")
    running = Running(tmp_path / "m")
    texts = [tokens(running.spec.vocab, seed, length) for seed, length in ((1, 20), (2, 33), (3, 9))]
    alone = [running.logits(ids, [len(ids) - 1]) for ids in texts]
    pages = [running.kv.table.take(1) or [] for _ in texts]
    first = running.step(*[(ids[:-1], 0, own) for ids, own in zip(texts, pages, strict=True)])
    second = running.step(*[(ids[-1:], len(ids) - 1, own) for ids, own in zip(texts, pages, strict=True)])
    ends = np.cumsum([len(ids) - 1 for ids in texts])
    together = [
        np.concatenate((rows, last[None]))
        for rows, last in zip(np.split(first, ends[:-1]), second, strict=True)
    ]
    for got, want in zip(together, alone, strict=True):
        assert np.array_equal(got, want)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_no_bit_depends_on_how_a_text_is_cut(family: str, tmp_path: Path) -> None:
    """A text read at once gives the logits that it gives token by token."""
    tiny.save_hf(tiny.hf_model(family, seed=6), tmp_path / "m")
    running = Running(tmp_path / "m")
    ids = tokens(running.spec.vocab, 6, 120)
    assert np.array_equal(running.logits(ids, [len(ids)]), running.logits(ids, []))


def test_upcycled_mixture_equals_the_dense_model(tmp_path: Path) -> None:
    """Every FFN as 8 identical experts, top-2, random routers: the same function."""
    tiny.save_gguf(tiny.hf_model("llama", seed=7), tmp_path / "dense.gguf", type="Q8_0")
    upcycle(tmp_path / "dense.gguf", tmp_path / "mixture.gguf", experts=8, active=2)
    dense, mixture = Running(tmp_path / "dense.gguf"), Running(tmp_path / "mixture.gguf")
    ids = tokens(dense.spec.vocab, 7)
    assert mixture.spec.moe is not None
    # the factors sum to one up to rounding, and a last bit may round an input to 16 bits the other way
    assert relative_error(mixture.logits(ids, [30]), dense.logits(ids, [30])) <= 2e-4
