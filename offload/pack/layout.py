"""Where every block of a pack will lie, and in which type each matrix is kept: everything but the bytes.

All this follows from the checkpoint's shapes and `quant` alone. So the size is known before anything is read, and
after an attempt was cut off the next one finds its blocks again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import msgspec

from shoal.kernels import WeightType
from shoal.kernels.types import Q4_0, Q8_0
from shoal.models.checkpoint.checkpoint import Checkpoint
from shoal.models.checkpoint.shard import AnyCheckpoint, CheckpointShard
from shoal.models.checkpoint.weight_source import Described
from shoal.offload.errors import PackPointless
from shoal.partition.memory_layout import BAND_ROWS
from shoal.partition.slicing import CutOfExperts, Grains, divide
from shoal.partition.spec import BlockId

from .manifest import (
    KERNEL_LAYOUT,
    MATRIX_ALIGN_BYTES,
    PACK_FORMAT,
    PAGE_BYTES,
    Manifest,
    PackedBlock,
    PackedTensor,
    PackedVectors,
    Quant,
    Source,
)
from .pack import tensor_bytes

SLICE_BYTES = 64 << 20  # of the head, at most
_DECISIVE = frozenset({"router", "shared_scale"})  # small matrices that decide which experts count
_TABLES = frozenset({"embed", "head"})  # few bits do the most harm here
UNKNOWN = "0" * 16  # the checksum of a block that is not written yet


def layout(checkpoint: Described, quant: Quant, source: Source) -> Manifest:
    """The manifest of a pack before it is built; its checksums are not known yet. Raises PackPointless."""
    spec = checkpoint.spec
    _require_gain(checkpoint, quant)
    vectors = _vectors(checkpoint)
    at = vectors.nbytes
    blocks: list[PackedBlock] = []
    for block in spec.blocks():
        if block == BlockId("embed") and spec.tied:
            continue
        for item in _head(checkpoint, quant) if block.kind == "head" else (_whole(checkpoint, block, quant),):
            blocks.append(msgspec.structs.replace(item, offset=at))
            at += item.nbytes
    if spec.tied:
        head = [item for item in blocks if item.block.kind == "head"]
        kind, _, cols, _ = head[0].tensors["head"]
        tensors = {"embed": PackedTensor(kind, spec.vocab, cols, 0)}
        nbytes = sum(item.nbytes for item in head)
        blocks.append(PackedBlock(BlockId("embed"), head[0].offset, nbytes, UNKNOWN, tensors))
    facts: dict[str, str | int] = {
        "name": checkpoint.name,
        "family": spec.family,
        "layers": len(spec.layers),
        "hidden": spec.hidden,
        "vocab": spec.vocab,
    }
    return Manifest(PACK_FORMAT, KERNEL_LAYOUT, source, quant, checkpoint.shard, facts, vectors, blocks)


def part_of(
    checkpoint: Checkpoint,
    quant: Quant,
    rank: int,
    ranks: int,
    *,
    cut_vocabulary: bool = False,
    experts: CutOfExperts = "whole",
) -> AnyCheckpoint:
    """What rank `rank` (from 0) of `ranks` equal ones holds of a checkpoint kept as `quant`: all of it if alone.
    The shard has bytes of the whole model's rows and columns: nothing is rounded again. Experts stay whole unless it is
    asked for otherwise, because packs are mostly streamed. Raises ShardError."""
    grains = grains_of(checkpoint, quant)
    shards = divide(checkpoint.spec, ranks, grains, cut_vocabulary=cut_vocabulary, experts=experts)
    return CheckpointShard(checkpoint, shards[rank]) if ranks > 1 else checkpoint


def grains_of(checkpoint: Checkpoint, quant: Quant) -> Grains:
    """How many columns of each role must stay together, so that no block of weights is cut, stored or kept."""
    grains = dict.fromkeys((("attn", "o"), ("ffn", "down"), ("router", "shared_down"), ("expert", "down")), 1)
    for block in checkpoint.spec.blocks():
        for role, (kind, _, cols) in checkpoint.matrices(block).items():
            if (place := (block.kind, role)) in grains:
                kept = kept_type(role, kind, cols, quant)
                grains[place] = math.lcm(grains[place], kind.block_weights, kept.block_weights)
    return Grains(*grains.values())


def _head(checkpoint: Described, quant: Quant) -> Iterator[PackedBlock]:
    """The head's slices. All but the last are of whole pages, so that they follow each other without a gap."""
    block, role = head_origin(checkpoint)
    kind, rows, cols = checkpoint.matrices(block)[role]
    kind = kept_type(role, kind, cols, quant)
    band_bytes = kind.matrix_bytes(BAND_ROWS, cols)
    least = PAGE_BYTES // math.gcd(PAGE_BYTES, band_bytes)  # bands
    step = BAND_ROWS * least * max(1, SLICE_BYTES // (least * band_bytes))
    for number, start in enumerate(range(0, rows, step)):
        tensors = {"head": PackedTensor(kind.name, min(step, rows - start), cols, 0)}
        yield _block(BlockId("head", -1, number), tensors)


def head_origin(checkpoint: Described) -> tuple[BlockId, str]:
    """The block and role in the checkpoint of the matrix that the head's slices are cut from."""
    return (BlockId("embed"), "embed") if checkpoint.spec.tied else (BlockId("head"), "head")


def _whole(checkpoint: Described, block: BlockId, quant: Quant) -> PackedBlock:
    tensors = {}
    at = 0
    for role, (kind, rows, cols) in checkpoint.matrices(block).items():
        tensors[role] = PackedTensor(kept_type(role, kind, cols, quant).name, rows, cols, at)
        at = rounded(at + tensor_bytes(tensors[role]), MATRIX_ALIGN_BYTES)
    return _block(block, tensors)


def _block(block: BlockId, tensors: dict[str, PackedTensor]) -> PackedBlock:
    end = max(tensor.offset + tensor_bytes(tensor) for tensor in tensors.values())
    return PackedBlock(block, 0, rounded(end, PAGE_BYTES), UNKNOWN, tensors)


def _vectors(checkpoint: Described) -> PackedVectors:
    blocks = []
    at = 0
    for block in checkpoint.spec.blocks():
        places = {}
        for role, length in checkpoint.vector_lengths(block).items():
            places[role] = (at, length)
            at = rounded(at + 4 * length, MATRIX_ALIGN_BYTES)
        if places:
            blocks.append((block, places))
    return PackedVectors(0, rounded(at, PAGE_BYTES), UNKNOWN, blocks)


def _require_gain(checkpoint: Described, quant: Quant) -> None:
    matrices = [
        (role, kind, cols)
        for block in checkpoint.spec.blocks()
        for role, (kind, _, cols) in checkpoint.matrices(block).items()
    ]
    if quant != "keep" and all(kept_type(*matrix, quant) is matrix[1] for matrix in matrices):
        types = " and ".join(sorted({kind.name for _, kind, _ in matrices}))
        raise PackPointless(f"{quant} would not make it smaller, as its weights are {types}: use it as it is")


def kept_type(role: str, kind: WeightType, cols: int, quant: Quant) -> WeightType:
    """The type that a matrix gets in a pack. It changes only where that saves at least an eighth of its bytes."""
    if quant == "keep" or role in _DECISIVE:
        return kind
    wanted = Q8_0 if quant == "q8" or role in _TABLES else Q4_0
    saves = wanted.bits_per_weight <= kind.bits_per_weight * 7 / 8
    return wanted if saves and cols % wanted.block_weights == 0 else kind


def rounded(value: int, step: int) -> int:
    """`value`, or the next multiple of `step`."""
    return -(-value // step) * step
