"""Models, machines and links that the tests of groups use."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

from shoal.partition.machines import LinkSpeed, Machine
from shoal.partition.plan import Wanted
from shoal.partition.spec import BlockId, LayerSpec, ModelSpec, MoeSpec, RopeSpec

GB = 10**9
SLICES = 8


def model(moe: MoeSpec | None = None, **changes: object) -> ModelSpec:
    """Llama-3-8B, or what `changes` make of it."""
    sizes: dict[str, object] = {
        "layers": (LayerSpec(moe=moe is not None),) * 32,
        "hidden": 4096,
        "vocab": 128256,
        "context": 8192,
        "heads": 32,
        "kv_heads": 8,
        "head_dim": 128,
        "ffn": 0 if moe else 14336,
        "ropes": (RopeSpec(64, 5e5),),
    }
    return ModelSpec(family="llama", moe=moe, **(sizes | changes))  # type: ignore[arg-type]


def small() -> ModelSpec:
    """A model of half a billion weights, with two KV heads."""
    return model(
        layers=(LayerSpec(),) * 24, hidden=896, vocab=151936, heads=14, kv_heads=2, head_dim=64, ffn=4864
    )


def mixture() -> ModelSpec:
    """A mixture with norms over all heads at once, as OLMoE has them."""
    moe = MoeSpec(64, 8, 1024, True)
    return model(
        moe,
        layers=(LayerSpec(moe=True),) * 16,
        hidden=2048,
        vocab=50304,
        heads=16,
        kv_heads=16,
        qk_norm="full",
    )


def block_bytes(spec: ModelSpec, weight_bytes: float = 0.5625) -> Mapping[BlockId, int]:
    """Of all blocks, the head of the vocabulary in slices. `weight_bytes`: of each weight; 4.5 bits by default."""
    hidden, moe = spec.hidden, spec.moe
    weights = {
        "embed": hidden * spec.vocab,
        "attn": 2 * hidden * spec.head_dim * (spec.heads + spec.kv_heads),
        "ffn": 3 * hidden * spec.ffn,
        "router": 4 * hidden * moe.experts / weight_bytes + 3 * hidden * moe.shared_ffn if moe else 0,
        "expert": 3 * hidden * moe.ffn if moe else 0,
    }
    blocks = {it: int(weights[it.kind] * weight_bytes) for it in spec.blocks() if it.kind != "head"}
    slice_bytes = int(hidden * spec.vocab * weight_bytes / SLICES)
    return blocks | {BlockId("head", -1, number): slice_bytes for number in range(SLICES)}


def wanted(spec: ModelSpec, context_tokens: int = 4608, **changes: object) -> Wanted:
    asked = Wanted(
        spec,
        context_tokens=context_tokens,
        kv_tokens=None,
        kv_type="f16",
        chunk_tokens=256,
        sequences=4,
        guesses=32,
        threads=2,
    )
    return asked._replace(**changes)  # type: ignore[arg-type]


def machine(
    name: str, memory: float = 16, pace: float = 20, flops: float = 400, disk: float = 0, threads: int = 4
) -> Machine:
    """In GB, GB/s, GFLOPS and GB/s."""
    return Machine(name, int(memory * GB), pace * GB, flops * GB, disk * GB, threads)


def all_linked(count: int, link: LinkSpeed) -> dict[tuple[int, int], LinkSpeed]:
    return dict.fromkeys(combinations(range(count), 2), link)


CABLE = LinkSpeed(0.1e-3, 125e6, "cable")  # 1 Gb/s
WIFI = LinkSpeed(27e-3, 4e6, "Wi-Fi")
