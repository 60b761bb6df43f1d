"""Tiny random models of every family, as `transformers` models, Hugging Face directories and GGUF files.

Every parameter is random, norms and biases too, so that a swapped or forgotten tensor shows in the logits. Names in
GGUF files come from the `gguf` package's own map, not from Shoal's.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from gguf import GGMLQuantizationType, GGUFWriter
from tokenizers.pre_tokenizers import ByteLevel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from shoal.kernels.arrays import Floats

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

_BYTES = sorted(ByteLevel.alphabet())
_MERGES = [
    "t h",
    "th e",
    "Ġ the",
    "i n",
    "a n",
    "e r",
    "Ġ a",
    "o n",
    "r e",
    "an d",
    "Ġ and",
    "in g",
    "Ġ i",
    "Ġ o",
]
_SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|unused0|>",
    "<|unused1|>",
    "<|unused2|>",
    "<|pad|>",
]
TOKENS = [*_BYTES, *(merge.replace(" ", "") for merge in _MERGES), *_SPECIAL]
END, START, STOP = (TOKENS.index(token) for token in _SPECIAL[:3])

_COMMON: dict[str, Any] = {
    "vocab_size": len(TOKENS),
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": END,
    "eos_token_id": STOP,
    "pad_token_id": len(TOKENS) - 1,
    "attn_implementation": "eager",
}
_MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_OWN: dict[str, dict[str, Any]] = {
    "llama": {
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "mistral": {"head_dim": 24, "sliding_window": 16},
    "qwen2": {"rope_parameters": {"rope_type": "default", "rope_theta": 1000.0}},
    "qwen3": {"head_dim": 32, "tie_word_embeddings": True},
    "gemma3": {
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "num_hidden_layers": 4,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    },
    "phi3": {
        "original_max_position_embeddings": 32,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "short_factor": [1.0, 1.1, 1.3, 1.7],
            "long_factor": [1.5, 2.0, 3.0, 4.5],
        },
    },
    "olmo2": {"rms_norm_eps": 1e-6},
    "mixtral": {
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "intermediate_size": 64,
        "sliding_window": None,
    },
    "qwen2_moe": {**_MOE, "shared_expert_intermediate_size": 64},
    "qwen3_moe": {**_MOE, "head_dim": 32, "norm_topk_prob": True},
    "olmoe": {"num_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 32},
}
_CONFIGS = {
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
    "gemma3": transformers.Gemma3TextConfig,
    "phi3": transformers.Phi3Config,
    "olmo2": transformers.Olmo2Config,
    "mixtral": transformers.MixtralConfig,
    "qwen2_moe": transformers.Qwen2MoeConfig,
    "qwen3_moe": transformers.Qwen3MoeConfig,
    "olmoe": transformers.OlmoeConfig,
}
_ARCHS = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "mixtral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
    "phi3": gguf.MODEL_ARCH.PHI3,
    "olmo2": gguf.MODEL_ARCH.OLMO2,
    "qwen2_moe": gguf.MODEL_ARCH.QWEN2MOE,
    "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE,
    "olmoe": gguf.MODEL_ARCH.OLMOE,
}
FAMILIES: tuple[str, ...] = tuple(_CONFIGS)
EXPERT_SIZES = {  # of mixtures: what the configuration calls the columns of an expert
    "mixtral": "intermediate_size",
    "qwen2_moe": "moe_intermediate_size",
    "qwen3_moe": "moe_intermediate_size",
    "olmoe": "intermediate_size",
}

_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Per type: the offset of each scale (f16) in a block → the scale with which random bytes mean weights within about ±1.
_RANDOM_SCALES: dict[str, dict[int, float]] = {
    "Q2_K": {80: 1 / 12, 82: 1.5 / 12},
    "Q3_K": {108: 1 / 42},
    "Q4_K": {0: 1 / 150, 2: 7.5 / 150},
    "Q5_K": {0: 1 / 330, 2: 15.5 / 330},
    "Q6_K": {208: 1 / 1300},
    "IQ4_NL": {0: 1 / 70},
}


def config(family: str, **overrides: Any) -> Any:
    """The `transformers` configuration of the family's tiny model, some of its values replaced."""
    return _CONFIGS[family](**{**_COMMON, **json.loads(json.dumps(_OWN[family])), **overrides})


def hf_model(family: str, seed: int = 0, **overrides: Any) -> Any:
    """A `transformers` model of the family with random f32 parameters, in eval mode.

    `overrides` replace values of its configuration, e.g. hidden_size=256 for types with blocks of 256.
    """
    model = transformers.AutoModelForCausalLM.from_config(
        config(family, **overrides), dtype=torch.float32
    ).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("norm.weight"):
                parameter.copy_(noise * 0.2 + (0.0 if family == "gemma3" else 1.0))
            elif parameter.dim() == 1:
                parameter.copy_(noise * 0.3)
            else:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
    return model


def logits(model: Any, ids: list[int]) -> Floats:
    """What a `transformers` model makes of a text: (T, vocab)."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].float().numpy()


def save_hf(model: Any, directory: Path, sharded: bool = False, type: str = "F32") -> Path:
    """Writes config.json, safetensors and a small tokenizer. type: F32, F16 or BF16, to which the model is rounded."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(_FLOATS[type]).float())
    state = {name: value.to(_FLOATS[type]) for name, value in model.state_dict().items()}
    model.save_pretrained(directory, state_dict=state, max_shard_size="40KB" if sharded else "1GB")
    tokenizer = {
        "version": "1.0",
        "added_tokens": [_added(TOKENS.index(token), token) for token in _SPECIAL],
        "pre_tokenizer": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": True,
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": {token: i for i, token in enumerate(TOKENS) if token not in _SPECIAL},
            "merges": _MERGES,
        },
    }
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    names = {"bos_token": _SPECIAL[0], "eos_token": _SPECIAL[2], "pad_token": _SPECIAL[-1]}
    (directory / "tokenizer_config.json").write_text(json.dumps(names))
    return directory


Tensors = dict[str, tuple[np.ndarray[Any, Any], GGMLQuantizationType | None]]


def save_gguf(
    model: Any,
    path: Path,
    type: str = "F32",
    split_tensors: int = 0,
    edit: Callable[[Tensors], Tensors] = lambda tensors: tensors,
) -> Path:
    """Writes a GGUF file as llama.cpp's converter would, with matrices stored as `type`.

    The model's own parameters become what was stored, so that both compute the same. Types that the `gguf` package
    cannot quantise get random blocks. split_tensors: the number of tensors per part; then the path of the first part is
    returned. edit: makes of the converter's tensors those to write, as rows with their type (None: the array's own).
    """
    config = model.config
    arch = _ARCHS[config.model_type]
    writer = GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch], split_max_tensors=split_tensors)
    _write_facts(writer, config)
    _write_tokenizer(writer)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    state = dict(model.named_parameters())  # without the tied head
    tensors: Tensors = {}
    for name, parameter in state.items():
        stored = _store(parameter, "F32" if _stays_f32(name, parameter) else type)
        for part, data in _parts(name, stored, config):
            ours = names.get_name(part, try_suffixes=(".weight", ".bias"))
            assert ours is not None, part
            if ours.endswith("ffn_gate_inp_shexp.weight"):
                data = data.reshape(-1)
            raw = GGMLQuantizationType[type] if data.dtype == np.uint8 else None
            if arch == gguf.MODEL_ARCH.GEMMA3 and name.endswith("norm.weight"):
                data = data + np.float32(1)
            tensors[ours] = (np.ascontiguousarray(data), raw)
    for ours, (data, raw) in edit(tensors).items():
        writer.add_tensor(ours, data, raw_dtype=raw)
    _write_rope_factors(writer, config)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(path.parent.glob(f"{path.stem}-00001-of-*.gguf"))[0] if split_tensors else path


def _added(number: int, token: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": token, "special": True, **flags}


def _stays_f32(name: str, parameter: torch.Tensor) -> bool:
    return parameter.dim() == 1 or name.endswith(("mlp.gate.weight", "shared_expert_gate.weight"))


def _store(parameter: torch.nn.Parameter, type: str) -> np.ndarray[Any, Any]:
    """The parameter as it is stored (f32, f16, or bytes of rows); the parameter itself is rounded to that."""
    values = parameter.detach().numpy()
    if type == "F32":
        return values.copy()
    if type == "F16":
        half = values.astype(np.float16)
        parameter.data = torch.from_numpy(half.astype(np.float32))
        return half
    kind = GGMLQuantizationType[type]
    data = _random_blocks(values, kind) if type in _RANDOM_SCALES else gguf.quantize(values, kind)
    parameter.data = torch.from_numpy(gguf.dequantize(data, kind).astype(np.float32)).view(parameter.shape)
    return data.view(np.uint8)


def _random_blocks(values: np.ndarray[Any, Any], kind: GGMLQuantizationType) -> np.ndarray[Any, Any]:
    weights, size = gguf.GGML_QUANT_SIZES[kind]
    rows, cols = values.shape[:-1], values.shape[-1]
    if cols % weights:
        raise ValueError(f"rows of {cols} weights cannot be stored as {kind.name}")
    random = np.random.default_rng(values.size)
    blocks = random.integers(0, 256, (*rows, cols // weights, size), dtype=np.uint8)
    for offset, scale in _RANDOM_SCALES[kind.name].items():
        blocks[..., offset : offset + 2] = np.array([scale / cols**0.5], np.float16).view(np.uint8)
    return blocks.reshape(*rows, -1)


def _parts(name: str, data: np.ndarray[Any, Any], config: Any) -> list[tuple[str, np.ndarray[Any, Any]]]:
    """The tensors that the converter makes of one: it parts fused experts, and permutes rows of Llama's q and k."""
    if name.endswith("experts.gate_up_proj"):
        stem, half = name.removesuffix("gate_up_proj"), data.shape[1] // 2
        return [(f"{stem}gate_proj.weight", data[:, :half]), (f"{stem}up_proj.weight", data[:, half:])]
    if name.endswith("experts.down_proj"):
        return [(f"{name}.weight", data)]
    if _ARCHS[config.model_type] == gguf.MODEL_ARCH.LLAMA:
        for projection, heads in (
            ("q_proj", config.num_attention_heads),
            ("k_proj", config.num_key_value_heads),
        ):
            if f".{projection}." in name:
                pairs = data.reshape(heads, 2, data.shape[0] // heads // 2, *data.shape[1:])
                return [(name, pairs.swapaxes(1, 2).reshape(data.shape))]
    return [(name, data)]


def _write_facts(writer: GGUFWriter, config: Any) -> None:
    heads, kind = config.num_attention_heads, config.model_type
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    rope = config.rope_parameters
    everywhere = rope.get("full_attention", rope)
    writer.add_name("tiny")  # some names change how llama.cpp tokenises
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(int(head_dim * everywhere.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(everywhere["rope_theta"])
    if "sliding_attention" in rope:
        writer.add_rope_freq_base_swa(rope["sliding_attention"]["rope_theta"])
    if everywhere["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(everywhere["rope_type"]))
        writer.add_rope_scaling_factor(everywhere["factor"])
    if everywhere["rope_type"] == "longrope":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
    if original := everywhere.get("original_max_position_embeddings"):
        writer.add_rope_scaling_orig_ctx_len(original)
    if kind in ("mistral", "phi3", "gemma3_text") and config.sliding_window:
        writer.add_sliding_window(config.sliding_window)
    if kind == "gemma3_text":
        writer.add_sliding_window_pattern([layer == "sliding_attention" for layer in config.layer_types])
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if size := getattr(config, "moe_intermediate_size", None):
        writer.add_expert_feed_forward_length(size)
    if size := getattr(config, "shared_expert_intermediate_size", None):
        writer.add_expert_shared_feed_forward_length(size)


def _write_rope_factors(writer: GGUFWriter, config: Any) -> None:
    rope = config.rope_parameters
    kind = rope.get("rope_type")
    if kind == "llama3":
        base = ROPE_INIT_FUNCTIONS["llama3"](config)[0]
        dims = 2 * len(base)
        plain = 1 / rope["rope_theta"] ** (torch.arange(0, dims, 2).float() / dims)
        writer.add_tensor("rope_freqs.weight", (plain / base).numpy())
    if kind == "longrope":
        scale = config.max_position_embeddings / config.original_max_position_embeddings
        magnitude = np.sqrt(1 + np.log(scale) / np.log(config.original_max_position_embeddings))
        writer.add_rope_scaling_attn_factors(float(magnitude))
        writer.add_tensor("rope_factors_long.weight", np.array(rope["long_factor"], np.float32))
        writer.add_tensor("rope_factors_short.weight", np.array(rope["short_factor"], np.float32))


def _write_tokenizer(writer: GGUFWriter) -> None:
    kinds = [gguf.TokenType.CONTROL if token in _SPECIAL else gguf.TokenType.NORMAL for token in TOKENS]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(TOKENS)
    writer.add_token_types(kinds)
    writer.add_token_merges(_MERGES)
    writer.add_bos_token_id(END)
    writer.add_eos_token_id(STOP)
    writer.add_add_bos_token(False)
