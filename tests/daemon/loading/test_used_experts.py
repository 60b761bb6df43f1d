"""A mixture whose experts come from disk, and one that a device computes with memory and disk: which experts were used
often is known at the next start, in the cache of the host as on the device."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fakes import tiny
from fakes.asking import CONFIG, prompt, text_of

from shoal.comm.home import Home
from shoal.comm.messages import Load
from shoal.daemon.library.packs import Packs
from shoal.daemon.node import Node
from shoal.daemon.throughput.own_machine import OwnMachine
from shoal.devices import opening
from shoal.engine.learn import expert_use
from shoal.offload.window.expert_cache import STEADY_USES
from shoal.offload.window.window_store import WindowStore
from shoal.partition.placement import PINNED_BYTES

MB = 10**6
SLOTS = 6


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("shoal.partition.streamed_plan.READING_BYTES", 1 << 18)
    monkeypatch.setattr("shoal.partition.placement.LOADING_BYTES", 1 << 18)
    monkeypatch.setattr(expert_use, "LEAST_USES", 4)
    yield
    opening._opened.clear()


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny.hf_model(
        "qwen3_moe", num_hidden_layers=6, hidden_size=256, moe_intermediate_size=192, num_experts=8
    )
    return tiny.save_gguf(model, tmp_path_factory.mktemp("m") / "mixture.gguf")


@pytest.mark.parametrize(
    ("device", "memory"), [("cpu", 13 * MB), ("sim:8MB", 11 * MB), ("sim:14MB", 11 * MB)]
)
def test_experts_that_were_used_often_come_first_at_the_next_start(
    device: str, memory: int, mixture: Path, tmp_path: Path
) -> None:
    packs = Packs(Home(tmp_path / "home"))
    config = replace(CONFIG, device=device, kv_type="f32", kv_disk_bytes=0, kv_tokens=768)

    def loaded() -> tuple[Node, Any]:
        node = Node(config, packs=packs, machine=OwnMachine(1, tmp_path / "profile.json"))
        node.budget.limit_bytes = node.budget.held_bytes + memory + (PINNED_BYTES if device != "cpu" else 0)
        node.load(Load(model=str(mixture)))
        (model,) = node._models
        return node, model.main

    node, main = loaded()
    with node:
        assert main.plan.expert_slots
        assert isinstance(main.executor.store, WindowStore)
        assert not main.executor.store._experts._scores
        there = {it.block for it in main.plan.blocks if it.tier == "gpu"}
        for i in range(3):
            text_of(node, prompt(i, tokens=40, new=40))
        counts = main.executor.experts.counts
    del main, node  # memory is freed with the last reference
    assert sum(counts.uses.values()) > 100
    node, main = loaded()
    with node:
        assert main.executor.experts.counts == counts
        plan, cache = main.plan, main.executor.store._experts
        slotted = {it.block for it in plan.blocks if it.slotted}
        assert cache._scores == {
            block: pytest.approx(STEADY_USES * share)
            for block, share in counts.shares.items()
            if block in slotted
        }
        often = sorted(slotted, key=lambda block: -counts.uses.get(block, 0))[: plan.expert_slots]
        until_s = time.monotonic() + 60
        while len(cache._held) < len(often) or not all(it.here for it in cache._held.values()):
            assert time.monotonic() < until_s, "they are not read"
            time.sleep(0.01)
        assert sorted(counts.uses.get(it, 0) for it in cache._held) == sorted(
            counts.uses.get(it, 0) for it in often
        )
        text_of(node, prompt(0, tokens=20, new=2))
        now = {it.block for it in plan.blocks if it.tier == "gpu" and it.block.kind == "expert"}
        if device == "sim:14MB":  # of which some experts were there, whichever
            before = {block for block in there if block.kind == "expert"}
            assert len(now) == len(before) > 0
            assert sum(counts.uses.get(it, 0) for it in now) > sum(counts.uses.get(it, 0) for it in before)
