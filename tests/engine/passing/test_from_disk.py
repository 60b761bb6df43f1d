"""Weights that pass from a disk through a window to a device, and models of which a device has dense parts while the
rest streams: logits are those of the CPU to the bit, nothing is read before it has come, and what fails is said."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from fakes.cuda_on_host import LOCKED, card
from fakes.on_device import ROOMY, logits, sim
from fakes.running import Running, relative_error
from fakes.streaming import packed

from shoal.devices.device_home import DeviceHome
from shoal.devices.errors import DeviceLost
from shoal.devices.sim_device import SimDevice
from shoal.devices.sim_kernels import SimKernels
from shoal.devices.torch_kernels import TorchKernels
from shoal.engine.collective import Alone
from shoal.engine.executor import Abandoned, Executor, attention_homes
from shoal.kernels.homes import cpu
from shoal.models.step import Step
from shoal.offload.errors import OffloadError, PackCorrupt, StoreError
from shoal.offload.kv.pool import KvPool
from shoal.offload.pack.pack import Pack
from shoal.offload.window.window_store import WindowStore
from shoal.partition.plan import BlockPlan, Plan
from shoal.partition.spec import BlockId

if TYPE_CHECKING:
    from fakes.streamed_cases import Faulty

pytest_plugins = ("fakes.streamed_cases",)

FAMILIES = ("mixtral", "olmoe", "qwen3_moe", "qwen2_moe", "llama", "gemma3", "olmo2")
NAME = "sim:test"
IN_TORCH = 1e-4  # of the largest logit
Which = Callable[[BlockId], bool]


class Case:
    def __init__(self, directory: Path, family: str) -> None:
        overrides = {"clip_qkv": 0.5} if family == "olmoe" else {}
        self.path, self.pack = packed(directory, family, **overrides)
        self.resident = Running(self.path)
        self.expected = logits(self.resident.executor)
        self.resident.executor.kv.table.give_back(list(self.resident.executor.kv.table._taken))

    def plan(self, placed: Callable[[BlockPlan], BlockPlan], spare_bytes: int = 0, slots: int = 4) -> Plan:
        """Blocks as they are in the pack, of which `placed` says where they are."""
        body = [block for block in self.resident.spec.blocks() if block.kind != "head"]
        heads = sorted(block for block in self.pack.blocks if block.kind == "head")
        blocks = [placed(BlockPlan(it, self.pack.blocks[it].nbytes, "disk")) for it in (*body, *heads)]
        cyclic = [
            it.nbytes for it in blocks if it.tier == "disk" and it.block.kind != "embed" and not it.slotted
        ]
        return replace(
            self.resident.plan,
            blocks=tuple(blocks),
            window_bytes=max(cyclic, default=0) + spare_bytes,
            expert_slots=slots if any(it.slotted for it in blocks) else 0,
        )


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("m"), "qwen3_moe")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("d"), "llama")


def passing(pinned: Which = lambda block: False, there: Which = lambda block: False) -> Any:
    """All layers pass through the device, from disk but for some; the head and some others stay there."""

    def placed(it: BlockPlan) -> BlockPlan:
        if it.block.kind == "embed":
            return it
        tier = "gpu" if it.block.kind == "head" or there(it.block) else "ram" if pinned(it.block) else "disk"
        return replace(it, tier=tier, device=NAME)

    return placed


def staying(there: Which, pinned: Which = lambda block: False) -> Any:
    """Some blocks stay on the device; the CPU has the others, some of them in memory."""

    def placed(it: BlockPlan) -> BlockPlan:
        if there(it.block):
            return replace(it, tier="gpu", device=NAME)
        return replace(it, tier="ram") if pinned(it.block) else it

    return placed


@contextmanager
def executing(case: Case, plan: Plan, home: DeviceHome, pack: Pack | None = None) -> Iterator[Executor]:
    homes = {"cpu": cpu(), NAME: home}
    store = WindowStore.open(plan, pack or case.pack, home_of=homes.__getitem__)
    kv = KvPool(case.resident.spec, plan.kv, attention_homes(plan, homes.__getitem__))
    executor = Executor(case.resident.executor.model, plan, store, kv, Alone(), homes.__getitem__)
    try:
        yield executor
    finally:
        executor.let_go()


def of_layer_one(block: BlockId) -> bool:
    return block.layer == 1


def attention(block: BlockId) -> bool:
    return block.kind == "attn"


def some_kept(block: BlockId) -> bool:
    return (block.kind == "ffn" and block.layer == 0) or (
        block.kind == "expert" and block.expert in (0, 2, 3)
    )


PASSING = {
    "all from disk": passing(),
    "some in memory": passing(pinned=of_layer_one),
    "attention in memory": passing(pinned=attention),
    "some there": passing(there=some_kept),
    "some everywhere": passing(pinned=of_layer_one, there=some_kept),
}


@pytest.mark.parametrize("spare_bytes", [0, 1 << 20])
@pytest.mark.parametrize("how", PASSING)
def test_what_passes_from_disk_gives_the_logits_of_the_cpu(case: Case, how: str, spare_bytes: int) -> None:
    plan = case.plan(PASSING[how], spare_bytes)
    assert plan.passes
    assert plan.streams
    device, home = sim()
    with executing(case, plan, home) as executor:
        assert device.budget.held_bytes <= plan.device_weights_bytes + plan.passing_bytes + (1 << 20)
        assert np.array_equal(logits(executor), case.expected)
        staged = sum(it.nbytes for it in device.schedule if it.queue == "stage")
        assert staged >= 3 * 0.9 * sum(it.nbytes for it in plan.blocks if it.passes)
        assert isinstance(executor.kv.layers[0].data, np.ndarray)  # on the host
    del executor
    assert device.budget.held_bytes == 0


@pytest.mark.parametrize("locked", LOCKED)
def test_so_it_is_on_a_card(mixture: Case, locked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose thread waits for the disk, and gives a place in the window back when it has been read."""
    device = card(monkeypatch, locked)
    plan = mixture.plan(PASSING["some everywhere"], spare_bytes=1 << 20)
    with executing(mixture, plan, DeviceHome(device, TorchKernels())) as executor:
        assert bool(device.locked_bytes) == (locked != "none")
        assert relative_error(logits(executor), mixture.expected) < IN_TORCH
    device.unpin()
    assert (device.lost, device.locked_bytes) == ("", 0)


STAYING = {
    "all but experts": staying(lambda block: block.kind not in ("embed", "expert")),
    "some experts, too": staying(
        lambda block: block.kind not in ("embed", "expert") or (block.kind == "expert" and block.layer == 1)
    ),
    "the last layer and the head": staying(lambda block: block.layer == 1 or block.kind == "head"),
    "the last layer, some in memory": staying(lambda block: block.layer == 1, attention),
}


@pytest.mark.parametrize("how", STAYING)
def test_what_streams_beside_a_device_gives_the_logits_of_the_cpu(case: Case, how: str) -> None:
    plan = case.plan(STAYING[how])
    if not any(it.tier == "disk" and it.block.kind != "embed" for it in plan.blocks):
        pytest.skip("a dense model has no experts")
    assert not plan.passes
    device, home = sim()
    with executing(case, plan, home) as executor:
        assert np.array_equal(logits(executor), case.expected)
        there = plan.device_weights_bytes + plan.device_kv_bytes  # a block in a pack is whole pages
        assert plan.device_kv_bytes < device.budget.held_bytes <= there + (1 << 18)
    del executor
    assert device.budget.held_bytes == 0


class _Impatient(SimDevice):
    """Computes something without waiting for weights that come."""

    def __init__(self, what: str) -> None:
        super().__init__(NAME, ROOMY)
        self._what = what

    def compute(self, what, work, run, after):  # type: ignore[no-untyped-def]
        known = [event for event in after if what != self._what or event.queue != "stage"]
        return super().compute(what, work, run, known)


@pytest.mark.parametrize("what", ["experts", "linears", "scores"])
def test_what_is_read_before_it_has_come_is_poisoned(mixture: Case, what: str) -> None:
    home = DeviceHome(_Impatient(what), SimKernels(cpu()))
    with np.errstate(invalid="ignore"), executing(mixture, mixture.plan(passing()), home) as executor:
        assert np.isnan(logits(executor, rounds=1)).all()


def again(executor: Executor, case: Case) -> None:
    """Goes on as if nothing had happened."""
    executor.kv.table.give_back(list(executor.kv.table._taken))
    assert np.array_equal(logits(executor), case.expected)


@pytest.mark.parametrize("how", ["passing", "staying"])
@pytest.mark.parametrize("block", [BlockId("attn", 1), BlockId("ffn", 0), BlockId("ffn", 1)])
def test_a_disk_that_fails_fails_the_step_and_no_other(
    dense: Case, block: BlockId, how: str, faulty: Faulty
) -> None:
    placed = passing() if how == "passing" else staying(lambda block: block.kind == "head")
    with executing(dense, dense.plan(placed), sim()[1]) as executor:
        item = dense.pack.blocks[block]
        faulty.bad = item.offset, item.offset + item.nbytes
        for _ in range(3):
            with pytest.raises(StoreError, match=rf"block {block}: .* cannot be read: Input/output error"):
                logits(executor)
            executor.kv.table.give_back(list(executor.kv.table._taken))
        faulty.bad = None
        again(executor, dense)


def test_experts_that_cannot_be_read_fail_the_step_and_no_other(mixture: Case, faulty: Faulty) -> None:
    for placed in (passing(), STAYING["all but experts"]):
        with executing(mixture, mixture.plan(placed), sim()[1]) as executor:
            items = [mixture.pack.blocks[BlockId("expert", 1, it)] for it in range(4)]
            faulty.bad = items[0].offset, items[-1].offset + items[-1].nbytes
            with pytest.raises(OffloadError, match="cannot be read: Input/output error"):
                logits(executor)
            faulty.bad = None
            again(executor, mixture)


def test_bytes_that_were_altered_are_no_weights(tmp_path: Path) -> None:
    case = Case(tmp_path, "llama")
    plan = case.plan(passing())
    item = case.pack.blocks[BlockId("ffn", 1)]
    with case.pack.path.open("r+b") as file:
        file.seek(item.offset + 5)
        file.write(b"\xff\x00\xff")
    with executing(case, plan, sim()[1]) as executor:
        with pytest.raises(PackCorrupt, match=r"block layers\.1\.ffn was altered"):
            logits(executor)
        assert executor.store.damaged


def test_a_step_that_was_given_up_leaves_nothing_behind(mixture: Case) -> None:
    device, home = sim()
    with executing(mixture, mixture.plan(passing()), home) as executor:
        held = device.budget.held_bytes
        for share in (0.0, 0.5):
            with pytest.raises(Abandoned):
                executor.forward(
                    Step.build([([1, 2, 3], 0, [7], 3)], 2), lambda done, most=share: done < most
                )
            again(executor, mixture)
            assert device.budget.held_bytes == held


@pytest.mark.parametrize("copy", [0, 4, 20])
@pytest.mark.parametrize("how", ["passing", "staying"])
def test_a_device_that_is_lost_in_the_middle(
    mixture: Case, monkeypatch: pytest.MonkeyPatch, copy: int, how: str
) -> None:
    device, home = sim()
    queue = "stage_in" if how == "passing" else "copy_in"
    plan = mixture.plan(passing() if how == "passing" else STAYING["all but experts"])
    begun: list[Any] = []
    with executing(mixture, plan, home) as executor:
        begin = getattr(device, queue)

        def going(*args: Any) -> Any:
            if len(begun) == copy:
                device.lose("the driver was restarted")
            begun.append(begin(*args))
            return begun[-1]

        monkeypatch.setattr(device, queue, going)
        for _ in range(2):
            with pytest.raises(DeviceLost, match="the driver was restarted"):
                logits(executor)
            executor.kv.table.give_back(list(executor.kv.table._taken))
    begun.clear()
    del executor
    assert device.budget.held_bytes == 0  # nothing has to be asked of it for that
