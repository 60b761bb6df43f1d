"""Which tensors each kind of block needs, by role, and their shapes.

This follows from the `ModelSpec` and from the biases that a checkpoint has. The roles are those of `models.weights`.
Knows no tensor names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from shoal.partition.spec import BlockKind, ModelSpec

Names = Mapping[BlockKind, Mapping[str, str]]
"""Per kind of block: role → name of its tensor, in which {layer} and {expert} are to be filled in. `a+b` is one tensor
that holds the rows of role a, then those of b. If the name of an expert's tensor has no {expert}, the tensor is a stack
of all experts."""

ATTENTION_BIASES = frozenset({"q_bias", "k_bias", "v_bias", "o_bias"})
QKV_BIASES = frozenset({"q_bias", "k_bias", "v_bias"})
FFN_BIASES = frozenset({"gate_bias", "up_bias", "down_bias"})
NORMS = frozenset({"norm", "post_norm", "q_norm", "k_norm"})


@dataclass(frozen=True)
class Recipe:
    """How to make the blocks of one checkpoint. The tensors in `names` are needed, and no others.

    warnings: what the configuration claims and the files contradict, each in one line.
    """

    spec: ModelSpec
    names: Names
    norm_shift: float = 0.0  # to be added to the weights of every norm
    warnings: tuple[str, ...] = ()


def shapes(spec: ModelSpec, kind: BlockKind) -> dict[str, tuple[int, ...]]:
    """Role → shape of everything that a block of this kind has, except biases."""
    c, moe = spec.hidden, spec.moe
    q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    norms: dict[str, tuple[int, ...]] = {}
    if spec.pre_norm:
        norms["norm"] = (c,)
    if spec.post_norm:
        norms["post_norm"] = (c,)
    match kind:
        case "embed":
            return {"embed": (spec.vocab, c)}
        case "attn":
            found = norms | {"q": (q, c), "k": (kv, c), "v": (kv, c), "o": (c, q + sum(spec.o_margins))}
            if spec.qk_norm == "head":
                found |= {"q_norm": (spec.head_dim,), "k_norm": (spec.head_dim,)}
            elif spec.qk_norm == "full":
                found |= {"q_norm": (q,), "k_norm": (kv,)}
            return found
        case "ffn":
            return norms | _gated(spec.ffn, c)
        case "router":
            assert moe is not None
            found = norms | {"router": (moe.experts, c)}
            if moe.shared_ffn:
                found |= {f"shared_{role}": shape for role, shape in _gated(moe.shared_ffn, c).items()}
                if moe.shared_gated:
                    found["shared_scale"] = (1, c)
            return found
        case "expert":
            assert moe is not None
            return _gated(moe.ffn, c)
        case "head":
            return {"norm": (c,)} | ({} if spec.tied else {"head": (spec.vocab, c)})


def bias_shapes(spec: ModelSpec, kind: BlockKind) -> dict[str, tuple[int, ...]]:
    """Role → shape of the biases that a block of this kind may have."""
    if kind not in ("attn", "ffn"):
        return {}
    return {f"{role}_bias": shape[:1] for role, shape in shapes(spec, kind).items() if len(shape) == 2}


def chosen(spec: ModelSpec, names: Names, biases: frozenset[str]) -> Names:
    """The names that a spec with these biases needs, out of all that a family may have."""
    return {
        kind: {roles: name for roles, name in entries.items() if _needed(spec, kind, roles, biases)}
        for kind, entries in names.items()
        if _exists(spec, kind)
    }


def _gated(ffn: int, hidden: int) -> dict[str, tuple[int, ...]]:
    return {"gate": (ffn, hidden), "up": (ffn, hidden), "down": (hidden, ffn)}


def _exists(spec: ModelSpec, kind: BlockKind) -> bool:
    if kind in ("router", "expert"):
        return any(layer.moe for layer in spec.layers)
    return kind != "ffn" or not all(layer.moe for layer in spec.layers)


def _needed(spec: ModelSpec, kind: BlockKind, roles: str, biases: frozenset[str]) -> bool:
    of = shapes(spec, kind)
    return all(role in of or role in biases for role in roles.split("+"))
