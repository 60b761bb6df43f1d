"""`ModelSpec`: the frozen facts of an architecture.

Knows sizes, head counts, experts, rope and norms, and which blocks follow from them. Does not know where the facts come
from (config.json or GGUF metadata: `models.families`), nor tensors, files or devices.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple

from .errors import SpecError

MAX_CONTEXT = 1 << 26
ANY_LENGTH = 1 << 62
# A text with dynamic NTK may grow by an eighth before all its keys are computed anew with the theta of its new length.
DYNAMIC_SLACK = 8

BlockKind = Literal["embed", "attn", "ffn", "router", "expert", "head"]


class BlockId(NamedTuple):
    """The unit that is read, moved, split and computed together. `str()` gives its name.

    A head that is streamed is cut into slices, which `expert` numbers as well.
    """

    kind: BlockKind
    layer: int = -1
    expert: int = -1

    def __str__(self) -> str:
        suffix = f".{self.expert}" if self.expert >= 0 else ""
        return f"{self.kind}{suffix}" if self.layer < 0 else f"layers.{self.layer}.{self.kind}{suffix}"

    @property
    def place(self) -> tuple[str, int]:
        """Which of its layer's blocks it is."""
        return self.kind, self.expert


@dataclass(frozen=True)
class RopeSpec:
    """Rotary embedding. Every published scaling amounts to divisors of the base frequencies.

    Pair i of a head turns by `position * theta**(-2i/dims) / divisors[i]`; cos and sin are multiplied by
    `magnitude` (YaRN, arXiv 2309.00071; LongRoPE, arXiv 2402.13753).

    Two scalings depend on how long the text is, and turn all of its keys otherwise when it gets longer (see `Turning`):
    LongRoPE has other divisors beyond `long_from_tokens`, and dynamic NTK another theta for every length beyond
    `dynamic_from_tokens`.
    """

    dims: int  # rotated dimensions of a head; the rest pass through
    theta: float
    interleaved: bool = False  # pairs are (2i, 2i+1), as GGUF stores llama; otherwise (i, i + dims/2)
    divisors: tuple[float, ...] = ()  # one per pair; () means all 1
    long_divisors: tuple[float, ...] = ()  # replace `divisors` in texts of more than `long_from_tokens`
    long_from_tokens: int = 0
    magnitude: float = 1.0
    long_magnitude: float = 1.0
    # Not in `repr`, which names KV on disk: texts that these do not change have the KV that they had before.
    dynamic_factor: float = field(default=0.0, repr=False)  # 0 = theta is the same for all lengths
    dynamic_from_tokens: int = field(default=0, repr=False)
    extends_to: int = field(default=0, repr=False)  # the longest text that it is meant for; 0 = not said

    def __post_init__(self) -> None:
        if self.dims <= 0 or self.dims % 2:
            raise SpecError(f"rope.dims={self.dims}: must be positive and even")
        # Published ones are up to 1e11; divisors are up to 1000 and at least 0.1, magnitudes near 1.
        _check_limits(
            self, "rope.", {"theta": (1e-3, 1e18), "magnitude": (1e-3, 1e3), "long_magnitude": (1e-3, 1e3)}
        )
        for name in ("divisors", "long_divisors"):
            values = getattr(self, name)
            if values and len(values) != self.dims // 2:
                raise SpecError(f"rope.{name} has {len(values)} values: must have dims/2={self.dims // 2}")
            wrong = next((v for v in values if not 1e-6 <= v <= 1e9), None)
            if wrong is not None:
                raise SpecError(f"rope.{name} has {wrong}: every value must be from 1e-06 to 1e+09")
        if self.dynamic_factor and not (
            self.dims > 2 and 1 <= self.dynamic_factor <= 1e6 and self.dynamic_from_tokens > 0
        ):
            raise SpecError(
                f"rope.dynamic_factor={self.dynamic_factor}: must be from 1 to 1e6, with more than 2 dims"
            )

    @property
    def by_length(self) -> bool:
        """Whether keys turn otherwise in longer texts."""
        return bool(self.long_divisors or self.dynamic_factor)

    def turning(self, tokens: int) -> Turning:
        """How the keys of a text of so many tokens turn."""
        if self.long_divisors and tokens > self.long_from_tokens:
            return Turning(self.theta, self.long_divisors, self.long_magnitude)
        if self.dynamic_factor and tokens > self.dynamic_from_tokens:
            stretch = self.dynamic_factor * tokens / self.dynamic_from_tokens - (self.dynamic_factor - 1)
            theta = self.theta * stretch ** (self.dims / (self.dims - 2))
            return Turning(theta, self.divisors, self.magnitude)
        return Turning(self.theta, self.divisors, self.magnitude)

    def length_class(self, tokens: int) -> int:
        """A length with the same turning as `tokens`, and the same for all that share it; 0 for short texts."""
        if self.dynamic_factor and tokens > self.dynamic_from_tokens:
            return tokens
        return self.long_from_tokens + 1 if self.long_divisors and tokens > self.long_from_tokens else 0

    def grows_to(self, length: int) -> int:
        """How long a text may get whose turning was chosen for `length` tokens (a `length_class`)."""
        if self.dynamic_factor:
            return length + length // DYNAMIC_SLACK if length else self.dynamic_from_tokens
        return self.long_from_tokens if self.long_divisors and not length else ANY_LENGTH


class Turning(NamedTuple):
    """The part of a `RopeSpec` that may depend on the length of the text."""

    theta: float
    divisors: tuple[float, ...]
    magnitude: float


def length_class(ropes: Iterable[RopeSpec], tokens: int) -> int:
    """The length for which the ropes of a text of so many tokens are chosen; 0 for one that is short for all."""
    return max((rope.length_class(tokens) for rope in ropes), default=0)


def grows_to(ropes: Iterable[RopeSpec], length: int) -> int:
    """How long a text may get before its ropes have to be chosen anew; `length` is its `length_class`."""
    return min((rope.grows_to(length) for rope in ropes), default=ANY_LENGTH)


@dataclass(frozen=True)
class MoeSpec:
    """Mixture of experts: softmax router, top-k, optional always-on shared expert."""

    experts: int
    active: int  # experts per token (k)
    ffn: int  # columns of one expert
    normalize: bool  # the k chosen probabilities are scaled to sum to 1
    shared_ffn: int = 0  # columns of the shared expert; 0 = none
    shared_gated: bool = False  # the shared expert's output is multiplied by sigmoid(x @ gate)
    held: tuple[int, int] | None = None  # the half-open range of experts that a shard has; None = all

    def __post_init__(self) -> None:
        limits = {"experts": (1, 4096), "active": (1, self.experts), "ffn": (1, 1 << 20)}
        _check_limits(self, "moe.", limits)
        if not 0 <= self.shared_ffn <= 1 << 20:
            raise SpecError(f"moe.shared_ffn={self.shared_ffn}: must be from 0 to {1 << 20}")
        if self.held and not 0 <= self.held[0] < self.held[1] <= self.experts:
            raise SpecError(f"moe.held={self.held}: must be some of the {self.experts} experts")

    @property
    def own(self) -> range:
        """The experts whose weights are here."""
        return range(*(self.held or (0, self.experts)))


@dataclass(frozen=True)
class LayerSpec:
    """What one layer does differently from its neighbours."""

    window: int | None = None  # sliding-window attention over this many tokens; None = all
    rope: int = 0  # index into ModelSpec.ropes
    moe: bool = False


@dataclass(frozen=True)
class NormShare:
    """How a shard takes part in norms over all heads (`qk_norm` "full"). `heads` and `kv_heads` are those of the whole
    model. Several shards may have the same KV heads; `adds_kv` says whether this one adds the squares of its own."""

    heads: int
    kv_heads: int
    adds_kv: bool


@dataclass(frozen=True)
class ModelSpec:
    """A whole architecture. Sizes are counts, not bytes."""

    family: str
    layers: tuple[LayerSpec, ...]
    hidden: int
    vocab: int  # 0 in a shard without embedding and head
    context: int  # longest sequence the model was made for, in tokens
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int  # columns of a dense FFN; 0 when every layer is MoE
    ropes: tuple[RopeSpec, ...]
    norm_eps: float = 1e-5
    activation: Literal["silu", "gelu_tanh"] = "silu"
    qk_norm: Literal["none", "head", "full"] = "none"  # over each head, or over all heads at once
    pre_norm: bool = True  # normalise what enters attn and ffn
    post_norm: bool = False  # normalise what leaves them, before it is added to the residual
    embed_scale: float = 1.0
    query_scale: float = 0.0  # 0 means head_dim ** -0.5
    qkv_clip: float | None = None  # clamp q, k and v to [-clip, clip]
    tied: bool = False  # head and embed are the same tensor
    o_margins: tuple[int, int] = (0, 0)  # columns that a shard's o has before and after those of its heads
    norm_share: NormShare | None = None  # None = this is no shard of heads that are normalised together
    moe: MoeSpec | None = None

    def __post_init__(self) -> None:
        limits = {
            "hidden": (1, 1 << 17),
            "vocab": (0, 1 << 22),
            "context": (1, MAX_CONTEXT),
            "heads": (1, 4096),
            "kv_heads": (1, self.heads),
            "head_dim": (1, 4096),
            "ffn": (0, 1 << 20),
        }
        _check_limits(self, "", limits)
        if not 1 <= len(self.layers) <= 4096:
            raise SpecError(f"layers={len(self.layers)}: must be from 1 to 4096")
        if self.heads % self.kv_heads:
            raise SpecError(f"kv_heads={self.kv_heads}: must divide heads={self.heads}")
        if min(self.o_margins) < 0:
            raise SpecError(f"o_margins={self.o_margins}: must not be negative")
        if not 1e-20 <= self.norm_eps < 1:  # less is nothing in f32
            raise SpecError(f"norm_eps={self.norm_eps}: must be from 1e-20 to 1")
        if not 0 <= self.query_scale <= 1e6:
            raise SpecError(f"query_scale={self.query_scale}: must be from 0 to 1e+06")
        if self.qkv_clip is not None and not 1e-6 <= self.qkv_clip <= 1e9:
            raise SpecError(f"qkv_clip={self.qkv_clip}: must be from 1e-06 to 1e+09")
        for rope in self.ropes:
            if rope.dims > self.head_dim:
                raise SpecError(f"rope.dims={rope.dims}: must not exceed head_dim={self.head_dim}")
        for i, layer in enumerate(self.layers):
            if not 0 <= layer.rope < len(self.ropes):
                raise SpecError(f"layers[{i}].rope={layer.rope}: there are {len(self.ropes)} ropes")
            if layer.moe and self.moe is None:
                raise SpecError(f"layers[{i}] is MoE but the spec has no experts")
            if not layer.moe and self.ffn == 0:
                raise SpecError(f"layers[{i}] is dense but ffn=0")
            if layer.window is not None and not 1 <= layer.window <= 1 << 48:
                raise SpecError(f"layers[{i}].window={layer.window}: must be from 1 to {1 << 48}")

    @property
    def longest(self) -> int:
        """The longest context that may be asked for: that of the model, or what its rope scaling extends it to."""
        return max(self.context, min(self.ropes[0].extends_to, MAX_CONTEXT))

    @property
    def attention_scale(self) -> float:
        return self.query_scale or self.head_dim**-0.5

    def ffn_blocks(self, layer: int) -> tuple[BlockId, ...]:
        """The blocks of a layer's feed-forward part: one, or the router followed by the experts that are here."""
        return self._feeding[layer]

    @cached_property  # planning asks thousands of times, and a mixture has thousands of blocks
    def _feeding(self) -> tuple[tuple[BlockId, ...], ...]:
        own = self.moe.own if self.moe is not None else ()
        return tuple(
            (BlockId("router", number), *(BlockId("expert", number, expert) for expert in own))
            if layer.moe
            else (BlockId("ffn", number),)
            for number, layer in enumerate(self.layers)
        )

    def blocks(self) -> tuple[BlockId, ...]:
        """Every block, in the order of a step."""
        body = (block for i in range(len(self.layers)) for block in (BlockId("attn", i), *self.ffn_blocks(i)))
        return (BlockId("embed"), *body, BlockId("head")) if self.vocab else tuple(body)


def _check_limits(spec: object, prefix: str, limits: Mapping[str, tuple[float, float]]) -> None:
    for name, (low, high) in limits.items():
        value = getattr(spec, name)
        if not low <= value <= high:
            raise SpecError(f"{prefix}{name}={value}: must be from {low} to {high}")
