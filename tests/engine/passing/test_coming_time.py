"""Steps for which dense layers come take, on a device's virtual clock, what the throughput model predicts, whatever
takes longest: copies, what the device computes, or what the CPU attends."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fakes import tiny
from fakes.on_device import Attending, executor_of, sim, with_blocks_on
from fakes.running import Running
from fakes.throughput.throughput_cases import FREE, free_card

from shoal.daemon.throughput.model_sizes import weighed
from shoal.devices import sim_device
from shoal.models.checkpoint.checkpoint import open_checkpoint
from shoal.models.step import Step
from shoal.partition.spec import BlockId
from shoal.partition.throughput.laws import Rows
from shoal.partition.throughput.profile import Device
from shoal.partition.throughput.step_pieces import Pieces
from shoal.partition.throughput.step_time import staying_step

LAYERS, ROWS, STEPS = 9, 120, 4
TOLERANCE = 0.05
CASES = {  # bytes per second of the link, operations per second of the device, and of the CPU
    "link": (1e7, 1e12, 1e15),
    "device": (1e12, 1e9, 1e15),
    "cpu": (1e12, 1e12, 1e8),
    "link and device": (3e6, 1e9, 1e15),
    "link and cpu": (3e7, 1e12, 1e9),
}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Running:
    path = tmp_path_factory.mktemp("m") / "m"
    tiny.save_hf(tiny.hf_model("llama", num_hidden_layers=LAYERS), path)
    return Running(path)


def stays(block: BlockId) -> bool:
    return block.kind == "head" or block.layer == LAYERS - 1


@pytest.mark.parametrize("longest", CASES)
def test_steps_take_what_is_predicted(
    running: Running, longest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    link, there_flops, here_flops = CASES[longest]
    monkeypatch.setattr(sim_device, "SIM_FLOPS", there_flops)
    monkeypatch.setattr(sim_device, "SIM_MEMORY_BYTES_PER_S", 1e18)
    monkeypatch.setattr(sim_device, "LAUNCH_S", 0.0)
    monkeypatch.setattr(sim_device, "PACKET_BYTES", 1)
    with open_checkpoint(running.path) as checkpoint:
        model = weighed(checkpoint, "keep")
    there = free_card(memory_bytes_per_s=1e18, flops=there_flops, host_bytes_per_s=link)
    machine = Device("cpu", 0.0, 1e18, here_flops, overheads=FREE, accelerators=(there,))
    plan = replace(with_blocks_on(running.plan, stays), staged_tokens=ROWS)
    segments = [Rows(1, ROWS, 0.0)]
    attends_s = Pieces(model, plan, machine, segments, None).looking(model.kind_of(0)).seconds
    device, home = sim(link_bytes_per_s=link)
    executor = executor_of(running, plan, home, Attending(device, attends_s))
    took = []
    for _ in range(STEPS):
        begun_s = device.now_s
        executor.head(executor.forward(Step.build([([*range(ROWS)], 0, [0, 1], 1)], ROWS)))
        took.append(device.now_s - begun_s)
    predicted_s = staying_step(model, plan, machine, there, segments, 1, None).seconds
    assert took[1:] == pytest.approx(
        [predicted_s] * (STEPS - 1), rel=TOLERANCE
    )  # before the first nothing came
