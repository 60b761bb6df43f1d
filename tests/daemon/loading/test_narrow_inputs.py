"""Inputs of 8 bits for o and a dense model's down: who takes them, and how far logits are from exact arithmetic's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fakes import tiny
from fakes.asking import prompt, text_of
from fakes.group.clusters import wait_for
from fakes.running import Running

from shoal.comm.messages import Load
from shoal.daemon.cluster.neighbours import Neighbours
from shoal.daemon.config import NodeConfig
from shoal.daemon.library.kv_files import fingerprint
from shoal.daemon.loading.assembly import Assembly
from shoal.daemon.loading.grouping import Judgement
from shoal.daemon.node import Node
from shoal.daemon.throughput.own_machine import OwnMachine
from shoal.kernels.arrays import Floats
from shoal.models.checkpoint.checkpoint import open_checkpoint
from shoal.offload.budget import Budget

IDS = list(range(3, 48))
OF_8_BITS, OF_16_BITS = 3e-2, 1e-3  # of the size of a row's logits, from exact arithmetic, in models so small
CONFIG = NodeConfig(kv_tokens=512, context_tokens=128)


def saved(tmp_path: Path, family: str, type: str) -> Path:
    wide = 256 if type.endswith("_K") else 64
    sizes = dict.fromkeys(("hidden_size", "intermediate_size", "moe_intermediate_size"), wide)
    sizes |= {"shared_expert_intermediate_size": 2 * wide, "head_dim": wide // 4}
    known = vars(tiny.config(family))
    model = tiny.hf_model(family, seed=11, **{name: size for name, size in sizes.items() if known.get(name)})
    path = tiny.save_gguf(model, tmp_path / "m.gguf", type=type)
    np.save(tmp_path / "exact.npy", tiny.logits(model, IDS))
    return path


def off(found: Floats, exact: Floats) -> float:
    """The median row's: where experts are chosen, a near tie may end otherwise and change single rows by more."""
    return float(np.median(np.linalg.norm(found - exact, axis=1) / np.linalg.norm(exact, axis=1)))


@pytest.mark.parametrize("family", ["llama", "qwen2_moe"])
@pytest.mark.parametrize("type", ["Q4_0", "Q4_1", "Q8_0", "IQ4_NL", "Q4_K", "Q5_K", "Q6_K"])
def test_logits_are_as_exact_as_8_bits_are(family: str, type: str, tmp_path: Path) -> None:
    path = saved(tmp_path, family, type)
    narrow, exact = Running(path, narrow_inputs=True), np.load(tmp_path / "exact.npy")
    found = narrow.logits(IDS, [30])
    assert OF_16_BITS < off(found, exact) <= OF_8_BITS
    assert np.array_equal(narrow.logits(IDS, [7, 1, 20]), found)  # no bit depends on chunks
    assert off(Running(path).logits(IDS, [30]), exact) <= OF_16_BITS


def test_who_computes_alone_takes_them(tmp_path: Path) -> None:
    """With other machines, or with a device, sums come in another order, and what rounds coarsely makes much of it."""
    path = saved(tmp_path, "llama", "Q4_0")
    near, far = OwnMachine(2), OwnMachine(2, alone=lambda: False)
    for machine, device, narrow in ((near, "cpu", True), (far, "cpu", False), (near, "sim:1GB", False)):
        config = replace(CONFIG, device=device)
        model = Assembly(Budget(1 << 30), machine=machine).load("m", path, config)
        assert model.main.plan.narrow_inputs is narrow
        model.main.close()


def test_a_model_is_loaded_anew_when_its_machine_joins_or_leaves_a_cluster(tmp_path: Path) -> None:
    """What it answers, and which KV it finds, is then as if it had been loaded since."""
    path, belongs = saved(tmp_path, "llama", "Q4_0"), False
    machine = OwnMachine(2, alone=lambda: not belongs)
    with Node(CONFIG, grouping=Neighbours(lambda: pytest.fail("nobody asked")), machine=machine) as node:
        node.load(Load(model=str(path)))
        (model,) = node._models
        rank = model.engine.rank
        assert model.plan.narrow_inputs
        for belongs in (True, False):
            node._regrouping.look()
            wait_for(lambda rank=rank: model.engine.rank is not rank)
            rank = model.engine.rank
            assert model.plan.narrow_inputs is not belongs
            node._regrouping.look()
            assert model.engine.rank is rank
            assert text_of(node, prompt(0, new=3))[2].finish_reason == "length"


def test_a_draft_model_stays_when_its_model_is_loaded_anew(tmp_path: Path) -> None:
    """And so does what the ledger has of it, and that the two run on one machine."""
    path, belongs = saved(tmp_path, "llama", "Q4_0"), False
    small = tiny.save_gguf(tiny.hf_model("llama", seed=12), tmp_path / "small.gguf")
    machine = OwnMachine(2, alone=lambda: not belongs)

    class Others(Neighbours):
        arrivals = 1

        def better(self, *_: object) -> Judgement:
            pytest.fail("a model with a draft model runs on one machine")

        seat = would_seat = better

    grouping = Others(lambda: pytest.fail("nobody asked"))
    with Node(CONFIG, grouping=grouping, machine=machine) as node:
        plan = node.load(Load(model=str(path), draft=str(small))).model.plan
        (model,) = node._models
        held_bytes, rank, belongs = node.budget.held_by(f"draft for {model.name}"), model.engine.rank, True
        assert held_bytes
        node._regrouping.look()
        wait_for(lambda: model.engine.rank is not rank)
        assert node.budget.held_by(f"draft for {model.name}") == held_bytes
        assert model.status().plan == plan
        node._regrouping.look()
        assert text_of(node, prompt(0, new=3))[2].finish_reason == "length"


def test_kept_kv_tells_how_inputs_were_rounded(tmp_path: Path) -> None:
    running = Running(saved(tmp_path, "llama", "Q4_0"))
    with open_checkpoint(running.path) as checkpoint:
        kept = [
            fingerprint(checkpoint, "keep", replace(running.plan, narrow_inputs=narrow))
            for narrow in (False, True)
        ]
    assert kept[0] != kept[1]
