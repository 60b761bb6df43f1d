"""Names of tensors in Hugging Face checkpoints and in GGUF files, by block and role.

The tables here hold for most families; `table` overrides them per family. Only data.
"""

from __future__ import annotations

from .tensors import Names

_ATTN = "{prefix}layers.{layer}.self_attn."
_MLP = "{prefix}layers.{layer}.mlp."

HF_NAMES: Names = {
    "embed": {"embed": "{prefix}embed_tokens.weight"},
    "attn": {
        "norm": "{prefix}layers.{layer}.input_layernorm.weight",
        "q": _ATTN + "q_proj.weight",
        "k": _ATTN + "k_proj.weight",
        "v": _ATTN + "v_proj.weight",
        "o": _ATTN + "o_proj.weight",
        "q_bias": _ATTN + "q_proj.bias",
        "k_bias": _ATTN + "k_proj.bias",
        "v_bias": _ATTN + "v_proj.bias",
        "o_bias": _ATTN + "o_proj.bias",
        "q_norm": _ATTN + "q_norm.weight",
        "k_norm": _ATTN + "k_norm.weight",
        "post_norm": "{prefix}layers.{layer}.post_attention_layernorm.weight",
    },
    "ffn": {
        "norm": "{prefix}layers.{layer}.post_attention_layernorm.weight",
        "gate": _MLP + "gate_proj.weight",
        "up": _MLP + "up_proj.weight",
        "down": _MLP + "down_proj.weight",
        "gate_bias": _MLP + "gate_proj.bias",
        "up_bias": _MLP + "up_proj.bias",
        "down_bias": _MLP + "down_proj.bias",
        "post_norm": "{prefix}layers.{layer}.post_feedforward_layernorm.weight",
    },
    "router": {
        "norm": "{prefix}layers.{layer}.post_attention_layernorm.weight",
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
    "head": {"norm": "{prefix}norm.weight", "head": "{head_prefix}lm_head.weight"},
}

GGUF_NAMES: Names = {
    "embed": {"embed": "token_embd.weight"},
    "attn": {
        "norm": "blk.{layer}.attn_norm.weight",
        "q": "blk.{layer}.attn_q.weight",
        "k": "blk.{layer}.attn_k.weight",
        "v": "blk.{layer}.attn_v.weight",
        "o": "blk.{layer}.attn_output.weight",
        "q_bias": "blk.{layer}.attn_q.bias",
        "k_bias": "blk.{layer}.attn_k.bias",
        "v_bias": "blk.{layer}.attn_v.bias",
        "o_bias": "blk.{layer}.attn_output.bias",
        "q_norm": "blk.{layer}.attn_q_norm.weight",
        "k_norm": "blk.{layer}.attn_k_norm.weight",
        "post_norm": "blk.{layer}.post_attention_norm.weight",
    },
    "ffn": {
        "norm": "blk.{layer}.ffn_norm.weight",
        "gate": "blk.{layer}.ffn_gate.weight",
        "up": "blk.{layer}.ffn_up.weight",
        "down": "blk.{layer}.ffn_down.weight",
        "gate_bias": "blk.{layer}.ffn_gate.bias",
        "up_bias": "blk.{layer}.ffn_up.bias",
        "down_bias": "blk.{layer}.ffn_down.bias",
        "post_norm": "blk.{layer}.post_ffw_norm.weight",
    },
    "router": {
        "norm": "blk.{layer}.ffn_norm.weight",
        "router": "blk.{layer}.ffn_gate_inp.weight",
        "shared_gate": "blk.{layer}.ffn_gate_shexp.weight",
        "shared_up": "blk.{layer}.ffn_up_shexp.weight",
        "shared_down": "blk.{layer}.ffn_down_shexp.weight",
        "shared_scale": "blk.{layer}.ffn_gate_inp_shexp.weight",
    },
    "expert": {
        "gate": "blk.{layer}.ffn_gate_exps.weight",
        "up": "blk.{layer}.ffn_up_exps.weight",
        "down": "blk.{layer}.ffn_down_exps.weight",
    },
    "head": {"norm": "output_norm.weight", "head": "output.weight"},
}

# Any GGUF may have q, k and v in one tensor, some with biases that are still apart.
GGUF_FUSED = {
    "q+k+v": "blk.{layer}.attn_qkv.weight",
    "q_bias+k_bias+v_bias": "blk.{layer}.attn_qkv.bias",
}

PHI3_HF: Names = {
    **HF_NAMES,
    "attn": {
        "norm": "{prefix}layers.{layer}.input_layernorm.weight",
        "q+k+v": _ATTN + "qkv_proj.weight",
        "o": _ATTN + "o_proj.weight",
    },
    "ffn": {
        "norm": "{prefix}layers.{layer}.post_attention_layernorm.weight",
        "gate+up": _MLP + "gate_up_proj.weight",
        "down": _MLP + "down_proj.weight",
    },
}

PHI3_GGUF: Names = {
    **GGUF_NAMES,
    "ffn": {
        "norm": "blk.{layer}.ffn_norm.weight",
        "gate+up": "blk.{layer}.ffn_up.weight",
        "down": "blk.{layer}.ffn_down.weight",
    },
}

GEMMA3_HF: Names = {
    **HF_NAMES,
    "ffn": {**HF_NAMES["ffn"], "norm": "{prefix}layers.{layer}.pre_feedforward_layernorm.weight"},
}

_MIXTRAL = "{prefix}layers.{layer}.block_sparse_moe."
MIXTRAL_HF: Names = {
    **HF_NAMES,
    "router": {**HF_NAMES["router"], "router": _MIXTRAL + "gate.weight"},
    "expert": {
        "gate": _MIXTRAL + "experts.{expert}.w1.weight",
        "up": _MIXTRAL + "experts.{expert}.w3.weight",
        "down": _MIXTRAL + "experts.{expert}.w2.weight",
    },
}
