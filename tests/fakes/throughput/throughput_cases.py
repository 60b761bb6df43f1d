"""Models and devices for tests of the throughput model, small enough to work out by hand."""

from __future__ import annotations

from typing import Any

from shoal.partition.plan import Wanted
from shoal.partition.spec import BlockId, LayerSpec, ModelSpec, MoeSpec, RopeSpec
from shoal.partition.throughput.profile import ANY, Accelerator, Device, Overheads, RowsLaw
from shoal.partition.throughput.weights_of import Product, Weighed

MB = 10**6


def spec(layers: int = 8, moe: MoeSpec | None = None, window: int | None = None, **more: Any) -> ModelSpec:
    sizes: dict[str, Any] = {
        "hidden": 1024,
        "vocab": 4096,
        "heads": 16,
        "kv_heads": 4,
        "head_dim": 64,
        "ffn": 4096,
    }
    kinds = tuple(LayerSpec(moe=moe is not None, window=window if i % 2 else None) for i in range(layers))
    return ModelSpec(
        family="llama",
        layers=kinds,
        context=1 << 17,
        ropes=(RopeSpec(64, 10000.0),),
        moe=moe,
        **(sizes | more),
    )


def weighed(model: ModelSpec, weight_bytes: float = 2.0, kind: str = "BF16", quant: str = "keep") -> Weighed:
    def product(rows: int, cols: int) -> Product:
        return Product(kind, rows, cols, int(rows * cols * weight_bytes))

    c, moe = model.hidden, model.moe
    q, kv = model.heads * model.head_dim, model.kv_heads * model.head_dim
    of: dict[str, tuple[Product, ...]] = {
        "embed": (product(model.vocab, c),),
        "attn": (product(q, c), product(kv, c), product(kv, c), product(c, q)),
        "ffn": (product(model.ffn, c), product(model.ffn, c), product(c, model.ffn)),
        "head": (product(model.vocab, c),),
    }
    if moe:
        shared = moe.shared_ffn
        beside = (product(shared, c), product(shared, c), product(c, shared)) if shared else ()
        of["router"] = (product(moe.experts, c), *beside)
        of["expert"] = (product(moe.ffn, c), product(moe.ffn, c), product(c, moe.ffn))
    products = {block: of[block.kind] for block in model.blocks()}
    sizes = {block: sum(it.nbytes for it in products[block]) for block in model.blocks()}
    extents = {block: nbytes for block, nbytes in sizes.items() if block.kind != "head"}
    products[BlockId("head", -1, 0)] = of["head"]
    extents[BlockId("head", -1, 0)] = sizes[BlockId("head")]
    return Weighed(model, quant, products, sizes, extents, MB, sum(sizes.values()))


def device(**more: Any) -> Device:
    figures: dict[str, Any] = {
        "name": "one",
        "memory_bytes": 16e9,
        "memory_bytes_per_s": 20e9,
        "flops": 200e9,
        "disk_bytes_per_s": 1e9,
        "threads": 2,
    }
    return Device(**(figures | more))


def free_card(**more: Any) -> Accelerator:
    """A device without fixed costs."""
    figures: dict[str, Any] = {
        "name": "gpu",
        "memory_bytes": 8e9,
        "memory_bytes_per_s": 1000e9,
        "flops": 50e12,
        "host_bytes_per_s": 20e9,
        **dict.fromkeys(("step_s", "layer_s", "mixture_s", "copy_s"), 0.0),
    }
    return Accelerator(**(figures | more))


def wanted(model: ModelSpec, **more: Any) -> Wanted:
    asked = Wanted(model, 1024, 1024, "f16", 256, 1, 0, 2)
    return asked._replace(**more)


FREE = Overheads(0.0, 0.0, 0.0, 0.0)
DENSE = weighed(spec())
MIXED = weighed(spec(moe=MoeSpec(32, 4, 512, True), ffn=0))
QUICK = Device("quick", 0.0, 1e15, 1e18, overheads=FREE)
# It multiplies slowly, with one row as with many; what it attends to it finds quickly.
SLOW = Device("slow", 0.0, 1e10, 1e13, products=(RowsLaw(ANY, 1.0, (1, 256), (1e-8, 1e-7)),))
