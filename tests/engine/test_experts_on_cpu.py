"""Mixtures whose experts the CPU computes, where they lie, and a device the rest: what passes the link, and who waits
for whom, on the virtual clock of a simulated device, to the second."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fakes import tiny
from fakes.on_device import TakingTime, executor_of, logits, sim, with_blocks_on
from fakes.running import Running, relative_error
from fakes.torch_on_host import torch_home

from shoal.devices.device import DeviceEvent
from shoal.devices.sim_device import Scheduled, SimDevice
from shoal.kernels import routing
from shoal.kernels.arrays import Floats
from shoal.kernels.homes import cpu
from shoal.partition.spec import BlockId

LAYERS = 4
SHARED = ("feed forward", "linears", "gate")  # what a shared expert takes, between `join` and `add`
CPU_S = 0.02  # that experts of a layer take it
APART = 1e-5  # of the largest logit: sums of experts in another order
IN_TORCH = {"F32": 1e-4, "Q4_0": 1e-3}  # whose inputs the CPU rounds to 16 bits


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Running:
    path = tmp_path_factory.mktemp("shared") / "m"
    tiny.save_hf(tiny.hf_model("qwen2_moe", num_hidden_layers=LAYERS), path)
    return Running(path)


def dense(block: BlockId) -> bool:
    return block.kind not in ("embed", "expert")


def scheduled(
    running: Running, there: Callable[[BlockId], bool] = dense, link: float = 16e9, cpu_s: float = 0.0
) -> tuple[SimDevice, int]:
    """A device after one step of which experts took the CPU `cpu_s` in every layer; for how many things the host has
    waited."""
    device, home = sim(link_bytes_per_s=link)
    executor = executor_of(running, with_blocks_on(running.plan, there), home, TakingTime(device, cpu_s))
    waits, wait = [], device.wait

    def waited(event: DeviceEvent) -> None:
        waits.append(event)
        wait(event)

    device.wait = waited  # type: ignore[method-assign]
    device.schedule.clear()
    assert np.array_equal(logits(executor, rounds=1), logits(running.executor, rounds=1))
    return device, len(set(waits))


def of(device: SimDevice, queue: str) -> list[Scheduled]:
    return [it for it in device.schedule if it.queue == queue]


def test_one_copy_each_way_in_a_layer(running: Running) -> None:
    device, waits = scheduled(running)
    moe, spec = running.spec.moe, running.spec
    assert moe is not None
    rows, wanted = 3 * 70, 71
    each = [rows] * (LAYERS - 1) + [wanted]  # after the last attention only rows are left that are asked for
    out = [4 * count * (spec.hidden + moe.experts) for count in each]
    assert [it.nbytes for it in of(device, "out")] == [*out, 4 * wanted * spec.vocab]
    assert waits == LAYERS + 1
    hidden = [it.nbytes for it in of(device, "in") if it.nbytes >= 4 * wanted * spec.hidden]
    assert hidden == [4 * count * spec.hidden for count in [rows, *each]]
    # Besides: ids of pages and angles, once for all layers, and the rows that are wanted.
    assert len(of(device, "in")) == len(hidden) + 1 + 2 * len(spec.ropes) + 1


@pytest.mark.parametrize(
    ("link", "cpu_s", "longest"),
    [(1e12, 0.0, "device"), (16e9, CPU_S, "cpu"), (10e6, 0.0, "link")],
)
def test_the_clock_is_that_of_the_schedule(running: Running, link: float, cpu_s: float, longest: str) -> None:
    """From where hidden states leave to where they leave in the next layer: the shared expert beside the way out, the
    CPU's experts and the way back, whichever takes longer, and then what comes one after the other."""
    device, _ = scheduled(running, link=link, cpu_s=cpu_s)
    computing = of(device, "compute")
    joins = [i for i, it in enumerate(computing) if it.what == "join"]
    outs = of(device, "out")[:LAYERS]
    assert len(joins) == LAYERS
    for layer in range(LAYERS - 2):  # later ones wait for the ids of the rows that are wanted
        first, after = joins[layer], joins[layer + 1]
        join, there = computing[first], computing[first + 1 : first + 1 + len(SHARED)]
        assert tuple(it.what for it in there) == SHARED
        assert outs[layer].begin_s == there[0].begin_s == join.end_s
        (back,) = [
            it for it in of(device, "in") if outs[layer].begin_s < it.begin_s < outs[layer + 1].begin_s
        ]
        assert back.begin_s == pytest.approx(outs[layer].end_s + cpu_s, rel=1e-12)
        shared_s = there[-1].end_s - join.end_s
        away_s = sum(it.end_s - it.begin_s for it in (outs[layer], back)) + cpu_s
        assert (shared_s > away_s) == (longest == "device")
        rest_s = sum(it.end_s - it.begin_s for it in computing[first + 1 + len(SHARED) : after + 1])
        took_s = computing[after].end_s - join.end_s
        assert took_s == pytest.approx(max(shared_s, away_s) + rest_s, rel=1e-9)


@pytest.mark.parametrize("there", [False, True], ids=["on the cpu", "on the device"])
def test_one_expert_gets_everything(running: Running, there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others, in the other place, get nothing."""
    favourite = 3

    def skewed(scores: Floats, count: int, normalize: bool) -> routing.Routing:
        rows = len(scores), 1
        return routing.Routing.of(np.full(rows, favourite), np.ones(rows, np.float32))

    monkeypatch.setattr(routing, "route", skewed)
    monkeypatch.setattr(type(cpu()), "route", lambda _, *operands: skewed(*operands))
    device, home = sim()

    def placed(block: BlockId) -> bool:
        return dense(block) or (block.kind == "expert" and (block.expert == favourite) is there)

    executor = executor_of(running, with_blocks_on(running.plan, placed), home)
    device.schedule.clear()
    assert relative_error(logits(executor), logits(running.executor)) < APART
    mixed = [it for it in of(device, "compute") if it.what == "experts"]
    assert len(mixed) == (3 * LAYERS if there else 0)


def test_what_leaves_together_is_there_when_somebody_has_waited_for_it() -> None:
    device, home = sim()
    x, y = home.place(np.ones((2, 3), np.float32)), home.place(np.full((2, 5), 2, np.float32))
    home.prefetch(x, y)
    assert x.leaving is not None
    assert np.isnan(x.leaving.here).all()
    held = device.budget.held_bytes
    assert np.array_equal(home.fetch(y), np.full((2, 5), 2))
    assert np.array_equal(home.fetch(x), np.ones((2, 3)))
    assert device.budget.held_bytes == held - 4 * (2 * 3 + 2 * 5)


def test_experts_of_a_layer_in_two_places(running: Running) -> None:
    """The device begins with its own, and the CPU computes the others meanwhile."""
    device, home = sim()
    plan = with_blocks_on(running.plan, lambda block: dense(block) or block.expert in (0, 2, 3))
    executor = executor_of(running, plan, home, TakingTime(device, CPU_S))
    device.schedule.clear()
    assert relative_error(logits(executor, rounds=1), logits(running.executor, rounds=1)) < APART
    mixes = [it for it in of(device, "compute") if it.what == "experts"]
    for mix, out in zip(mixes, of(device, "out")[:LAYERS], strict=True):
        assert out.end_s < mix.begin_s < mix.end_s < out.end_s + CPU_S


@pytest.mark.parametrize("kernels", ["the cpu's", "torch"])
@pytest.mark.parametrize("stored", ["F32", "Q4_0"])
def test_experts_that_are_used_change_places_with_others(tmp_path: Path, kernels: str, stored: str) -> None:
    """In every memory there is as much as before, and logits are the same."""
    model, path = tiny.hf_model("qwen3_moe"), tmp_path / "m.gguf"
    running = Running(tiny.save_hf(model, path) if stored == "F32" else tiny.save_gguf(model, path, stored))
    home = sim()[1] if kernels == "the cpu's" else torch_home()
    plan = with_blocks_on(running.plan, lambda block: dense(block) or block.expert in (0, 2, 3))
    executor, expected = executor_of(running, plan, home), logits(running.executor)
    places, near = executor._experts, APART if kernels == "the cpu's" else IN_TORCH[stored]
    assert relative_error(logits(executor), expected) < near
    assert not executor.exchange_experts()  # nothing was used often enough
    held = home.device.budget.held_bytes
    for wanted in ((1, 4, 5), (0, 1, 2)):
        for _ in range(3000):
            places.parted(1, [BlockId("expert", 1, expert) for expert in wanted])
        while executor.exchange_experts():
            pass
        there = {block for block, its in places._homes.items() if its is home}
        assert {BlockId("expert", 1, expert) for expert in wanted} <= there
        assert len(there) == 9
        assert relative_error(logits(executor), expected) < near
    assert home.device.budget.held_bytes == held
    assert set(places._homes.values()) == {home, cpu()}
