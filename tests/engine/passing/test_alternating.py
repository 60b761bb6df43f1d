"""Weights that pass through a device while the CPU attends, for two groups in turns: logits are those of the CPU to the
bit, and nothing is read before it has come or overwritten while it is read."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import tiny
from fakes.on_device import ROOMY, executor_of, logits, sim, with_blocks_passing
from fakes.running import FP32, Running, relative_error
from fakes.torch_on_host import torch_home

from shoal.devices.device_home import DeviceHome
from shoal.devices.errors import DeviceFull, DeviceLost
from shoal.devices.sim_device import Scheduled, SimDevice
from shoal.devices.sim_kernels import SimKernels
from shoal.engine.executor import Abandoned
from shoal.kernels import routing
from shoal.kernels.arrays import Floats
from shoal.kernels.homes import cpu
from shoal.models.step import Step
from shoal.partition.plan import Plan
from shoal.partition.spec import BlockId

# All mixtures, and of what is dense what has norms after blocks, clips, biases, windows and scaled embeddings.
FAMILIES = ("mixtral", "olmoe", "qwen3_moe", "qwen2_moe", "llama", "gemma3", "olmo2")
IN_TORCH = 1e-4  # of the largest logit
Kept = Callable[[BlockId], bool]


def the_head(block: BlockId) -> bool:
    return block.kind == "head"


def some_experts(block: BlockId) -> bool:
    return block.kind == "head" or (block.kind == "expert" and block.expert in (0, 2, 3))


@pytest.fixture(scope="module", params=FAMILIES)
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Running:
    overrides = {"clip_qkv": 0.5} if request.param == "olmoe" else {}
    path = tmp_path_factory.mktemp(request.param) / "m"
    tiny.save_hf(tiny.hf_model(request.param, **overrides), path)
    return Running(path)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Running:
    path = tmp_path_factory.mktemp("m") / "m"
    tiny.save_hf(tiny.hf_model("qwen3_moe"), path)
    return Running(path)


def of(device: SimDevice, queue: str) -> list[Scheduled]:
    return [it for it in device.schedule if it.queue == queue]


def with_texts_there(plan: Plan, rows: int = 16) -> Plan:
    """The same plan; texts with so many rows in a step attend on the device."""
    return replace(plan, attending_rows=rows)


@pytest.mark.parametrize("attending_rows", [0, 16])
@pytest.mark.parametrize("kept", [the_head, some_experts])
def test_logits_are_those_of_the_cpu(running: Running, kept: Kept, attending_rows: int) -> None:
    plan = with_texts_there(with_blocks_passing(running.plan, kept), attending_rows)
    device, home = sim()
    executor = executor_of(running, plan, home)
    assert device.budget.held_bytes <= plan.device_weights_bytes + plan.passing_bytes + (1 << 20)
    assert np.array_equal(logits(executor), logits(running.executor))
    passed = sum(it.nbytes for it in plan.blocks if it.passes)
    assert 3 * passed * 0.9 < sum(it.nbytes for it in of(device, "stage")) < 4 * passed
    assert isinstance(executor.kv.layers[0].data, np.ndarray)  # on the host
    executor.let_go()
    del executor
    assert device.budget.held_bytes == 0


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("chunk_tokens", [1, 256])  # with room for a text, and for all
def test_texts_attend_there_or_here(tmp_path: Path, seed: int, chunk_tokens: int) -> None:
    """Prompts in parts of any length behind a common beginning, beside answers: logits are the CPU's to the bit, also
    where there is not room for all of them, and what was computed there answers go on with here."""
    tiny.save_hf(tiny.hf_model("qwen3_moe", max_position_embeddings=320), tmp_path / "m")
    running = Running(tmp_path / "m", replace(FP32, kv_tokens=13 * 64, context_tokens=320))
    source, here = random.Random(seed), running.executor
    plan = with_texts_there(with_blocks_passing(running.plan), source.choice([1, 8, 30]))
    there = executor_of(running, replace(plan, chunk_tokens=chunk_tokens), sim()[1])
    ids = [source.randrange(running.spec.vocab) for _ in range(200)]
    # The first page is everybody's; it is computed first.
    texts = [([*ids, *source.choices(ids, k=120)], [0, *range(at, at + 4)]) for at in (1, 5, 9)]
    done = [64] * len(texts)
    segments = [(ids[:64], 0, [0], 64)]
    while segments:
        found = []
        for executor in (here, there):
            rows = sum(len(it[0]) for it in segments)
            step = Step.build(segments, executor.plan.rows_together(rows), alike=executor.plan.passes)
            found.append(executor.head(executor.forward(step)))
        assert np.array_equal(*found)
        segments = []
        for place, (tokens, pages) in enumerate(texts):
            count = min(source.choice([1, 1, 5, 20, 31, 64, 90]), len(tokens) - done[place])
            if count:
                segments.append((tokens[done[place] : done[place] + count], done[place], pages, count))
                done[place] += count


def test_pages_that_are_looked_at_before_they_have_come_are_poison(
    mixture: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a text that goes on in the second group."""
    device, home = sim()
    executor = executor_of(mixture, with_texts_there(with_blocks_passing(mixture.plan), 1), home)
    step = Step.build([([*range(1, 71)], 0, [0, 1], 70)], 40, alike=True)
    expected = executor.head(executor.forward(step))
    bring_in, compute = device.bring_in, device.compute
    coming: list[object] = []

    def noted(*operands: Any) -> Any:
        coming.append(bring_in(*operands))
        return coming[-1]

    monkeypatch.setattr(device, "bring_in", noted)
    monkeypatch.setattr(
        device,
        "compute",
        lambda what, work, run, after: compute(what, work, run, [it for it in after if it not in coming]),
    )
    with np.errstate(invalid="ignore"):
        found = executor.head(executor.forward(step))
    assert len(coming) == len(mixture.spec.layers)
    assert np.isfinite(expected).all()
    assert np.isnan(found[40:]).all()


def test_what_attends_there_leaves_before_it_is_looked_at(mixture: Running) -> None:
    """K and V of a prompt that nobody waits for are poison to its answer."""
    _, home = sim()
    executor = executor_of(mixture, with_texts_there(with_blocks_passing(mixture.plan)), home)
    prompt, answer = (
        Step.build([(ids, at, [0, 1], 1)], 40, alike=True) for ids, at in ((range(70), 0), ([7], 70))
    )
    executor.forward(prompt)
    expected = executor.head(executor.forward(answer))
    fetch = home.fetch

    def impatient(x: Any) -> Any:
        return fetch(x) if x.dtype != np.uint8 else x.leaving.here

    home.fetch = impatient  # type: ignore[method-assign]
    executor.forward(prompt)
    home.fetch = fetch  # type: ignore[method-assign]
    with np.errstate(invalid="ignore"):
        found = executor.head(executor.forward(answer))
    assert np.isfinite(expected).all()
    assert not np.array_equal(found, expected)


def test_a_layers_experts_come_in_one_copy(mixture: Running) -> None:
    """A copy for each of them would take who asks for it longer than its bytes the link."""
    device, home = sim()
    executor = executor_of(mixture, with_blocks_passing(mixture.plan, some_experts), home)
    expected = executor.head(executor.forward(Step.build([([1, 2, 3], 0, [0], 3)], 2)))
    device.schedule.clear()
    again = executor.head(executor.forward(Step.build([([1, 2, 3], 0, [0], 3)], 2)))
    assert np.array_equal(again, expected)
    passed = [it for it in executor.plan.blocks if it.passes]
    copies = of(device, "stage")
    assert len(copies) == 3 * len(mixture.spec.layers)  # attention, router, experts
    assert sum(it.nbytes for it in copies) == pytest.approx(sum(it.nbytes for it in passed), rel=1e-2)


@pytest.mark.parametrize("kv_type", ["i8", "bf16"])
def test_types_of_kv(tmp_path: Path, kv_type: str) -> None:
    tiny.save_hf(tiny.hf_model("qwen3_moe"), tmp_path / "m")
    running = Running(tmp_path / "m", replace(FP32, kv_type=kv_type))  # type: ignore[arg-type]
    # Of more parts than two, each is a group.
    for part_tokens, attending_rows in ((33, 0), (1 << 30, 0), (33, 16), (1 << 30, 16)):
        plan = with_texts_there(with_blocks_passing(running.plan), attending_rows)
        plan = replace(plan, part_tokens=part_tokens)
        assert np.array_equal(logits(executor_of(running, plan, sim()[1])), logits(running.executor))


@pytest.mark.parametrize("attending_rows", [0, 16])
@pytest.mark.parametrize("stored", ["F32", "Q4_0"])
def test_in_torch_they_are_the_same_but_for_rounding(
    tmp_path: Path, stored: str, attending_rows: int
) -> None:
    model, path = tiny.hf_model("qwen2_moe"), tmp_path / "m.gguf"
    running = Running(tiny.save_hf(model, path) if stored == "F32" else tiny.save_gguf(model, path, stored))
    plan = with_texts_there(with_blocks_passing(running.plan), attending_rows)
    found = logits(executor_of(running, plan, torch_home()))
    assert relative_error(found, logits(running.executor)) < (IN_TORCH if stored == "F32" else 1e-3)


class _Impatient(SimDevice):
    """Computes something without waiting for copies in one of its queues."""

    def __init__(self, queue: str, what: str) -> None:
        super().__init__("sim:test", ROOMY)
        self._copies, self._what = queue, what

    def compute(self, what, work, run, after):  # type: ignore[no-untyped-def]
        known = [event for event in after if what != self._what or event.queue != self._copies]
        return super().compute(what, work, run, known)


@pytest.mark.parametrize(
    ("queue", "what"),
    [("stage", "experts"), ("stage", "linears"), ("stage", "scores"), ("in", "linears")],
)
def test_what_is_read_before_it_has_come_is_poisoned(mixture: Running, queue: str, what: str) -> None:
    home = DeviceHome(_Impatient(queue, what), SimKernels(cpu()))
    with np.errstate(invalid="ignore"):
        executor = executor_of(mixture, with_blocks_passing(mixture.plan), home)
        assert np.isnan(logits(executor, rounds=1)).all()


def test_what_is_looked_at_before_it_has_left_is_poisoned(
    mixture: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, home = sim()
    executor = executor_of(mixture, with_blocks_passing(mixture.plan), home)
    step = Step.build([([1, 2, 3], 0, [0], 3)], 2)
    expected = executor.head(executor.forward(step))
    wait, waits = device.wait, []

    def impatient(event: Any) -> None:
        waits.append(event)
        if event is not waits[0]:  # queries of the first group
            wait(event)

    monkeypatch.setattr(device, "wait", impatient)
    with np.errstate(invalid="ignore"):
        found = executor.head(executor.forward(step))
    assert np.isnan(found).any()
    monkeypatch.setattr(device, "wait", wait)
    assert np.array_equal(executor.head(executor.forward(step)), expected)


def test_a_step_that_was_given_up_leaves_nothing_behind(mixture: Running) -> None:
    device, home = sim()
    executor = executor_of(mixture, with_blocks_passing(mixture.plan), home)
    expected, held = logits(mixture.executor), device.budget.held_bytes
    for share in (0.0, 0.5):
        with pytest.raises(Abandoned):
            executor.forward(Step.build([([1, 2, 3], 0, [7], 3)], 2), lambda done, most=share: done < most)
        assert np.array_equal(logits(executor), expected)
        assert device.budget.held_bytes == held


def test_steps_that_want_no_rows(mixture: Running) -> None:
    found = []
    for executor in (mixture.executor, executor_of(mixture, with_blocks_passing(mixture.plan), sim()[1])):
        parts = [[([5, 6, 7], 0, [5], 0)], [([8], 3, [5], 0), ([1, 2], 0, [6], 0)], [([9, 10], 4, [5], 2)]]
        for part in parts:
            hidden = executor.forward(Step.build(part, executor.plan.rows_together(3), alike=True))
        found.append(executor.head(hidden))
    assert np.array_equal(*found)


def test_both_groups_have_as_much_of_everything() -> None:
    pages = [*range(8)]
    answers = [([number], 100 + number, pages, 1) for number in range(64)]
    prompts = [([100] * 300, 0, pages, 0), ([101] * 20, 0, pages, 1), ([102] * 180, 5, pages, 2)]
    step = Step.build([*answers, *prompts], 282, alike=True)
    assert [part.segments.tokens for part in step.parts] == [282, 282]
    for part in step.parts:
        rows = part.segments.table[:, 1].tolist()
        assert rows.count(1) == 32
    assert step.tokens[step.rows].tolist() == [*range(64), 101, 102, 102]


def test_one_expert_gets_everything(mixture: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def skewed(scores: Floats, count: int, normalize: bool) -> routing.Routing:
        rows = len(scores), 1
        return routing.Routing.of(np.full(rows, 3), np.ones(rows, np.float32))

    monkeypatch.setattr(routing, "route", skewed)
    monkeypatch.setattr(type(cpu()), "route", lambda _, *operands: skewed(*operands))
    executor = executor_of(mixture, with_blocks_passing(mixture.plan), sim()[1])
    assert np.array_equal(logits(executor), logits(mixture.executor))


@pytest.mark.parametrize("copy", [0, 4, 14])
def test_a_device_that_is_lost_in_the_middle(
    mixture: Running, monkeypatch: pytest.MonkeyPatch, copy: int
) -> None:
    device, home = sim()
    executor = executor_of(mixture, with_blocks_passing(mixture.plan), home)
    stage_in, copies = device.stage_in, []

    def going(*args: Any) -> Any:
        if len(copies) == copy:
            device.lose("the driver was restarted")
        copies.append(stage_in(*args))
        return copies[-1]

    monkeypatch.setattr(device, "stage_in", going)
    for _ in range(2):
        with pytest.raises(DeviceLost, match="the driver was restarted"):
            logits(executor)
        executor.kv.table.give_back(list(executor.kv.table._taken))
    executor.let_go()
    copies.clear()
    del executor
    assert device.budget.held_bytes == 0  # nothing has to be asked of it for that


def test_no_room_is_said_before_any_step_and_a_full_device_fails_one(mixture: Running) -> None:
    plan = with_blocks_passing(mixture.plan)
    device, home = sim()
    executor = executor_of(mixture, plan, home)
    least = device.budget.held_bytes
    device.budget.limit_bytes = least + 1000
    with pytest.raises(DeviceFull):
        logits(executor)
    device.budget.limit_bytes = ROOMY
    executor.kv.table.give_back(list(executor.kv.table._taken))
    assert np.array_equal(logits(executor), logits(mixture.executor))
    del executor
    with pytest.raises(DeviceFull):
        executor_of(mixture, plan, sim(least - 1)[1])
