"""Measurements: perplexity against its definition with transformers' logits, and what bench counts."""

from __future__ import annotations

import json
import math
import threading
import time
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import tiny

from shoal.daemon import measurement as measure
from shoal.daemon.config import NodeConfig
from shoal.daemon.errors import DaemonError
from shoal.devices import opening
from shoal.devices.errors import DeviceFull, DeviceLost
from shoal.engine.executor import Executor
from shoal.engine.learn.speeds import Speeds
from shoal.kernels.arrays import Floats
from shoal.models.tokenizer.tokenizer import Tokenizer

CONFIG = NodeConfig(chunk_tokens=16, memory_bytes=3 << 30, kv_type="f32", kv_tokens=64, max_guesses=0)
TEXT = "the cat and\r\nthe other thing, in an\nengine on the re\r\n" * 6


def quiet(what: str, done: int, total: int) -> None:
    return None


def with_bos(directory: Path) -> None:
    path = directory / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    bos = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [bos, text],
        "pair": [bos, text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            "<|endoftext|>": {"id": "<|endoftext|>", "ids": [tiny.END], "tokens": ["<|endoftext|>"]}
        },
    }
    path.write_text(json.dumps(tokenizer))


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("ctx", [4, 33, 100])
def test_perplexity_is_the_mean_over_second_halves(ctx: int, bos: bool, tmp_path: Path) -> None:
    model = tiny.hf_model("qwen2", seed=1)
    directory = tiny.save_hf(model, tmp_path / "m")
    if bos:
        with_bos(directory)
    (tmp_path / "text").write_bytes(TEXT.encode())
    ids = Tokenizer.from_hf(directory).encode(TEXT, parse_special=False)
    assert (ids[0] == tiny.END) == bos
    losses = []
    for start in range(0, len(ids) - ctx + 1, ctx):
        window = ids[start : start + ctx]
        if bos:
            window[0] = tiny.END
        logits = tiny.logits(model, window).astype(np.float64)
        total = np.log(np.exp(logits).sum(-1))
        losses += [total[at] - logits[at, window[at + 1]] for at in range(ctx // 2, ctx - 1)]
    result = measure.perplexity(directory, tmp_path / "text", ctx=ctx, config=CONFIG, progress=quiet)
    assert result.tokens == len(losses)
    assert result.perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)


def test_a_broken_model_has_no_perplexity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def head(self: Executor, hidden: Floats, rows: slice) -> Floats:
        return np.full((len(hidden[rows]), 300), math.inf, np.float32)

    monkeypatch.setattr(Executor, "head", head)
    directory = tiny.save_hf(tiny.hf_model("qwen2", seed=1), tmp_path / "m")
    (tmp_path / "text").write_bytes(TEXT.encode())
    result = measure.perplexity(directory, tmp_path / "text", ctx=33, config=CONFIG, progress=quiet)
    assert math.isnan(result.perplexity)


@pytest.mark.parametrize(
    ("data", "ctx", "match"),
    [(b"the", 8, "at least one window of 8"), (b"the", 3, "ctx=3"), (b"\xff\xfe", 8, "cannot read")],
)
def test_perplexity_refuses_what_it_cannot_score(data: bytes, ctx: int, match: str, tmp_path: Path) -> None:
    path = tiny.save_gguf(tiny.hf_model("llama"), tmp_path / "m.gguf")
    (tmp_path / "text").write_bytes(data)
    with pytest.raises(DaemonError, match=match):
        measure.perplexity(path, tmp_path / "text", ctx=ctx, config=CONFIG, progress=quiet)


def test_no_window_is_advised_that_would_be_refused(tmp_path: Path) -> None:
    path = tiny.save_gguf(tiny.hf_model("llama"), tmp_path / "m.gguf")
    (tmp_path / "text").write_text("the")
    with pytest.raises(DaemonError) as caught:
        measure.perplexity(path, tmp_path / "text", ctx=4, config=CONFIG, progress=quiet)
    assert caught.value.hint == "use a longer text"


def test_bench_counts_only_tokens_of_the_time_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a clock that ticks once per reading of this thread, speeds are counts. 4 prompts of 40 tokens take 10 steps
    of 16: their first tokens come with steps 3, 5, 8 and 10, when they have 8, 6, 3 and 1."""
    path = tiny.save_gguf(tiny.hf_model("llama"), tmp_path / "m.gguf")
    ticks, here, now_s = count(), threading.get_ident(), time.monotonic

    def clock() -> float:
        return float(next(ticks)) if threading.get_ident() == here else now_s()

    monkeypatch.setattr(time, "monotonic", clock)
    monkeypatch.setattr(Speeds, "prompt_tokens", lambda self, decodes, prompts: CONFIG.chunk_tokens)
    result = measure.bench(
        path, prompt_tokens=40, new_tokens=12, batch=4, repeat=2, config=CONFIG, progress=quiet
    )
    assert result.prefill_tokens_per_s.median == 4 * 40
    assert result.decode_tokens_per_s.median == 4 * 12 - (8 + 6 + 3 + 1)


def test_bench_of_one_new_token_has_no_decode_speed(tmp_path: Path) -> None:
    path = tiny.save_gguf(tiny.hf_model("llama"), tmp_path / "m.gguf")
    result = measure.bench(
        path, prompt_tokens=5, new_tokens=1, batch=2, repeat=1, config=CONFIG, progress=quiet
    )
    assert result.decode_tokens_per_s.max == 0.0
    assert result.prefill_tokens_per_s.min > 0


def test_bench_beyond_the_model_is_refused(tmp_path: Path) -> None:
    path = tiny.save_gguf(tiny.hf_model("llama"), tmp_path / "m.gguf")
    for config in (CONFIG, replace(CONFIG, context_tokens=100)):
        with pytest.raises(DaemonError) as caught:
            measure.bench(
                path, prompt_tokens=120, new_tokens=20, batch=1, repeat=1, config=config, progress=quiet
            )
        assert caught.value.code == "context_overflow"
        most = config.context_tokens or 128
        assert caught.value.hint == f"`prompt_tokens` and `new_tokens` may be {most} together"


def test_what_is_measured_is_called_as_it_was_asked_for(tmp_path: Path) -> None:
    path = tiny.save_gguf(tiny.hf_model("llama"), tmp_path / "m.gguf")
    (tmp_path / "text").write_text(TEXT)
    tight = replace(CONFIG, memory_bytes=1 << 20)
    for run in (
        lambda name: measure.bench(
            path, name=name, prompt_tokens=5, new_tokens=1, batch=1, repeat=1, config=tight, progress=quiet
        ),
        lambda name: measure.perplexity(
            path, tmp_path / "text", name=name, ctx=33, config=tight, progress=quiet
        ),
    ):
        for name in ("", "smollm2"):
            with pytest.raises(DaemonError, match=f"^{name or 'm.gguf'} needs at least "):
                run(name)


@pytest.mark.parametrize("lost", [False, True])
def test_a_device_that_fails_meanwhile_is_one_line(
    lost: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = DeviceLost("sim:64MB", "it was pulled out") if lost else DeviceFull("sim:64MB", 7, 8, 9)
    path = tiny.save_gguf(tiny.hf_model("llama"), tmp_path / "tiny.gguf", type="Q8_0")
    (tmp_path / "text").write_bytes(TEXT.encode())
    config = replace(CONFIG, device="sim:64MB")
    for run in (
        lambda: measure.bench(
            path, prompt_tokens=20, new_tokens=20, batch=1, repeat=1, config=config, progress=quiet
        ),
        lambda: measure.perplexity(path, tmp_path / "text", ctx=33, config=config, progress=quiet),
    ):
        monkeypatch.setattr(opening, "_opened", {})
        device, steps = opening.device_home("sim:64MB").device, count()

        def going(*args: Any, device: Any = device, steps: Any = steps, compute: Any = device.compute) -> Any:
            if next(steps) > 30:
                device.lost = "it was pulled out" if lost else ""
                raise error
            return compute(*args)

        monkeypatch.setattr(device, "compute", going)
        with pytest.raises(DaemonError, match=f"^tiny.gguf: {error}$") as failed:
            run()
        assert failed.value.code == ("internal" if lost else "resources")
