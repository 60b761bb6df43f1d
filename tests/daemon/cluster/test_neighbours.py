"""A node that is alone has nothing of a cluster in memory; what is asked of others makes it, once."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shoal.comm.cluster_messages import Invitation, Invite, MeasureLinks, Nodes, NodesReply, Rejoin
from shoal.comm.home import Home
from shoal.daemon.cluster.neighbours import Neighbours
from shoal.daemon.cluster.pairing_up import unpair
from shoal.daemon.cluster.place import place_in_cluster
from shoal.daemon.config import NodeConfig
from shoal.daemon.errors import DaemonError
from shoal.daemon.loading.grouping import Unseated
from shoal.daemon.throughput.own_machine import OwnMachine
from shoal.offload.budget import Budget

CONFIG = NodeConfig(memory_bytes=1 << 30, threads=1)


class Found:
    """Counts how often a cluster is made."""

    def __init__(self, home: Home) -> None:
        self.home = home
        self.times = 0

    def __call__(self) -> Any:
        self.times += 1
        return place_in_cluster(self.home, CONFIG, Budget(1 << 30), None, list)


@pytest.fixture
def found(tmp_path: Path) -> Found:
    return Found(Home(tmp_path / "home"))


def seated(neighbours: Neighbours, ranks: int | None) -> Any:
    checkpoint: Any = None  # nobody is there to look at it
    return neighbours.seat("m", checkpoint, replace(CONFIG, ranks=ranks), 1 << 30)


def test_a_daemon_imports_nothing_of_a_cluster() -> None:
    code = (
        "import sys, shoal.daemon.service; print([m for m in sys.modules if '.cluster.' in m or m == 'ssl'])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout.strip() == "['shoal.daemon.cluster.neighbours']"


def test_loading_alone_makes_none(found: Found) -> None:
    neighbours = Neighbours(found)
    checkpoint: Any = None
    assert seated(neighbours, None) == seated(neighbours, 1) == Unseated("")
    assert not neighbours.better("m", checkpoint, CONFIG, None, 1 << 30).others
    assert (neighbours.machines, neighbours.arrivals) == (1, 0)
    neighbours.close()
    assert found.times == 0


def test_a_number_of_ranks_that_nobody_can_be(found: Found) -> None:
    neighbours = Neighbours(found)
    with pytest.raises(DaemonError, match="2 ranks were asked for, and besides this machine there is nobody"):
        seated(neighbours, 2)
    neighbours.close()


def test_it_is_made_once(found: Found) -> None:
    neighbours = Neighbours(found)
    assert neighbours.answer(Nodes()) == NodesReply(role="alone", nodes=[])
    neighbours.answer(Rejoin())
    assert isinstance(neighbours.answer(Invite(listen=["127.0.0.1:0"])), Invitation)
    assert found.times == 1
    neighbours.close()


def test_questions_make_no_member(found: Found) -> None:
    """Or models that are loaded after them would answer otherwise."""
    neighbours, machine = Neighbours(found), OwnMachine.of(found.home, 1)
    assert neighbours.answer(Nodes()) == NodesReply(role="alone", nodes=[])
    with pytest.raises(DaemonError, match="2 ranks"):
        seated(neighbours, 2)
    with pytest.raises(DaemonError, match="in no cluster"):
        neighbours.answer(MeasureLinks())
    assert machine.alone
    neighbours.answer(Invite(listen=["127.0.0.1:0"]))
    assert not machine.alone
    unpair(found.home)
    neighbours.answer(Rejoin())
    assert machine.alone
    neighbours.close()


def test_nothing_begins_at_the_end(found: Found) -> None:
    neighbours = Neighbours(found)
    neighbours.close()
    neighbours.close()
    with pytest.raises(DaemonError, match="stopping"):
        neighbours.answer(Nodes())
    assert found.times == 0


def test_what_cannot_be_joined_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def fails() -> Any:
        raise OSError("no room")

    Neighbours(fails).start()
    assert "the cluster is not joined: no room" in caplog.text
