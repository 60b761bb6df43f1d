"""`auto`: a device computes where that is predicted to be quicker, `ps` says why, and whatever is wrong with a card
costs one line. What a device can do is tried once and kept as long as nothing changes that it depends on."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from fakes import tiny
from fakes.asking import CONFIG, prompt, text_of
from fakes.cli_fakes import shoal
from fakes.throughput.throughput_cases import QUICK

from shoal.comm.home import Home
from shoal.comm.messages import Load, ModelStatus
from shoal.daemon.errors import DaemonError
from shoal.daemon.library.packs import Packs
from shoal.daemon.loading import device_rooms, runnable
from shoal.daemon.loading.outlook import Outlook, outlook
from shoal.daemon.node import Node
from shoal.daemon.throughput import device_figures, fixed_costs, foresight
from shoal.daemon.throughput.own_machine import OwnMachine
from shoal.devices import device_timing, expert_timing, opening, sim_device
from shoal.devices.device_home import DeviceHome
from shoal.devices.errors import DeviceLost, NoSuchDevice
from shoal.devices.sim_device import SimDevice
from shoal.offload.budget import Budget
from shoal.partition.throughput.placing import staging_worth
from shoal.partition.throughput.profile import CopyContention, Device, Profile, unmeasured

CARD = "sim:64MB"


@pytest.fixture(autouse=True)
def _devices_of_its_own(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """There is one card; the processor is slow, and calls of the device cost next to nothing."""
    monkeypatch.setattr(device_rooms, "present", lambda: [CARD])
    monkeypatch.setattr(sim_device, "LAUNCH_S", 1e-9)
    monkeypatch.setattr(fixed_costs, "MANY", 4)
    monkeypatch.setattr(fixed_costs, "DEVICE_TOKENS", 4)
    slow(monkeypatch)
    yield
    opening._opened.clear()


def slow(monkeypatch: pytest.MonkeyPatch, machine: Device = unmeasured(2)) -> None:  # noqa: B008
    monkeypatch.setattr(staging_worth, "FAST", machine)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_gguf(
        tiny.hf_model("qwen3_moe"), tmp_path_factory.mktemp("m") / "mixture.gguf", type="Q8_0"
    )


def loaded(path: Path, machine: OwnMachine | None = None, **more: Any) -> Node:
    # Of a cluster: alone the CPU would round inputs to 8 bits, and its texts would not be a device's.
    machine = machine or OwnMachine(1, alone=lambda: False)
    node = Node(replace(CONFIG, **more), machine=machine)
    node.load(Load(model=str(path)))
    return node


def status(node: Node) -> ModelStatus:
    (found,) = node.status().models
    return found


@pytest.fixture
def node(path: Path) -> Iterator[Node]:
    """Whose texts are to be a device's."""
    with loaded(path, device="cpu") as node:
        yield node


def test_it_is_taken_where_it_is_quicker(node: Node, path: Path) -> None:
    expected = text_of(node, prompt(0))[:2]
    with loaded(path) as there:
        found = status(there)
        assert found.device == CARD
        assert found.device_why.startswith(f"on {CARD}: all layers: a prompt of ")
        assert found.device_why.endswith(" s with the processor alone")
        assert text_of(there, prompt(0))[:2] == expected
        assert found.warnings == []


def test_it_is_left_where_it_is_slower(
    node: Node, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow(monkeypatch, QUICK)
    with loaded(path) as there:
        found = status(there)
        assert (found.device, found.device_bytes) == ("", 0)
        assert found.device_why.startswith("the processor alone: a prompt of ")
        assert f" s with on {CARD}: all layers" in found.device_why
        assert found.plan == status_of_cpu(path).plan
        assert text_of(there, prompt(0))[:2] == text_of(node, prompt(0))[:2]
    said = outlook(path, CONFIG, Packs(Home(tmp_path)), OwnMachine(1))
    assert isinstance(said, Outlook)
    assert said.device == ""
    assert _but_seconds(said.why) == _but_seconds(found.device_why)  # it was tried twice


def _but_seconds(why: str) -> str:
    return re.sub(r"[\d.e-]+ s", "so many s", why)


def status_of_cpu(path: Path) -> ModelStatus:
    with loaded(path, device="cpu") as node:
        return status(node)


def test_a_mixture_gets_its_experts_where_they_are_quickest(mixture: Path) -> None:
    with loaded(mixture) as node:
        assert status(node).device_why.startswith(f"on {CARD}: all layers: ")


@pytest.mark.parametrize(
    "why",
    [
        "device cuda:0 is not there: torch 2.11 finds 0 cards: The NVIDIA driver on your system is too old",
        "device cuda:0 cannot be used: 64 times 64 times 64 is 7 there",
        "device cuda:0 needs torch, which cannot be imported: libcudart.so.13: no such file",
    ],
)
def test_a_card_that_cannot_be_used_costs_one_line(
    why: str, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(name: str) -> Any:
        raise NoSuchDevice(why)

    monkeypatch.setattr(device_rooms, "device_home", broken)
    with loaded(path) as node:
        found = status(node)
        assert (found.device, found.device_why) == ("", "")
        assert found.warnings == [f"{CARD} is left alone: {why}"]
        assert [it.getMessage() for it in caplog.records if it.levelname == "WARNING"] == found.warnings
        assert len(text_of(node, prompt(0))[1]) == 24


def test_no_card_costs_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_rooms, "present", list)
    monkeypatch.setattr(device_rooms, "device_home", None)
    with loaded(path) as node:
        assert (status(node).device_why, status(node).warnings) == ("", [])


def test_a_card_that_is_lost_while_it_is_tried(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage_in = SimDevice.stage_in

    def losing(self: SimDevice, *operands: Any) -> Any:
        self.lose("the driver was restarted")
        return stage_in(self, *operands)

    monkeypatch.setattr(SimDevice, "stage_in", losing)
    with loaded(path) as node:
        (said,) = status(node).warnings
        assert said.startswith(f"device {CARD} is lost (the driver was restarted), so the cpu computes")
        assert len(text_of(node, prompt(0))[1]) == 24


def test_a_card_without_memory_is_left_alone(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_rooms, "present", lambda: ["sim:10kB"])
    with loaded(path) as node:
        (said,) = status(node).warnings
        assert said.startswith("sim:10kB is left alone: 10 kB of its memory are free, too little")


def test_a_card_is_not_tried_without_memory_to_try_it_with(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_timing, "HOST_TRIED_BYTES", 1 << 60)
    with loaded(path) as node:
        (said,) = status(node).warnings
        assert said.startswith(f"{CARD} is left alone: ")
        assert "of the memory budget are free, too little to try how fast it is" in said


def test_one_that_is_lost_later_is_done_without(node: Node, path: Path) -> None:
    expected = text_of(node, prompt(0))[:2]
    with loaded(path) as there:
        assert status(there).device == CARD
        opening.device_home(CARD).device.lose("somebody pulled it out")  # type: ignore[attr-defined]
        assert text_of(there, prompt(0))[:2] == expected
        assert status(there).device == ""


def test_show_says_why_and_what_is_wrong(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A choice hides no trouble."""
    card = f"{CARD},16GB/s,4GB/s,1MB"
    monkeypatch.setattr(device_rooms, "present", lambda: [card])
    monkeypatch.setenv("SHOAL_HOME", str(tmp_path))
    found = outlook(path, CONFIG, Packs(Home(tmp_path)), OwnMachine(1))
    assert isinstance(found, Outlook)
    assert found.why.startswith(f"on {card}: all layers: a prompt of ")
    assert found.trouble.startswith(f"copies to {card} are slower than they could be")
    shown = " ".join(shoal("show", "--ctx", "128", str(path)).stdout.split())
    assert "are predicted to take" in shown
    assert "without page-locked memory: 6.29 MB were asked for" in shown


def test_several_machines_leave_devices_alone() -> None:
    class Others:
        machines = 2

    assert device_rooms.device_asked_for(CONFIG, None) == "auto"
    assert device_rooms.device_asked_for(CONFIG, Others()) == "cpu"  # type: ignore[arg-type]
    assert device_rooms.device_asked_for(replace(CONFIG, ranks=2), None) == "cpu"
    assert device_rooms.device_asked_for(replace(CONFIG, device=CARD), Others()) == CARD  # type: ignore[arg-type]


def test_what_plan_says(path: Path, tmp_path: Path) -> None:
    profile = Profile((unmeasured(2, 1e9),))
    found = foresight.foresee(path, profile, foresight.Asked(64, 16), CONFIG, OwnMachine(2))
    names = [row.name for row in found.plans]
    assert f"on {CARD}: all layers" in names
    assert "memory" in names
    assert found.chosen == f"on {CARD}: all layers"
    assert found.trouble is msgspec.UNSET
    config = replace(CONFIG, device="cpu")
    found = foresight.foresee(path, profile, foresight.Asked(64, 16), config, OwnMachine(2))
    assert found.chosen == "memory"


class Tried:
    """How often something was."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        for module, name in ((device_timing, "device_speed"), (expert_timing, "expert_times")):
            monkeypatch.setattr(module, name, self._counted(getattr(module, name)))

    def _counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*operands: Any) -> Any:
            self.count += 1
            return call(*operands)

        return run

    def by(self, path: Path, kept: Path, device: str = "auto") -> int:
        """For a load of the model."""
        before = self.count
        room, _ = device_rooms.device_room(device, Budget(1 << 40), weighed_of(path), OwnMachine(1, kept))
        assert room is not None
        return self.count - before


def test_what_was_tried_is_kept(
    mixture: Path,
    path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    tried, kept, file = Tried(monkeypatch), tmp_path / "profile.json", tmp_path / "devices.json"
    assert [tried.by(mixture, kept) for _ in range(2)] == [2, 0]
    assert tried.by(mixture, kept, CARD) == 0
    assert tried.by(path, kept) == 2  # of another model
    assert tried.by(mixture, kept) == 0
    # Another link; that of an expert alone, then laws besides.
    assert tried.by(mixture, kept, f"{CARD},1GB/s") == 1
    monkeypatch.setattr(device_rooms, "present", lambda: [f"{CARD},1GB/s"])
    assert [tried.by(mixture, kept) for _ in range(2)] == [2, 0]
    monkeypatch.setattr(device_figures, "package_version", lambda: "9.9")
    assert tried.by(mixture, kept) == 2
    found = json.loads(file.read_text())
    for it in found["kept"]:
        it["tried_s"] -= device_figures.AGED_S
    file.write_text(json.dumps(found))
    assert tried.by(mixture, kept) == 2
    assert not [it for it in caplog.records if "devices.json" in it.getMessage()]


@pytest.mark.parametrize(
    "rubbish",
    [
        "",
        "[" * 100_000,
        '{"kept": [{"key": "x"}]}',
        '{"kept": [{"key": "x", "tried_s": 0, "figures": {"expert": [1, -1.0, 1, 1.0]}}]}',
        '{"kept": [{"key": "x", "tried_s": 0, "figures": {"laws": {"name": "x", "memory_bytes": 1e9, '
        '"memory_bytes_per_s": 0, "flops": 1e12, "host_bytes_per_s": 1e9}}}]}',
    ],
)
def test_what_is_kept_is_not_believed(
    rubbish: str,
    path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    tried, kept, file = Tried(monkeypatch), tmp_path / "profile.json", tmp_path / "devices.json"
    file.write_text(rubbish)
    assert [tried.by(path, kept) for _ in range(2)] == [2, 0]
    (line,) = (it.getMessage() for it in caplog.records if "devices.json" in it.getMessage())
    assert line.startswith(f"{file} is of no use, so devices are tried again: ")


def test_only_so_many_are_kept(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_figures, "_MOST_KEPT", 2)
    tried, kept = Tried(monkeypatch), tmp_path / "profile.json"
    for version in ("1", "2", "3"):
        monkeypatch.setattr(device_figures, "package_version", lambda version=version: version)
        assert tried.by(path, kept) == 2
    found = json.loads((tmp_path / "devices.json").read_text())
    assert [it["key"].split(" | ")[1] for it in found["kept"]] == ["3", "2"]


def test_the_laws_of_the_simulated_device_are_what_it_does(
    mixture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its link, the speed of its memory, and so many calls for a layer."""
    with loaded(mixture):
        pass
    home = opening.device_home(CARD)
    from shoal.daemon.throughput.model_sizes import weighed
    from shoal.models.checkpoint.checkpoint import open_checkpoint

    with open_checkpoint(mixture) as checkpoint:
        model = weighed(checkpoint, "keep")
    scarce, enough = Budget(device_timing.HOST_TRIED_BYTES - 1), Budget(device_timing.HOST_TRIED_BYTES)
    held: list[int] = []

    def looked(*_: object) -> CopyContention:
        held.append(enough.free_bytes)
        return CopyContention()

    monkeypatch.setattr(device_timing, "copy_contention", looked)
    none, found = (
        device_figures.device_figures(home, model, 1 << 26, None, budget, laws=True).laws  # type: ignore[arg-type]
        for budget in (scarce, enough)
    )
    assert none is None
    assert held == [0], "the ledger has what the host's memory is read for"
    assert enough.held_bytes == scarce.held_bytes == 0
    assert found is not None
    assert found.host_bytes_per_s == pytest.approx(16e9, rel=0.02)
    assert found.memory_bytes_per_s == pytest.approx(sim_device.SIM_MEMORY_BYTES_PER_S, rel=0.2)
    assert found.flops <= sim_device.SIM_FLOPS
    assert found.measured
    assert 0 < found.layer_s < 1e-5


def test_errors_while_it_is_tried_are_no_bug(mixture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*_: object) -> Any:
        home = opening.device_home(CARD)
        home.device.lose("gone")  # type: ignore[attr-defined]
        raise DeviceLost(CARD, "gone")

    monkeypatch.setattr(device_timing, "device_speed", lost)
    with loaded(mixture) as node:
        assert status(node).warnings[0].startswith(f"device {CARD} is lost (gone), so the cpu computes")


def test_one_that_is_lost_in_a_step_of_a_trial(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = fixed_costs._engine

    def losing(spec: Any, store: Any, streams: int, home: Any) -> Any:
        engine = made(spec, store, streams, home)
        home.device.lose("gone")
        return engine

    monkeypatch.setattr(fixed_costs, "_engine", losing)
    with loaded(path) as node:
        assert status(node).warnings[0].startswith(f"device {CARD} is lost (gone), so the cpu computes")
        assert len(text_of(node, prompt(0))[1]) == 24


def test_a_card_that_others_have_filled_meanwhile_is_done_without(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What it can do is known, so nobody notices before weights come."""
    kept = tmp_path / "profile.json"
    with loaded(path, OwnMachine(1, kept)) as node:
        assert status(node).device == CARD

    def full(self: DeviceHome, w: Any) -> Any:
        raise self.device.budget.full()

    monkeypatch.setattr(DeviceHome, "keep_matrix", full)
    with loaded(path, OwnMachine(1, kept)) as node:
        assert status(node).device == ""
        assert len(text_of(node, prompt(0))[1]) == 24
        assert node.budget.on(CARD).held_bytes == 0
        (said,) = status(node).warnings
        assert said.startswith(f"device {CARD} is full: ")
        assert said.endswith("; it is loaded without")
    lines = [it.getMessage() for it in caplog.records if "is full" in it.getMessage()]
    assert [line.endswith("; it is loaded without") for line in lines] == [True, True]
    with pytest.raises(DaemonError, match=r"has .* free of 64 MB"):  # one that was named has to compute
        loaded(path, device=CARD)


def test_a_card_that_is_full_when_all_has_been_read_leaves_nothing_running(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What reads from a disk would go on, and keep its memory."""
    stores: list[tuple[Any, float]] = []
    closed: list[Any] = []
    opened, made = runnable.open_store, runnable.Executor

    def noting(*args: Any, **more: Any) -> Any:
        stores.append(opened(*args, **more))
        store = stores[-1][0]
        monkeypatch.setattr(store, "close", lambda: closed.append(store))
        return stores[-1]

    def full(model: Any, plan: Any, store: Any, kv: Any, collective: Any, home_of: Any, rows: Any) -> Any:
        if plan.device:
            raise home_of(plan.device).device.budget.full()
        return made(model, plan, store, kv, collective, home_of, rows)

    monkeypatch.setattr(runnable, "open_store", noting)
    monkeypatch.setattr(runnable, "Executor", full)
    with loaded(path) as node:
        (first, _), (second, _) = stores
        assert closed == [first]
        assert status(node).device == ""
    assert closed[-1] is second


def test_what_is_kept_of_a_card_holds_by_whatever_name(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A card has one for each bound of its memory."""
    begin, kept = SimDevice.__init__, tmp_path / "profile.json"

    def as_one_card(self: SimDevice, *operands: Any) -> None:
        begin(self, *operands)
        self.facts = "one card"

    monkeypatch.setattr(SimDevice, "__init__", as_one_card)
    profile = Profile((unmeasured(2, 1e9),))
    for name in ("sim:32MB", CARD):
        config = replace(CONFIG, device=name)
        found = foresight.foresee(path, profile, foresight.Asked(64, 16), config, OwnMachine(2, kept))
        assert f"on {name}: all layers" in [row.name for row in found.plans]
    assert len(json.loads((tmp_path / "devices.json").read_text())["kept"]) == 1
    tried = Tried(monkeypatch)
    assert tried.by(path, kept) == 0
    with loaded(path, OwnMachine(2, kept)) as node:
        assert status(node).device == CARD
    laws, _ = device_rooms.device_laws(CARD, OwnMachine(2, kept), weighed_of(path))
    assert [(it.name, it.memory_bytes) for it in laws] == [(CARD, 64e6)]


def weighed_of(path: Path) -> Any:
    from shoal.daemon.throughput.model_sizes import weighed
    from shoal.models.checkpoint.checkpoint import open_checkpoint

    with open_checkpoint(path) as checkpoint:
        return weighed(checkpoint, "keep")


def test_what_there_was_no_room_to_try_is_tried_when_there_is(
    mixture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, tried_bytes = tmp_path / "profile.json", expert_timing.tried_bytes
    monkeypatch.setattr(expert_timing, "tried_bytes", lambda expert: 1 << 40)
    room, _ = device_rooms.device_room("auto", Budget(1 << 40), weighed_of(mixture), OwnMachine(1, kept))
    assert room is not None
    assert (room.expert, room.laws is None) == (None, False)
    monkeypatch.setattr(expert_timing, "tried_bytes", tried_bytes)
    room, _ = device_rooms.device_room("auto", Budget(1 << 40), weighed_of(mixture), OwnMachine(1, kept))
    assert room is not None
    assert room.expert is not None


@pytest.mark.parametrize("error", [ImportError("no torch"), OSError("libcudart.so.13: cannot open")])
def test_a_torch_that_cannot_be_imported_costs_one_line(
    error: Exception, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_rooms, "present", lambda: ["cuda:0"])
    for name in [it for it in sys.modules if it.startswith("shoal.devices.cuda_device")]:
        monkeypatch.delitem(sys.modules, name)

    class Broken:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "shoal.devices.cuda_device":
                raise error

    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with loaded(path) as node:
        (said,) = status(node).warnings
        assert said == f"cuda:0 is left alone: device cuda:0 needs torch, which cannot be imported: {error}"


def test_cards_that_are_hidden_are_no_cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Hidden:
        def is_dir(self) -> bool:
            raise PermissionError("not for you")

    monkeypatch.setattr(opening, "NVIDIA", Hidden())
    monkeypatch.setattr(opening, "NODES", tmp_path)
    assert opening.present() == []
    (tmp_path / "nvidia0").touch()
    (tmp_path / "nvidiactl").touch()
    assert opening.present() == ["cuda:0"]
