"""Names of tensors in Hugging Face checkpoints and in GGUF files, by block and role.

HF_NAMES and GGUF_NAMES are those of most families; the others differ from them where their families do. Only data.
"""

from __future__ import annotations

from .tensors import Names

_LAYER = "{prefix}layers.{layer}."
_ATTN = _LAYER + "self_attn."
_MLP = _LAYER + "mlp."
_MIXTRAL = _LAYER + "block_sparse_moe."
_BLK = "blk.{layer}."


def _linears(stem: str, **names: str) -> dict[str, str]:
    """Role → name of its matrix, then those of their biases."""
    weights = {role: f"{stem}{name}.weight" for role, name in names.items()}
    return weights | {f"{role}_bias": f"{stem}{name}.bias" for role, name in names.items()}


HF_NAMES: Names = {
    "embed": {"embed": "{prefix}embed_tokens.weight"},
    "attn": {
        "norm": _LAYER + "input_layernorm.weight",
        **_linears(_ATTN, q="q_proj", k="k_proj", v="v_proj", o="o_proj"),
        "q_norm": _ATTN + "q_norm.weight",
        "k_norm": _ATTN + "k_norm.weight",
        "post_norm": _LAYER + "post_attention_layernorm.weight",
    },
    "ffn": {
        "norm": _LAYER + "post_attention_layernorm.weight",
        **_linears(_MLP, gate="gate_proj", up="up_proj", down="down_proj"),
        "post_norm": _LAYER + "post_feedforward_layernorm.weight",
    },
    "router": {
        "norm": _LAYER + "post_attention_layernorm.weight",
        "router": _MLP + "gate.weight",
        "shared_gate": _MLP + "shared_expert.gate_proj.weight",
        "shared_up": _MLP + "shared_expert.up_proj.weight",
        "shared_down": _MLP + "shared_expert.down_proj.weight",
        "shared_scale": _MLP + "shared_expert_gate.weight",
    },
    "expert": {
        "gate": _MLP + "experts.{expert}.gate_proj.weight",
        "up": _MLP + "experts.{expert}.up_proj.weight",
        "down": _MLP + "experts.{expert}.down_proj.weight",
    },
    "head": {"norm": "{prefix}norm.weight", "head": "lm_head.weight"},
}

GGUF_NAMES: Names = {
    "embed": {"embed": "token_embd.weight"},
    "attn": {
        "norm": _BLK + "attn_norm.weight",
        **_linears(_BLK, q="attn_q", k="attn_k", v="attn_v", o="attn_output"),
        "q_norm": _BLK + "attn_q_norm.weight",
        "k_norm": _BLK + "attn_k_norm.weight",
        "post_norm": _BLK + "post_attention_norm.weight",
    },
    "ffn": {
        "norm": _BLK + "ffn_norm.weight",
        **_linears(_BLK, gate="ffn_gate", up="ffn_up", down="ffn_down"),
        "post_norm": _BLK + "post_ffw_norm.weight",
    },
    "router": {
        "norm": _BLK + "ffn_norm.weight",
        "router": _BLK + "ffn_gate_inp.weight",
        "shared_gate": _BLK + "ffn_gate_shexp.weight",
        "shared_up": _BLK + "ffn_up_shexp.weight",
        "shared_down": _BLK + "ffn_down_shexp.weight",
        "shared_scale": _BLK + "ffn_gate_inp_shexp.weight",
    },
    "expert": {
        "gate": _BLK + "ffn_gate_exps.weight",
        "up": _BLK + "ffn_up_exps.weight",
        "down": _BLK + "ffn_down_exps.weight",
    },
    "head": {"norm": "output_norm.weight", "head": "output.weight"},
}

# Any GGUF may have q, k and v in one tensor; the biases may be fused, too, or not.
GGUF_FUSED = {
    "q+k+v": _BLK + "attn_qkv.weight",
    "q_bias+k_bias+v_bias": _BLK + "attn_qkv.bias",
}

PHI3_HF: Names = {
    **HF_NAMES,
    "attn": {
        "norm": _LAYER + "input_layernorm.weight",
        "q+k+v": _ATTN + "qkv_proj.weight",
        "o": _ATTN + "o_proj.weight",
    },
    "ffn": {
        "norm": _LAYER + "post_attention_layernorm.weight",
        "gate+up": _MLP + "gate_up_proj.weight",
        "down": _MLP + "down_proj.weight",
    },
}

PHI3_GGUF: Names = {
    **GGUF_NAMES,
    "ffn": {
        "norm": _BLK + "ffn_norm.weight",
        "gate+up": _BLK + "ffn_up.weight",
        "down": _BLK + "ffn_down.weight",
    },
}

GEMMA3_HF: Names = {
    **HF_NAMES,
    "ffn": {**HF_NAMES["ffn"], "norm": _LAYER + "pre_feedforward_layernorm.weight"},
}

MIXTRAL_HF: Names = {
    **HF_NAMES,
    "router": {**HF_NAMES["router"], "router": _MIXTRAL + "gate.weight"},
    "expert": {
        "gate": _MIXTRAL + "experts.{expert}.w1.weight",
        "up": _MIXTRAL + "experts.{expert}.w3.weight",
        "down": _MIXTRAL + "experts.{expert}.w2.weight",
    },
}
