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


# Keys of config.json that transformers reads for some families only, be they Shoal's or not → the value that changes
# nothing. Of a list, each item.
PECULIAR: Mapping[str, Any] = {
    "attention_chunk_size": None,
    "attention_multiplier": 1,
    "attention_scale": None,
    "attn_logit_softcapping": None,
    "attn_temperature_tuning": False,
    "clip_qkv": None,
    "embedding_multiplier": 1,
    "embedding_scale": 1,
    "final_logit_softcapping": None,
    "hidden_activation": None,
    "lm_head_bias": False,
    "logit_scale": 1,
    "logits_scaling": 1,
    "n_group": 1,
    "no_rope_layers": 1,
    "norm_topk_prob": True,
    "num_nextn_predict_layers": 0,
    "partial_rotary_factor": 1,
    "query_pre_attn_scalar": None,
    "residual_multiplier": 1,
    "residual_scale": 1,
    "routed_scaling_factor": 1,
    "router_logit_softcapping": None,
    "scale_depth": None,
    "scale_emb": 1,
    "scoring_func": "softmax",
    "_sliding_window_pattern": None,
    "sliding_window_pattern": None,
    "topk_group": 1,
    "use_bidirectional_attention": False,
}
WINDOWED: Mapping[str, Any] = {
    "layer_types": "full_attention",
    "sliding_window": None,
}  # where there are windows

# Options that change the arithmetic of every family → the values that change nothing.
UNSUPPORTED_HF: Mapping[str, tuple[Any, ...]] = {"is_causal": (True,)}
UNSUPPORTED_GGUF: Mapping[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "expert_group_count": (0, 1),
    "nextn_predict_layers": (0,),
}

# Keys of GGUF that change nothing whatever they say, or nothing with this value; llama.cpp uses no others that Shoal
# does not ask for, as far as these families go.
WITHOUT_EFFECT = frozenset(
    {"expert_shared_count", "pooling_type", "rope.scaling.finetuned", "tensor_data_layout", "vocab_size"}
)
OFF: Mapping[str, Any] = {
    "attention.output_scale": 1,
    "attention.value_scale": 1,
    "embedding_scale": 1,
    "expert_group_used_count": 1,
    "expert_weights_scale": 1,
    "logit_scale": 1,
    "residual_scale": 1,
    "rope.scaling.yarn_ext_factor": 1,
}


@dataclass(frozen=True, kw_only=True)
class HfSide:
    """How a family's config.json and safetensors are read."""

    types: tuple[str, ...]  # model_type
    names: Names = field(default_factory=lambda: HF_NAMES)
    defaults: Mapping[str, Any] = field(default_factory=dict)  # of keys that may be absent from config.json
    biases: Mapping[str, frozenset[str]] = field(default_factory=dict)  # flag, or ALWAYS → roles
    windows: Callable[[Facts, int], Windows] = no_windows
    moe: Callable[[Facts, int], Moe] | None = None
    norm_shift: float = 0.0  # what has to be added to stored norm weights
    local_rope: bool = False  # windowed layers have a rope of their own
    longrope_names: tuple[str, ...] = ()  # further names that the family uses for longrope
    peculiar: tuple[str, ...] = ()  # keys of PECULIAR that the family has; others are not used
    # Further keys as in UNSUPPORTED_HF.
    unsupported: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)


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
    partial_rope: bool = False  # fewer dimensions of a head than it has may be rotated
    clip: bool = False  # q, k and v may be clipped
    head: Literal["tied", "own", "either"] = "either"  # where llama.cpp, or the family, expects it
    # Further keys as in UNSUPPORTED_GGUF.
    unsupported: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)


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
