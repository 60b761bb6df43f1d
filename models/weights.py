"""The weights of one block, by role.

Knows the names under which the transformer asks for tensors; does not know files or where bytes live.

Roles by kind of block (vectors are f32; those in brackets exist in some families only):

    embed   matrix: embed (vocab, hidden)
    attn    matrix: q (heads*head_dim, hidden), k, v (kv_heads*head_dim, hidden), o (hidden, heads*head_dim)
            vector: [norm], [q_bias], [k_bias], [v_bias], [o_bias], [q_norm], [k_norm], [post_norm]
            (a shard's o has margins besides: `ModelSpec.o_margins`)
    ffn     matrix: gate, up (ffn, hidden), down (hidden, ffn)
            vector: [norm], [gate_bias], [up_bias], [down_bias], [post_norm]
    router  matrix: router (experts, hidden), [shared_gate], [shared_up], [shared_down],
            [shared_scale (1, hidden)]    vector: [norm], [post_norm]
    expert  matrix: gate, up (moe.ffn, hidden), down (hidden, moe.ffn)
    head    matrix: head (vocab, hidden)    vector: norm

Inputs of quantised matrices are rounded to 16 bits; of some roles to 8 where the caller says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from shoal.kernels import (
    NARROW_INPUTS,
    WIDE_INPUTS,
    Activation,
    ComputeHome,
    FeedForward,
    Linears,
    Matrix,
)
from shoal.kernels.arrays import Floats
from shoal.partition.spec import ModelSpec

_NO_ROLES = frozenset[str]()


_WIDE_SHARE = 8  # of a mixture's layers, the first of so many


def narrow_roles(spec: ModelSpec, layer: int) -> frozenset[str]:
    """Whose inputs lose nothing that can be told when 8 bits are left of them. Not those of a mixture's down, nor of
    its first layers: the routers after them would choose other experts too often (docs/ARCHITECTURE.md)."""
    if spec.moe is None:
        return frozenset({"o", "gate", "down"})
    return frozenset({"o", "gate"}) if layer * _WIDE_SHARE >= len(spec.layers) else _NO_ROLES


@dataclass(frozen=True, eq=False)
class Weights:
    """Matrices have their stored type; vectors (norms, biases) are f32 and small.

    Vectors stay valid after the block is released, matrices do not.
    """

    matrix: Mapping[str, Matrix] = field(default_factory=dict)
    vector: Mapping[str, Floats] = field(default_factory=dict)
    _linears: dict[tuple[frozenset[str], tuple[str, ...]], Linears] = field(
        default_factory=dict, init=False, repr=False
    )
    _feed_forward: dict[tuple[frozenset[str], str], FeedForward] = field(
        default_factory=dict, init=False, repr=False
    )

    def within(self, home: ComputeHome) -> Weights:
        """The same weights in the memory of a home; these are not needed any more. Raises HomeFull and HomeLost."""
        vectors = {role: home.keep_vector(vector) for role, vector in self.vector.items()}
        return self.elsewhere(home.keep_matrix, vectors)

    def elsewhere(
        self, bring: Callable[[Matrix], Matrix], vectors: Mapping[str, Floats] | None = None
    ) -> Weights:
        """The same weights, with the matrices that `bring` makes of them, and with vectors, if there are any."""
        return Weights({role: bring(matrix) for role, matrix in self.matrix.items()}, vectors or {})

    def linears(self, *roles: str, narrow: frozenset[str] = _NO_ROLES) -> Linears:
        """The matrices of these roles, each with its bias if it has one, as kernels take them; made once. Inputs of
        those that are `narrow` have 8 bits."""
        made = self._linears.get((narrow, roles))
        if made is None:
            biases = [self.vector.get(f"{role}_bias") for role in roles]
            bits = [NARROW_INPUTS if role in narrow else WIDE_INPUTS for role in roles]
            made = Linears([self.matrix[role] for role in roles], biases, bits)
            self._linears[narrow, roles] = made
        return made

    def feed_forward(
        self, activation: Activation, prefix: str = "", narrow: frozenset[str] = _NO_ROLES
    ) -> FeedForward:
        """Gate, up and down, their roles prefixed, as kernels take them; made once. `narrow`: as of `linears`."""
        made = self._feed_forward.get((narrow, prefix))
        if made is None:
            enter = self.linears(prefix + "gate", prefix + "up", narrow=narrow)
            leave = self.linears(prefix + "down", narrow=narrow)
            made = self._feed_forward[narrow, prefix] = FeedForward(enter, leave, activation)
        return made

    @property
    def nbytes(self) -> int:
        return sum(m.nbytes for m in self.matrix.values()) + sum(v.nbytes for v in self.vector.values())
