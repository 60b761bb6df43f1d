"""Of all ways to pin blocks the one that streams least is found, without looking at each."""

from __future__ import annotations

from random import Random

import pytest

from shoal.partition.pinning import Pinnings
from shoal.partition.spec import BlockId, LayerSpec, ModelSpec, MoeSpec, RopeSpec


def spec(layers: int, moe: MoeSpec | None) -> ModelSpec:
    return ModelSpec(
        family="llama",
        layers=(LayerSpec(moe=moe is not None),) * layers,
        hidden=64,
        vocab=128,
        context=1024,
        heads=4,
        kv_heads=2,
        head_dim=16,
        ffn=64,
        ropes=(RopeSpec(16, 10000.0),),
        moe=moe,
    )


def extents(model: ModelSpec, random: Random, *, alike: bool) -> dict[BlockId, int]:
    """Few sizes, so that several ways stream as much."""
    usual = {kind: random.randint(1, 20) for kind in ("attn", "ffn", "router", "expert", "head")}
    blocks = [*model.blocks()[1:-1], *(BlockId("head", -1, place) for place in range(random.randint(1, 5)))]
    return {it: usual[it.kind] if alike else random.randint(1, 20) for it in blocks}


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("moe", [None, MoeSpec(8, 2, 32, True)])
@pytest.mark.parametrize("keeps_head", [False, True])
def test_the_best_of_all_ways(alike: bool, moe: MoeSpec | None, keeps_head: bool) -> None:
    random, found = Random(7), 0
    for layers in range(1, 8):
        model = spec(layers, moe)
        sizes = extents(model, random, alike=alike)
        known = Pinnings(model, sizes, keeps_head=keeps_head)
        dense = {block: nbytes for block, nbytes in sizes.items() if block.kind != "expert"}
        slots_bytes = 2 * max((sizes[it] for it in sizes if it.kind == "expert"), default=0)
        for _ in range(100):
            room, window = random.randint(-5, sum(sizes.values())), random.randint(0, 60)
            left = room - slots_bytes - sum(dense.values())
            each = ((it.streamed_bytes, it.window_bytes(window), it.counts) for it in known._candidates)
            least = min((it for it in each if it[1] - it[0] <= left), default=None)
            best = known.best(room, window)
            if least is None or best is None:
                assert least is best is None
                continue
            found += 1
            streamed = sum(nbytes for block, nbytes in dense.items() if block not in best.pinned)
            assert (streamed, best.window_bytes) == least[:2]
    assert found > 100
