"""A node whose card hangs without an error, played: answers go on without it, and the daemon unloads, loads and ends in
time. What the card may still copy from or to is not given to anybody."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from fakes.asking import CONFIG, prompt, text_of
from fakes.cuda_on_host import Event, card

from shoal.comm.messages import Load, ModelStatus, Unload
from shoal.daemon import service
from shoal.daemon.memory import pinned_for
from shoal.daemon.node import Node
from shoal.daemon.throughput.own_machine import OwnMachine
from shoal.devices import copy_thread, cuda_device, opening, waiting
from shoal.devices.cuda_device import CudaDevice
from shoal.devices.device_home import DeviceHome
from shoal.devices.torch_kernels import TorchKernels
from shoal.partition.placement import PINNED_BYTES

CARD = "cuda:0"
IN_TIME_S = 20.0
LOST = "device cuda:0 is lost (CUDA: nothing that was begun has ended for 0 s), so the cpu computes"


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[CudaDevice]:
    """The card of this process."""
    assert waiting.STILL_LIMIT_S < service.ENDING_S  # in which a daemon that is to stop has to end
    monkeypatch.setattr(waiting, "STILL_LIMIT_S", 0.2)
    monkeypatch.setattr(waiting, "LOOK_S", 0.02)
    monkeypatch.setattr(cuda_device, "LEFT_LIMIT_S", 0.2)
    monkeypatch.setattr(copy_thread, "BEGIN_LIMIT_S", 1.0)
    monkeypatch.setattr(cuda_device, "_hanging", [])
    made = card(monkeypatch, "much")
    opening._opened[CARD] = DeviceHome(made, TorchKernels())
    yield made
    opening._opened.clear()


@pytest.fixture
def node(path: Path, device: CudaDevice) -> Iterator[Node]:
    node = Node(replace(CONFIG, device=CARD), machine=OwnMachine(1, alone=lambda: False))
    try:
        node.load(Load(model=str(path)))
        assert status(node).device == CARD
        yield node
    finally:
        Event.hang = False
        node.close()


def status(node: Node) -> ModelStatus:
    (found,) = node.status().models
    return found


def in_time(act: Callable[[], object]) -> None:
    failed: list[BaseException] = []

    def run() -> None:
        try:
            act()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(IN_TIME_S)
    assert not thread.is_alive(), "it hangs"
    assert not failed


def hang_in_a_step(device: CudaDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    compute, steps = device.compute, count()

    def computing(*args: Any) -> Any:
        if next(steps) == 150:  # in the middle of the answer
            Event.hang = True
        return compute(*args)

    monkeypatch.setattr(device, "compute", computing)


def test_answers_go_on_without_it(
    node: Node, path: Path, device: CudaDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    hang_in_a_step(device, monkeypatch)
    in_time(lambda: text_of(node, prompt(0)))
    found = status(node)
    assert (found.device, found.device_bytes) == ("", 0)
    assert found.warnings[0].startswith(LOST)
    assert len(text_of(node, prompt(0))[1]) == 24
    for _ in range(2):
        in_time(lambda: node.unload(Unload(model=status(node).name)))
        assert node.budget.held_by(pinned_for(CARD)) == device.locked_bytes == PINNED_BYTES
        in_time(lambda: node.load(Load(model=str(path))))
        assert status(node).warnings[0].startswith(LOST)
    assert len(text_of(node, prompt(1))[1]) == 24
    in_time(node.close)


def test_who_unloads_finds_that_it_hangs(node: Node, path: Path, device: CudaDevice) -> None:
    text_of(node, prompt(0))
    Event.hang = True
    in_time(lambda: node.unload(Unload(model=status(node).name)))
    in_time(lambda: node.load(Load(model=str(path))))
    in_time(lambda: text_of(node, prompt(0)))
    assert status(node).device == ""


def test_a_daemon_that_is_to_stop_does(
    node: Node, device: CudaDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a step that waits."""
    hang_in_a_step(device, monkeypatch)

    def ask() -> None:
        with suppress(Exception):  # it ends with the daemon
            text_of(node, prompt(0))

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    while not Event.hang:
        asking.join(0.01)
        assert asking.is_alive()
    in_time(node.close)
