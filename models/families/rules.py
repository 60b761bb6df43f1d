"""Rules that several families share: which layers have a window or experts.

Each takes the facts of one checkpoint and its number of layers. The entries of `table` name them.
"""

from __future__ import annotations

import math
from dataclasses import replace

from shoal.models.errors import UnsupportedCheckpoint
from shoal.partition.spec import MoeSpec

from .facts import UNLIKE_LLAMA_CPP, Facts
from .family import Moe, Windows

_SOFTMAX = 1  # the value of expert_gating_func in GGUF


def hf_window_everywhere(config: Facts, layers: int) -> Windows:
    return _everywhere(config, _window(config), layers)


def hf_window_by_type(config: Facts, layers: int) -> Windows:
    """mistral: all layers, unless layer_types says which (in transformers such a model is a Ministral)."""
    return _by_type(config, [True] * layers)


def hf_window_if_used(config: Facts, layers: int) -> Windows:
    """qwen3_moe: one switch for all layers."""
    return _everywhere(config, _window(config) if config.flag("use_sliding_window", False) else None, layers)


def hf_window_from_layer(config: Facts, layers: int) -> Windows:
    """qwen2, qwen3: layers from max_window_layers on, unless layer_types says which."""
    if not config.flag("use_sliding_window", False):
        return _everywhere(config, None, layers)
    first = config.integer("max_window_layers", 28)
    return _by_type(config, [i >= first for i in range(layers)])


def hf_window_alternating(config: Facts, layers: int) -> Windows:
    """qwen2_moe: every other of the layers before max_window_layers, unless layer_types says which."""
    if not config.flag("use_sliding_window", False):
        return _everywhere(config, None, layers)
    last = config.integer("max_window_layers", 28)
    return _by_type(config, [i % 2 == 0 and i < last for i in range(layers)])


def hf_window_pattern(config: Facts, layers: int) -> Windows:
    """gemma3: all but every n-th layer, unless layer_types says which."""
    windows = _by_type(config, _all_but_every(config.integer("sliding_window_pattern", 6), layers))
    local = [window is not None for window in windows]
    # Beside layer_types transformers writes the second one, true or not.
    unread = "sliding_window_pattern" if config.has("layer_types") else "_sliding_window_pattern"
    if config.has(unread) and any(local) and _all_but_every(config.integer(unread), layers) != local:
        config.say(unread, "is not used, as in transformers")
    return windows


def gguf_window_everywhere(metadata: Facts, layers: int) -> Windows:
    window = metadata.integer("attention.sliding_window", 0) or None
    if window and window < metadata.integer("context_length"):
        metadata.say("attention.sliding_window", UNLIKE_LLAMA_CPP)
    return [window] * layers


def gguf_window_pattern(metadata: Facts, layers: int) -> Windows:
    """gemma3: all but every n-th layer (n is 6 unless stored), or a list of which."""
    window = metadata.integer("attention.sliding_window", 0) or None
    key = "attention.sliding_window_pattern"
    stored = metadata.values.get(metadata.prefix + key)
    if isinstance(stored, list):
        local = metadata.items(key, int)  # or bool
        if len(local) != layers or not {*local} <= {0, 1}:
            raise metadata.wrong(key, local, f"a list of {layers}, one for each layer, true or false")
    else:
        local = _all_but_every(metadata.integer(key, 6), layers)
    return [window if here else None for here in local]


def mixtral_moe(config: Facts, layers: int) -> Moe:
    return Moe(_hf_experts(config, "intermediate_size", normalize=True), [True] * layers)


def olmoe_moe(config: Facts, layers: int) -> Moe:
    normalize = config.flag("norm_topk_prob", False)
    return Moe(_hf_experts(config, "intermediate_size", normalize), [True] * layers)


def qwen_moe(config: Facts, layers: int) -> Moe:
    """qwen2_moe and qwen3_moe. There is a shared expert only if its size is given."""
    shared = config.integer("shared_expert_intermediate_size", 0)
    spec = _hf_experts(config, "moe_intermediate_size", config.flag("norm_topk_prob", False))
    spec = replace(spec, shared_ffn=shared, shared_gated=shared > 0)
    step = config.integer("decoder_sparse_step", 1)
    if step < 1:
        raise config.wrong("decoder_sparse_step", step, "at least 1")
    dense = set(config.items("mlp_only_layers", int, []))
    return Moe(spec, [i not in dense and (i + 1) % step == 0 for i in range(layers)])


def gguf_mixtral_moe(metadata: Facts, layers: int) -> Moe:
    ffn = metadata.integer("feed_forward_length")
    return Moe(_gguf_experts(metadata, ffn, normalize=True), [True] * layers)


def gguf_olmoe_moe(metadata: Facts, layers: int) -> Moe:
    ffn = metadata.integer("feed_forward_length")
    return Moe(_gguf_experts(metadata, ffn, normalize=False), [True] * layers)


def gguf_qwen2_moe(metadata: Facts, layers: int) -> Moe:
    """Beside the chosen experts there is a gated one that is always on."""
    shared = metadata.integer("expert_shared_feed_forward_length", 0)
    shared = shared or metadata.integer("feed_forward_length")
    spec = _gguf_experts(metadata, _qwen_expert_ffn(metadata), normalize=False)
    return Moe(replace(spec, shared_ffn=shared, shared_gated=True), [True] * layers)


def gguf_qwen3_moe(metadata: Facts, layers: int) -> Moe:
    return Moe(_gguf_experts(metadata, _qwen_expert_ffn(metadata), normalize=True), [True] * layers)


def gemma3_query_scale(metadata: Facts, layers: int) -> float:
    """GGUF does not store it. Only the largest model (62 layers) scales by another number than its head size."""
    if layers != 62:
        return 0.0
    query_dim = metadata.integer("embedding_length") // max(metadata.integer("attention.head_count"), 1)
    return 1 / math.sqrt(max(query_dim, 1))


def _hf_experts(config: Facts, ffn_key: str, normalize: bool) -> MoeSpec:
    """Any family may call their number by either name, depending on the version of transformers that wrote the file."""
    return MoeSpec(
        experts=config.integer("num_experts" if config.has("num_experts") else "num_local_experts"),
        active=config.integer("num_experts_per_tok"),
        ffn=config.integer(ffn_key),
        normalize=normalize,
    )


def _gguf_experts(metadata: Facts, ffn: int, normalize: bool) -> MoeSpec:
    """The experts; ways of routing that Shoal does not compute are refused. `normalize`: if the file does not say."""
    keys = f"{metadata.origin}: {metadata.prefix}"
    if (function := metadata.integer("expert_gating_func", _SOFTMAX)) != _SOFTMAX:
        raise UnsupportedCheckpoint(
            f"{keys}expert_gating_func={function} is not supported (supported: 1, softmax)"
        )
    if (scale := metadata.number("expert_weights_scale", 1.0)) not in (0.0, 1.0):
        raise UnsupportedCheckpoint(f"{keys}expert_weights_scale={scale} is not supported")
    if metadata.flag("expert_weights_norm", normalize) != normalize:
        metadata.say("expert_weights_norm", UNLIKE_LLAMA_CPP)
    return MoeSpec(
        experts=metadata.integer("expert_count"),
        active=metadata.integer("expert_used_count"),
        ffn=ffn,
        normalize=metadata.flag("expert_weights_norm", normalize),
    )


def _qwen_expert_ffn(metadata: Facts) -> int:
    """Early files say only how many columns all active experts have together."""
    together = metadata.integer("feed_forward_length", 0) // max(metadata.integer("expert_used_count"), 1)
    return metadata.integer("expert_feed_forward_length", together)


def _all_but_every(period: int, layers: int) -> list[bool]:
    return [period < 1 or (i + 1) % period != 0 for i in range(layers)]


def _everywhere(config: Facts, window: int | None, layers: int) -> Windows:
    kind = "full_attention" if window is None else "sliding_attention"
    if config.has("layer_types") and {*config.items("layer_types", str)} != {kind}:
        config.say("layer_types", "is not used, as in transformers")
    return [window] * layers


def _by_type(config: Facts, local: list[bool]) -> Windows:
    window = _window(config)
    if config.has("layer_types"):
        types = config.items("layer_types", str)
        if len(types) != len(local):
            raise config.wrong("layer_types", types, f"a list of {len(local)}, one for each layer")
        if unknown := {*types} - {"sliding_attention", "full_attention"}:
            raise UnsupportedCheckpoint(
                f"{config.origin}: layer_types has {min(unknown)!r:.60}, which is not supported "
                "(supported: full_attention, sliding_attention)"
            )
        local = [kind == "sliding_attention" for kind in types]
        if window is None and any(local):
            raise config.wrong("sliding_window", window, "a number, since layer_types has sliding_attention")
    return [window if here else None for here in local]


def _window(config: Facts) -> int | None:
    """A null says that there is none; what is absent may have a default."""
    if "sliding_window" in config.values and not config.has("sliding_window"):
        return None
    return config.integer("sliding_window", 0) or None
