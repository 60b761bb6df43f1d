"""What is peculiar to a family, as data: the type of an entry in `table`. Knows neither files nor tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from shoal.partition.errors import SpecError
from shoal.partition.spec import LayerSpec, ModelSpec, MoeSpec, RopeSpec

from .facts import Facts
from .names import GGUF_NAMES, HF_NAMES
from .tensors import Names

Windows = list[int | None]  # per layer, as in LayerSpec.window
ALWAYS = ""  # stands for a flag where a family has these biases whatever its config.json says


def no_windows(_: Facts, layers: int) -> Windows:
    return [None] * layers


@dataclass(frozen=True)
class Moe:
    """The experts of a model and which layers have them."""

    spec: MoeSpec
    layers: list[bool]


# Keys of config.json that transformers reads for some families only → the value that changes nothing.
PECULIAR: Mapping[str, Any] = {
    "clip_qkv": None,
    "hidden_activation": None,
    "partial_rotary_factor": 1,
    "query_pre_attn_scalar": None,
}


@dataclass(frozen=True, kw_only=True)
class HfSide:
    """How a family's config.json and safetensors are read."""

    types: tuple[str, ...]  # model_type
    names: Names = field(default_factory=lambda: HF_NAMES)
    defaults: Mapping[str, Any] = field(default_factory=dict)  # of keys that may be absent from config.json
    biases: Mapping[str, frozenset[str]] = field(
        default_factory=dict
    )  # flag in config.json, or ALWAYS → roles
    windows: Callable[[Facts, int], Windows] = no_windows
    moe: Callable[[Facts, int], Moe] | None = None
    norm_shift: float = 0.0  # what has to be added to stored norm weights
    local_rope: bool = False  # windowed layers have a rope of their own
    longrope_names: tuple[str, ...] = ()  # further names that the family uses for longrope
    peculiar: tuple[str, ...] = ()  # keys of PECULIAR that the family has; others are not used
    unsupported: tuple[str, ...] = ()  # keys of options that change the arithmetic, so that they must be off


@dataclass(frozen=True, kw_only=True)
class GgufSide:
    """How a family's GGUF metadata and tensors are read."""

    archs: tuple[str, ...]  # general.architecture
    names: Names = field(default_factory=lambda: GGUF_NAMES)
    interleaved: bool = False  # rows of q and k are permuted so that the two of a rope pair are neighbours
    windows: Callable[[Facts, int], Windows] = no_windows
    moe: Callable[[Facts, int], Moe] | None = None
    query_scale: Callable[[Facts, int], float] = lambda facts, layers: 0.0
    local_rope: bool = False  # windowed layers have an unscaled rope of their own
    unsupported: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family of architectures. Fields that `ModelSpec` has too go into the spec as they are."""

    name: str
    activation: Literal["silu", "gelu_tanh"] = "silu"  # of GGUF; config.json names its own
    qk_norm: Literal["none", "head", "full"] = "none"
    pre_norm: bool = True
    post_norm: bool = False
    scaled_embed: bool = False  # embeddings are multiplied by sqrt(hidden)
    hf: HfSide
    gguf: GgufSide | None = None

    def spec(
        self, *, hidden: int, windows: Windows, moe: Moe | None, ropes: tuple[RopeSpec, ...], **sizes: Any
    ) -> ModelSpec:
        """The spec of one model of the family. `sizes`: the fields that only its checkpoint knows. Raises SpecError.

        Layers with a window have the last rope, the others the first.
        """
        if sizes["vocab"] < 1:  # only shards of models have none
            raise SpecError(f"vocab={sizes['vocab']}: must be 1 or more")
        sparse = moe.layers if moe else [False] * len(windows)
        return ModelSpec(
            family=self.name,
            layers=tuple(
                LayerSpec(window, 0 if window is None else len(ropes) - 1, has_experts)
                for window, has_experts in zip(windows, sparse, strict=True)
            ),
            hidden=hidden,
            ropes=ropes,
            qk_norm=self.qk_norm,
            pre_norm=self.pre_norm,
            post_norm=self.post_norm,
            embed_scale=math.sqrt(hidden) if self.scaled_embed and hidden > 0 else 1.0,
            moe=moe.spec if moe else None,
            **sizes,
        )
