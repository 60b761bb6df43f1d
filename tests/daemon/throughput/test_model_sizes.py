"""What `shoal plan` says of memory is what the daemon's ledger holds."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.daemon.config import NodeConfig
from shoal.daemon.loading.budgeting import Shortfall, plan_within_budget
from shoal.daemon.throughput.model_sizes import described, weighed
from shoal.models.checkpoint.checkpoint import open_checkpoint
from shoal.offload.budget import Budget
from shoal.offload.kv.disk_pages import buffer_bytes
from shoal.partition.memory_layout import kv_page_bytes
from shoal.partition.throughput.peak import PROCESS_BYTES, beside_bytes
from shoal.partition.throughput.prediction import Job
from shoal.partition.throughput.profile import Profile, unmeasured
from shoal.partition.throughput.solve import Choices, asks, solve


@pytest.mark.parametrize("kv_type", ["f16", "i8"])
def test_the_least_memory_is_that_of_the_ledger(model: Path, kv_type: str) -> None:
    config = NodeConfig(threads=1, context_tokens=64, kv_type=kv_type)  # type: ignore[arg-type]
    with described(model) as checkpoint:
        known = weighed(checkpoint, "keep")
    wanted = asks(Job(48, 16), 64, config.chunk_tokens, config.max_sequences, config.max_guesses)
    tiny = Profile((unmeasured(1, memory_bytes=1e6),))
    planned = min(
        it.least_bytes for it in solve([known], wanted, tiny, Job(48, 16), Choices(kv_type)).candidates
    )
    with open_checkpoint(model) as opened:
        budget = Budget(PROCESS_BYTES)
        budget.take("this process", PROCESS_BYTES)
        extra = buffer_bytes(kv_page_bytes(known.spec, kv_type))
        found = plan_within_budget(opened, known, config, budget, extra_bytes=extra)
        assert isinstance(found, Shortfall)
        assert planned == pytest.approx(found.least_bytes, rel=0.001)
        budget = Budget(10**9)
        plan = plan_within_budget(opened, known, config, budget, extra_bytes=extra)
        assert not isinstance(plan, Shortfall)
        tokenizer = opened.tokenizer()
        assert known.tokenizer_bytes == tokenizer.nbytes > 0
        assert beside_bytes(known, kv_type) == PROCESS_BYTES + extra + tokenizer.nbytes


@pytest.mark.parametrize(("family", "feeding", "count"), [("qwen2", "ffn", 2), ("olmoe", "expert", 1)])
def test_which_inputs_may_be_narrow(family: str, feeding: str, count: int, tmp_path: Path) -> None:
    """Those of o and gate, and of a dense model's down; not of a mixture's first layer."""
    from fakes import tiny

    with described(tiny.save_gguf(tiny.hf_model(family), tmp_path / "tiny.gguf", type="Q8_0")) as checkpoint:
        known = weighed(checkpoint, "keep")
    mixture = known.spec.moe is not None
    for block, its in known.products.items():
        wanted = {"attn": 1, feeding: count}.get(block.kind, 0)
        assert sum(it.narrow for it in its) == (0 if mixture and block.layer == 0 else wanted)
