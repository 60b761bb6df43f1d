"""Synthetic models: the types of known files, weights of the deviation meant, and files that Shoal reads."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import synthetic
from compare import bytes_per_token
from engines.engine_process import kinds
from fakes import tiny
from fakes.running import Running
from inputs.shapes import SHAPES, Shape

from shoal.models.checkpoint.checkpoint import open_checkpoint

SMALL = Shape(
    name="small",
    arch="llama",
    mix="Q4_K_M",
    layers=3,
    hidden=256,
    heads=4,
    kv_heads=2,
    ffn=512,
    vocab=len(tiny.TOKENS) + 5,
    context=128,
    rope_base=10000.0,
)
SMALL_MOE = replace(SMALL, name="moe", arch="olmoe", kv_heads=4, qk_norm="all", experts=4, active=2)
SMALL_ODD = replace(SMALL, name="odd", arch="qwen2", mix="Q5_K_M", hidden=96, biases=True, tied=True)


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_gguf(tiny.hf_model("llama"), tmp_path_factory.mktemp("vocabulary") / "tiny.gguf")


@pytest.mark.parametrize(
    ("name", "types"),
    [
        ("llama-1.1b", {"F32": 45, "Q4_K": 135, "Q6_K": 21}),  # as published Q4_K_M files of TinyLlama
        ("qwen2-0.5b", {"F32": 121, "Q5_1": 132, "Q8_0": 13, "Q5_K": 12, "Q6_K": 12}),  # Qwen2.5-0.5B, Q5_K_M
    ],
)
def test_mixes_are_those_of_known_files(name: str, types: dict[str, int]) -> None:
    assert Counter(tensor.type for tensor in SHAPES[name].tensors()) == types


@pytest.mark.parametrize("shape", [SMALL, SMALL_MOE, SMALL_ODD, replace(SMALL, mix="BF16", name="float")])
def test_shoal_computes_with_a_synthetic_model(shape: Shape, vocabulary: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    done: list[tuple[int, int]] = []
    synthetic.write(shape, path, vocabulary, lambda *progress: done.append(progress))
    assert done[-1][0] == done[-1][1] < path.stat().st_size
    running = Running(path)
    assert running.spec.vocab == shape.vocab
    logits = running.logits(list(range(20)), prefill=[20])
    assert np.isfinite(logits).all()
    assert 0.1 < logits.std() < 10


@pytest.mark.parametrize("type", [*synthetic._BLOCK_FLOATS, "BF16", "F32"])
def test_weights_have_the_deviation_meant(type: str) -> None:
    blocks = synthetic._pool(type, 1024)[:4096]
    weights = gguf.dequantize(blocks, gguf.GGMLQuantizationType[type])
    assert np.isclose(weights.std() * 32, 1, rtol=0.1)
    assert abs(weights.mean()) * 32 < 0.15  # Q4_0 has -8 but no 8


@pytest.mark.parametrize("vocab", [len(tiny.TOKENS) - 12, len(tiny.TOKENS) + 7])
def test_a_vocabulary_is_cut_or_padded(vocab: int, vocabulary: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    synthetic.write(replace(SMALL, vocab=vocab), path, vocabulary)
    with open_checkpoint(path) as checkpoint:
        tokenizer = checkpoint.tokenizer()
        assert tokenizer.vocab_size == vocab
        assert tokenizer.decode(tokenizer.encode("the thing and on")) == "the thing and on"


@pytest.mark.peer
@pytest.mark.parametrize("shape", [SMALL, SMALL_MOE, SMALL_ODD])
def test_llama_cpp_computes_the_same(shape: Shape, vocabulary: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    synthetic.write(shape, path, vocabulary)
    ids = [7 * i % shape.vocab for i in range(50)]
    ours = Running(path).logits(ids, prefill=[50])[:-1].astype(np.float64)
    nll = np.log(np.exp(ours).sum(-1)) - ours[np.arange(49), ids[1:]]
    with kinds(os.environ["SHOAL_PEER_PYTHON"])["llama.cpp"].start() as engine:
        engine.call("load", model=str(path), context=64, streams=1, threads=1)
        (theirs,) = engine.call("score", windows=[ids], batch=50)
    off = np.abs(nll - theirs["nll"])
    # llama.cpp rounds activations to 8 bits, so that a token of a mixture may meet another expert.
    assert (np.quantile(off, 0.95) if shape.experts else off.max()) < 0.1
    assert (ours.argmax(-1) == theirs["greedy"]).mean() > 0.9


def test_a_file_is_written_once(vocabulary: Path, tmp_path: Path) -> None:
    first = synthetic.cached(SMALL, tmp_path / "models", vocabulary, lambda done, total: None)
    written_ns = first.stat().st_mtime_ns
    assert synthetic.cached(SMALL, tmp_path / "models", vocabulary, lambda done, total: None) == first
    assert first.stat().st_mtime_ns == written_ns
    other = synthetic.cached(
        replace(SMALL, ffn=256), tmp_path / "models", vocabulary, lambda done, total: None
    )
    assert other != first
    assert {path.suffix for path in first.parent.iterdir()} == {".gguf"}


def test_a_full_disk_is_refused(vocabulary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "SPARE_BYTES", 1 << 60)
    with pytest.raises(synthetic.SyntheticError, match=r"small takes 0\.0 GB, the disk has"):
        synthetic.cached(SMALL, tmp_path, vocabulary, lambda done, total: None)
    assert not list(tmp_path.iterdir())


def test_bytes_of_one_token(vocabulary: Path, tmp_path: Path) -> None:
    def needed(shape: Shape) -> int:
        path = tmp_path / f"{shape.name}.gguf"
        synthetic.write(shape, path, vocabulary)
        return bytes_per_token(path)

    def matrices(shape: Shape) -> dict[str, int]:
        return {tensor.name: synthetic.nbytes(tensor) for tensor in shape.tensors() if len(tensor.sizes) > 1}

    small, moe, tied = matrices(SMALL), matrices(SMALL_MOE), matrices(SMALL_ODD)
    assert needed(SMALL) == sum(small.values()) - small.pop("token_embd.weight")
    del moe["token_embd.weight"]
    assert needed(SMALL_MOE) == sum(size // 2 if "_exps" in name else size for name, size in moe.items())
    assert needed(SMALL_ODD) == sum(tied.values())
