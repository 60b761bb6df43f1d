"""A model of which only config.json is there: what its weights would be, without any.

Knows shapes and the type that the configuration names. Reads no weights, as there are none.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from shoal.kernels import WeightType
from shoal.kernels.types import BF16, F16, F32
from shoal.models.errors import CorruptCheckpoint
from shoal.models.families import recipe_from_hf, shapes
from shoal.partition.spec import BlockId, BlockKind

from .hf_dir import read_json

_TYPES: Mapping[str, WeightType] = {"float32": F32, "float16": F16, "bfloat16": BF16}


class BareConfig:
    """What config.json says of a model. See `Checkpoint` for what the attributes are. Raises CheckpointError."""

    shard: Literal["whole"] = "whole"

    def __init__(self, path: Path) -> None:
        config = read_json(path)
        recipe = recipe_from_hf(config, str(path), ())
        self.path = path
        self.spec = recipe.spec
        self.type = _stored_type(config, path)
        self.warnings = list(recipe.warnings)
        name = config.get("_name_or_path")
        self.name = name if isinstance(name, str) and name else path.absolute().parent.name
        self._shapes: dict[BlockKind, dict[str, tuple[int, ...]]] = {}

    def matrices(self, block: BlockId) -> dict[str, tuple[WeightType, int, int]]:
        """Role → type, rows and columns of each matrix of a block."""
        found = self._of(block.kind).items()
        return {role: (self.type, shape[0], shape[1]) for role, shape in found if len(shape) == 2}

    def vector_lengths(self, block: BlockId) -> dict[str, int]:
        """Role → length of each vector of a block, but for biases, which weigh nothing."""
        return {role: shape[0] for role, shape in self._of(block.kind).items() if len(shape) == 1}

    def _of(self, kind: BlockKind) -> dict[str, tuple[int, ...]]:
        if kind not in self._shapes:
            self._shapes[kind] = shapes(self.spec, kind)
        return self._shapes[kind]


def _stored_type(config: Mapping[str, Any], path: Path) -> WeightType:
    """What weights are stored in; most are bfloat16 where nothing is said."""
    inner = config.get("text_config")
    for part in (config, inner if isinstance(inner, Mapping) else {}):
        said = part.get("torch_dtype") or part.get("dtype")
        if said is not None:
            kind = _TYPES.get(str(said).removeprefix("torch."))
            if kind is None:
                raise CorruptCheckpoint(
                    f"{path}: torch_dtype={str(said)[:40]!r}: must be one of {', '.join(_TYPES)}"
                )
            return kind
    return BF16
