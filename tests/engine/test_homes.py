"""Blocks are computed in the home of their device; hidden states are copied only where the next block has another."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from fakes import tiny
from fakes.opaque_home import Opaque, OpaqueHome
from fakes.running import Running
from fakes.streaming import Streaming, packed

from shoal.engine.collective import Alone
from shoal.engine.executor import Executor
from shoal.kernels import KernelError
from shoal.kernels.arrays import Floats
from shoal.kernels.homes import cpu
from shoal.models.step import Step
from shoal.partition.spec import BlockId

# Between them they scale the embedding, clip q, k and v, have every norm, gated and plain shared experts.
FAMILIES = ("llama", "gemma3", "olmo2", "olmoe", "qwen3_moe", "qwen2_moe")
Device = Callable[[BlockId], str]


def on(running: Running, device: Device, home: OpaqueHome, part_tokens: int = 1 << 30) -> Executor:
    """The same model and KV, its blocks on other devices."""
    old = running.executor
    blocks = tuple(replace(item, device=device(item.block), tier="gpu") for item in old.plan.blocks)
    plan = replace(old.plan, blocks=blocks, part_tokens=part_tokens)
    homes = {"cpu": cpu(), "opaque": home}
    return Executor(old.model, plan, old.store, old.kv, Alone(), homes.__getitem__)


def logits(running: Running, executor: Executor) -> Floats:
    """Logits of two steps of three sequences: 21 tokens each, then one more each. The second sequence wants none."""
    taken = running.kv.table.take(6)
    assert taken is not None
    generator, results = np.random.default_rng(5), []
    for start, count in ((0, 21), (21, 1)):
        chunks = [
            (generator.integers(0, running.spec.vocab, count).tolist(), start, taken[i : i + 1], wanted)
            for i, wanted in ((0, count), (2, 0), (4, 1))
        ]
        step = Step.build(chunks, executor.plan.part_tokens)
        results.append(executor.head(executor.forward(step)))
    running.kv.table.give_back(taken)
    return np.concatenate(results)


@pytest.fixture(params=FAMILIES)
def running(request: pytest.FixtureRequest, tmp_path: Path) -> Running:
    overrides = {"clip_qkv": 0.5} if request.param == "olmoe" else {}
    tiny.save_hf(tiny.hf_model(request.param, **overrides), tmp_path / "m")
    return Running(tmp_path / "m")


@pytest.mark.parametrize("part_tokens", [1 << 30, 7])
def test_hidden_states_pass_untouched(running: Running, part_tokens: int) -> None:
    home = OpaqueHome(cpu())
    executor = on(running, lambda block: "opaque", home, part_tokens)
    assert np.array_equal(logits(running, executor), logits(running, running.executor))
    assert (home.placed, home.fetched) == (2, 2)  # embeddings in, logits out, in each step


@pytest.mark.parametrize(
    "device",
    [
        lambda block: "opaque" if block.kind == "attn" else "cpu",
        lambda block: "opaque" if block.kind in ("ffn", "router") else "cpu",
        lambda block: "opaque" if block.kind in ("ffn", "router", "expert") else "cpu",
        lambda block: "opaque" if block.kind == "expert" else "cpu",
        lambda block: "opaque" if block.layer == 1 else "cpu",
        lambda block: "opaque" if block.kind in ("embed", "head") else "cpu",
    ],
    ids=["attention", "feed-forward", "feed-forward and experts", "experts", "a layer", "the ends"],
)
def test_copies_are_made_where_the_device_changes(running: Running, device: Device) -> None:
    home = OpaqueHome(cpu())
    executor = on(running, device, home)
    assert np.array_equal(logits(running, executor), logits(running, running.executor))
    path = ["cpu"]  # of the host's rows
    for layer, kind in enumerate(running.spec.layers):
        path += [device(BlockId("embed"))] if not layer else []
        path.append(device(BlockId("attn", layer)))
        ffn = device(BlockId("router" if kind.moe else "ffn", layer))
        path += [ffn, device(BlockId("expert", layer, 0)), ffn] if kind.moe else [ffn]
    path += [device(BlockId("head")), "cpu"]
    entered = sum(a != b == "opaque" for a, b in pairwise(path))
    assert home.placed == home.fetched == 2 * entered


def test_experts_from_disk_are_foreseen_in_the_home_of_their_router(tmp_path: Path) -> None:
    path, pack = packed(tmp_path, "qwen3_moe")
    running = Running(path)
    home = OpaqueHome(cpu())
    with Streaming(path, pack, pinned=lambda block: block.kind != "expert") as streaming:
        executor = on(streaming, lambda block: "opaque" if block.layer % 2 else "cpu", home)
        assert np.array_equal(logits(streaming, executor), logits(running, running.executor))


def test_nobody_else_looks_into_hidden_states() -> None:
    home = OpaqueHome(cpu())
    rows = np.ones((2, 3), np.float32)
    x = home.place(rows)
    for look in (len, iter, bool, np.asarray, operator.itemgetter(0), lambda x: x + rows, lambda x: rows + x):
        with pytest.raises(TypeError):
            look(x)
    with pytest.raises(AssertionError):
        OpaqueHome(cpu()).fetch(x)
    assert isinstance(home.rows(x, slice(0, 1)), Opaque)


def test_a_device_without_a_home_is_refused(running: Running) -> None:
    old = running.executor
    blocks = tuple(replace(item, device="cuda:7", tier="gpu") for item in old.plan.blocks)
    plan = replace(old.plan, blocks=blocks)
    with pytest.raises(KernelError, match=r"^nothing computes on device 'cuda:7': use one of cpu$"):
        Executor(old.model, plan, old.store, old.kv, Alone())
