"""Published results of other systems, and what the throughput model says of their machines, written down by hand.

Both systems cut every layer, as our groups do, so `group_cost` predicts them; what they hold in memory is theirs.
Sources: TPI-LLM, arXiv 2410.00531, section 4; distributed-llama's table of Raspberry Pi 5.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from shoal.partition.group_cost import Cost, Placement
from shoal.partition.machines import LinkSpeed, Machine, Workload
from shoal.partition.plan import Wanted
from shoal.partition.rank_sizes import Held, Portion, Sizes
from shoal.partition.spec import BlockId, LayerSpec, ModelSpec, RopeSpec
from shoal.partition.sum_cost import Means, Network


class Published(NamedTuple):
    """A model, seconds for a token, and the largest peak of memory in GB, as published."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    token_s: float
    peak_gb: float


TPI_LLM: Mapping[str, Published] = {
    "Llama 2-3B": Published(26, 3200, 32, 32, 8640, 32000, 1.9, 1.4),
    "Llama 2-7B": Published(32, 4096, 32, 32, 11008, 32000, 2.6, 1.7),
    "Llama 2-13B": Published(40, 5120, 40, 40, 13824, 32000, 2.9, 2.1),
    "Llama 2-70B": Published(80, 8192, 64, 8, 28672, 32000, 26.1, 3.1),
    "Llama 3.1-8B": Published(32, 4096, 32, 8, 14336, 128256, 4.3, 5.4),
    "Llama 3.1-70B": Published(80, 8192, 64, 8, 28672, 128256, 29.9, 11.3),
    "Yi-34B": Published(60, 7168, 56, 8, 20480, 64000, 13.7, 4.9),
}
RANKS = 8
TPI_MEMORY_BYTES = 8e9
TPI_DISK_BYTES_PER_S = 1.30e9  # fitted: the one figure of the testbed that is not published
TPI_LINK = LinkSpeed(1e-3, 300e6 / 8)
# A sum as their sockets make it, with Nagle's algorithm and delayed acknowledgements; fitted.
TPI_ROUND_S = 34e-3

PI_5: Mapping[int, float] = {1: 0.564, 2: 0.444, 4: 0.331}  # nodes → seconds a token, Llama-3-8B in Q40
LLAMA_3_8B = Published(32, 4096, 32, 8, 14336, 128256, 0.0, 0.0)


def spec_of(model: Published) -> ModelSpec:
    dim = model.hidden // model.heads
    return ModelSpec(
        family="llama",
        layers=(LayerSpec(),) * model.layers,
        hidden=model.hidden,
        vocab=model.vocab,
        context=4096,
        heads=model.heads,
        kv_heads=model.kv_heads,
        head_dim=dim,
        ffn=model.ffn,
        ropes=(RopeSpec(dim, 10000.0),),
    )


def block_bytes(spec: ModelSpec, weight_bytes: float) -> dict[BlockId, int]:
    dim = spec.head_dim
    of = {
        "embed": spec.vocab * spec.hidden,
        "attn": 2 * spec.hidden * dim * (spec.heads + spec.kv_heads),
        "ffn": 3 * spec.hidden * spec.ffn,
        "head": spec.vocab * spec.hidden,
    }
    return {block: int(of[block.kind] * weight_bytes) for block in spec.blocks()}


def _predicted(
    model: Published, weight_bytes: float, machine: Machine, ranks: int, link: LinkSpeed, streams: bool
) -> float:
    """Seconds for a token."""
    spec = spec_of(model)
    sizes = Sizes.of(spec, block_bytes(spec, weight_bytes))
    wanted = Wanted(spec, 256, 256, "f32", 64, 1, 0, machine.threads)
    cost = Cost(wanted, sizes, Workload(32, 32))
    parts = []
    for rank in range(ranks):
        portion = Portion.even(spec, 1 / ranks, first=rank == 0)
        streamed = int(sizes.cut / ranks) + (sizes.head if rank == 0 else 0)
        parts.append(Placement(machine, portion, Held(0, streamed if streams else 0, 0.0, 64)))
    links = {(one, other): link for one in range(ranks) for other in range(one + 1, ranks)}
    network = Network([machine] * ranks, links, range(ranks))
    return cost.tensor(parts, network, [Means("star", "f32")]).token_s


def tpi_llm(name: str, disk_bytes_per_s: float = TPI_DISK_BYTES_PER_S) -> float:
    """As TPI-LLM says that it works: each rank streams all of its part from disk in every step, sums go over a star."""
    machine = Machine("laptop", int(TPI_MEMORY_BYTES), 15e9, 100e9, disk_bytes_per_s, 8)
    return _predicted(TPI_LLM[name], 4, machine, RANKS, TPI_LINK, True)


def tpi_cached(name: str) -> float | None:
    """Where a rank's weights find room beside the process: the system's page cache keeps them, and what is left is
    computing and the sums. None where they do not."""
    model = TPI_LLM[name]
    spec = spec_of(model)
    sizes = Sizes.of(spec, block_bytes(spec, 4))
    if sizes.cut / RANKS + sizes.head + sizes.embed > TPI_MEMORY_BYTES:
        return None
    machine = Machine("laptop", int(TPI_MEMORY_BYTES), 15e9, 100e9, 0.0, 8)
    here = _predicted(model, 4, machine, RANKS, LinkSpeed(1e-9, 1e12), False)
    return here + 2 * model.layers * TPI_ROUND_S


def tpi_peak_gb(name: str) -> float:
    """Of the head: the embedding and the head of the vocabulary, two layers' blocks of its part, and a process in
    torch with its buffers."""
    spec = spec_of(TPI_LLM[name])
    blocks = block_bytes(spec, 4)
    window = 2 * (blocks[BlockId("attn", 0)] + blocks[BlockId("ffn", 0)]) / RANKS
    ends = blocks[BlockId("embed")] + blocks[BlockId("head")]
    return (ends + window + 0.5e9) / 1e9


def pi_5(nodes: int, memory_bytes_per_s: float, link: LinkSpeed) -> float:
    """Seconds a token on so many Raspberry Pi 5."""
    machine = Machine("pi", 8_000_000_000, memory_bytes_per_s, 60e9, 0.0, 4)
    return _predicted(LLAMA_3_8B, 18 / 32, machine, nodes, link, False)


PI_MEMORY_BYTES_PER_S = 7.54e9  # fitted to one node
PI_LINK = LinkSpeed(0.93e-3, 117e6)  # gigabit Ethernet; its delay fitted to two nodes
