"""config.json → recipe, for any family in the table.

Knows the keys that transformers gives most families. What is peculiar to one family comes from its `HfSide`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from typing import Any, Literal

from shoal.models.errors import UnsupportedCheckpoint
from shoal.partition.spec import ModelSpec, RopeSpec

from .claims import Ends, Same, check_layers, claimed_biases, find_ends, unused
from .facts import Facts
from .family import ALWAYS, PECULIAR, UNSUPPORTED_HF, WINDOWED, Family, HfSide, no_windows
from .rope_scaling import hf_rope
from .tensors import Names, Recipe, chosen

_ACTIVATIONS: dict[str, Literal["silu", "gelu_tanh"]] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}


def hf_recipe(
    family: Family, config: Mapping[str, Any], origin: str, tensors: Collection[str], same: Same
) -> Recipe:
    """The recipe of a checkpoint whose (text) configuration is `config`; `tensors` has the names in its files, and
    `same` says whether two of them hold the same bytes.

    Raises CheckpointError or SpecError.
    """
    hf = family.hf
    known = {**PECULIAR, **(WINDOWED if hf.windows is no_windows else {})}
    strange = {key: known[key] for key in known if key not in hf.peculiar}
    config, unread = _without(strange, config)
    facts = Facts(config, origin, defaults=hf.defaults)
    for option, off in {**UNSUPPORTED_HF, **hf.unsupported}.items():
        if config.get(option) not in (None, *off):
            raise facts.unsupported(option)
    hidden, heads = facts.integer("hidden_size"), facts.integer("num_attention_heads")
    count = layer_count(facts)
    ends = find_ends(tensors, facts.flag("tie_word_embeddings", False), origin, same)
    numbered = re.escape(ends.prefix) + r"layers\.(\d{1,6})\."
    check_layers(tensors, numbered, count, f"{origin}: num_hidden_layers")
    head_dim = facts.integer("head_dim", hidden // max(heads, 1))
    moe = hf.moe(facts, count) if hf.moe else None
    query_dim = facts.number("query_pre_attn_scalar", head_dim)
    spec = family.spec(
        hidden=hidden,
        windows=hf.windows(facts, count),
        moe=moe,
        ropes=_ropes(hf, facts, head_dim),
        vocab=facts.integer("vocab_size"),
        context=facts.integer("max_position_embeddings"),
        heads=heads,
        kv_heads=facts.integer("num_key_value_heads", heads),
        head_dim=head_dim,
        ffn=0 if moe and all(moe.layers) else facts.integer("intermediate_size"),
        norm_eps=facts.number("rms_norm_eps"),
        activation=_activation(facts),
        query_scale=0.0 if query_dim == head_dim else _inverse_root(facts, query_dim),
        qkv_clip=facts.number("clip_qkv") if facts.has("clip_qkv") else None,
        tied=ends.tied,
    )
    names = _filled(hf.names, ends)
    flags = {role: flag for flag, roles in hf.biases.items() for role in roles}
    claimed = {role: flag == ALWAYS or facts.flag(flag, False) for role, flag in flags.items()}
    biases, without = claimed_biases(names, tensors, claimed, count, origin)
    names = chosen(spec, names, biases)
    left = unused(tensors, _used(spec, names) | {ends.spare}, ends.prefix, count, origin)
    said = (
        *(f"{origin}: {claim} is not used: {family.name} has no such thing" for claim in unread),
        *facts.said,
    )
    return Recipe(spec, names, hf.norm_shift, said + ends.warnings + without + left)


def _without(
    strange: Mapping[str, Any], config: Mapping[str, Any], depth: int = 3
) -> tuple[dict[str, Any], list[str]]:
    """What is left of a configuration and its parts (rope_parameters and those of its layers) without the strange keys,
    and what these claim, where it is not what they say by themselves."""
    claims = [f"{key}={config[key]!r:.40}" for key in strange if _says(config.get(key), strange[key])]
    kept = {key: value for key, value in config.items() if key not in strange}
    for key in ("rope_parameters", "rope_scaling", "full_attention", "sliding_attention"):
        if depth and isinstance(part := kept.get(key), Mapping):
            kept[key], more = _without(strange, part, depth - 1)
            claims += more
    return kept, claims


def _says(value: object, nothing: object) -> bool:
    items = value if isinstance(value, list) else [value]
    return any(item is not None and item != nothing for item in items)


def layer_count(facts: Facts, key: str = "num_hidden_layers") -> int:
    """The number of layers. It is checked here, because lists of this length are made before there is a spec."""
    count = facts.integer(key)
    if not 1 <= count <= 4096:
        raise facts.wrong(key, count, "from 1 to 4096")
    return count


def _ropes(hf: HfSide, facts: Facts, head_dim: int) -> tuple[RopeSpec, ...]:
    """The rope of all layers; if windowed layers have one of their own, that comes second."""
    parameters, scaling = facts.part("rope_parameters"), facts.part("rope_scaling")
    if not hf.local_rope:  # where a file has both, the older key counts in transformers
        if scaling.values and parameters.values and scaling.values != parameters.values:
            facts.say("rope_parameters", "is not used: rope_scaling is there, too")
        return (hf_rope(facts, head_dim, scaling if scaling.values else parameters, hf.longrope_names),)
    everywhere = parameters.part("full_attention")
    everywhere = Facts({**everywhere.values, **scaling.values}, facts.origin, said=facts.said)
    local = parameters.part("sliding_attention", {"rope_theta": facts.number("rope_local_base_freq")})
    return hf_rope(facts, head_dim, everywhere), hf_rope(facts, head_dim, local)


def _activation(facts: Facts) -> Literal["silu", "gelu_tanh"]:
    name = facts.text("hidden_activation", facts.text("hidden_act", "silu"))
    if name not in _ACTIVATIONS:
        raise UnsupportedCheckpoint(
            f"{facts.origin}: activation {name!r} is not supported (supported: {', '.join(_ACTIVATIONS)})"
        )
    return _ACTIVATIONS[name]


def _inverse_root(facts: Facts, query_dim: float) -> float:
    if query_dim <= 0:
        raise facts.wrong("query_pre_attn_scalar", query_dim, "positive")
    return 1 / math.sqrt(query_dim)


def _filled(names: Names, ends: Ends) -> Names:
    """The names as this checkpoint has them, up to the numbers of layers and experts."""
    filled = {
        kind: {roles: name.replace("{prefix}", ends.prefix) for roles, name in of.items()}
        for kind, of in names.items()
    }
    filled["embed"]["embed"], filled["head"]["head"] = ends.embed, ends.head
    return filled


def _used(spec: ModelSpec, names: Names) -> set[str]:
    blocks = spec.blocks()
    return {name.format(layer=b.layer, expert=b.expert) for b in blocks for name in names[b.kind].values()}
