"""What a configuration claims and the files contradict: the files decide as in transformers, and it is said."""

from __future__ import annotations

import contextlib
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from fakes import tiny
from fakes.running import Running, relative_error
from gguf import GGUFWriter
from safetensors.torch import load_file, save_file

from shoal.models.checkpoint.checkpoint import open_checkpoint
from shoal.models.errors import CheckpointError, CorruptCheckpoint

from .test_gguf_facts import edit

Tensors = dict[str, torch.Tensor]
Change = Callable[[Tensors], object]
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
IDS = random.Random(3).choices(range(len(tiny.TOKENS)), k=24)


def made(directory: Path, family: str, change: Change, claims: dict[str, Any], **overrides: Any) -> Path:
    """A tiny model whose tensors and config.json were changed after it was saved."""
    path = tiny.save_hf(tiny.hf_model(family, seed=4, **overrides), directory)
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(
        {name: it.clone() for name, it in tensors.items()}, path / "model.safetensors", {"format": "pt"}
    )
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **claims}))
    return path


def warnings(path: Path) -> list[str]:
    with open_checkpoint(path) as checkpoint:
        found = list(checkpoint.warnings)
    assert all("\n" not in said and str(path) in said for said in found)
    return found


def as_in_transformers(path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    )
    assert relative_error(Running(path).logits(IDS, [10]), tiny.logits(model.eval(), IDS)) <= 1e-4


def own_head(tensors: Tensors) -> None:
    tensors[HEAD] = tensors[EMBED].flip(0).clone()


def last_row(tensors: Tensors) -> None:
    tensors[HEAD] = tensors[EMBED].clone()
    tensors[HEAD][-1, -1] += 1


def without_embedding(tensors: Tensors) -> None:
    tensors[HEAD] = tensors.pop(EMBED)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("change", [own_head, last_row])
def test_a_head_of_its_own_is_used_though_it_is_said_to_be_tied(
    family: str, change: Change, tmp_path: Path
) -> None:
    path = made(tmp_path / "m", family, change, {"tie_word_embeddings": True}, tie_word_embeddings=True)
    assert not open_checkpoint(path).spec.tied
    (said,) = warnings(path)
    assert "tie_word_embeddings is true, but the files hold lm_head.weight" in said
    as_in_transformers(path)


def test_a_head_that_equals_the_embedding_takes_no_memory(tmp_path: Path) -> None:
    path = made(tmp_path / "m", "llama", lambda it: it.update({HEAD: it[EMBED].clone()}), {})
    assert open_checkpoint(path).spec.tied
    assert warnings(path) == []
    as_in_transformers(path)


def test_without_a_head_the_embedding_serves(tmp_path: Path) -> None:
    path = made(tmp_path / "m", "llama", lambda it: it, {"tie_word_embeddings": False})
    (said,) = warnings(path)
    assert "tie_word_embeddings is false, but the files hold no lm_head.weight" in said
    tied = made(tmp_path / "t", "llama", lambda it: it, {})
    assert warnings(tied) == []
    assert relative_error(Running(path).logits(IDS, [24]), Running(tied).logits(IDS, [24])) == 0


def test_without_an_embedding_the_tied_head_serves(tmp_path: Path) -> None:
    path = made(tmp_path / "m", "llama", without_embedding, {})
    (said,) = warnings(path)
    assert "no model.embed_tokens.weight" in said
    as_in_transformers(path)
    untied = made(tmp_path / "u", "llama", without_embedding, {"tie_word_embeddings": False})
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight is missing"):
        open_checkpoint(untied)


EXTRA: dict[str, tuple[str, Change, dict[str, Any], str]] = {
    "bias of attention": (
        "llama",
        lambda it: it.update({"model.layers.1.self_attn.q_proj.bias": torch.ones(64)}),
        {},
        "gives 1 tensor of the files no place (model.layers.1.self_attn.q_proj.bias); it is not used",
    ),
    "biases of a family without": (
        "mistral",
        lambda it: it.update({f"model.layers.{i}.mlp.up_proj.bias": torch.ones(96) for i in range(3)}),
        {},
        "gives 3 tensors of the files no place",
    ),
    "norms of heads": (
        "llama",
        lambda it: it.update({"model.layers.0.self_attn.q_norm.weight": torch.full((16,), 3.0)}),
        {},
        "self_attn.q_norm.weight",
    ),
    "a bias of the head": (
        "qwen2",
        lambda it: it.update({"lm_head.bias": torch.ones(277)}),
        {},
        "lm_head.bias",
    ),
    "more layers": (
        "llama",
        lambda it: it,
        {"num_hidden_layers": 2},
        "num_hidden_layers=2, but the files hold 3 layers",
    ),
    "a flag that the family does not have": ("qwen2", lambda it: it, {"qkv_bias": False}, ""),
}


@pytest.mark.parametrize("case", EXTRA)
def test_what_has_no_place_is_said(case: str, tmp_path: Path) -> None:
    family, change, claims, message = EXTRA[case]
    path = made(tmp_path / "m", family, change, claims)
    found = warnings(path)
    assert len(found) == bool(message)
    assert message in "".join(found)
    as_in_transformers(path)


def test_claimed_biases_that_no_layer_has_are_zero(tmp_path: Path) -> None:
    path = made(tmp_path / "m", "llama", lambda it: it, {"attention_bias": True, "mlp_bias": True})
    (said,) = warnings(path)
    assert "asks for biases that the files do not hold" in said
    as_in_transformers(path)
    some = made(
        tmp_path / "s", "llama", lambda it: it.pop("model.layers.2.mlp.up_proj.bias"), {}, mlp_bias=True
    )
    with pytest.raises(CheckpointError, match=r"layers\.2\.mlp\.up_proj\.bias is missing"):
        open_checkpoint(some)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"num_hidden_layers": 5}, "num_hidden_layers=5, but the files hold 3 layers"),
    ("llama", {"vocab_size": 300}, r"embed_tokens\.weight has shape \(277, 64\).* \(300, 64\)"),
    ("llama", {"vocab_size": 200}, r"embed_tokens\.weight has shape"),
    ("llama", {"hidden_size": 128}, "has shape"),
    ("llama", {"intermediate_size": 64}, "has shape"),
    ("llama", {"num_key_value_heads": 4}, r"k_proj\.weight has shape"),
    ("llama", {"num_attention_heads": 8, "head_dim": 16}, r"q_proj\.weight has shape"),
    (
        "qwen3",
        {"head_dim": 16, "num_attention_heads": 8, "num_key_value_heads": 4},
        r"_norm\.weight has shape",
    ),
    ("llama", {"model_type": "qwen3"}, r"q_norm\.weight is missing"),
    ("mixtral", {"num_local_experts": 3}, r"gate\.weight has shape"),
    ("mixtral", {"num_local_experts": 9}, r"gate\.weight has shape|is missing"),
    ("qwen3_moe", {"moe_intermediate_size": 16}, "has shape"),
]


@pytest.mark.parametrize(("family", "claims", "message"), REFUSED)
def test_sizes_that_do_not_fit_are_refused(
    family: str, claims: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = made(tmp_path / "m", family, lambda it: it, claims)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "prefix", ["", "transformer.", "language_model.model.", "model.language_model.", "a.b.model."]
)
@pytest.mark.parametrize("tied", [True, False])
def test_names_with_another_beginning(prefix: str, tied: bool, tmp_path: Path) -> None:
    def renamed(tensors: Tensors) -> None:
        for name in list(tensors):
            if name.startswith("model."):
                tensors[prefix + name.removeprefix("model.")] = tensors.pop(name)

    plain = made(tmp_path / "p", "llama", lambda it: it, {}, tie_word_embeddings=tied)
    path = made(tmp_path / "m", "llama", renamed, {}, tie_word_embeddings=tied)
    assert warnings(path) == []
    assert relative_error(Running(path).logits(IDS, [24]), Running(plain).logits(IDS, [24])) == 0


@pytest.mark.parametrize("count", [2, 5])
def test_layers_of_a_gguf_file(count: int, tmp_path: Path) -> None:
    path = tiny.save_gguf(tiny.hf_model("llama"), tmp_path / "m.gguf")
    key = "llama.block_count"
    wrong = edit(path, lambda writer: writer.add_uint32(key, count), (key,))
    with pytest.raises(CorruptCheckpoint, match=rf"block_count={count}, but the files? holds? 3 layers"):
        open_checkpoint(wrong)


ODD: list[object] = ["4", "x", [], [1], {}, True]
NUMBERS: list[object] = [1e300, 1e-300, math.inf, -math.inf, math.nan, -1, 0, 10**400, 2**62, *ODD]
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3", "qwen2_moe"])
def test_numbers_that_no_model_has_are_the_files_fault(family: str, tmp_path: Path) -> None:
    """Each number of config.json in turn; whatever loads computes."""
    more = {"rope_parameters": {**YARN, "beta_fast": 32.0, "mscale": 1.0, "attention_factor": 1.0}}
    path = tiny.save_hf(tiny.hf_model(family, **(more if family == "llama" else {})), tmp_path / "m")
    config = json.loads((path / "config.json").read_text())

    def places(value: Any, where: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
        if isinstance(value, dict):
            return [place for key, item in value.items() for place in places(item, (*where, key))]
        return [where] if isinstance(value, int | float) else []

    for place in places(config):
        for number in NUMBERS:
            changed = json.loads(json.dumps(config))
            inner = changed
            for key in place[:-1]:
                inner = inner[key]
            inner[place[-1]] = number
            (path / "config.json").write_text(json.dumps(changed))
            with contextlib.suppress(CheckpointError):
                open_checkpoint(path).close()
                continue
            with pytest.raises(CheckpointError) as caught:
                open_checkpoint(path)
            assert str(path) in str(caught.value), (place, number)
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "key",
    ["rope.freq_base", "rope.scaling.factor", "rope.scaling.attn_factor", "attention.layer_norm_rms_epsilon"],
)
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, -1.0, 1e300, 1e-300])
def test_numbers_of_a_gguf_file(key: str, value: float, tmp_path: Path) -> None:
    yarn = tiny.hf_model("llama", rope_parameters=YARN)
    path = tiny.save_gguf(yarn, tmp_path / "m.gguf")

    def change(writer: GGUFWriter) -> None:
        writer.add_float64(f"llama.{key}", value)

    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(edit(path, change, (f"llama.{key}",)))
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "olmo2", "mixtral", "qwen3_moe"])
@pytest.mark.parametrize(
    ("claims", "said"),
    [
        ({"clip_qkv": 0.5}, "clip_qkv=0.5 is not used"),
        (
            {
                "partial_rotary_factor": 0.5,
                "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
            },
            "partial_rotary_factor=0.5 is not used",
        ),
        (
            {
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 5000.0,
                    "partial_rotary_factor": 0.5,
                }
            },
            "partial_rotary_factor=0.5 is not used",
        ),
        ({"query_pre_attn_scalar": 100}, "query_pre_attn_scalar=100 is not used"),
        ({"hidden_activation": "gelu_pytorch_tanh"}, "hidden_activation='gelu_pytorch_tanh' is not used"),
        ({"partial_rotary_factor": 1.0, "clip_qkv": None}, None),
    ],
)
def test_what_other_families_have_is_not_used(
    family: str, claims: dict[str, Any], said: str | None, tmp_path: Path
) -> None:
    path = made(tmp_path / "m", family, lambda tensors: None, claims)
    as_in_transformers(path)
    found = warnings(path)
    assert len(found) == (said is not None)
    assert all(str(said) in warning for warning in found)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
@pytest.mark.parametrize(
    "claims",
    [
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {"rope_scaling": {"type": "linear", "factor": 4.0, "rope_theta": 50.0}},
        {"rope_scaling": {}},
        {"rope_scaling": None},
    ],
)
def test_of_two_ropes_the_one_counts_that_counts_in_transformers(
    family: str, claims: dict[str, Any], tmp_path: Path
) -> None:
    as_in_transformers(made(tmp_path / "m", family, lambda tensors: None, claims))


def outcome(path: Path) -> str:
    """ "used", or what is said about the file: a warning or a refusal."""
    try:
        return " ".join(warnings(path)) or "used"
    except CheckpointError as error:
        return f"refused: {error}"


@pytest.mark.parametrize(
    ("family", "claims", "expected"),
    [
        ("llama", {"logit_scale": 0.5}, "logit_scale=0.5 is not used"),
        ("qwen3", {"residual_multiplier": 0.5}, "residual_multiplier=0.5 is not used"),
        ("mixtral", {"embedding_multiplier": 12.0}, "embedding_multiplier=12.0 is not used"),
        ("olmo2", {"attention_multiplier": 0.1}, "attention_multiplier=0.1 is not used"),
        ("mistral", {"final_logit_softcapping": 3.0}, "final_logit_softcapping=3.0 is not used"),
        ("gemma3", {"final_logit_softcapping": 3.0}, "refused: final_logit_softcapping=3.0 is not supported"),
        ("gemma3", {"attn_logit_softcapping": 3.0}, "attn_logit_softcapping=3.0 is not used"),
        ("olmo2", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True is not used"),
        ("llama", {"is_causal": False}, "refused: is_causal=False is not supported"),
        ("gemma3", {"is_causal": False}, "refused: is_causal=False is not supported"),
        ("olmoe", {"is_causal": True}, "used"),
        ("llama", {"sliding_window": 8}, "sliding_window=8 is not used"),
        ("llama", {"layer_types": ["sliding_attention"] * 3, "sliding_window": 8}, "layer_types"),
        ("mixtral", {"sliding_window": 8, "layer_types": ["full_attention"] * 3}, "layer_types"),
        (
            "mistral",
            {
                "sliding_window": 8,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            },
            "used",
        ),
        ("mistral", {"sliding_window": None}, "used"),
        ("gemma3", {"sliding_window_pattern": 2}, "sliding_window_pattern=2 is not used"),
        ("gemma3", {"sliding_window_pattern": 2, "layer_types": None}, "used"),
        (
            "gemma3",
            {"_sliding_window_pattern": 2, "layer_types": None},
            "_sliding_window_pattern=2 is not used",
        ),
        ("qwen2", {"sliding_window_pattern": 2}, "sliding_window_pattern=2 is not used"),
        ("mixtral", {"norm_topk_prob": False}, "norm_topk_prob=False is not used"),
        ("qwen3_moe", {"norm_topk_prob": False}, "used"),
        ("qwen2_moe", {"routed_scaling_factor": 2.5}, "routed_scaling_factor=2.5 is not used"),
        ("qwen3", {"no_rope_layers": [1, 0, 1]}, "no_rope_layers=[1, 0, 1] is not used"),
        ("qwen3", {"no_rope_layers": [1, 1, 1], "n_group": 1, "logit_scale": 1.0}, "used"),
        ("llama", {"rope_parameters": {"rope_type": "default", "factor": 4.0}}, "factor=4.0 is not used"),
        ("llama", {"rope_parameters": {**YARN, "low_freq_factor": 2.0}}, "low_freq_factor=2.0 is not used"),
        ("qwen2", {"rope_parameters": {**YARN, "factor": None}}, "used"),
        ("qwen2", {"rope_parameters": {"rope_type": "yarn"}}, "refused: factor of rope scaling 'yarn'"),
        ("olmo2", {"rope_scaling": {"type": "linear"}}, "refused: factor is missing"),
        ("mistral", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_parameters"),
    ],
)
def test_claims_are_used_or_said_or_refused(
    family: str, claims: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    path = made(tmp_path / "m", family, lambda tensors: None, claims)
    assert all(part in outcome(path) for part in expected.split(": "))
    if not expected.startswith("refused"):
        as_in_transformers(path)


def test_a_window_that_config_json_leaves_out_is_that_of_the_family(tmp_path: Path) -> None:
    path = made(tmp_path / "m", "mistral", lambda tensors: None, {})
    config = json.loads((path / "config.json").read_text())
    for change, window in (({"sliding_window": None}, None), ({}, 4096)):
        del config["sliding_window"]
        config |= change
        (path / "config.json").write_text(json.dumps(config))
        assert {layer.window for layer in open_checkpoint(path).spec.layers} == {window}


def test_kinds_of_layers_that_nobody_knows_are_refused(tmp_path: Path) -> None:
    claims = {"layer_types": ["sliding_attention", "chunked_attention", "full_attention", "full_attention"]}
    with pytest.raises(CheckpointError, match=r"config\.json: layer_types has 'chunked_attention'"):
        warnings(made(tmp_path / "m", "gemma3", lambda tensors: None, claims))
