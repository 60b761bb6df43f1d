"""`Weighed`: a model as the throughput model sees it: its spec, and what each of its blocks weighs and multiplies.

Made from a checkpoint's header or from config.json alone (`daemon.throughput.model_sizes`). Pure: knows sizes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from ..memory_layout import KV_FORMATS, PAGE_TOKENS, KvLayout
from ..pinning import Pinnings
from ..spec import BlockId, ModelSpec


class Product(NamedTuple):
    """A matrix that rows are multiplied by: its stored type, its rows and columns, its bytes in memory. `narrow`:
    whether inputs of 8 bits do for it where a plan has narrow inputs. `expert`: of one."""

    kind: str
    rows: int
    cols: int
    nbytes: int
    narrow: bool = False
    expert: bool = False


class LayerKind(NamedTuple):
    """Layers that take equally long: the products of attention, of the dense part or of router and shared expert, and
    of one expert; the window of attention."""

    attention: tuple[Product, ...]
    dense: tuple[Product, ...]
    expert: tuple[Product, ...]
    window: int | None


@dataclass(frozen=True, eq=False)
class Weighed:
    """One model, kept in the types of one `quant`.

    `products`: of every block; of a head in slices those of each slice besides. `block_bytes`: of every block in
    memory, in the order of a step; `extents`: of every block in a pack, with the head in slices, and `vectors_bytes`
    of its norms (see `plan_streamed`). `stored_bytes`: of the files. `tokenizer_bytes`: what the tokenizer
    takes. `buffers`: by type of K and V, bytes of pages on their way to a disk. `chances`: how likely a token is to
    choose each expert, of layers where that was counted (`token_chances`).
    """

    spec: ModelSpec
    quant: str
    products: Mapping[BlockId, tuple[Product, ...]]
    block_bytes: Mapping[BlockId, int]
    extents: Mapping[BlockId, int]
    vectors_bytes: int
    stored_bytes: int
    tokenizer_bytes: int = 0
    buffers: Mapping[str, int] = field(default_factory=dict)
    chances: tuple[tuple[float, ...], ...] = ()

    @cached_property
    def layer_kinds(self) -> Mapping[LayerKind, int]:
        """How many layers there are of each kind."""
        return Counter(map(self.kind_of, range(len(self.spec.layers))))

    @cached_property
    def chosen(self) -> dict[float, float]:
        """How many experts of a layer so many tokens choose by `chances`, as far as that was worked out."""
        return {}

    def kind_of(self, layer: int) -> LayerKind:
        feeding, *experts = self.spec.ffn_blocks(layer)
        return LayerKind(
            self.products[BlockId("attn", layer)],
            self.products[feeding],
            self.products[experts[0]] if experts else (),
            self.spec.layers[layer].window,
        )

    @cached_property
    def pinnings(self) -> Pinnings:
        """All ways to keep some of its blocks in memory."""
        return Pinnings(self.spec, self.extents)

    @cached_property
    def pinnings_with_head(self) -> Pinnings:
        """Those with all of the head."""
        return Pinnings(self.spec, self.extents, keeps_head=True)

    @property
    def head(self) -> tuple[Product, ...]:
        return self.products[BlockId("head")]

    @property
    def weights_bytes(self) -> int:
        return sum(self.block_bytes.values())


def queried(spec: ModelSpec) -> int:
    """Numbers of the queries and keys of one token in a layer."""
    return (spec.heads + spec.kv_heads) * spec.head_dim


def attended(spec: ModelSpec, context: float) -> float:
    """How many tokens one token sees, of all layers together, if there are `context` before it."""
    windows = Counter(layer.window for layer in spec.layers)
    return sum(count * min(context, window or context) for window, count in windows.items())


def kv_bytes_by_layer(spec: ModelSpec, tokens: int, kv_type: str) -> int:
    """What K and V of one sequence take if each layer keeps only what it will see again: all tokens, or those of its
    window in whole pages. Today's pool keeps all tokens of all layers (`kv_page_bytes`)."""
    head_bytes = KvLayout.of(KV_FORMATS[kv_type], spec.head_dim).head_bytes
    pages = 0
    for layer in spec.layers:
        kept = min(tokens, layer.window + PAGE_TOKENS - 1) if layer.window else tokens
        pages += -(-kept // PAGE_TOKENS)
    return pages * spec.kv_heads * head_bytes
