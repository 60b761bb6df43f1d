"""GGUF metadata and tensors → specs and blocks: defaults, options, refusals, and agreement with llama.cpp."""

from __future__ import annotations

import json
import os
import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from fakes import tiny
from fakes.running import relative_error
from gguf import GGUFWriter

from shoal.kernels import dequantize
from shoal.kernels.arrays import Floats
from shoal.models.checkpoint.checkpoint import open_checkpoint
from shoal.models.errors import CheckpointError, CorruptCheckpoint, UnsupportedCheckpoint
from shoal.partition.spec import BlockId


def edit(path: Path, change: Callable[[GGUFWriter], None], drop: tuple[str, ...] = ()) -> Path:
    """A copy of a GGUF file with keys dropped and others (or tensors) added."""
    reader = gguf.GGUFReader(path)
    architecture = str(reader.fields["general.architecture"].contents())
    copy = path.with_name("edited.gguf")
    writer = GGUFWriter(copy, architecture)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture" or name in drop:
            continue
        kind = field.types[0]
        writer.add_key_value(name, field.contents(), kind, field.types[-1] if len(field.types) > 1 else None)
    for entry in reader.tensors:
        if entry.name not in drop:
            writer.add_tensor(entry.name, np.array(entry.data), raw_dtype=entry.tensor_type)
    change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return copy


def test_facts_and_their_defaults(tmp_path: Path) -> None:
    path = tiny.save_gguf(tiny.hf_model("mistral", head_dim=16), tmp_path / "m.gguf")
    keys = "rope.dimension_count", "rope.freq_base", "attention.key_length", "attention.value_length"
    drop = tuple(f"llama.{name}" for name in (*keys, "attention.sliding_window"))

    def change(writer: GGUFWriter) -> None:
        writer.add_float32("general.sampling.temp", 0.5)
        writer.add_int32("general.sampling.top_k", 7)
        writer.add_float32("llama.rope.scale_linear", 2.0)

    with open_checkpoint(edit(path, change, drop)) as checkpoint:
        spec = checkpoint.spec
        assert (spec.head_dim, spec.ropes[0].dims, spec.ropes[0].theta) == (16, 16, 10000.0)
        assert spec.ropes[0].interleaved
        assert spec.ropes[0].divisors == (2.0,) * 8
        assert spec.layers[0].window is None
        assert checkpoint.advice == (str(checkpoint.path), "general.sampling.", {"temp": 0.5, "top_k": 7})
        assert checkpoint.name == "tiny"
        assert checkpoint.types == {"F32": 3 * 9 + 3}
        assert checkpoint.kind == "gguf"


def test_gemma3_pattern_and_scale(tmp_path: Path) -> None:
    model = tiny.hf_model("gemma3", num_hidden_layers=7, layer_types=None)
    path = tiny.save_gguf(model, tmp_path / "m.gguf")
    key = "gemma3.attention.sliding_window_pattern"
    for change, windows in (
        (lambda writer: None, [16, 16, 16, 16, 16, None, 16]),
        (lambda writer: writer.add_uint32(key, 2), [16, None, 16, None, 16, None, 16]),
    ):
        with open_checkpoint(edit(path, change, (key,))) as checkpoint:
            assert [layer.window for layer in checkpoint.spec.layers] == windows
            assert checkpoint.spec.query_scale == 0


def test_sizes_that_differ_by_layer(tmp_path: Path) -> None:
    path = tiny.save_gguf(tiny.hf_model("llama"), tmp_path / "m.gguf")
    name = "llama.feed_forward_length"
    with open_checkpoint(
        edit(path, lambda writer: writer.add_array(name, [96, 96, 96]), (name,))
    ) as checkpoint:
        assert checkpoint.spec.ffn == 96
    with pytest.raises(UnsupportedCheckpoint, match=f"{name} differs from layer to layer"):
        open_checkpoint(edit(path, lambda writer: writer.add_array(name, [96, 64, 96]), (name,)))


REFUSED: list[tuple[str, Callable[[GGUFWriter], None], tuple[str, ...], type[CheckpointError], str]] = [
    ("llama", lambda w: None, ("llama.block_count",), CorruptCheckpoint, "llama.block_count is missing"),
    ("llama", lambda w: None, ("blk.1.attn_k.weight",), CorruptCheckpoint, "blk.1.attn_k.weight is missing"),
    ("llama", lambda w: None, ("token_embd.weight",), CorruptCheckpoint, "token_embd.weight is missing"),
    (
        "llama",
        lambda w: w.add_value_length(8),
        ("llama.attention.value_length",),
        UnsupportedCheckpoint,
        "=8",
    ),
    ("llama", lambda w: w.add_string("llama.rope.scaling.type", "odd"), (), UnsupportedCheckpoint, "'odd'"),
    ("llama", lambda w: w.add_embedding_length(60), ("llama.embedding_length",), CorruptCheckpoint, "shape"),
    (
        "llama",
        lambda w: w.add_token_list([*tiny.TOKENS, "x"]),
        ("tokenizer.ggml.tokens",),
        CorruptCheckpoint,
        f"{len(tiny.TOKENS) + 1} tokens, but token_embd.weight has {len(tiny.TOKENS)} rows",
    ),
    ("gemma3", lambda w: w.add_final_logit_softcapping(30.0), (), UnsupportedCheckpoint, "softcapping"),
    ("olmo2", lambda w: w.add_sliding_window(8), (), UnsupportedCheckpoint, "olmo2.attention.sliding_window"),
    (
        "qwen3_moe",
        lambda w: w.add_uint32("qwen3moe.expert_gating_func", 2),
        (),
        UnsupportedCheckpoint,
        "softmax",
    ),
    ("qwen3_moe", lambda w: w.add_expert_weights_scale(2.5), (), UnsupportedCheckpoint, "scale=2.5"),
]


@pytest.mark.parametrize(("family", "change", "drop", "kind", "message"), REFUSED)
def test_refused_metadata(
    tmp_path: Path,
    family: str,
    change: Callable[[GGUFWriter], None],
    drop: tuple[str, ...],
    kind: type[CheckpointError],
    message: str,
) -> None:
    path = tiny.save_gguf(tiny.hf_model(family), tmp_path / "m.gguf")
    with pytest.raises(kind, match=message):
        open_checkpoint(edit(path, change, drop))


def test_experts_in_single_tensors_are_refused(tmp_path: Path) -> None:
    path = tiny.save_gguf(tiny.hf_model("mixtral"), tmp_path / "m.gguf")

    def change(writer: GGUFWriter) -> None:
        writer.add_tensor("blk.0.ffn_gate.0.weight", np.zeros((64, 64), np.float32))

    with pytest.raises(UnsupportedCheckpoint, match=r"blk\.0\.ffn_gate\.0\.weight.*convert the model again"):
        open_checkpoint(edit(path, change, ("blk.0.ffn_gate_exps.weight",)))


def test_one_expert_is_read_alone(tmp_path: Path) -> None:
    """From a stack of experts in a quantised type, each block gets its own slice."""
    model = tiny.hf_model("qwen3_moe", hidden_size=64, moe_intermediate_size=64)
    path = tiny.save_gguf(model, tmp_path / "m.gguf", type="Q4_0")
    fused = model.state_dict()["model.layers.1.mlp.experts.gate_up_proj"].numpy()
    with open_checkpoint(path) as checkpoint:
        for expert in range(6):
            block = BlockId("expert", 1, expert)
            matrix = checkpoint.read_block(block).matrix
            assert matrix["gate"].nbytes == 64 * 2 * 18
            assert np.array_equal(dequantize(matrix["up"]), fused[expert, 64:])


def test_tokens_leave_with_the_files(tmp_path: Path) -> None:
    with open_checkpoint(tiny.save_gguf(tiny.hf_model("qwen2"), tmp_path / "m.gguf")) as checkpoint:
        assert len(checkpoint.metadata["tokenizer.ggml.tokens"]) == len(tiny.TOKENS)
        assert checkpoint.tokenizer().decode(checkpoint.tokenizer().encode("the ring")) == "the ring"
    for metadata in (checkpoint.metadata, checkpoint._files.metadata):
        assert "tokenizer.ggml.tokens" not in metadata
    assert checkpoint.metadata["general.architecture"] == "qwen2"


PEER = """
import json, sys
import llama_cpp, numpy
path, ids, out = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
model = llama_cpp.Llama(path, n_ctx=128, logits_all=True, verbose=False, n_threads=1, type_k=0, type_v=0)
model.eval(ids)
numpy.save(out, numpy.array(model.scores[: len(ids)], numpy.float32))
"""


def peer_logits(path: Path, ids: list[int]) -> Floats:
    """What llama.cpp makes of a text: (T, vocab). SHOAL_PEER_PYTHON is a Python that has llama_cpp."""
    python = os.environ["SHOAL_PEER_PYTHON"]
    out = path.with_name("logits.npy")
    subprocess.run(
        [python, "-c", PEER, path, json.dumps(ids), out], check=True, timeout=120, capture_output=True
    )
    logits: Floats = np.load(out)
    return logits


@pytest.mark.peer
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_tiny_files_mean_the_same_to_llama_cpp(family: str, tmp_path: Path) -> None:
    """Checks the writer of GGUF files that the other tests rely on.

    llama.cpp ignores Mistral's window, demands as many KV heads as heads of OLMoE, and looks GELU up in a table of f16.
    """
    overrides = {"mistral": {"sliding_window": None}, "olmoe": {"num_key_value_heads": 4}}.get(family, {})
    model = tiny.hf_model(family, seed=6, **overrides)
    path = tiny.save_gguf(model, tmp_path / "m.gguf")
    ids = random.Random(6).choices(range(len(tiny.TOKENS)), k=45)
    assert relative_error(peer_logits(path, ids), tiny.logits(model, ids)) <= (
        2e-3 if family == "gemma3" else 1e-5
    )
