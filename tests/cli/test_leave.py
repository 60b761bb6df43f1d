"""What `shoal cluster leave` says: a worker leaves its head, a head lets go of its workers."""

from __future__ import annotations

from pathlib import Path

import pytest
from fakes.cli_fakes import FakeClient, shoal
from fakes.group.nodes import Machine

from shoal.cli import background
from shoal.cli import cluster as cluster_room
from shoal.comm.cluster_messages import NodesReply, NodeStatus
from shoal.comm.errors import RequestFailed
from shoal.comm.group.peers import PairedNode, Peers
from shoal.comm.home import Home
from shoal.daemon.private_files import private_dir


@pytest.mark.parametrize(
    ("role", "others", "said"),
    [
        ("worker", ["pi3"], "this machine has left pi3"),
        ("head", ["pi3", "pi4"], "this machine is no head any more: it has let go of pi3, pi4"),
        ("head", [], "this machine is no head any more"),
        ("alone", [], "this machine was in no cluster"),
    ],
)
def test_what_it_says(
    role: str, others: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOAL_HOME", str(tmp_path / "home"))
    home = Home.from_env()
    private_dir(home.root)
    private_dir(home.cluster)
    if role == "head":
        (home.cluster / "listen").write_text("auto:7447\n")
    for name in others:
        certificate = Machine.at(tmp_path, name).identity.certificate
        Peers(home.cluster).add(PairedNode(name, "head" if role == "worker" else "worker", certificate))
    assert shoal("cluster", "leave").stderr.splitlines() == [said]
    assert shoal("cluster", "leave").stderr.splitlines() == ["this machine was in no cluster"]


@pytest.mark.parametrize("gone", [True, False])
def test_a_worker_that_leaves_at_that_very_moment_stops_nothing(
    gone: bool, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is there when the daemon is asked, and not any more when it is to be forgotten; but other errors are told."""
    there = [
        NodeStatus(name=name, fingerprint=name * 32, role=role, attached=True)
        for name, role in (("ab", "head"), ("cd", "worker"), ("ef", "worker"))
    ]
    told: list[str] = []

    class Asked(FakeClient):
        def nodes(self) -> NodesReply:
            return NodesReply(role="head", nodes=there)

        def forget(self, node: str) -> None:
            told.append(node)
            if node == "cd" * 32:
                if gone:
                    del there[1]
                raise RequestFailed("bad_request", f"node={node!r}: no node of this name is paired here")

        def rejoin(self) -> None:
            told.append("all")

    monkeypatch.setattr(background, "running_pid", lambda home: 1)
    monkeypatch.setattr(cluster_room, "Client", Asked())
    left = shoal("cluster", "leave")
    if gone:
        assert left.exit_code == 0
        assert told == ["cd" * 32, "ef" * 32, "all"]
        assert left.stderr.splitlines() == ["this machine is no head any more: it has let go of ef"]
    else:
        assert left.exit_code != 0
        assert "no node of this name" in left.stderr


def test_who_is_forgotten_meanwhile_by_the_daemon_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOAL_HOME", str(tmp_path / "home"))
    home = Home.from_env()
    private_dir(home.root)
    private_dir(home.cluster)
    (home.cluster / "listen").write_text("auto:7447\n")
    for name in ("pi3", "pi4"):
        certificate = Machine.at(tmp_path, name).identity.certificate
        Peers(home.cluster).add(PairedNode(name, "worker", certificate))
    forget, others = Peers.forget, Peers(home.cluster)

    def first_elsewhere(peers: Peers, name: str) -> PairedNode:
        if peers is not others and len(others.listed()) == 2:
            forget(others, "pi3")
        return forget(peers, name)

    monkeypatch.setattr(Peers, "forget", first_elsewhere)
    left = shoal("cluster", "leave")
    assert left.exit_code == 0
    assert left.stderr.splitlines() == ["this machine is no head any more: it has let go of pi4"]
    assert Peers(home.cluster).listed() == ()
