"""Shapes of known models, and the stored type of each of their tensors: data for `synthetic`.

Knows sizes, tensor names and llama.cpp's rules for the "mixes" (Q4_K_M and the like). Does not know what is in a
tensor, nor files.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

Mix = Literal["F32", "BF16", "Q8_0", "Q4_1", "Q4_K_M", "Q5_K_M"]

_FALLBACK = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}  # if rows are not whole blocks of 256

# Deviation of an embedding to which layers add little, so that each token has a routing of its own.
LOUD = 4.0


class TensorShape(NamedTuple):
    """One tensor: its GGUF name, its sizes with the columns last, and its stored type."""

    name: str
    sizes: tuple[int, ...]
    type: str
    loudness: float = 1.0  # 1: its values keep sums at their size


@dataclass(frozen=True)
class Shape:
    """The sizes of one model. If there are experts, `ffn` is that of one expert."""

    name: str
    arch: str
    mix: Mix
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    context: int
    rope_base: float
    norm_eps: float = 1e-5
    tied: bool = False
    biases: bool = False  # of q, k and v
    qk_norm: Literal["", "heads", "all"] = ""  # over each head, or over all heads at once
    head: int = 0  # the size of a head, if it is not hidden / heads
    experts: int = 0
    active: int = 0

    @property
    def head_dim(self) -> int:
        return self.head or self.hidden // self.heads

    def tensors(self) -> Iterator[TensorShape]:
        """Every tensor, in the order of the file."""
        query, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        embedding = self._matrix("token_embd", self.vocab, self.hidden)
        yield embedding._replace(loudness=LOUD * self.hidden**0.5) if self.experts else embedding
        for i in range(self.layers):
            layer = f"blk.{i}."
            yield from self._vectors(layer + "attn_norm", layer + "ffn_norm", size=self.hidden)
            for role, rows, cols in (
                ("q", query, self.hidden),
                ("k", kv, self.hidden),
                ("v", kv, self.hidden),
                ("output", self.hidden, query),
            ):
                yield self._matrix(f"{layer}attn_{role}", rows, cols, layer=i)
                if self.biases and role != "output":
                    yield TensorShape(f"{layer}attn_{role}.bias", (rows,), "F32")
            if self.qk_norm:
                whole = self.qk_norm == "all"
                yield from self._vectors(layer + "attn_q_norm", size=query if whole else self.head_dim)
                yield from self._vectors(layer + "attn_k_norm", size=kv if whole else self.head_dim)
            suffix = "_exps" if self.experts else ""
            if self.experts:
                yield TensorShape(f"{layer}ffn_gate_inp.weight", (self.experts, self.hidden), "F32")
            for role in ("gate", "up"):
                yield self._matrix(f"{layer}ffn_{role}{suffix}", self.ffn, self.hidden, layer=i)
            yield self._matrix(f"{layer}ffn_down{suffix}", self.hidden, self.ffn, layer=i)
        yield from self._vectors("output_norm", size=self.hidden)
        if not self.tied:
            yield self._matrix("output", self.vocab, self.hidden)

    def _matrix(self, name: str, rows: int, cols: int, layer: int = 0) -> TensorShape:
        sizes = (self.experts, rows, cols) if name.endswith("_exps") else (rows, cols)
        return TensorShape(f"{name}.weight", sizes, self._type(name, cols, layer))

    def _vectors(self, *names: str, size: int) -> Iterator[TensorShape]:
        return (TensorShape(f"{name}.weight", (size,), "F32") for name in names)

    def _type(self, name: str, cols: int, layer: int) -> str:
        """The type that llama.cpp chooses (llama-quant.cpp) for models that do not have exactly eight experts."""
        head = name == "output" or (name == "token_embd" and self.tied)
        if not self.mix.endswith("_M"):
            return "Q8_0" if head and self.mix.startswith("Q") else self.mix
        kind = self.mix.removesuffix("_M")
        if head or (
            name.endswith(("attn_v", "ffn_down", "ffn_down_exps")) and _more_bits(layer, self.layers)
        ):
            kind = "Q6_K"
        return _FALLBACK[kind] if cols % 256 else kind


def _more_bits(layer: int, layers: int) -> bool:
    """Whether the mixes give this layer more bits: those in the first and last eighth, and every third between them."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


_LLAMA_3B = Shape(
    name="llama-3b",  # Llama-3.2-3B with the vocabulary of SmolLM2
    arch="llama",
    mix="BF16",
    layers=28,
    hidden=3072,
    heads=24,
    kv_heads=8,
    ffn=8192,
    vocab=49152,
    context=8192,
    rope_base=500000.0,
    tied=True,
)

_OLMOE_HALF = Shape(
    name="olmoe-half",  # OLMoE-1B-7B with 8 of its 16 layers
    arch="olmoe",
    mix="Q4_K_M",
    layers=8,
    hidden=2048,
    heads=16,
    kv_heads=16,
    ffn=1024,
    vocab=50304,
    context=4096,
    rope_base=10000.0,
    qk_norm="all",
    experts=64,
    active=8,
)

SHAPES = {
    shape.name: shape
    for shape in (
        Shape(
            name="llama-21m",  # where sums weigh more than weights
            arch="llama",
            mix="F32",
            layers=8,
            hidden=384,
            heads=6,
            kv_heads=6,
            ffn=1024,
            vocab=8192,
            context=2048,
            rope_base=10000.0,
        ),
        Shape(
            name="llama-34m",
            arch="llama",
            mix="F32",
            layers=8,
            hidden=512,
            heads=8,
            kv_heads=8,
            ffn=1408,
            vocab=8192,
            context=2048,
            rope_base=10000.0,
        ),
        Shape(
            name="llama-97m",
            arch="llama",
            mix="F32",
            layers=12,
            hidden=768,
            heads=12,
            kv_heads=12,
            ffn=2048,
            vocab=8192,
            context=2048,
            rope_base=10000.0,
        ),
        Shape(
            name="llama-1.1b",  # TinyLlama
            arch="llama",
            mix="Q4_K_M",
            layers=22,
            hidden=2048,
            heads=32,
            kv_heads=4,
            ffn=5632,
            vocab=32000,
            context=2048,
            rope_base=10000.0,
        ),
        Shape(
            name="qwen2-0.5b",
            arch="qwen2",
            mix="Q5_K_M",
            layers=24,
            hidden=896,
            heads=14,
            kv_heads=2,
            ffn=4864,
            vocab=151936,
            context=32768,
            rope_base=1e6,
            norm_eps=1e-6,
            tied=True,
            biases=True,
        ),
        _OLMOE_HALF,
        replace(_OLMOE_HALF, name="olmoe-half-q8_0", mix="Q8_0"),
        replace(_OLMOE_HALF, name="olmoe-half-bf16", mix="BF16"),
        Shape(
            name="smollm2-bf16",  # SmolLM2-135M
            arch="llama",
            mix="BF16",
            layers=30,
            hidden=576,
            heads=9,
            kv_heads=3,
            ffn=1536,
            vocab=49152,
            context=8192,
            rope_base=100000.0,
            tied=True,
        ),
        Shape(
            name="smollm2-1.7b",
            arch="llama",
            mix="Q4_K_M",
            layers=24,
            hidden=2048,
            heads=32,
            kv_heads=32,
            ffn=8192,
            vocab=49152,
            context=8192,
            rope_base=130000.0,
            tied=True,
        ),
        _LLAMA_3B,
        replace(_LLAMA_3B, name="llama-3b-q4_k_m", mix="Q4_K_M"),  # as most people have it
        Shape(
            name="mistral-7b",  # Mistral-7B-v0.3
            arch="llama",
            mix="Q4_K_M",
            layers=32,
            hidden=4096,
            heads=32,
            kv_heads=8,
            ffn=14336,
            vocab=32768,
            context=32768,
            rope_base=1e6,
        ),
        Shape(
            name="llama-70b",  # Llama-2-70B
            arch="llama",
            mix="Q4_K_M",
            layers=80,
            hidden=8192,
            heads=64,
            kv_heads=8,
            ffn=28672,
            vocab=32000,
            context=4096,
            rope_base=10000.0,
        ),
        Shape(
            name="llama-8b",  # Llama-3.1-8B
            arch="llama",
            mix="Q4_K_M",
            layers=32,
            hidden=4096,
            heads=32,
            kv_heads=8,
            ffn=14336,
            vocab=128256,
            context=131072,
            rope_base=500000.0,
        ),
        Shape(
            name="qwen3-30b-a3b",
            arch="qwen3moe",
            mix="Q4_K_M",
            layers=48,
            hidden=2048,
            heads=32,
            kv_heads=4,
            ffn=768,
            vocab=151936,
            context=32768,
            rope_base=1e6,
            norm_eps=1e-6,
            head=128,
            qk_norm="heads",
            experts=128,
            active=8,
        ),
    )
}
