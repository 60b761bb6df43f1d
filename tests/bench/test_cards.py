"""What is measured on a graphics card: parts that fail or take too long cost the others nothing, and what is said of
figures. Nothing is timed here; `bench/gpu.sh --dry-run` runs all of it."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cards import card_parts, kernel_parts, measure_card
from cards.card_models import DENSE, MIXTURE, weights_bytes
from cards.card_report import report
from fakes.throughput.throughput_cases import MIXED, device, free_card, wanted

from shoal.partition.plan import Plan
from shoal.partition.throughput.placing.device_ways import ways_through_device
from shoal.partition.throughput.placing.rooms import room_of
from shoal.partition.throughput.prediction import Job

SPEEDS = {"first_s": 0.1, "tokens_per_s": 60.0}
RESULTS: dict[str, Any] = {
    "tests": {"passed": True, "said": "60 passed"},
    "copies": {"bytes_per_s": {"within": 4e12, "in, page-locked": 5e10, "card": "a card"}},
    "dense": {"weights_bytes": 5e9, "interactive": {"tokens_per_s": 500.0}, "predicted": {"tokens_per_s": 480.0}},
    "kernels": {
        "products": [{
            "type": "Q4_K", "rows": 1, "nbytes": 3e7, "flops": 1e8, "off": 1e-6,
            "seconds": {"torch": 1e-3, "triton": 1e-5},
        }],
        "failed with": {"triton, Q6_K by 1": "RuntimeError: no"}, "no time for": ["IQ4_NL by 64", "IQ4_NL by 512"],
    },
    "dense-torch": {
        "weights_bytes": 5e9, "interactive": {"tokens_per_s": 50.0}, "predicted": {}, "kernels": "torch",
        "not better": "SHOAL_DEVICE_KERNELS says torch",
    },
    "crossover": {"predicted_tokens": 100, "seen_tokens": 128, "seconds": {"64": {"stay": 0.1, "come": 0.2}}},
    "interactive-16": {
        "plan": "a plan", "tried_s": 3.0, "load_s": 30.0, "peak_bytes": 15e9, "limit_bytes": 16e9,
        "unpinned": "no memory", "measured": SPEEDS, "predicted": {"tokens_per_s": 61.0},
    },
    "offline-16": {
        "plan": "a plan", "tried_s": 3.0, "load_s": 30.0, "peak_bytes": 17e9, "limit_bytes": 16e9, "unpinned": "",
        "measured": {"tokens_per_s": 2000.0, "token_s": 1.0}, "predicted": {},
        "bounds": {"come_bytes": 42.5e9, "link_s": 0.9, "card_s": 0.2, "attention_s": 0.5, "kv_s": 0.4},
    },
    "peer-16": {"interactive": {"tokens_per_s": 6.0}, "offline": {"tokens_per_s": 500.0}},
    "offline-24": {"failed": "not done in 130 s"},
}  # fmt: skip


def test_what_is_said() -> None:
    said = "\n".join(report(RESULTS))
    for part in (
        "offline-24: failed: not done in 130 s",
        "tests on the card: passed: 60 passed",
        "in, page-locked: 50.0 GB/s",
        "dense, 4 bits: 500 tokens/s, 2500 GB/s of weights, 62% of the card's memory (aim 60%: met)",
        "dense-torch, 4 bits: 50 tokens/s, 250 GB/s of weights",
        "dense-torch computes with torch (SHOAL_DEVICE_KERNELS says torch)",
        "kernels of triton, Q6_K by 1: RuntimeError: no",
        "kernels: there was no time for IQ4_NL by 64, IQ4_NL by 512",
        "Q4_K by 1: torch 1000 µs, triton 10 µs; 3000 GB/s, 75% of the card's memory, 10 Tflop/s, 1e-06 apart",
        "dense: predicted 480 tokens/s, measured +4% (aim 6%: met)",
        "peak 15 GB, within its budget",
        "without page-locked memory: no memory",
        "60 tokens/s, Accelerate 6: 10 times (aim 5: met)",
        "it: predicted 61 tokens/s, measured -2% (aim 6%: met)",
        "2000 tokens/s, Accelerate 500: 4 times (aim 10: MISSED)",
        "peak 17 GB, BEYOND its budget",
        "85% of what the link allows (aim 80%: met): the link 850 ms, the card 200 ms, the processor's attention 500",
        "experts come: predicted from 100 tokens on, seen from 128 on",
        "64 tokens: 100.0 ms where they stay, 200.0 ms where they come",
    ):
        assert part in said, part
    slow = RESULTS["offline-16"] | {"bounds": RESULTS["offline-16"]["bounds"] | {"come_bytes": 1e9}}
    said = "\n".join(report(RESULTS | {"offline-16": slow}))
    assert "50% of what the processor's attention allows (aim 80%: MISSED)" in said
    del slow["bounds"]
    assert "no share of link, card, attention and KV" in "\n".join(report({"offline-16": slow}))
    assert report({}) == []
    for name in RESULTS:
        report({name: RESULTS[name]})


def measured(monkeypatch: pytest.MonkeyPatch, out: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    monkeypatch.setattr(sys, "argv", ["measure_card", "--out", str(out), *arguments])
    code = measure_card.main()
    return code, json.loads((out / "results.json").read_text())


def test_parts_that_fail_cost_the_others_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started: list[str] = []

    def run(name: str, options: object, limit_s: float) -> dict[str, Any]:
        assert 0 < limit_s <= card_parts.LIMITS_S[name]
        started.append(name)
        return RESULTS.get(name, {"failed": "it ended without a word"}) | {"took_s": 1.0}

    monkeypatch.setattr(measure_card, "_run", run)
    code, found = measured(monkeypatch, tmp_path)
    assert started == list(found) == list(card_parts.PARTS)
    assert code == 1
    assert found["peer-24"]["failed"] == "it ended without a word"
    code, found = measured(monkeypatch, tmp_path / "some", "--parts", "dense,tests")
    assert (code, list(found)) == (0, ["dense", "tests"])
    code, found = measured(monkeypatch, tmp_path / "some", "--parts", "copies")  # the others are still there
    assert (code, list(found)) == (0, ["dense", "tests", "copies"])
    code, found = measured(monkeypatch, tmp_path / "late", "--seconds", "0", "--parts", "dense")
    assert (code, found) == (1, {"dense": {"failed": "there was no time left"}})
    with pytest.raises(SystemExit):
        measured(monkeypatch, tmp_path, "--parts", "nothing")


def test_kernels_that_there_is_no_time_for_cost_the_others_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are made when they are first used, and nobody has seen how long that takes on a machine with a card."""
    product = {"type": "Q4_K"}
    clock = iter(range(100))
    monkeypatch.setattr(kernel_parts, "_product", lambda *_: product)
    monkeypatch.setattr(kernel_parts, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    found = kernel_parts.compared("sim:kernels", dry=True, seconds=1.5)
    assert (found["products"], found["looks"]) == ([product], [])
    assert found["no time for"] == ["Q4_K by 2", "f16 K and V of 2 × 100"]


def test_answers_of_both_kernels_agree() -> None:
    pytest.importorskip("triton")
    found = kernel_parts.compared("sim:kernels", dry=True, seconds=60.0)
    (look,) = found["looks"]
    assert look["off"] < 1e-3
    assert set(look["seconds"]) == {"torch", "triton"}
    assert not found["failed with"]


def test_the_shapes_are_those_of_the_models() -> None:
    assert weights_bytes(MIXTURE) == pytest.approx(61e9, rel=0.01)
    assert weights_bytes(DENSE) == pytest.approx(4.9e9, rel=0.02)
    assert set(card_parts.LIMITS_S) == set(card_parts.PARTS)


def test_what_bounds_a_step() -> None:
    """What the schedule says of each, and K and V at memory's speed."""
    card = free_card(memory_bytes=4e8, flops=1e13, host_bytes_per_s=1e9, scratch_bytes=0)
    machine = device(memory_bytes=8e9, accelerators=(card,))
    job = Job(98, 32, 64)
    asked = wanted(MIXED.spec, sequences=64, kv_tokens=64 * 192)
    (way,) = ways_through_device(MIXED, [asked], room_of(card, ())._replace(gathers=False), 4 << 30)
    assert isinstance(way.made, Plan)
    found = card_parts.bounds(MIXED, way.made, machine, job)
    assert found["come_bytes"] == sum(it.nbytes for it in way.made.blocks if it.passes)
    assert found["link_s"] == pytest.approx(found["come_bytes"] / 1e9)
    assert found["kv_s"] == pytest.approx(64 * 115 * 8 * 2 * 4 * 64 * 2 / 20e9)
    assert 0 < found["attention_s"] < found["link_s"]
    assert found["card_s"] > 0
    assert card_parts.bounds(MIXED, way.made, None, job) == {}
    stays = replace(way.made, blocks=tuple(replace(it, tier="gpu") for it in way.made.blocks))
    assert card_parts.bounds(MIXED, stays, machine, job) == {}
