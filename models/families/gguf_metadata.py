"""GGUF metadata → recipe, for any family in the table.

Knows the keys that all architectures share, and the small tensors that hold rope factors. What is peculiar to one
architecture comes from its `GgufSide`. An absent key has the default that llama.cpp gives it.
"""

from __future__ import annotations

from typing import Any

from shoal.kernels import dequantize, from_stored
from shoal.models.checkpoint.tensor_files import TensorFiles
from shoal.models.errors import CorruptCheckpoint, UnsupportedCheckpoint
from shoal.models.texts import Texts
from shoal.partition.amounts import counted
from shoal.partition.spec import RopeSpec

from .claims import check_layers
from .facts import REQUIRED, UNLIKE_LLAMA_CPP, Facts
from .family import OFF, UNSUPPORTED_GGUF, WITHOUT_EFFECT, Family, GgufSide
from .hf_config import layer_count
from .names import GGUF_FUSED
from .rope_scaling import gguf_rope
from .tensors import Names, Recipe, chosen

_LOCAL_SIZES = ("attention.key_length_swa", "attention.value_length_swa")  # of layers with a window
_NAMED = 8  # of the values that are not used, so many are named


class GgufFacts(Facts):
    """Metadata of one architecture. A size may be a list of one per layer, all of which must be the same."""

    def integer(self, key: str, default: Any = REQUIRED) -> int:
        value = self._get(key, default)
        if not isinstance(value, list):
            return super().integer(key, default)
        if not value or any(item != value[0] for item in value):
            raise UnsupportedCheckpoint(
                f"{self.origin}: {self.prefix}{key} differs from layer to layer, which Shoal does not support"
            )
        return Facts({key: value[0]}, self.origin).integer(key)


def gguf_recipe(family: Family, arch: str, files: TensorFiles) -> Recipe:
    """The recipe of an open GGUF file. Raises CheckpointError or SpecError."""
    gguf = family.gguf
    assert gguf is not None
    origin = str(files.paths[0])
    facts = GgufFacts(files.metadata, origin, prefix=f"{arch}.")
    for option, off in {**UNSUPPORTED_GGUF, **gguf.unsupported}.items():
        if facts.has(option) and facts.values[facts.prefix + option] not in off:
            raise facts.unsupported(option)
    count, hidden = layer_count(facts, "block_count"), facts.integer("embedding_length")
    heads = facts.integer("attention.head_count")
    head_dim = facts.integer("attention.key_length", hidden // max(heads, 1))
    for key in ("attention.value_length", *(_LOCAL_SIZES if gguf.local_rope else ())):
        if (other := facts.integer(key, head_dim)) != head_dim:
            raise UnsupportedCheckpoint(f"{origin}: {arch}.{key}={other} other than key_length={head_dim}")
    moe = gguf.moe(facts, count) if gguf.moe else None
    spec = family.spec(
        hidden=hidden,
        windows=gguf.windows(facts, count),
        moe=moe,
        ropes=_ropes(gguf, facts, head_dim, files),
        vocab=_vocab(files),
        context=facts.integer("context_length"),
        heads=heads,
        kv_heads=facts.integer("attention.head_count_kv", heads),
        head_dim=head_dim,
        ffn=0 if moe and all(moe.layers) else facts.integer("feed_forward_length"),
        norm_eps=facts.number("attention.layer_norm_rms_epsilon"),
        activation=family.activation,
        query_scale=gguf.query_scale(facts, count),
        qkv_clip=_clip(gguf, facts),
        tied="output.weight" not in files.tensors,
    )
    layers = check_layers(files.tensors, r"blk\.(\d{1,6})\.", count, f"{origin}: {arch}.block_count")
    if layers > count:
        raise CorruptCheckpoint(
            f"{origin}: {arch}.block_count={count}, but the file holds {counted(layers, 'layer')}"
        )
    names = _with_fused(gguf.names, files)
    said = (*facts.said, *_unused(facts), *_odd_head(gguf, spec.tied, origin))
    return Recipe(spec, chosen(spec, names, _biases(names, files)), warnings=said)


def _unused(facts: Facts) -> list[str]:
    """A line for each value that nothing was made of, though it says something."""
    left = {key: value for key, value in facts.unasked().items() if key not in WITHOUT_EFFECT}
    odd = [key for key, value in left.items() if value and value != OFF.get(key)]
    for key in odd[:_NAMED]:
        facts.say(key, "is not used, as in llama.cpp")
    more = [f"{facts.origin}: {len(odd) - _NAMED} further values are not used"] if odd[_NAMED:] else []
    return facts.said[len(facts.said) - len(odd[:_NAMED]) :] + more


def _odd_head(gguf: GgufSide, tied: bool, origin: str) -> list[str]:
    """As in llama.cpp the file decides, not what its family has."""
    if gguf.head == "tied" and not tied:
        return [f"{origin}: holds output.weight, though models of this family have none; it is used"]
    if gguf.head == "own" and tied:
        return [f"{origin}: holds no output.weight; token_embd.weight serves as both"]
    return []


def _clip(gguf: GgufSide, facts: Facts) -> float | None:
    if not gguf.clip or not (clip := facts.number("attention.clamp_kqv", 0.0)):
        return None
    facts.say("attention.clamp_kqv", UNLIKE_LLAMA_CPP)
    return clip


def _vocab(files: TensorFiles) -> int:
    rows = files.find("token_embd.weight").rows
    tokens = files.metadata.get("tokenizer.ggml.tokens", [])
    if isinstance(tokens, Texts) and len(tokens) > rows:
        raise CorruptCheckpoint(
            f"{files.paths[0]}: {counted(len(tokens), 'token')}, but token_embd.weight has {counted(rows, 'row')}"
        )
    return rows


def _ropes(gguf: GgufSide, facts: Facts, head_dim: int, files: TensorFiles) -> tuple[RopeSpec, ...]:
    """The rope of all layers; if windowed layers have one of their own, that comes second."""
    rope = gguf_rope(
        facts,
        head_dim,
        interleaved=gguf.interleaved,
        freqs=_factors(files, "rope_freqs.weight"),
        short=_factors(files, "rope_factors_short.weight"),
        long=_factors(files, "rope_factors_long.weight"),
    )
    if rope.dims != head_dim and not gguf.partial_rope:
        raise facts.unsupported("rope.dimension_count")
    if not gguf.local_rope:
        return (rope,)
    if facts.integer("rope.dimension_count_swa", rope.dims) != rope.dims:
        raise facts.unsupported("rope.dimension_count_swa")
    theta, magnitude = (
        facts.number("rope.freq_base_swa", 10000.0),
        facts.number("rope.scaling.attn_factor", 1.0),
    )
    return rope, RopeSpec(rope.dims, theta, gguf.interleaved, magnitude=magnitude)


def _factors(files: TensorFiles, name: str) -> tuple[float, ...]:
    """A small tensor of rope factors; () if the file has none."""
    tensor = files.tensors.get(name)
    if tensor is None:
        return ()
    if tensor.weights > 4096:
        raise CorruptCheckpoint(f"{files.paths[0]}: {name} has {tensor.weights} values: must have dims/2")
    matrix = from_stored(tensor.type, tensor.rows, tensor.shape[-1], files.read(tensor))
    return tuple(dequantize(matrix).flatten().tolist())


def _with_fused(names: Names, files: TensorFiles) -> Names:
    """The names, with tensors fused where they are in the first layer; all other layers must be like it."""
    attention = dict(names["attn"])
    for roles, name in GGUF_FUSED.items():
        if name.format(layer=0) in files.tensors:
            for role in roles.split("+"):
                del attention[role]
            attention[roles] = name
    return {**names, "attn": attention}


def _biases(names: Names, files: TensorFiles) -> frozenset[str]:
    """The biases that the first layer has; all other layers must be like it."""
    return frozenset(
        role
        for kind in ("attn", "ffn")
        for roles, name in names[kind].items()
        if name.format(layer=0) in files.tensors
        for role in roles.split("+")
        if role.endswith("_bias")
    )
