"""What `shoal cluster leave` says: a worker leaves its head, a head lets go of its workers."""

from __future__ import annotations

from pathlib import Path

import pytest
from fakes.cli_fakes import shoal
from fakes.group.nodes import Machine

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
