"""How often a mixture's experts were used, kept in a small file for each model, so that those that are used often are
placed well at the next load.

Nothing in a file is believed: one that is not exactly what this model's would be counts as none, and a line says so.
Knows files and what counts depend on; `engine.learn.expert_use` knows what follows from them.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from shoal.daemon.library.kv_files import spelled
from shoal.daemon.private_files import keep
from shoal.daemon.throughput.model_sizes import weighed
from shoal.daemon.throughput.own_machine import OwnMachine
from shoal.engine.learn.expert_use import FADING, NONE_YET, UseCounts
from shoal.models.checkpoint.checkpoint import Checkpoint
from shoal.models.regular_files import read_regular
from shoal.offload.pack.manifest import Quant
from shoal.partition.spec import BlockId, ModelSpec
from shoal.partition.throughput.laws import token_chances
from shoal.partition.throughput.weights_of import Weighed

log = logging.getLogger(__name__)

TELLING_PARTS = 256  # of steps: fewer tell too little of a layer
_FORM = 1  # of what is in a file
MOST_FILES = 64  # the oldest go first
USES_FILE_BYTES = 4 << 20  # at most: ten times what a model of 100 layers with 512 experts takes

_Count = Annotated[int, Meta(ge=0, lt=FADING)]


class _File(Struct, frozen=True):
    """`parts`: by layer; `uses`: of each expert, by layer. Layers without experts have none."""

    key: str
    parts: list[_Count]
    uses: list[list[_Count]]


class KeptUses:
    """Of one model, in a file in `directory`."""

    def __init__(self, directory: Path, checkpoint: Checkpoint, quant: Quant) -> None:
        spec = checkpoint.spec
        self._key = _key(checkpoint, quant)
        self._path = directory / f"{self._key[:32]}.json"
        self._experts = [_experts(spec, layer) for layer in range(len(spec.layers))]
        self._written: UseCounts | None = None

    def read(self) -> UseCounts:
        """What is kept of it."""
        try:
            found = msgspec.json.decode(read_regular(self._path, USES_FILE_BYTES), type=_File)
        except FileNotFoundError:
            return NONE_YET
        except (OSError, msgspec.MsgspecError, RecursionError) as error:
            return self._ignored(str(error))
        if found.key != self._key:
            return self._ignored("it is another model's")
        if list(map(len, found.uses)) != list(map(len, self._experts)) or len(found.parts) != len(found.uses):
            return self._ignored("it has other layers or experts than the model")
        if any(max(uses, default=0) > parts for uses, parts in zip(found.uses, found.parts, strict=True)):
            return self._ignored("an expert was used more often than its layer")
        blocks = (zip(its, uses, strict=True) for its, uses in zip(self._experts, found.uses, strict=True))
        self._written = UseCounts(
            {block: count for its in blocks for block, count in its if count},
            {layer: parts for layer, parts in enumerate(found.parts) if parts},
        )
        return self._written

    def keep(self, counts: UseCounts) -> None:
        """Write them down, unless they are there already."""
        if counts == self._written or not counts.uses:
            return
        uses = [[counts.uses.get(block, 0) for block in its] for its in self._experts]
        parts = [counts.parts.get(layer, 0) for layer in range(len(self._experts))]
        keep(self._path, _File(self._key, parts, uses))
        self._written = counts
        with suppress(OSError):
            files = sorted(self._path.parent.glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
            for path in files[:-MOST_FILES]:
                path.unlink()

    def _ignored(self, why: str) -> UseCounts:
        said = " ".join(why.split())[:200]
        log.warning(
            "%s: how often experts were used is not known, as the file is of no use: %s", self._path, said
        )
        return NONE_YET


def weighed_as_used(
    checkpoint: Checkpoint, quant: Quant, machine: OwnMachine
) -> tuple[Weighed, KeptUses | None, UseCounts]:
    """(a checkpoint with what counts tell of its routers; where they are kept, if it has experts; the counts)"""
    model = weighed(checkpoint, quant)
    if machine.home is None or checkpoint.spec.moe is None:
        return model, None, NONE_YET
    uses = KeptUses(machine.home.experts, checkpoint, quant)
    counts = uses.read()
    return with_chances(model, counts), uses, counts


def with_chances(model: Weighed, counts: UseCounts) -> Weighed:
    """The model with what counts tell of its routers; as it was where they tell nothing."""
    found = []
    for layer, parts in counts.parts.items():
        experts = _experts(model.spec, layer)
        # As if each had been used in half of one part more: what was not used yet may be, and what always was, not.
        shares = [(counts.uses.get(block, 0) + 0.5) / (parts + 1) for block in experts]
        if model.spec.moe and parts >= TELLING_PARTS:
            found.append(token_chances(shares, model.spec.moe.active))
    told = tuple(it for it in found if it is not None)
    return replace(model, chances=told) if told else model


def _key(checkpoint: Checkpoint, quant: Quant) -> str:
    """Differs if anything differs that routing depends on: the model's files, its bits, its architecture."""
    files = [(str(path.resolve()), checkpoint.stamps[path]) for path in checkpoint.files]
    stamps = [(name, stamp and stamp[2:]) for name, stamp in files]  # devices get other numbers at each start
    facts = repr((_FORM, quant, stamps, spelled(checkpoint.spec)))
    return blake2b(facts.encode(), digest_size=32).hexdigest()


def _experts(spec: ModelSpec, layer: int) -> Sequence[BlockId]:
    return [block for block in spec.ffn_blocks(layer) if block.kind == "expert"]
