"""Models larger than memory, end to end: equal tokens, shared passes, stages, making room, refusals."""

from __future__ import annotations

import gc
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
from fakes import tiny
from fakes.group.nodes import begun_threads
from fakes.running import planned

from shoal.comm.home import Home
from shoal.comm.messages import Accepted, Done, Error, Generate, Load, Sampling, Stage, Token, Unload
from shoal.daemon.backend import Event
from shoal.daemon.config import NodeConfig
from shoal.daemon.errors import DaemonError
from shoal.daemon.library.kv_files import KvFiles
from shoal.daemon.library.packs import Packs
from shoal.daemon.loading.assembly import Assembly
from shoal.daemon.loading.planning import make_plan
from shoal.daemon.node import Node
from shoal.daemon.throughput.model_sizes import weighed
from shoal.kernels.arrays import Bytes
from shoal.models.checkpoint.checkpoint import open_checkpoint
from shoal.models.weights import Weights
from shoal.offload.block_store import ReadStage
from shoal.offload.direct_io import DirectFile
from shoal.partition.plan import Misfit, Plan
from shoal.partition.spec import BlockId
from shoal.partition.throughput.cost import step_cost
from shoal.partition.throughput.profile import Overheads, unmeasured
from shoal.partition.throughput.step_curve import step_curve

CONFIG = NodeConfig(context_tokens=96, kv_tokens=768, max_sequences=4, chunk_tokens=16, kv_type="f32")
GREEDY = Sampling(temperature=0.0)
SERVE = """
import sys
from pathlib import Path
from shoal.comm.messages import Generate, Load, Sampling, Token
from shoal.daemon.config import NodeConfig
from shoal.comm.home import Home
from shoal.daemon.node import Node
from shoal.daemon.library.packs import Packs
from shoal.partition import streamed_plan

path, directory, packs, least = *sys.argv[1:3], Packs(Home(Path(sys.argv[3]))), int(sys.argv[4])
streamed_plan.READING_BYTES, streamed_plan.SCRATCH_SHARE = 1 << 18, 1
config = NodeConfig(context_tokens=96, kv_tokens=768, max_sequences=4, chunk_tokens=16, kv_type="f32")
for name, streamed in ((path, False), (path, True), (path + ":q4", False), (directory, False)):
    with Node(config, packs=packs) as node:
        if streamed:
            node.budget.limit_bytes = node.budget.held_bytes + least
        assert (node.load(Load(model=name)).model.streamed_bytes > 0) == streamed
        sampling = Sampling(temperature=0.5, top_p=0.9, seed=1, repetition_penalty=1.1)
        events = list(node.stream(Generate(prompt_tokens=[*range(5, 45)], max_tokens=6, sampling=sampling)))
        assert any(isinstance(event, Token) for event in events)
print("torch" in sys.modules)
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny.hf_model("qwen2", num_hidden_layers=6, hidden_size=256, intermediate_size=1024)
    return tiny.save_gguf(model, tmp_path_factory.mktemp("models") / "tiny.gguf")


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> Packs:
    return Packs(Home(tmp_path_factory.mktemp("home")))


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The usual bound of reading is larger than these tiny weights, and their share for long steps would be nothing."""
    monkeypatch.setattr("shoal.partition.streamed_plan.READING_BYTES", 1 << 18)
    monkeypatch.setattr("shoal.partition.streamed_plan.SCRATCH_SHARE", 1)


def least(path: Path) -> int:
    """Memory for a plan that streams a quarter of the weights."""
    with open_checkpoint(path) as checkpoint:
        high = planned(checkpoint, CONFIG, 1 << 30).peak_bytes
        for memory in range(high - 1, 0, -(1 << 18)):
            plan = planned(checkpoint, CONFIG, memory)
            if plan.cyclic_bytes > plan.weights_bytes // 4:
                return memory
    raise AssertionError("nothing streams so much")


@pytest.fixture
def node(path: Path, packs: Packs) -> Iterator[Node]:
    with Node(CONFIG, packs=packs) as made:
        made.budget.limit_bytes = made.budget.held_bytes + least(path)
        yield made


def asked(n: int, **fields: object) -> Generate:
    prompt = [(7 * n + 3 * i) % 90 + 5 for i in range(40)]
    options = {"max_tokens": 6, "ignore_eos": True, "sampling": GREEDY, **fields}
    return Generate(prompt_tokens=prompt, **options)  # type: ignore[arg-type]


def ids(node: Node, request: Generate) -> tuple[list[int], Done]:
    found: list[int] = []
    for event in node.stream(request):
        if isinstance(event, Token):
            found += event.ids
        elif isinstance(event, Done):
            return found, event
    raise AssertionError("no end")


def test_streamed_answers_are_those_from_memory(node: Node, path: Path) -> None:
    with Node(CONFIG) as roomy:
        roomy.load(Load(model=str(path)))
        expected = [ids(roomy, asked(n))[0] for n in range(3)]
        assert roomy.status().models[0].streamed_bytes == 0
    heard: list[str] = []
    status = node.load(Load(model=str(path)), lambda doing, done, total: heard.append(doing)).model
    assert {"packing", "loading"} >= set(heard)
    assert status.streamed_bytes > 0
    assert status.window_bytes > 0
    assert status.step_s > 0
    assert "pass through a window" in status.plan
    assert [ids(node, asked(n))[0] for n in range(3)] == expected


def test_who_serves_with_native_kernels_never_loads_torch(path: Path, tmp_path: Path) -> None:
    """Not from memory or from disk, and not for weights that are packed in fewer bits or come as safetensors."""
    directory = tiny.save_hf(tiny.hf_model("olmoe"), tmp_path / "hf", type="BF16")
    command = [sys.executable, "-c", SERVE, path, directory, tmp_path / "home", str(least(path))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.stdout.strip(), done.stderr, done.returncode) == ("False", "", 0)


def test_a_prompt_longer_than_a_chunk_of_memory_passes_once(node: Node, path: Path) -> None:
    node.load(Load(model=str(path)))
    model = next(iter(node._models))
    assert model.plan.chunk_tokens >= 40 > CONFIG.chunk_tokens
    steps = []
    step = model.engine.rank.executor.forward
    model.engine.rank.executor.forward = lambda it, *wanted: steps.append(len(it.tokens)) or step(it, *wanted)  # type: ignore
    ids(node, asked(5, max_tokens=1))
    assert steps == [40]


def test_an_idle_model_goes_before_another_is_streamed(path: Path, packs: Packs, tmp_path: Path) -> None:
    other = tiny.save_gguf(tiny.hf_model("qwen2", seed=2), tmp_path / "other.gguf")
    with Node(CONFIG, packs=packs) as node:
        node.load(Load(model=str(other)))
        node.budget.limit_bytes = node.budget.held_bytes + least(path)
        status = node.load(Load(model=str(path))).model
        assert status.streamed_bytes == 0
        assert [model.name for model in node.status().models] == ["tiny.gguf"]


def test_without_a_place_for_packs_it_is_refused(path: Path) -> None:
    with Node(CONFIG) as node:
        node.budget.limit_bytes = node.budget.held_bytes + least(path)
        with pytest.raises(DaemonError, match="no place for a pack") as refused:
            node.load(Load(model=str(path)))
        assert refused.value.code == "resources"


def test_a_stage_is_told_while_nothing_comes(node: Node, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The node has a clock of its own, with which every wait for an event ends at once."""
    monkeypatch.setattr("shoal.daemon.node.STAGE_S", 1e-4)
    monkeypatch.setattr(
        "shoal.offload.window.window_store.WindowStore.stage", lambda self: ReadStage(3, 14, 2e9)
    )
    node.load(Load(model=str(path)))
    stages = [event for event in node.stream(asked(1, progress=True)) if isinstance(event, Stage)]
    assert stages
    assert {(stage.doing, stage.done, stage.total) for stage in stages} == {("reading", 3, 14)}
    assert not [event for event in node.stream(asked(2)) if isinstance(event, Stage)]


def test_further_rows_are_nearly_free_where_steps_wait_for_a_disk(path: Path) -> None:
    """With the machine that nobody has measured, whose fixed costs would hide what these few weights take."""
    with open_checkpoint(path) as checkpoint:
        model = weighed(checkpoint, "keep")
        resident = planned(checkpoint, CONFIG, 1 << 30)
        streamed = planned(checkpoint, CONFIG, least(path))
    free = replace(unmeasured(1), overheads=Overheads(0.0, 0.0, 0.0, 0.0))

    def row_share(plan: Plan, disk_bytes_per_s: float) -> float:
        machine = replace(free, disk_bytes_per_s=disk_bytes_per_s)
        seconds = step_curve(plan, lambda *about: step_cost(model, plan, machine, *about).seconds)
        return seconds(2) / seconds(1) - 1

    assert row_share(resident, 1e9) == pytest.approx(0.15, rel=0.05)
    assert row_share(streamed, 1e9) < 0.15 / 5
    assert row_share(streamed, 0.5e9) < row_share(streamed, 1e9)


def test_a_model_is_streamed_in_the_room_that_a_busy_one_leaves(path: Path, packs: Packs) -> None:
    with open_checkpoint(path) as checkpoint:
        plan = planned(checkpoint, CONFIG, least(path))
    with Node(CONFIG, packs=packs) as node:
        node.budget.limit_bytes = node.budget.held_bytes + least(path)
        model = Assembly(node.budget, packs).load("again", path, CONFIG)
        assert model.plan.blocks == plan.blocks
        assert node.budget.free_bytes >= 0
        model.release(node.budget)


@pytest.mark.parametrize(
    "part", ["shoal.daemon.loading.assembly.Scheduler", "shoal.daemon.library.kv_files.KvFiles.open"]
)
def test_a_load_that_fails_late_leaves_nothing_behind(
    path: Path, packs: Packs, tmp_path: Path, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise MemoryError

    with Node(CONFIG, packs=packs) as node:
        node.budget.limit_bytes = node.budget.held_bytes + least(path)
        held, left = node.budget.held_bytes, begun_threads()
        monkeypatch.setattr(part, fails)
        with pytest.raises(MemoryError):
            Assembly(node.budget, packs, KvFiles(tmp_path / "kv", None)).load("late", path, CONFIG)
        assert (node.budget.held_bytes, left()) == (held, [])


def test_the_budget_is_given_back_when_the_last_step_has_ended(path: Path, packs: Packs) -> None:
    """A model is unloaded in the middle of a pass. The pass ends at its next block, and only then is there room."""
    with Node(CONFIG, packs=packs) as node:
        node.budget.limit_bytes = node.budget.held_bytes + least(path)
        node.load(Load(model=str(path)))
        model = node._models.pick("")
        assert model is not None
        acquire, held = model.executor.store.acquire, node.budget.held_bytes
        inside, seen = threading.Event(), list[int]()

        def slow(block: BlockId) -> AbstractContextManager[Weights]:
            inside.set()
            while not model.executor.store._readers._closed:  # type: ignore[attr-defined]
                time.sleep(0.001)
            until_s = time.monotonic() + 0.05
            while node.budget.held_bytes == held and time.monotonic() < until_s:
                time.sleep(0.001)
            seen.append(node.budget.held_bytes)
            return acquire(block)

        model.executor.store.acquire = slow  # type: ignore[method-assign]
        errors: list[object] = []
        node.submit(asked(1), errors.append)
        assert inside.wait(20)
        node.unload(Unload(model=""))
        assert seen[0] == held
        assert isinstance(errors[-1], Error)
        assert errors[-1].code == "unloaded"


class Disk:
    """While this disk hangs, every read of a pack waits here."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.works = threading.Event()
        self.works.set()
        read = DirectFile.read

        def slow(file: DirectFile, offset: int, into: Bytes) -> None:
            assert self.works.wait(60)
            read(file, offset, into)

        monkeypatch.setattr(DirectFile, "read", slow)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    made = Disk(monkeypatch)
    yield made
    made.works.set()


def waiting(node: Node, request: Generate) -> queue.SimpleQueue[Event]:
    """The events of a request that has been accepted."""
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    node.submit(request, events.put)
    assert isinstance(events.get(timeout=30), Accepted)
    return events


def test_a_deadline_ends_a_request_in_the_middle_of_a_step(node: Node, path: Path, disk: Disk) -> None:
    node.load(Load(model=str(path)))
    expected = ids(node, asked(1))[0]
    disk.works.clear()
    done = waiting(node, asked(2, deadline_s=0.01)).get(timeout=30)
    assert isinstance(done, Done)
    assert done.finish_reason == "deadline"
    disk.works.set()
    assert ids(node, asked(1))[0] == expected


@pytest.mark.parametrize("how", ["unloaded", "closed"])
def test_nothing_waits_for_a_disk_that_hangs_when_a_model_goes(
    node: Node, path: Path, disk: Disk, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.offload.window.readers.CLOSING_S", 0.01)
    node.load(Load(model=str(path)))
    disk.works.clear()
    events = waiting(node, asked(1))
    if how == "unloaded":
        node.unload(Unload(model=str(path)))
    else:
        node.close()
        node._thread.join(30)
        assert not node._thread.is_alive()
    error = events.get(timeout=30)
    assert isinstance(error, Error)
    assert error.code == {"unloaded": "unloaded"}.get(how, "shutting_down")


def test_a_node_that_is_closed_packs_no_further(path: Path, tmp_path: Path) -> None:
    node = Node(CONFIG, packs=Packs(Home(tmp_path)))
    node.budget.limit_bytes = node.budget.held_bytes + least(path)
    heard: list[str] = []

    def closing(doing: str, done: int, total: int) -> None:
        heard.append(doing)
        node.close()

    with pytest.raises(DaemonError, match="is stopping"):
        node.load(Load(model=str(path)), closing)
    assert heard == ["packing"]


def test_a_pack_that_was_altered_fails_what_needs_it_and_is_made_anew(
    node: Node, path: Path, packs: Packs
) -> None:
    node.load(Load(model=str(path)))
    expected = ids(node, asked(1))[0]
    node.unload(Unload(model=str(path)))
    with open_checkpoint(path) as checkpoint:
        pack = packs.get(checkpoint)
    block = pack.blocks[next(b for b in pack.blocks if b.kind == "ffn" and b.layer == 2)]
    with pack.path.open("r+b") as file:
        file.seek(block.offset + 100)
        file.write(b"altered")
    told = rf"block {block.block} was altered: .* packed anew when it is loaded next"
    with pytest.raises(DaemonError, match=told) as refused:
        ids(node, asked(1, model=str(path)))
    assert refused.value.code == "corrupt"
    assert ids(node, asked(1, model=str(path)))[0] == expected
    assert packs.verify(pack.path.parent) == []


def test_a_pack_that_is_cut_off_while_it_streams_is_made_anew(node: Node, path: Path, packs: Packs) -> None:
    status = node.load(Load(model=str(path))).model
    expected = ids(node, asked(1))[0]
    with open_checkpoint(path) as checkpoint:
        pack = packs.get(checkpoint)
    os.truncate(pack.path, pack.manifest.vectors.nbytes)
    for number in range(2, 5):
        with suppress(DaemonError):  # or reading ahead noticed it between two requests
            ids(node, asked(number))
    assert ids(node, asked(1))[0] == expected
    assert packs.verify(pack.path.parent) == []
    again = node.status().models
    assert [(model.name, model.context_tokens) for model in again] == [(status.name, status.context_tokens)]


def test_planning_keeps_no_error(path: Path) -> None:
    """An error that is kept would keep the caller, and the models that it holds, until the garbage collector runs."""

    def errors() -> int:
        return sum(issubclass(type(it), Exception) for it in gc.get_objects())

    with open_checkpoint(path) as checkpoint:
        high, low = planned(checkpoint, CONFIG, 1 << 30).peak_bytes, least(path)
        gc.collect()
        gc.disable()
        try:
            before = errors()
            for memory_bytes in (high, low):
                make_plan(weighed(checkpoint, "keep"), CONFIG, memory_bytes)
            assert isinstance(make_plan(weighed(checkpoint, "keep"), CONFIG, 0), Misfit)
            assert errors() <= before  # those of other threads may go meanwhile
        finally:
            gc.enable()
