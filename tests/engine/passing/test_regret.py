"""Which placement is chosen for how many requests at once, on the simulated device's clock: the CPU and the device take
what their laws say, and what is chosen takes at most a tenth longer than what would have been best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from fakes import tiny
from fakes.on_device import executor_of, sim, with_blocks_on, with_blocks_passing
from fakes.running import FP32, Running

from shoal.daemon.throughput.model_sizes import weighed
from shoal.devices import sim_device
from shoal.devices.sim_device import SimDevice
from shoal.kernels.attention_operands import KvPages, Scoring, Segments
from shoal.kernels.homes import cpu
from shoal.kernels.matrix import FeedForward, Linears, Routes
from shoal.models.checkpoint.checkpoint import open_checkpoint
from shoal.models.step import Step
from shoal.partition.plan import Plan
from shoal.partition.throughput.cost import step_of
from shoal.partition.throughput.laws import Rows
from shoal.partition.throughput.offline import saturating_tokens
from shoal.partition.throughput.profile import Accelerator, Device, Overheads
from shoal.partition.throughput.weights_of import Weighed

HOST_FLOPS, HOST_BYTES_PER_S = 2e9, 4e9
FLOPS, LINK, BYTES_PER_S = 2e10, 1e9, 1e11
CONTEXT = 12
AT_ONCE = 64  # requests whose K and V have room on the device


class Lawful:
    """The CPU; what it computes takes it on a device's virtual clock what the host's figures say."""

    def __init__(self, device: SimDevice) -> None:
        self._device = device

    def _takes(self, nbytes: float, flops: float) -> None:
        self._device.now_s += max(nbytes / HOST_BYTES_PER_S, flops / HOST_FLOPS)

    def _multiplies(self, rows: float, *parts: Linears) -> None:
        for w in (w for part in parts for w in part.matrices):
            self._takes(w.nbytes, 2 * rows * w.rows * w.cols)

    def linears(self, x: Any, all: Linears, *more: Any) -> Any:
        self._multiplies(len(x), all)
        return cpu().linears(x, all, *more)

    def experts(self, x: Any, all: Sequence[FeedForward], routes: Routes, into: Any) -> None:
        for layer in all:
            self._multiplies(len(routes.tokens) / len(all), layer.enter, layer.leave)
        cpu().experts(x, all, routes, into)

    def attention(self, kv: KvPages, segments: Segments, q: Any, k: Any, v: Any, scoring: Scoring) -> Any:
        for _, rows, start, _ in segments.table.tolist():
            seen = rows * start + rows * (rows + 1) / 2
            nbytes = (start + rows) * kv.kv_heads * kv.layout.head_bytes / 64
            self._takes(nbytes, 4 * seen * kv.heads * kv.layout.head_dim / 0.5)
        return cpu().attention(kv, segments, q, k, v, scoring)

    def __getattr__(self, name: str) -> Any:
        return getattr(cpu(), name)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Running:
    path = tmp_path_factory.mktemp("m") / "m"
    tiny.save_hf(tiny.hf_model("qwen3_moe", moe_intermediate_size=192, num_experts=16), path)
    return Running(path, replace(FP32, kv_tokens=1 << 15))


def measured_s(running: Running, plan: Plan, requests: int) -> float:
    """A step in which each of so many requests gets a token, on the virtual clock, in the long run."""
    device, home = sim(link_bytes_per_s=LINK)
    executor = executor_of(running, plan, home, Lawful(device))
    segments = [([number % 90], CONTEXT, [number], 1) for number in range(requests)]
    ends = []
    for _ in range(3):
        step = Step.build(segments, plan.rows_together(requests), alike=plan.passes)
        executor.head(executor.forward(step))
        ends.append(device.now_s)
    return ends[-1] - ends[-2]


def predicted_s(model: Weighed, plan: Plan, requests: int) -> float:
    none = Overheads(0.0, 0.0, 0.0, 0.0)
    gpu = Accelerator("sim:test", 1e9, BYTES_PER_S, FLOPS, LINK, layer_s=0, mixture_s=0, step_s=0, copy_s=0)
    host = Device("host", 1e9, HOST_BYTES_PER_S, HOST_FLOPS, accelerators=(gpu,), overheads=none)
    return step_of(model, plan, host, [Rows(requests, 1, CONTEXT)], requests, 1.0).seconds


def test_what_is_chosen_is_hardly_slower_than_the_best(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (
        ("SIM_FLOPS", FLOPS), ("SIM_MEMORY_BYTES_PER_S", BYTES_PER_S), ("LAUNCH_S", 1e-9), ("PACKET_BYTES", 1 << 10),
    ):  # fmt: skip
        monkeypatch.setattr(sim_device, name, value)
    with open_checkpoint(running.path) as checkpoint:
        model = weighed(checkpoint, "keep")
    moe = running.spec.moe
    assert moe is not None
    crossing = round(saturating_tokens(FLOPS, LINK, moe.experts, moe.active, 4))
    assert crossing == 320
    dense = with_blocks_on(running.plan, lambda block: block.kind not in ("embed", "expert"))
    half = with_blocks_on(
        running.plan, lambda block: block.kind != "embed" and (block.kind != "expert" or block.layer > 1)
    )
    coming = replace(dense, staged_experts=4, staged_tokens=33)
    plans = [dense, half, coming, with_blocks_passing(running.plan)]
    won, regrets, said = set(), [], []
    for requests in (1, 8, 32, 64, 160, crossing):
        steps = [1.0 if plan.passes else max(1.0, requests / AT_ONCE) for plan in plans]
        rows = [requests if plan.passes else min(requests, AT_ONCE) for plan in plans]
        each = list(zip(steps, plans, rows, strict=True))
        took = [count * measured_s(running, plan, its) for count, plan, its in each]
        thought = [count * predicted_s(model, plan, its) for count, plan, its in each]
        chosen = min(range(len(plans)), key=lambda number: thought[number])
        regret = took[chosen] / min(took)
        off = [mine / its for mine, its in zip(thought, took, strict=True)]
        said.append(f"{requests}: {chosen}, regret {regret:.3f}, predicted ÷ measured {off}")
        regrets.append(regret)
        won.add(plans[chosen].passes)
        assert all(0.9 < its < 1.1 for its in off), said
    assert max(regrets) <= 1.1, said
    assert won == {False, True}
