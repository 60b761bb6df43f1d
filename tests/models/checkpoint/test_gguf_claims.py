"""What the metadata of a GGUF file claim: used as by llama.cpp or transformers, said to be unused, or refused."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from fakes import tiny
from fakes.running import Running, relative_error
from gguf import GGUFWriter

from shoal.models.checkpoint.checkpoint import open_checkpoint

from .test_claims import outcome
from .test_gguf_facts import edit, peer_logits

IDS = random.Random(3).choices(range(len(tiny.TOKENS)), k=45)

GGUF_CLAIMS: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"attention.clamp_kqv": 0.5}, "attention.clamp_kqv=0.5 is not used, as in llama.cpp"),
    ("olmoe", {"attention.clamp_kqv": 0.5}, "attention.clamp_kqv=0.5 is used, as in transformers"),
    ("llama", {"attention.sliding_window": 8}, "attention.sliding_window=8 is used, as in transformers"),
    ("llama", {"attention.sliding_window": 500}, "used"),
    ("qwen2", {"attention.sliding_window": 8}, "attention.sliding_window=8 is not used"),
    ("phi3", {"attention.sliding_window_pattern": 2}, "attention.sliding_window_pattern=2 is not used"),
    ("gemma3", {"attention.sliding_window_pattern": [1, 0, 1, 0]}, "used"),
    ("gemma3", {"attention.sliding_window_pattern": [1, 0, 1]}, "refused: a list of 4"),
    ("gemma3", {"attention.sliding_window_pattern": [2, 0, 1, 1]}, "refused: a list of 4"),
    ("qwen3", {"final_logit_softcapping": 3.0}, "final_logit_softcapping=3.0 is not used"),
    ("gemma3", {"final_logit_softcapping": 3.0}, "refused: final_logit_softcapping=3.0 is not supported"),
    ("gemma3", {"final_logit_softcapping": 0.0}, "used"),
    ("gemma3", {"attn_logit_softcapping": 3.0}, "attn_logit_softcapping=3.0 is not used"),
    ("mixtral", {"router_logit_softcapping": 3.0}, "router_logit_softcapping=3.0 is not used"),
    ("olmo2", {"logit_scale": 0.5}, "logit_scale=0.5 is not used"),
    (
        "phi3",
        {"residual_scale": 0.5, "embedding_scale": 2.0},
        "residual_scale=0.5 is: embedding_scale=2.0 is",
    ),
    ("qwen2_moe", {"residual_scale": 1.0, "embedding_scale": 1.0, "logit_scale": 0.0}, "used"),
    ("qwen2_moe", {"attention.scale": 0.5}, "attention.scale=0.5 is not used"),
    ("qwen3_moe", {"attention.output_scale": 0.5}, "attention.output_scale=0.5 is not used"),
    ("llama", {"attention.causal": False}, "refused: llama.attention.causal=False is not supported"),
    ("gemma3", {"attention.causal": False}, "refused: gemma3.attention.causal=False"),
    ("qwen2", {"attention.causal": True}, "used"),
    ("qwen3_moe", {"expert_group_count": 2}, "refused: expert_group_count=2"),
    ("olmoe", {"expert_group_count": 1, "expert_group_used_count": 1}, "used"),
    ("qwen3_moe", {"expert_weights_norm": False}, "expert_weights_norm=False is used, as in transformers"),
    ("qwen3", {"nextn_predict_layers": 1}, "refused: nextn_predict_layers=1"),
    ("gemma3", {"attention.key_length_swa": 8}, "refused: attention.key_length_swa=8"),
    ("gemma3", {"rope.dimension_count_swa": 8}, "refused: rope.dimension_count_swa=8"),
    ("llama", {"rope.dimension_count": 8}, "refused: rope.dimension_count=8"),
    ("llama", {"rope.freq_base_swa": 50.0}, "rope.freq_base_swa=50.0 is not used"),
    ("qwen2", {"rope.scaling.type": "yarn"}, "rope.scaling.type='yarn' changes nothing"),
    ("qwen2", {"rope.scaling.type": "linear"}, "rope.scaling.type='linear' changes nothing"),
    (
        "qwen2",
        {"rope.scaling.type": "none", "rope.scaling.factor": 4.0},
        "rope.scaling.factor=4.0 is not used",
    ),
    ("qwen2", {"rope.scaling.factor": 4.0}, "used"),
    ("qwen2", {"rope.scale_linear": 4.0}, "used"),
    ("qwen2", {"rope.scale_linear": 4.0, "rope.scaling.factor": 2.0}, "rope.scale_linear=4.0 is not used"),
    ("qwen2", {"rope.scaling.yarn_beta_fast": 8.0}, "rope.scaling.yarn_beta_fast=8.0 is not used"),
    (
        "qwen2",
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.yarn_beta_fast": 8.0},
        "rope.scaling.yarn_beta_fast=8.0 is used, as in transformers",
    ),
    ("qwen2", {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, "used"),
    ("qwen3", {"rope.scaling.alpha": 4.0}, "rope.scaling.alpha=4.0 is not used"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu' is not used"),
    ("llama", {"vocab_size": 1000, "tensor_data_layout": "Meta AI original pth", "expert_count": 0}, "used"),
    ("llama", {f"odd{i}": i + 1 for i in range(12)}, "odd7=8 is not used: 4 further values"),
]
_PLAIN = {
    "llama": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "olmoe": {"num_key_value_heads": 4},  # llama.cpp demands as many as heads
    "phi3": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
        "sliding_window": None,
    },
}


def claiming(directory: Path, family: str, claims: dict[str, Any]) -> Path:
    """A GGUF file whose metadata claim this, too."""
    path = tiny.save_gguf(tiny.hf_model(family, seed=6, **_PLAIN.get(family, {})), directory / "m.gguf")

    def change(writer: GGUFWriter) -> None:
        for key, value in claims.items():
            full, kinds = f"{writer.arch}.{key}", {bool: writer.add_bool, int: writer.add_uint32}
            kinds |= {float: writer.add_float32, str: writer.add_string, list: writer.add_array}
            kinds[type(value)](full, value)

    arch = str(gguf.GGUFReader(path).fields["general.architecture"].contents())
    return edit(path, change, tuple(f"{arch}.{key}" for key in claims))


@pytest.mark.parametrize(("family", "claims", "expected"), GGUF_CLAIMS)
def test_claims_of_a_gguf_file_are_used_or_said_or_refused(
    family: str, claims: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    found = outcome(claiming(tmp_path, family, claims))
    assert all(part in found for part in expected.split(": "))
    assert found.startswith("refused") == expected.startswith("refused")


@pytest.mark.peer
@pytest.mark.parametrize(
    ("family", "claims"),
    [
        (family, claims)
        for family, claims, said in GGUF_CLAIMS
        if not re.search("refused|in transformers", said)
    ],
)
def test_claims_of_a_gguf_file_mean_the_same_to_llama_cpp(
    family: str, claims: dict[str, Any], tmp_path: Path
) -> None:
    path = claiming(tmp_path, family, claims)
    theirs = peer_logits(path, IDS)
    assert relative_error(Running(path).logits(IDS, [10]), theirs) <= (2e-3 if family == "gemma3" else 1e-5)


@pytest.mark.parametrize(
    ("family", "head", "said"),
    [
        ("gemma3", True, "holds output.weight, though"),
        ("llama", True, ""),
        ("olmo2", False, "holds no output.weight; token_embd.weight serves as both"),
        ("olmoe", False, "holds no output.weight"),
        ("qwen2", False, ""),
    ],
)
def test_the_head_of_a_gguf_file_decides(family: str, head: bool, said: str, tmp_path: Path) -> None:
    path = tiny.save_gguf(tiny.hf_model(family, tie_word_embeddings=True), tmp_path / "m.gguf")
    rows = np.ones((len(tiny.TOKENS), 64), np.float32)
    if head:
        path = edit(path, lambda writer: writer.add_tensor("output.weight", rows))
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.spec.tied != head
        assert len(checkpoint.warnings) == bool(said)
        assert said in "".join(checkpoint.warnings)
