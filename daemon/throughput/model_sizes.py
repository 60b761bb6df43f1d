"""What a model weighs, for the throughput model: from a checkpoint's header, or from config.json alone.

Opens files and reads headers. `partition.throughput` predicts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shoal.daemon.error_codes import refusing
from shoal.kernels.types import WEIGHT_TYPES, WeightType
from shoal.models.checkpoint.bare_config import BareConfig
from shoal.models.checkpoint.checkpoint import Checkpoint, open_checkpoint
from shoal.models.checkpoint.weight_source import Described
from shoal.models.tokenizer.file_costs import VOCABULARY_BYTES
from shoal.models.weights import narrow_roles
from shoal.offload.kv.disk_pages import buffer_bytes
from shoal.offload.pack.layout import layout
from shoal.offload.pack.manifest import Quant, Source
from shoal.partition.amounts import format_bytes
from shoal.partition.memory_layout import KV_FORMATS, kv_page_bytes
from shoal.partition.spec import BlockId
from shoal.partition.throughput.weights_of import Product, Weighed

CONFIG = "config.json"
NOWHERE = Source("", [])  # what no pack is made from
_TYPES = {kind.name: kind for kind in WEIGHT_TYPES}


@contextmanager
def described(path: Path) -> Iterator[Described]:
    """The model at `path`: a checkpoint, of which headers are enough, a config.json, or a directory that has no weights
    beside it. Raises DaemonError."""
    with refusing(path.name):
        config = path / CONFIG if path.is_dir() else path
        bare = path.is_dir() and not any(path.glob("*.safetensors")) and config.is_file()
        if bare or path.suffix == ".json":
            yield BareConfig(config)
            return
        with open_checkpoint(path, whole=False) as checkpoint:
            yield checkpoint


def cut_words(model: Described) -> str:
    """Which files of a checkpoint end before their tensors do; "" if none does."""
    cut = model.cut_short if isinstance(model, Checkpoint) else []
    if not cut:
        return ""
    path, size, end = cut[0]
    others = f" ({len(cut)} files are cut short)" if len(cut) > 1 else ""
    said = f"{path.name} has {format_bytes(size)} of its {format_bytes(end)}{others}"
    return f"{said}: its header is enough to plan with, but it cannot run"


def weighed(model: Described, quant: Quant) -> Weighed:
    """What a model, or a rank's shard of one, weighs, kept in at most so many bits. Raises PackPointless where that
    would not be fewer."""
    spec = model.spec
    manifest = layout(model, quant, NOWHERE)
    products: dict[BlockId, tuple[Product, ...]] = {}
    extents = {BlockId("embed"): 0} if spec.vocab else {}
    seen: dict[tuple[object, ...], tuple[Product, ...]] = {}
    for item in manifest.blocks:
        roles = narrow_roles(spec, item.block.layer)
        expert = item.block.kind == "expert"
        key = tuple((*tensor[:3], role in roles, expert) for role, tensor in item.tensors.items())
        if key not in seen:
            seen[key] = tuple(
                Product(kind, rows, cols, _TYPES[kind].matrix_bytes(rows, cols), *flags)
                for kind, rows, cols, *flags in key
            )
        products[item.block] = seen[key]
        extents[item.block] = item.nbytes
    if spec.tied and spec.vocab:
        extents[BlockId("embed")] = 0  # its bytes are the head's
    if slices := [products[block][0] for block in extents if block.kind == "head"]:
        rows, nbytes = sum(it.rows for it in slices), sum(it.nbytes for it in slices)
        products[BlockId("head")] = (slices[0]._replace(rows=rows, nbytes=nbytes),)
    if quant == "keep":
        block_bytes = _stored_bytes(model)
    else:
        block_bytes = dict(extents)
        block_bytes[next(iter(extents))] += manifest.vectors.nbytes  # of all blocks: they are read at once
    stored, tokenizer = 0, 0
    if isinstance(model, Checkpoint):
        stored, tokenizer = model.nbytes, model.tokenizer_memory().kept
    elif isinstance(model, BareConfig):
        tokenizer = VOCABULARY_BYTES * spec.vocab
    return Weighed(
        spec,
        quant,
        products,
        block_bytes,
        extents,
        manifest.vectors.nbytes,
        stored or sum(_stored_bytes(model).values()),
        tokenizer,
        {kv_type: buffer_bytes(kv_page_bytes(spec, kv_type)) for kv_type in KV_FORMATS},
    )


def _stored_bytes(model: Described) -> dict[BlockId, int]:
    """Bytes of every block in memory, in the types of the files, in the order of a step."""
    seen: dict[tuple[WeightType, int, int], int] = {}
    sizes: dict[BlockId, int] = {}
    for block in model.spec.blocks():
        nbytes = 4 * sum(model.vector_lengths(block).values())
        for matrix in model.matrices(block).values():
            if matrix not in seen:
                kind, rows, cols = matrix
                seen[matrix] = kind.matrix_bytes(rows, cols)
            nbytes += seen[matrix]
        sizes[block] = nbytes
    return sizes
