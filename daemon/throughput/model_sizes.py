"""What a model weighs, for the throughput model: from a checkpoint's header, or from config.json alone.

Opens files and reads headers. `partition.throughput` predicts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shoal.daemon.error_codes import refusing
from shoal.kernels.types import WEIGHT_TYPES
from shoal.models.checkpoint.bare_config import BareConfig
from shoal.models.checkpoint.checkpoint import Checkpoint, open_checkpoint
from shoal.models.checkpoint.weight_source import Described
from shoal.offload.pack.layout import layout
from shoal.offload.pack.manifest import Quant, Source
from shoal.partition.spec import BlockId
from shoal.partition.throughput.weights_of import Product, Weighed

CONFIG = "config.json"
NOWHERE = Source("", [])  # what no pack is made from
_TYPES = {kind.name: kind for kind in WEIGHT_TYPES}


@contextmanager
def described(path: Path) -> Iterator[Described]:
    """The model at `path`: a checkpoint, a config.json, or a directory that has nothing else. Raises DaemonError."""
    with refusing(path.name):
        config = path / CONFIG if path.is_dir() else path
        bare = path.is_dir() and not any(path.glob("*.safetensors*")) and config.is_file()
        if bare or path.suffix == ".json":
            yield BareConfig(config)
            return
        with open_checkpoint(path) as checkpoint:
            yield checkpoint


def weighed(model: Described, quant: Quant) -> Weighed:
    """What the model weighs, kept in at most so many bits. Raises PackPointless where that would not be fewer."""
    spec = model.spec
    manifest = layout(model, quant, NOWHERE)
    products: dict[BlockId, tuple[Product, ...]] = {}
    extents = {BlockId("embed"): 0} if spec.vocab else {}
    seen: dict[tuple[object, ...], tuple[Product, ...]] = {}
    for item in manifest.blocks:
        key = tuple(tensor[:3] for tensor in item.tensors.values())
        if key not in seen:
            seen[key] = tuple(
                Product(kind, rows, cols, _TYPES[kind].matrix_bytes(rows, cols)) for kind, rows, cols in key
            )
        products[item.block] = seen[key]
        extents[item.block] = item.nbytes
    if spec.tied:
        extents[BlockId("embed")] = 0
    slices = [products[block] for block in extents if block.kind == "head"]
    first = slices[0][0]
    rows = sum(each[0].rows for each in slices)
    products[BlockId("head")] = (
        Product(first.kind, rows, first.cols, sum(each[0].nbytes for each in slices)),
    )
    tokenizer = model.tokenizer_memory().more if isinstance(model, Checkpoint) else 0
    return Weighed(
        spec,
        quant,
        products,
        _block_bytes(model, quant, extents, manifest.vectors.nbytes),
        extents,
        manifest.vectors.nbytes,
        model.nbytes if isinstance(model, Checkpoint) else sum(_block_bytes(model, "keep", {}, 0).values()),
        tokenizer,
    )


def _block_bytes(
    model: Described, quant: Quant, extents: dict[BlockId, int], vectors_bytes: int
) -> dict[BlockId, int]:
    """As plans in memory have it (`daemon.loading.planning`)."""
    if quant != "keep":
        sizes = dict(extents)
        sizes[next(iter(sizes))] += vectors_bytes
        return sizes
    return {
        block: sum(kind.matrix_bytes(rows, cols) for kind, rows, cols in model.matrices(block).values())
        + 4 * sum(model.vector_lengths(block).values())
        for block in model.spec.blocks()
    }
