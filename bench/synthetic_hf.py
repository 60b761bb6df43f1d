"""A Hugging Face directory of a known shape with random weights, for engines that do not read GGUF.

    python bench/synthetic_hf.py SHAPE DIRECTORY [--vocabulary MODEL.gguf]

The same weights and vocabulary as `synthetic` would write, all in bfloat16 or float32, one tensor in memory at a
time. Knows the names of llama's tensors in both worlds; other architectures are refused.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import synthetic
from inputs.shapes import SHAPES, Shape, TensorShape
from synthetic import Progress, SyntheticError
from transformers import AutoTokenizer

_HEADER_ALIGNMENT = 4096
_TORCH_NAMES = {"BF16": "bfloat16", "F32": "float32"}
_BYTES = {"BF16": 2, "F32": 4}
_NAMES = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def cached(shape: Shape, directory: Path, vocabulary: Path, progress: Progress) -> Path:
    """The directory of a shape in `directory`, written if it is not there. Raises SyntheticError."""
    return synthetic.kept(
        directory / f"{shape.name}-{synthetic.digest(shape)}",
        lambda path: write(shape, path, vocabulary, progress),
    )


def write(shape: Shape, path: Path, vocabulary: Path, progress: Progress = lambda done, total: None) -> None:
    """Write the directory. Raises SyntheticError if the disk is too small, or it is no plain llama in bf16 or f32."""
    if shape.arch != "llama" or shape.mix not in _TORCH_NAMES or shape.experts:
        raise SyntheticError(
            f"{shape.name}: only dense llama shapes in BF16 and F32 are written as directories"
        )
    tensors = list(shape.tensors())
    total = sum(_nbytes(tensor, shape.mix) for tensor in tensors)
    synthetic.need_room(shape, path.parent, total)
    path.mkdir()
    (path / "config.json").write_text(json.dumps(_config(shape), indent=1) + "\n", encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(vocabulary.parent, gguf_file=vocabulary.name)
    tokenizer.save_pretrained(path)
    with (path / "model.safetensors").open("wb") as stream:
        stream.write(_header(tensors, shape.mix))
        done = 0
        for seed, tensor in enumerate(tensors):
            data = synthetic.data(tensor, np.random.default_rng(seed))
            stream.write(data if tensor.type == shape.mix else _upper_halves(data))
            done += _nbytes(tensor, shape.mix)
            progress(done, total)
        stream.flush()
        os.fsync(stream.fileno())


def _config(shape: Shape) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": _TORCH_NAMES[shape.mix],
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab,
        "max_position_embeddings": shape.context,
        "rope_theta": shape.rope_base,
        "rms_norm_eps": shape.norm_eps,
        "hidden_act": "silu",
        "tie_word_embeddings": shape.tied,
    }


def _header(tensors: list[TensorShape], mix: str) -> bytes:
    """The header: names, shapes and places, padded so that the first tensor starts at a multiple of a page."""
    entries, offset = {}, 0
    for tensor in tensors:
        end = offset + _nbytes(tensor, mix)
        entries[_name(tensor.name)] = {
            "dtype": mix,
            "shape": list(tensor.sizes),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries).encode()
    text += b" " * (-(len(text) + 8) % _HEADER_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _name(gguf_name: str) -> str:
    stem = gguf_name.removesuffix(".weight")
    if stem == "output":
        return "lm_head.weight"
    if stem.startswith("blk."):
        _, layer, role = stem.split(".")
        return f"model.layers.{layer}.{_NAMES[role]}.weight"
    return f"model.{_NAMES[stem]}.weight"


def _nbytes(tensor: TensorShape, mix: str) -> int:
    return _BYTES[mix] * int(np.prod(tensor.sizes))


def _upper_halves(vector: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """A float32 vector as bfloat16."""
    return np.ascontiguousarray(vector.view(np.uint16)[1::2])


def main() -> None:
    parser = argparse.ArgumentParser(
        description="random weights in a known shape, as a Hugging Face directory"
    )
    parser.add_argument(
        "shape", choices=[name for name, shape in SHAPES.items() if shape.mix in _TORCH_NAMES]
    )
    parser.add_argument("target", type=Path)
    parser.add_argument("--vocabulary", type=Path, help="a GGUF; default: the default model, from the store")
    options = parser.parse_args()
    vocabulary = options.vocabulary or synthetic.default_vocabulary()
    try:
        write(SHAPES[options.shape], options.target, vocabulary, synthetic.bar(options.shape))
    except BaseException:
        shutil.rmtree(options.target, ignore_errors=True)
        raise


if __name__ == "__main__":
    main()
