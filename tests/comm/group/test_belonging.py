"""Whether a machine belongs to a cluster is in its files, whoever has asked what."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from shoal.comm.group.belonging import belongs
from shoal.comm.group.node_identity import NodeIdentity
from shoal.comm.group.peers import PairedNode, Peers


def paired(directory: Path, role: str) -> Path:
    certificate = NodeIdentity.of(directory.parent / "other", "pi3").certificate
    Peers(directory).add(PairedNode("pi3", "head" if role == "worker" else "worker", certificate))
    if role == "head":
        (directory / "listen").write_text("auto:7447\n")
    return directory


@pytest.mark.parametrize("role", ["head", "worker"])
def test_heads_and_workers_belong_until_they_leave(role: str, tmp_path: Path) -> None:
    directory = paired(tmp_path / "cluster", role)
    assert belongs(directory)
    Peers(directory).forget("pi3")
    assert belongs(directory) is (role == "head")  # which awaits others
    (directory / "listen").unlink(missing_ok=True)
    assert not belongs(directory)


def test_what_is_kept_for_later_makes_no_member(tmp_path: Path) -> None:
    assert not belongs(tmp_path / "none")
    NodeIdentity.of(tmp_path)
    (tmp_path / "speed.json").write_text("{}")
    assert not belongs(tmp_path)


def test_who_cannot_read_it_may_be_a_member(tmp_path: Path) -> None:
    directory = paired(tmp_path / "cluster", "worker")
    Peers(directory).file.write_text("{")
    assert belongs(directory)


def test_machines_that_were_never_paired_need_no_tls(tmp_path: Path) -> None:
    code = "import sys, pathlib; from shoal.comm.group.belonging import belongs"
    code += "; print(belongs(pathlib.Path(sys.argv[1])), 'ssl' in sys.modules)"
    command = [sys.executable, "-c", code, str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout.split() == ["False", "False"]
