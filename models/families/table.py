"""The families, one entry each. To add a family, add its entry here, and rules of its own to `rules`."""

from __future__ import annotations

from . import rules
from .family import ALWAYS, Family, GgufSide, HfSide
from .names import GEMMA3_HF, MIXTRAL_HF, PHI3_GGUF, PHI3_HF
from .tensors import ATTENTION_BIASES, FFN_BIASES, QKV_BIASES

_ATTENTION = {"attention_bias": ATTENTION_BIASES}
_WINDOWED = {"rms_norm_eps": 1e-6, "sliding_window": 4096}

FAMILIES = (
    Family(
        name="llama",
        hf=HfSide(
            types=("llama",), defaults={"rms_norm_eps": 1e-6}, biases=_ATTENTION | {"mlp_bias": FFN_BIASES}
        ),
        gguf=GgufSide(archs=("llama",), interleaved=True, windows=rules.gguf_window_everywhere),
    ),
    Family(
        name="mistral",
        hf=HfSide(types=("mistral",), defaults=_WINDOWED, windows=rules.hf_window_by_type),
    ),
    Family(
        name="qwen2",
        hf=HfSide(
            types=("qwen2",),
            defaults=_WINDOWED,
            biases={ALWAYS: QKV_BIASES},
            windows=rules.hf_window_from_layer,
        ),
        gguf=GgufSide(archs=("qwen2",)),
    ),
    Family(
        name="qwen3",
        qk_norm="head",
        hf=HfSide(
            types=("qwen3",),
            defaults=_WINDOWED | {"head_dim": 128},
            biases=_ATTENTION,
            windows=rules.hf_window_from_layer,
        ),
        gguf=GgufSide(archs=("qwen3",)),
    ),
    Family(
        name="gemma3",
        activation="gelu_tanh",
        qk_norm="head",
        post_norm=True,
        scaled_embed=True,
        hf=HfSide(
            types=("gemma3_text", "gemma3"),
            names=GEMMA3_HF,
            defaults={  # the published multimodal checkpoints leave most of these out
                "vocab_size": 262_208,
                "hidden_size": 2304,
                "intermediate_size": 9216,
                "num_hidden_layers": 26,
                "num_attention_heads": 8,
                "num_key_value_heads": 4,
                "head_dim": 256,
                "hidden_activation": "gelu_pytorch_tanh",
                "max_position_embeddings": 131_072,
                "rms_norm_eps": 1e-6,
                "tie_word_embeddings": True,
                "rope_theta": 1_000_000.0,
                "rope_local_base_freq": 10_000.0,
                "query_pre_attn_scalar": 256,
                "sliding_window": 4096,
            },
            biases=_ATTENTION,
            windows=rules.hf_window_pattern,
            norm_shift=1.0,
            local_rope=True,
            peculiar=(
                "final_logit_softcapping",
                "hidden_activation",
                "query_pre_attn_scalar",
                "_sliding_window_pattern",
                "sliding_window_pattern",
                "use_bidirectional_attention",
            ),
            unsupported={"final_logit_softcapping": (), "use_bidirectional_attention": (False,)},
        ),
        gguf=GgufSide(
            archs=("gemma3",),
            windows=rules.gguf_window_pattern,
            query_scale=rules.gemma3_query_scale,
            local_rope=True,
            partial_rope=True,
            head="tied",
            unsupported={"final_logit_softcapping": (0,)},
        ),
    ),
    Family(
        name="phi3",
        hf=HfSide(
            types=("phi3",),
            names=PHI3_HF,
            defaults={"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096},
            windows=rules.hf_window_everywhere,
            longrope_names=("yarn",),
            peculiar=("partial_rotary_factor",),
        ),
        gguf=GgufSide(
            archs=("phi3",), names=PHI3_GGUF, windows=rules.gguf_window_everywhere, partial_rope=True
        ),
    ),
    Family(
        name="olmo2",
        qk_norm="full",
        pre_norm=False,
        post_norm=True,
        hf=HfSide(types=("olmo2",), defaults={"rms_norm_eps": 1e-5}, biases=_ATTENTION),
        gguf=GgufSide(archs=("olmo2",), head="own", unsupported={"attention.sliding_window": (0,)}),
    ),
    Family(
        name="mixtral",
        hf=HfSide(
            types=("mixtral",),
            names=MIXTRAL_HF,
            defaults={"rms_norm_eps": 1e-5, "rope_theta": 1_000_000.0},
            windows=rules.hf_window_everywhere,
            moe=rules.mixtral_moe,
        ),
        gguf=GgufSide(
            archs=("llama",),
            interleaved=True,
            windows=rules.gguf_window_everywhere,
            moe=rules.gguf_mixtral_moe,
        ),
    ),
    Family(
        name="qwen2_moe",
        hf=HfSide(
            types=("qwen2_moe",),
            defaults=_WINDOWED | {"shared_expert_intermediate_size": 5632, "qkv_bias": True},
            biases={"qkv_bias": QKV_BIASES},
            windows=rules.hf_window_alternating,
            moe=rules.qwen_moe,
            peculiar=("norm_topk_prob",),
        ),
        gguf=GgufSide(archs=("qwen2moe",), moe=rules.gguf_qwen2_moe, head="own"),
    ),
    Family(
        name="qwen3_moe",
        qk_norm="head",
        hf=HfSide(
            types=("qwen3_moe",),
            defaults=_WINDOWED,
            biases=_ATTENTION,
            windows=rules.hf_window_if_used,
            moe=rules.qwen_moe,
            peculiar=("norm_topk_prob",),
        ),
        gguf=GgufSide(archs=("qwen3moe",), moe=rules.gguf_qwen3_moe),
    ),
    Family(
        name="olmoe",
        qk_norm="full",
        hf=HfSide(
            types=("olmoe",),
            defaults={"rms_norm_eps": 1e-5},
            biases=_ATTENTION,
            moe=rules.olmoe_moe,
            peculiar=("clip_qkv", "norm_topk_prob"),
        ),
        gguf=GgufSide(archs=("olmoe",), moe=rules.gguf_olmoe_moe, clip=True, head="own"),
    ),
)
