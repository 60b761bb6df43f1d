"""Families of architectures: from what a checkpoint says to a spec and the names of its tensors.

`table` has one entry per family; `hf_config` and `gguf_metadata` read what is common to all. Only facts are decided
here; `models.checkpoint` reads the blocks.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from shoal.models.checkpoint.tensor_files import TensorFiles
from shoal.models.errors import CorruptCheckpoint, UnsupportedCheckpoint
from shoal.partition.errors import SpecError

from .claims import Same, all_differ
from .facts import Facts
from .gguf_metadata import gguf_recipe
from .hf_config import hf_recipe
from .table import FAMILIES
from .tensors import Names, Recipe, bias_shapes, shapes

__all__ = ["FAMILIES", "Names", "Recipe", "bias_shapes", "recipe_from_gguf", "recipe_from_hf", "shapes"]


def recipe_from_hf(
    config: Mapping[str, Any], origin: str, tensors: Collection[str], same: Same = all_differ
) -> Recipe:
    """The recipe of a Hugging Face directory. `tensors`: the names in its files. `origin`: the file that messages name.
    `same`: whether two tensors hold the same bytes.

    Raises CheckpointError.
    """
    text = config.get("text_config")
    for part in (config, text if isinstance(text, Mapping) else {}):
        if isinstance(quantization := part.get("quantization_config"), Mapping):
            method = quantization.get("quant_method", "unknown")
            raise UnsupportedCheckpoint(
                f"{origin}: the weights are quantised by {str(method)[:40]!r}, which Shoal does not read; "
                "use the original weights or a GGUF file"
            )
    name = Facts(config, origin).text("model_type")
    family = next((f for f in FAMILIES if name in f.hf.types), None)
    if family is None:
        known = ", ".join(t for f in FAMILIES for t in f.hf.types)
        raise UnsupportedCheckpoint(f"{origin}: model_type {name!r} is not supported (supported: {known})")
    if isinstance(text, Mapping):
        config = text
    with _numbers_of(origin):
        return hf_recipe(family, config, origin, tensors, same)


def recipe_from_gguf(files: TensorFiles) -> Recipe:
    """The recipe of an open GGUF file. Raises CheckpointError."""
    origin = str(files.paths[0])
    arch = Facts(files.metadata, origin).text("general.architecture")
    experts = Facts(files.metadata, origin).integer(f"{arch}.expert_count", 0) > 0
    sides = [f for f in FAMILIES if f.gguf and arch in f.gguf.archs]
    if not sides:
        known = ", ".join(dict.fromkeys(arch for f in FAMILIES if f.gguf for arch in f.gguf.archs))
        raise UnsupportedCheckpoint(f"{origin}: architecture {arch!r} is not supported (supported: {known})")
    family = next((f for f in sides if f.gguf and (f.gguf.moe is not None) == experts), sides[0])
    with _numbers_of(origin):
        return gguf_recipe(family, arch, files)


@contextmanager
def _numbers_of(origin: str) -> Iterator[None]:
    """Numbers that no model has are the file's fault. Each may be finite, and what is computed of them is not."""
    try:
        yield
    except SpecError as error:
        raise CorruptCheckpoint(f"{origin}: {error}") from error
    except (ArithmeticError, ValueError) as error:
        raise CorruptCheckpoint(f"{origin}: holds numbers that no model can have: {error}") from error
