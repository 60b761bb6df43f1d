"""Families: variants of configuration against `transformers`, both styles of config.json, and refusals.

What every family does by default is in test_equivalence; here are the options that a family has.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import tiny
from fakes.running import Running, relative_error
from safetensors.numpy import load_file, save_file

from shoal.models.checkpoint.checkpoint import open_checkpoint
from shoal.models.errors import CheckpointError, CorruptCheckpoint, UnsupportedCheckpoint
from shoal.models.families import FAMILIES, bias_shapes, recipe_from_hf, shapes
from shoal.partition.spec import ANY_LENGTH, BlockId, ModelSpec, RopeSpec, grows_to, length_class

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0}}),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 3.0}}),
    ("llama", {"rope_parameters": YARN}),
    ("llama", {"rope_parameters": {**YARN, "attention_factor": 0.9, "beta_fast": 16.0, "beta_slow": 2.0}}),
    ("llama", {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3, "truncate": False}}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
    ("llama", {"num_key_value_heads": 4, "head_dim": 8}),
    ("mistral", {"sliding_window": None, "num_key_value_heads": 1}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    ("qwen2", {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 0}),
    (
        "qwen3",
        {"attention_bias": True, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    ),
    ("gemma3", {"query_pre_attn_scalar": 50, "layer_types": None, "num_hidden_layers": 7}),
    ("gemma3", {"attention_bias": True, "tie_word_embeddings": False, "rope_parameters": None}),
    ("phi3", {"rope_parameters": None, "sliding_window": 12}),
    ("phi3", {"original_max_position_embeddings": 128}),
    ("olmo2", {"attention_bias": True, "num_key_value_heads": 4}),
    ("mixtral", {"sliding_window": 10, "head_dim": 24}),
    ("qwen2_moe", {"mlp_only_layers": [0], "norm_topk_prob": True, "qkv_bias": False}),
    ("qwen2_moe", {"decoder_sparse_step": 2, "use_sliding_window": True, "sliding_window": 8}),
    ("qwen3_moe", {"mlp_only_layers": [1], "norm_topk_prob": False, "attention_bias": True}),
    ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 8}),
    ("olmoe", {"norm_topk_prob": True, "attention_bias": True}),
    ("olmoe", {"clip_qkv": 0.5}),
]


def same_logits(model: Any, path: Path) -> None:
    ids = random.Random(7).choices(range(len(tiny.TOKENS)), k=40)
    assert relative_error(Running(path).logits(ids, [25]), tiny.logits(model, ids)) <= 1e-4


def edited(directory: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize(("family", "overrides"), VARIANTS)
def test_variants(family: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    model = tiny.hf_model(family, seed=1, **overrides)
    same_logits(model, tiny.save_hf(model, tmp_path / "m"))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_old_style_config(family: str, tmp_path: Path) -> None:
    """config.json as transformers 4 wrote it: rope at the top level, no rope_parameters."""

    def age(config: dict[str, Any]) -> None:
        rope = config.pop("rope_parameters")
        config["rope_theta"] = rope.get("full_attention", rope).pop("rope_theta")
        if local := rope.pop("sliding_attention", None):
            config["rope_local_base_freq"] = local["rope_theta"]
            config["sliding_window_pattern"] = 3
            del config["layer_types"]
        rope = rope.get("full_attention", rope)
        config["partial_rotary_factor"] = rope.pop("partial_rotary_factor", 1.0)
        kind = rope.pop("rope_type")
        config["rope_scaling"] = None if kind == "default" else {**rope, "type": kind}

    model = tiny.hf_model(family, seed=2)
    same_logits(model, edited(tiny.save_hf(model, tmp_path / "m"), age))


@pytest.mark.parametrize(
    ("prefix", "head"),
    [("language_model.model.", "language_model."), ("model.language_model.", "")],
    ids=["version 4", "version 5"],
)
def test_multimodal_gemma3(prefix: str, head: str, tmp_path: Path) -> None:
    """The text part is found within the whole, under the names of either version."""
    model = tiny.hf_model("gemma3", seed=4, tie_word_embeddings=False)
    directory = tiny.save_hf(model, tmp_path / "m")
    tensors = {
        prefix + name.removeprefix("model.") if name.startswith("model.") else head + name: tensor
        for name, tensor in load_file(directory / "model.safetensors").items()
    }
    save_file(tensors | {"vision_tower.weight": np.ones(2, np.int64)}, directory / "model.safetensors")

    def wrap(config: dict[str, Any]) -> None:
        text = dict(config)
        config.clear()
        config |= {"model_type": "gemma3", "text_config": text, "vision_config": {}}

    same_logits(model, edited(directory, wrap))


def test_base_model_without_prefix(tmp_path: Path) -> None:
    """What is saved from the decoder alone names its tensors without `model.`."""
    model = tiny.hf_model("llama", seed=5)
    directory = tiny.save_hf(model, tmp_path / "m")
    tensors = load_file(directory / "model.safetensors")
    save_file({n.removeprefix("model."): t for n, t in tensors.items()}, directory / "model.safetensors")
    same_logits(model, directory)


def test_published_gemma3_leaves_defaults_out() -> None:
    """The config.json of the published 4B: most keys are absent."""
    text = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    spec = spec_of({"model_type": "gemma3", "text_config": text})
    assert (spec.vocab, spec.heads, spec.kv_heads, spec.head_dim, spec.tied) == (262208, 8, 4, 256, True)
    assert [layer.window for layer in spec.layers[:7]] == [1024] * 5 + [None, 1024]
    assert [rope.theta for rope in spec.ropes] == [1e6, 1e4]
    assert spec.ropes[0].divisors == (8.0,) * 128
    assert spec.ropes[1].divisors == ()
    assert spec.embed_scale == 2560**0.5
    assert spec.activation == "gelu_tanh"


def test_clip() -> None:
    assert spec_of(small("olmoe", clip_qkv=8.0)).qkv_clip == 8.0


def test_dynamic_rope_is_plain_within_the_context() -> None:
    plain = spec_of(small("llama", rope_parameters={"rope_type": "default", "rope_theta": 100.0}))
    dynamic = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0}
    scaled = spec_of(small("llama", rope_parameters=dynamic))
    (rope,), (other,) = scaled.ropes, plain.ropes
    assert all(rope.turning(tokens) == other.turning(tokens) for tokens in (1, 64, 128))
    assert rope.turning(129).theta > other.turning(129).theta == 100.0
    assert (scaled.context, scaled.longest, plain.longest) == (128, 256, 128)
    assert repr(scaled) == repr(plain)  # or KV on disk of older versions would not be found


@pytest.mark.parametrize("factor", [0.5, 1e300, 1e7])
def test_a_dynamic_factor_has_limits(factor: float) -> None:
    dynamic = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": factor}
    with pytest.raises(CorruptCheckpoint, match="dynamic_factor"):
        spec_of(small("llama", rope_parameters=dynamic))


def test_ropes_are_chosen_by_the_length_of_a_text() -> None:
    short, long = (1.0, 2.0), (3.0, 4.0)
    longrope = RopeSpec(4, 100.0, divisors=short, long_divisors=long, long_from_tokens=64, long_magnitude=2.0)
    dynamic = RopeSpec(4, 100.0, dynamic_factor=2.0, dynamic_from_tokens=100)
    assert longrope.turning(64) == (100.0, short, 1.0)
    assert longrope.turning(65) == (100.0, long, 2.0)
    assert [length_class([longrope], tokens) for tokens in (1, 64, 65, 1000)] == [0, 0, 65, 65]
    assert [length_class([dynamic], tokens) for tokens in (1, 100, 101, 1000)] == [0, 0, 101, 1000]
    assert [length_class([longrope, dynamic], tokens) for tokens in (64, 65, 101)] == [0, 65, 101]
    assert (grows_to([longrope], 0), grows_to([dynamic], 0), grows_to([dynamic], 800)) == (64, 100, 900)
    assert grows_to([longrope], 65) == grows_to([RopeSpec(4, 100.0)], 0) == ANY_LENGTH
    for tokens in range(1, 300):
        for ropes in ([longrope], [dynamic], []):
            assert grows_to(ropes, length_class(ropes, tokens)) >= tokens


def small(family: str, **changes: Any) -> dict[str, Any]:
    config: dict[str, Any] = tiny.config(family).to_dict()
    return config | changes


def spec_of(config: dict[str, Any]) -> ModelSpec:
    return recipe_from_hf(config, "config.json", {}).spec


REFUSED: list[tuple[str, dict[str, Any], type[CheckpointError], str]] = [
    ("llama", {"model_type": "mamba"}, UnsupportedCheckpoint, "model_type 'mamba' .*llama, mistral"),
    ("llama", {"model_type": None}, CorruptCheckpoint, "model_type is missing"),
    ("llama", {"quantization_config": {"quant_method": "gptq"}}, UnsupportedCheckpoint, "'gptq'"),
    ("llama", {"hidden_act": "relu"}, UnsupportedCheckpoint, "activation 'relu'"),
    ("llama", {"hidden_size": "64"}, CorruptCheckpoint, "hidden_size='64': must be an integer"),
    ("llama", {"hidden_size": -64}, CorruptCheckpoint, "hidden=-64"),
    ("llama", {"hidden_size": None}, CorruptCheckpoint, "hidden_size is missing"),
    (
        "llama",
        {"num_hidden_layers": 10**9},
        CorruptCheckpoint,
        "num_hidden_layers=1000000000: must be from 1",
    ),
    ("llama", {"num_hidden_layers": True}, CorruptCheckpoint, "must be an integer"),
    ("llama", {"num_attention_heads": 0}, CorruptCheckpoint, "heads=0"),
    ("llama", {"num_key_value_heads": 3}, CorruptCheckpoint, "kv_heads=3: must divide"),
    ("llama", {"head_dim": 7}, CorruptCheckpoint, "rotated dimensions of a head=7"),
    ("llama", {"rms_norm_eps": float("nan")}, CorruptCheckpoint, "finite"),
    ("llama", {"vocab_size": 10**400}, CorruptCheckpoint, "vocab_size"),
    ("llama", {"vocab_size": 0}, CorruptCheckpoint, "vocab=0: must be 1 or more"),
    ("llama", {"tie_word_embeddings": "yes"}, CorruptCheckpoint, "true or false"),
    ("llama", {"rope_parameters": {"rope_type": "mrope"}}, UnsupportedCheckpoint, "rope scaling 'mrope'"),
    ("llama", {"rope_parameters": {"rope_type": "linear"}}, CorruptCheckpoint, "factor is missing"),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 0}}, CorruptCheckpoint, "factor=0"),
    ("llama", {"rope_parameters": {"rope_theta": -1.0}}, CorruptCheckpoint, "rope base=-1.0"),
    ("llama", {"rope_parameters": [1]}, CorruptCheckpoint, "an object"),
    ("llama", {"rope_parameters": {**YARN, "beta_fast": 0.5}}, UnsupportedCheckpoint, "beta_fast 0.5"),
    ("phi3", {"rope_parameters": {"rope_type": "longrope"}}, CorruptCheckpoint, "short_factor is missing"),
    (
        "phi3",
        {"rope_parameters": {"partial_rotary_factor": 1e300}},
        CorruptCheckpoint,
        "partial_rotary_factor",
    ),
    ("gemma3", {"final_logit_softcapping": 30.0}, UnsupportedCheckpoint, "final_logit_softcapping=30.0"),
    ("gemma3", {"use_bidirectional_attention": True}, UnsupportedCheckpoint, "use_bidirectional_attention"),
    ("gemma3", {"layer_types": ["full_attention"]}, CorruptCheckpoint, "a list of 4"),
    ("mixtral", {"num_experts_per_tok": 9}, CorruptCheckpoint, "moe.active=9: must be from 1 to 5"),
    ("qwen2_moe", {"decoder_sparse_step": 0}, CorruptCheckpoint, "decoder_sparse_step=0"),
    ("qwen2_moe", {"mlp_only_layers": ["x"]}, CorruptCheckpoint, "mlp_only_layers"),
]


@pytest.mark.parametrize(("family", "changes", "kind", "message"), REFUSED)
def test_refused_configs(
    family: str, changes: dict[str, Any], kind: type[CheckpointError], message: str
) -> None:
    with pytest.raises(kind, match=message) as caught:
        spec_of(small(family, **changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_blocks_match_the_spec(family: str, tmp_path: Path) -> None:
    """Every block has exactly the roles and shapes that its spec asks for, and the announced bytes."""
    paths = [tmp_path / "m", tmp_path / "m.gguf"]
    model = tiny.hf_model(family)
    tiny.save_hf(model, paths[0])
    tiny.save_gguf(model, paths[1])
    for path in paths:
        with open_checkpoint(path) as checkpoint:
            total = 0
            for block in checkpoint.spec.blocks():
                weights = checkpoint.read_block(block)
                wanted = shapes(checkpoint.spec, block.kind)
                allowed = wanted | bias_shapes(checkpoint.spec, block.kind)
                got = {role: (matrix.rows, matrix.cols) for role, matrix in weights.matrix.items()}
                got |= {role: tuple(vector.shape) for role, vector in weights.vector.items()}
                assert wanted.keys() <= got.keys() <= allowed.keys()
                assert got == {role: allowed[role] for role in got}
                assert all(vector.dtype == np.float32 for vector in weights.vector.values())
                assert weights.nbytes == checkpoint.block_bytes(block)
                total += weights.nbytes
            assert total == checkpoint.nbytes == 4 * checkpoint.parameters
            assert checkpoint.parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_missing_tensor_is_named(family: str, tmp_path: Path) -> None:
    directory = tiny.save_hf(tiny.hf_model(family), tmp_path / "m")
    tensors = load_file(directory / "model.safetensors")
    gone = sorted(name for name in tensors if ".1." in name)[0]
    del tensors[gone]
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(CorruptCheckpoint, match=gone):
        open_checkpoint(directory)


def test_tied_head_has_no_matrix(tmp_path: Path) -> None:
    with open_checkpoint(tiny.save_hf(tiny.hf_model("llama"), tmp_path / "m")) as checkpoint:
        assert checkpoint.spec.tied
        assert not checkpoint.read_block(BlockId("head")).matrix
        assert checkpoint.block_bytes(BlockId("head")) == 4 * checkpoint.spec.hidden


def test_fused_tensors_share_one_buffer(tmp_path: Path) -> None:
    with open_checkpoint(tiny.save_hf(tiny.hf_model("phi3"), tmp_path / "m")) as checkpoint:
        matrix = checkpoint.read_block(BlockId("attn", 0)).matrix
        buffer = matrix["q"].data.base
        assert buffer is not None
        assert all(matrix[role].data.base is buffer for role in "kv")


def test_model_types_and_architectures_are_unique() -> None:
    types = [kind for family in FAMILIES for kind in family.hf.types]
    assert len(types) == len(set(types))
    archs = [(arch, f.gguf.moe is None) for f in FAMILIES if f.gguf for arch in f.gguf.archs]
    assert len(archs) == len(set(archs))
