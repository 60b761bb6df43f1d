"""Texts beyond the length that a model was trained with, against `transformers`: every rope scaling, and the two whose
keys turn otherwise in longer texts: LongRoPE and dynamic NTK."""

from __future__ import annotations

import json
import queue
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import tiny

from shoal.comm.messages import Done, Error, Generate, Load, Sampling, Token
from shoal.daemon.backend import Event
from shoal.daemon.config import NodeConfig
from shoal.daemon.errors import DaemonError
from shoal.daemon.node import Node

ORIGINAL = 64
CONFIG = NodeConfig(kv_type="f32", context_tokens=512, kv_tokens=2048, chunk_tokens=24, memory_bytes=3 << 30)
SCALINGS: dict[str, dict[str, Any]] = {
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
    },
}


def ids(seed: int, count: int) -> list[int]:
    return random.Random(seed).choices(range(200), k=count)


def truth(model: Any, prompt: list[int], count: int) -> list[tuple[int, float]]:
    """Greedy tokens and their log-probabilities, each from the whole text anew, as in a text of that length."""
    text, found = list(prompt), []
    for _ in range(count):
        # dynamic NTK's ropes remember longer texts, so the model is made anew each time
        fresh = type(model)(model.config).eval()
        fresh.load_state_dict(model.state_dict())
        with torch.no_grad():
            odds = torch.log_softmax(fresh(torch.tensor([text])).logits[0, -1].float(), -1)
        found.append((int(odds.argmax()), float(odds.max())))
        text.append(found[-1][0])
    return found


def request(prompt: list[int], count: int) -> Generate:
    sampling = Sampling(temperature=0.0, logprobs=0)
    return Generate(prompt_tokens=prompt, max_tokens=count, ignore_eos=True, sampling=sampling)


def answers(node: Node, *requests: Generate) -> list[tuple[list[tuple[int, float]], Done]]:
    """Several requests at once: the tokens of each and how it ended."""
    queues = [queue.SimpleQueue[Event]() for _ in requests]
    for one, events in zip(requests, queues, strict=True):
        node.submit(one, events.put)
    found = []
    for events in queues:
        tokens = list[tuple[int, float]]()
        while not isinstance(event := events.get(timeout=60), Done):
            assert not isinstance(event, Error), event
            if isinstance(event, Token):
                tokens += [(entry.id, entry.logprob) for entry in event.logprobs]
        found.append((tokens, event))
    return found


def check(seen: list[tuple[int, float]], expected: list[tuple[int, float]], within: float = 1e-3) -> None:
    assert [token for token, _ in seen] == [token for token, _ in expected]
    assert max(abs(a - b) for (_, a), (_, b) in zip(seen, expected, strict=True)) <= within


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., tuple[Any, Path]]:
    def make(family: str, **overrides: Any) -> tuple[Any, Path]:
        model = tiny.hf_model(family, seed=9, **overrides)
        return model, tiny.save_hf(model, tmp_path / "m")

    return make


@pytest.mark.parametrize("name", SCALINGS)
def test_a_scaling_extends_a_context_that_was_left_at_its_original_value(
    name: str, made: Callable[..., tuple[Any, Path]], caplog: pytest.LogCaptureFixture
) -> None:
    parameters = {**SCALINGS[name], "rope_theta": 10_000.0}
    model, path = made("qwen2", rope_parameters=parameters, max_position_embeddings=ORIGINAL)
    with Node(CONFIG) as node:
        with pytest.raises(
            DaemonError, match=r"was made for 64, and its rope scaling extends that to 256"
        ) as refused:
            node.load(Load(model=str(path)))
        assert refused.value.code == "context_overflow"
        model_status = node.load(Load(model=str(path), context=256)).model
        assert model_status.context_tokens == 256
        said = "the model was made for 64 tokens. Its rope scaling extends that to 256"
        assert said in caplog.text
        assert any(said in warning for warning in model_status.warnings)
        for length in (20, 100, 200):
            # beyond the original length dynamic NTK keeps the base of the prompt for a while
            count = 1 if name == "dynamic" and length > ORIGINAL else 6
            prompt = ids(length, length)
            ((seen, _),) = answers(node, request(prompt, count))
            check(seen, truth(model, prompt, count))


def test_without_a_scaling_the_limit_stays(made: Callable[..., tuple[Any, Path]]) -> None:
    _, path = made("qwen2", max_position_embeddings=ORIGINAL)
    with Node(CONFIG) as node, pytest.raises(DaemonError, match=r"the model was made for 64 \(use"):
        node.load(Load(model=str(path), context=65))


PHI3: dict[str, Any] = {
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "partial_rotary_factor": 0.5,
        "short_factor": [1.0, 1.1, 1.3, 1.7],
        "long_factor": [2.0, 4.0, 9.0, 20.0],
    },
    "original_max_position_embeddings": ORIGINAL,
    "max_position_embeddings": 512,
    "sliding_window": None,
}


@pytest.fixture
def phi3(made: Callable[..., tuple[Any, Path]]) -> tuple[Any, Path]:
    """A model with a long context whose factors for long texts differ much from those for short ones."""
    return made("phi3", **PHI3)


def test_a_gguf_file_says_the_same(tmp_path: Path) -> None:
    model = tiny.hf_model("phi3", seed=9, **PHI3)
    path = tiny.save_gguf(model, tmp_path / "m.gguf", type="F32")
    with Node(CONFIG) as node:
        node.load(Load(model=str(path)))
        for length in (40, 62, 150):
            ((seen, _),) = answers(node, request(ids(6, length), 5))
            check(seen, truth(model, ids(6, length), 5))


def test_each_text_is_computed_with_the_factors_of_its_own_length(phi3: tuple[Any, Path]) -> None:
    """Short, long, and growing over the border while it is answered; alone, together, and from the prefix cache."""
    model, path = phi3
    prompts = [ids(7, 40), ids(8, 150), ids(7, 60), ids(8, 64), ids(8, 63), ids(8, 65)]
    expected = [truth(model, prompt, 12) for prompt in prompts]
    with Node(CONFIG) as node:
        node.load(Load(model=str(path)))
        for prompt, wanted in zip(prompts, expected, strict=True):
            ((seen, end),) = answers(node, request(prompt, 12))
            check(seen, wanted)
            assert end.timings.preemptions == 0
        for _ in range(2):
            together = answers(node, *[request(prompt, 12) for prompt in prompts])
            for (seen, _), wanted in zip(together, expected, strict=True):
                check(seen, wanted)


def test_pages_of_short_texts_are_not_shared_with_long_ones(phi3: tuple[Any, Path]) -> None:
    model, path = phi3
    text = ids(5, 200)
    with Node(CONFIG) as node:
        node.load(Load(model=str(path)))
        answers(node, request(text[:64], 1))
        ((seen, end),) = answers(node, request(text, 3))
        assert end.usage.cached_tokens == 0
        check(seen, truth(model, text, 3))
        ((_, end),) = answers(node, request([*text, 1, 2, 3], 1))
        assert end.usage.cached_tokens >= 128  # those of long texts are
        ((seen, end),) = answers(node, request(text[:60], 2))
        assert end.usage.cached_tokens == 59
        check(seen, truth(model, text[:60], 2))


def test_guesses_do_not_reach_over_the_border(phi3: tuple[Any, Path], tmp_path: Path) -> None:
    """A text that repeats itself is guessed ahead; with a draft model that has the same ropes, too."""
    model, path = phi3
    prompt = ids(1, 8) * 7
    expected = truth(model, prompt, 30)
    for draft in (None, str(path)):
        with Node(CONFIG) as node:
            node.load(Load(model=str(path), draft=draft))
            for _ in range(2):
                ((seen, end),) = answers(node, request(prompt, 30))
                check(seen, expected)
            assert end.usage.completion_tokens == 30


def test_kv_on_disk_keeps_short_and_long_texts_apart(phi3: tuple[Any, Path], tmp_path: Path) -> None:
    model, path = phi3
    text = ids(3, 200)
    for length, cached in ((64, 0), (200, 0), (200, 199), (64, 63)):
        with Node(CONFIG, kv_root=tmp_path / "kv") as node:
            node.load(Load(model=str(path)))
            ((seen, end),) = answers(node, request(text[:length], 1))
            check(seen, truth(model, text[:length], 1))
            assert bool(end.usage.cached_tokens) == bool(cached)


def test_old_and_new_spellings_of_longrope_are_the_same(phi3: tuple[Any, Path]) -> None:
    model, path = phi3
    file = path / "config.json"
    config = json.loads(file.read_text())
    parameters = config.pop("rope_parameters")
    config |= {"rope_theta": 10_000.0, "partial_rotary_factor": 0.5}
    factors = {name: parameters[name] for name in ("short_factor", "long_factor")}
    config["rope_scaling"] = {"type": "su", **factors}
    file.write_text(json.dumps(config))
    with Node(CONFIG) as node:
        node.load(Load(model=str(path)))
        for length in (40, 100):
            ((seen, _),) = answers(node, request(ids(2, length), 3))
            check(seen, truth(model, ids(2, length), 3))
