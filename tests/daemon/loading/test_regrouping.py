"""Models that are loaded anew while they are used: when that begins, and what becomes of those that compute well."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from fakes import tiny
from fakes.asking import CONFIG, prompt, text_of
from fakes.group.clusters import wait_for

from shoal.comm.messages import Load
from shoal.daemon.errors import DaemonError
from shoal.daemon.loading.loaded_model import LoadedModel
from shoal.daemon.node import Node
from shoal.engine import engine as engine_room
from shoal.engine.errors import RankLost

WHY = "a machine has come"


@pytest.fixture
def node(path: Path, tmp_path: Path) -> Iterator[Node]:
    file = Path(shutil.copy(path, tmp_path / "model.gguf"))
    with Node(CONFIG) as node:
        node.load(Load(model=str(file)))
        yield node


@pytest.fixture
def model(node: Node) -> LoadedModel:
    (found,) = node._models
    return found


def answers(node: Node) -> bool:
    return text_of(node, prompt(0, new=3, deadline_s=5))[2].finish_reason == "length"


def begun(node: Node, model: LoadedModel, why: str = WHY) -> None:
    """It has begun, and ended."""
    node._regrouping.begin(model, why)
    wait_for(lambda: model not in node._regrouping._begun)


def test_a_model_computes_until_it_is_its_turn(node: Node, model: LoadedModel) -> None:
    """Another one may be packed for an hour."""
    rank = model.engine.rank
    with node._loader.alone():
        node._regrouping.begin(model, WHY)
        time.sleep(0.2)
        assert answers(node)
        assert model.engine.rank is rank
    wait_for(lambda: model.engine.rank is not rank)
    assert answers(node)


def test_a_model_whose_turn_never_comes_stays_as_it_is(
    node: Node, model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def never() -> Iterator[None]:
        raise DaemonError("busy", "another model has not come further for 300 s")
        yield

    rank = model.engine.rank
    with monkeypatch.context() as patched:
        patched.setattr(node._loader, "alone", never)
        begun(node, model)
    assert list(node._models) == [model]
    assert model.engine.rank is rank
    assert answers(node)


@pytest.mark.parametrize("gone", [True, False])
def test_what_could_not_be_read_again_stays_in_memory(
    gone: bool, node: Node, model: LoadedModel, tmp_path: Path
) -> None:
    rank, path = model.engine.rank, model.checkpoint.path
    sequence_goes_on = node.stream(prompt(0))
    events = [next(sequence_goes_on) for _ in range(3)]
    path.unlink()
    if not gone:
        tiny.save_gguf(tiny.hf_model("qwen2", seed=2), path)
    begun(node, model)
    assert (list(node._models), model.engine.rank) == ([model], rank)
    assert [*events, *sequence_goes_on][-1].finish_reason == "length"  # type: ignore[union-attr]


def test_a_step_without_end_is_not_waited_for_without_end(
    node: Node, model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk may be dead, and who unloads the model has to get his turn."""
    monkeypatch.setattr(engine_room, "STEP_LIMIT_S", 0.1)
    with model.engine._stepping:
        begun(node, model)
    assert model.engine.lost is None
    assert answers(node)


def test_one_loss_is_no_reason_to_load_it_twice(node: Node, model: LoadedModel) -> None:
    """Who looks may have begun, and ended, before the thread that computes says so."""
    rank = model.engine.rank
    begun(node, model, why="")
    assert model.engine.rank is rank
    assert answers(node)


def test_without_threads_it_is_tried_again(
    node: Node, model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank, start = model.engine.rank, threading.Thread.start

    def none_left(thread: threading.Thread) -> None:
        if thread.name == "shoal-regroup":
            raise RuntimeError("can't start new thread")
        start(thread)

    assert model.engine.suspend(RankLost(0, "the device is gone"))
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", none_left)
        node._regrouping.begin(model)
    wait_for(lambda: model.engine.rank is not rank and model.engine.lost is None)
    assert answers(node)


@pytest.mark.parametrize("retired", [True, False])
def test_a_loss_that_nobody_has_told_is_seen(retired: bool, node: Node, model: LoadedModel) -> None:
    """It may have happened just as another regrouping ended. There need be no group: a device is lost, too."""
    model.retired = retired
    rank = model.engine.rank
    assert model.engine.suspend(RankLost(0, "the device is gone"))
    wait_for(lambda: model.engine.rank is not rank and model.engine.lost is None)
    assert answers(node)


def test_a_machine_lost_while_a_model_waits_for_its_turn_is_blamed_once(
    node: Node, model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    blamed: list[int] = []
    regroup, tried = node._regrouping._assembly.regroup, list[LoadedModel]()

    def at_second(model: LoadedModel, config: object) -> None:
        tried.append(model)
        if len(tried) == 1:
            raise DaemonError("busy", "another one was lost")
        monkeypatch.undo()
        model.main.group = None
        regroup(model, config)  # type: ignore[arg-type]

    monkeypatch.setattr("shoal.daemon.loading.assembly.Assembly.regroup", lambda self, *it: at_second(*it))
    monkeypatch.setattr("shoal.daemon.loading.regrouping.REGROUP_PAUSE_S", 0.0)
    with node._loader.alone():
        node._regrouping.begin(model, WHY)
        time.sleep(0.1)
        model.main.group = SimpleNamespace(blame=blamed.append, whole=True)  # type: ignore[assignment]
        model.engine.lost = RankLost(2, "it was unplugged")
    wait_for(lambda: model.engine.lost is None)
    assert (blamed, len(tried)) == ([2], 2)
    assert answers(node)
