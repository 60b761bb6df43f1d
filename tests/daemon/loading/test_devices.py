"""A node whose model is computed by a simulated device: the same answers, within the device's budget, whatever becomes
of the device."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from fakes import tiny
from fakes.asking import CONFIG, prompt, text_of

import shoal.daemon.node as node_module
from shoal.comm.home import Home
from shoal.comm.messages import Load, ModelStatus, Unload
from shoal.daemon.errors import DaemonError
from shoal.daemon.library.packs import Packs
from shoal.daemon.loading import device_rooms
from shoal.daemon.loading.outlook import Outlook, outlook
from shoal.daemon.node import Node
from shoal.daemon.throughput.own_machine import OwnMachine
from shoal.devices import opening, sim_device
from shoal.devices.device_home import DeviceHome
from shoal.devices.sim_device import SimDevice
from shoal.engine.learn import expert_use
from shoal.kernels.homes import cpu
from shoal.kernels.matrix import Matrix
from shoal.offload.block_store import ResidentStore
from shoal.partition.placement import PINNED_BYTES
from shoal.partition.spec import BlockId
from shoal.partition.throughput.placing import staging_worth
from shoal.partition.throughput.profile import unmeasured

ROOMY = "sim:64MB"


@pytest.fixture(autouse=True)
def _devices_of_its_own() -> Iterator[None]:
    """Devices are the process's; what became of one in a test is nobody else's business."""
    yield
    opening._opened.clear()


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_gguf(
        tiny.hf_model("qwen3_moe"), tmp_path_factory.mktemp("m") / "mixture.gguf", type="Q8_0"
    )


def loaded(
    path: Path | str,
    device: str,
    packs: Packs | None = None,
    machine: OwnMachine | None = None,
    **more: object,
) -> Node:
    # Of a cluster: alone the CPU would round inputs to 8 bits, and its texts would not be a device's.
    machine = machine or OwnMachine(1, alone=lambda: False)
    node = Node(replace(CONFIG, device=device, **more), packs=packs, machine=machine)  # type: ignore[arg-type]
    node.load(Load(model=str(path)))
    return node


def sim(name: str = ROOMY) -> SimDevice:
    device = opening.device_home(name).device
    assert isinstance(device, SimDevice)
    return device


def status(node: Node) -> ModelStatus:
    (found,) = node.status().models
    return found


def whole_bytes(path: Path | str, packs: Packs | None = None) -> int:
    """What the model takes on a device that has room for all of it."""
    with loaded(path, ROOMY, packs) as node:
        return status(node).device_bytes


@pytest.fixture
def node(path: Path) -> Iterator[Node]:
    """Whose texts are to be a device's."""
    with loaded(path, "cpu") as node:
        yield node


def test_answers_are_those_of_the_cpu(node: Node, path: Path) -> None:
    expected = [text_of(node, prompt(i))[:2] for i in range(3)]
    with loaded(path, ROOMY) as there:
        assert [text_of(there, prompt(i))[:2] for i in range(3)] == expected
        found, device = status(there), sim()
        assert "all 3 layers and the head on sim:64MB with " in found.plan
        assert (found.device, found.warnings) == (ROOMY, [])
        assert there.budget.on(ROOMY).held_bytes == found.device_bytes >= device.budget.peak_bytes
        assert device.budget.limit_bytes == 64_000_000
        there.unload(Unload(model=found.name))
        assert there.budget.on(ROOMY).held_bytes == device.budget.held_bytes == 0


@pytest.mark.parametrize("kind", ["dense", "mixture"])
def test_what_does_not_fit_stays_on_the_cpu(kind: str, path: Path, mixture: Path) -> None:
    path = path if kind == "dense" else mixture
    with loaded(path, "cpu") as node:
        expected = [text_of(node, prompt(i))[:2] for i in range(2)]
        in_ram = node.budget.held_bytes
    whole = whole_bytes(path)
    page_bytes = 768 * 2 * 2 * 2 * 16  # tokens, K and V, KV heads, bytes, numbers
    experts_bytes = 6 * 3 * 32 * 64 * 34 // 32  # of a layer
    cases = {
        "dense": ((1, "all 3 layers on"), (page_bytes, "2 of 3 layers (the last) and the head on")),
        "mixture": (
            (1, "all 3 layers (12 of 18 experts) and the head on"),
            (experts_bytes + 1, "all 3 layers (6 of 18 experts) and the head on"),
            (3 * experts_bytes, "all 3 layers (without experts) and the head on"),
            (3 * experts_bytes + page_bytes, "2 of 3 layers (the last, without experts) and the head on"),
        ),
    }
    for less, said in cases[kind]:
        name = f"sim:{whole - less}"
        with loaded(path, name) as there:
            assert [text_of(there, prompt(i))[:2] for i in range(2)] == expected
            assert said in status(there).plan
            device = sim(name)
            assert device.budget.peak_bytes <= status(there).device_bytes <= device.budget.limit_bytes
            assert there.budget.held_bytes <= in_ram + (36 << 20)  # a block passes on its way there
    layer = "one layer" if kind == "dense" else "one layer without its experts"
    with pytest.raises(DaemonError, match=rf"^{layer} with its KV and scratch takes") as refused:
        loaded(path, "sim:1000")
    assert refused.value.code == "resources"


def test_another_model_goes_before_one_is_split(path: Path, mixture: Path) -> None:
    name = f"sim:{whole_bytes(mixture) + whole_bytes(path) // 2}"
    with loaded(path, name) as node:
        node.load(Load(model=str(mixture)))
        assert "all 3 layers and the head" in status(node).plan
        assert node.budget.on(name).held_bytes == status(node).device_bytes


@pytest.mark.parametrize("quant", ["", ":q4"])
def test_experts_change_places_while_nobody_asks(
    mixture: Path, quant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expert_use, "LEAST_USES", 1)
    monkeypatch.setattr(node_module, "IDLE_WAIT_S", 0.01)
    packs, asked = Packs(Home(tmp_path / "home")), f"{mixture}{quant}"
    name = f"sim:{whole_bytes(asked, packs) - 1}"
    with loaded(asked, name, packs) as there:
        moved, exchange = Event(), ResidentStore.exchange

        def seen(self: ResidentStore, *what: Any) -> None:
            exchange(self, *what)
            moved.set()

        monkeypatch.setattr(ResidentStore, "exchange", seen)
        before = there.budget.held_bytes, sim(name).budget.held_bytes
        for index in range(4):
            text_of(there, prompt(index))
        assert moved.wait(10)
        assert "12 of 18 experts" in status(there).plan
        assert (there.budget.held_bytes, sim(name).budget.held_bytes) == before
        assert len(text_of(there, prompt(0))[1]) == 24
        assert sim(name).budget.peak_bytes <= status(there).device_bytes <= sim(name).budget.limit_bytes
        sim(name).lose("somebody pulled it out")
        assert len(text_of(there, prompt(0))[1]) == 24
        assert status(there).device == ""


def test_experts_that_were_used_often_are_placed_at_load(
    mixture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(expert_use, "LEAST_USES", 1)
    with loaded(mixture, "cpu") as alone:
        expected = [text_of(alone, prompt(i))[:2] for i in range(2)]
    name, kept = f"sim:{whole_bytes(mixture) - 1}", tmp_path / "profile.json"

    def there() -> set[BlockId]:
        return {block for block, home in places() if home is not cpu()}

    def places() -> Any:
        (model,) = node._models
        return model.executor.experts._homes.items()

    with loaded(mixture, name, machine=OwnMachine(1, kept, alone=lambda: False)) as node:
        first = there()
        for _ in range(3):
            assert [text_of(node, prompt(i))[:2] for i in range(2)] == expected
        (model,) = node._models
        uses, plan = model.executor.experts.counts.uses, model.plan
    (file,) = (tmp_path / "experts").iterdir()
    with loaded(mixture, name, machine=OwnMachine(1, kept, alone=lambda: False)) as node:
        assert sum(uses.get(it, 0) for it in there()) > sum(uses.get(it, 0) for it in first)
        assert len(there()) == len(first)
        (model,) = node._models
        assert (model.plan.peak_bytes, model.plan.device_bytes) == (plan.peak_bytes, plan.device_bytes)
        assert model.executor.experts.counts.uses == uses
        assert "12 of 18 experts" in status(node).plan
        assert [text_of(node, prompt(i))[:2] for i in range(2)] == expected
    file.write_text("[]")
    with loaded(mixture, name, machine=OwnMachine(1, kept, alone=lambda: False)) as node:
        assert there() == first
    assert sum("how often experts were used is not known" in it.getMessage() for it in caplog.records) == 1


@pytest.mark.parametrize(("matrix", "error"), [(1, MemoryError()), (2, OSError("no idea"))])
def test_an_exchange_that_fails_halfway_mixes_no_experts_up(
    mixture: Path, matrix: int, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expert_use, "LEAST_USES", 1)
    monkeypatch.setattr(node_module, "IDLE_WAIT_S", 0.01)
    with loaded(mixture, "cpu") as alone:
        expected = [text_of(alone, prompt(index))[:2] for index in range(3)]
    exchange, begun, failed = DeviceHome.exchange, count(1), Event()

    def seen(self: DeviceHome, mine: Matrix, hosts: Matrix) -> None:
        exchange(self, mine, hosts)
        if next(begun) == matrix:
            failed.set()
            raise error

    monkeypatch.setattr(DeviceHome, "exchange", seen)
    with loaded(mixture, f"sim:{whole_bytes(mixture) - 1}") as there:
        for _ in range(2):
            assert [text_of(there, prompt(index))[:2] for index in range(3)] == expected
            assert failed.wait(10)
        assert "12 of 18 experts" in status(there).plan


def test_fewer_bits_from_a_pack(path: Path, tmp_path: Path) -> None:
    packs = Packs(Home(tmp_path / "home"))
    with loaded(f"{path}:q4", "cpu", packs) as node:
        expected = text_of(node, prompt(1))[:2]
    with loaded(f"{path}:q4", ROOMY, packs) as node:
        assert text_of(node, prompt(1))[:2] == expected
        assert sim().budget.peak_bytes <= status(node).device_bytes


def test_a_lost_device_is_done_without(node: Node, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = text_of(node, prompt(0))[:2]
    with loaded(path, ROOMY) as there:
        device, steps = sim(), count()
        compute = device.compute

        def going(*args: Any) -> Any:
            if next(steps) == 150:  # in the middle of the answer
                device.lose("the driver was restarted")
            return compute(*args)

        monkeypatch.setattr(device, "compute", going)
        assert text_of(there, prompt(0))[:2] == expected
        found = status(there)
        said = "device sim:64MB is lost (the driver was restarted), so the cpu computes"
        assert found.warnings[0].startswith(said)
        assert (found.device, found.device_bytes) == ("", 0)
        assert there.budget.on(ROOMY).held_bytes == sim().budget.held_bytes == 0
        assert text_of(there, prompt(0))[:2] == expected


def test_models_are_loaded_after_a_device_was_lost(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Each time at once: nothing is asked of it any more, and its page-locked memory has been given back."""
    with loaded(path, ROOMY) as there:
        sim().lose("the driver was restarted")
        for _ in range(2):
            there.unload(Unload(model=status(there).name))
            there.load(Load(model=str(path)))
            (said,) = status(there).warnings
            assert said.startswith("device sim:64MB is lost (the driver was restarted), so the cpu computes")
            assert not there.budget.held_by(f"page-locked memory for {ROOMY}")
        assert not [it for it in caplog.records if "it is loaded without" in it.getMessage()]
        assert len(text_of(there, prompt(0))[1]) == 24


@pytest.mark.parametrize("lost", [False, True])
def test_experts_come_for_prompts(mixture: Path, lost: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And if the device is lost while they do, answers go on without it."""
    monkeypatch.setattr(sim_device, "LAUNCH_S", 1e-9)  # or such small ones would be quicker where they are
    monkeypatch.setattr(staging_worth, "FAST", unmeasured(2))
    with loaded(mixture, "cpu") as node:
        expected = [text_of(node, prompt(i, tokens=40))[:2] for i in range(3)]
    name = f"sim:{whole_bytes(mixture) - 1}"
    with loaded(mixture, name) as there:
        device, stage_in, copies = sim(name), sim(name).stage_in, count()

        def coming(*args: Any) -> Any:
            if next(copies) == 1 and lost:
                device.lose("the driver was restarted")
            return stage_in(*args)

        monkeypatch.setattr(device, "stage_in", coming)
        said = status(there).plan
        assert "12 of 18 experts" in said
        assert re.search(r"\(others come for steps of \d+ tokens or more\)", said)
        assert [text_of(there, prompt(i, tokens=40))[:2] for i in range(3)] == expected
        assert next(copies) > 1
        found = status(there)
        assert found.device == ("" if lost else name)
        if not lost:
            assert device.budget.peak_bytes <= found.device_bytes <= device.budget.limit_bytes
        assert there.budget.on(name).held_bytes == found.device_bytes


def test_kv_on_disk_comes_back_to_the_device(path: Path, tmp_path: Path) -> None:
    def run() -> tuple[tuple[str, list[int]], int]:
        with Node(replace(CONFIG, device=ROOMY), kv_root=tmp_path / "kv") as node:
            node.load(Load(model=str(path)))
            text, ids, done = text_of(node, prompt(0, tokens=80, new=8))
            return (text, ids), done.usage.cached_tokens

    first, nothing = run()
    again, cached = run()
    assert (again, nothing, cached) == (first, 0, 79)


def test_a_device_that_is_lost_leaves_kv_on_disk_in_order(path: Path, tmp_path: Path) -> None:
    ask = prompt(0, tokens=80, new=8)
    with Node(replace(CONFIG, device=ROOMY), kv_root=tmp_path / "kv") as node:
        node.load(Load(model=str(path)))
        first = text_of(node, ask)[:2]
        sim().lose("somebody pulled it out")  # before its page was written
        assert text_of(node, ask)[:2] == first
        assert (status(node).device, status(node).kv_disk_why) == ("", "")
    with Node(CONFIG, kv_root=tmp_path / "kv") as node:
        node.load(Load(model=str(path)))
        *again, done = text_of(node, ask)
        assert (tuple(again), done.usage.cached_tokens) == (first, 79)


def test_page_locked_memory_is_in_the_ledger_once(path: Path, mixture: Path) -> None:
    with loaded(path, ROOMY) as there:
        assert there.budget.held_by(f"page-locked memory for {ROOMY}") == PINNED_BYTES == sim().pinned_bytes
        held = there.budget.held_bytes
        there.unload(Unload(model=status(there).name))
        there.load(Load(model=str(path)))
        assert there.budget.held_bytes == held


@pytest.mark.parametrize("lacks", ["a limit", "room"])
def test_without_page_locked_memory_a_line_says_so_and_nothing_else_changes(
    node: Node, path: Path, lacks: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither where blocks are nor answers."""
    with loaded(path, ROOMY) as there:
        plan = status(there).plan
    name = f"{ROOMY},16GB/s,4GB/s"
    if lacks == "a limit":
        name, why = f"{name},1MB", "6.29 MB were asked for, and at most 1 MB may be page-locked"
    else:
        monkeypatch.setattr(device_rooms, "PINNED_BYTES", 1 << 50)
        why = f"page-locked memory for {name} needs 1.13 PB, but "
    with loaded(path, name) as there:
        (said,) = status(there).warnings
        assert said.startswith(
            f"copies to {name} are slower than they could be, without page-locked memory: {why}"
        )
        assert [it.getMessage() for it in caplog.records if "page-locked" in it.getMessage()] == [said]
        assert status(there).plan == plan.replace(ROOMY, name)
        assert not there.budget.held_by(f"page-locked memory for {name}")
        assert text_of(there, prompt(0))[:2] == text_of(node, prompt(0))[:2]


def test_what_show_says(path: Path, tmp_path: Path) -> None:
    packs, machine = Packs(Home(tmp_path / "home")), OwnMachine(1)
    found = outlook(path, replace(CONFIG, device=ROOMY), packs, machine)
    assert isinstance(found, Outlook)
    assert (found.device, found.tokens_per_s) == (ROOMY, 0.0)
    assert found.plan == found.plan.replace("cpu", "")
    assert "on sim:64MB with" in found.plan
    assert found.device_bytes == whole_bytes(path)
    assert isinstance(here := outlook(path, CONFIG, packs, machine), Outlook)
    assert (here.device, here.device_bytes) == ("", 0)
    assert here.tokens_per_s > 0


def test_devices_that_are_not_there_and_groups_are_refused(path: Path) -> None:
    for changes, said in (
        ({"device": "cuda:7"}, "cuda:7"),
        ({"device": ROOMY, "ranks": 2}, "a device belongs to no group"),
    ):
        with pytest.raises(DaemonError, match=said) as refused:
            loaded(path, **changes)  # type: ignore[arg-type]
        assert refused.value.code == "unsupported"
