"""What stands between machines: looked at quickly, whatever the system is."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest

from shoal.comm.group.node_identity import NodeIdentity
from shoal.comm.group.peers import PairedNode, Peers
from shoal.daemon.cluster.routes import surroundings as module
from shoal.daemon.cluster.routes.surroundings import behind_nat, firewalls, look_around, role_of
from shoal.daemon.errors import DaemonError


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is sent to the network."""
    monkeypatch.setattr(module, "hears_itself", lambda hosts: dict.fromkeys(hosts, ""))


def test_ports_that_answer_and_that_do_not() -> None:
    with socket.create_server(("127.0.0.1", 0)) as open_, socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and does not listen
        gone = closed.getsockname()[1]
        listening = [f"127.0.0.1:{port}" for port in (open_.getsockname()[1], gone)]
        around = look_around(
            listening, {"pi3": "127.0.0.1:5", "other": "127.0.0.1", "away": "", "odd": "x:1"}
        )
    assert list(around.tried) == listening
    assert around.closed == {listening[1]: "Connection refused"}
    assert {name: own.kind for name, own in around.used.items()} == {"pi3": "loopback", "other": "loopback"}


def test_one_that_takes_no_connection_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """All are tried at once."""
    monkeypatch.setattr(module, "OWN_CONNECT_S", 1.0)
    full = socket.socket()
    full.bind(("127.0.0.1", 0))
    full.listen(0)
    waiting = [socket.socket() for _ in range(4)]
    for one in waiting:
        one.setblocking(False)
        one.connect_ex(full.getsockname())
    began_s = time.monotonic()
    text = f"127.0.0.1:{full.getsockname()[1]}"
    assert look_around([text] * 8, {}).closed == {text: "no answer"}
    assert time.monotonic() - began_s < 6
    for one in (full, *waiting):
        one.close()


def test_firewalls_that_are_on(tmp_path: Path) -> None:
    assert firewalls(tmp_path) == ()
    config = tmp_path / "etc/ufw/ufw.conf"
    config.parent.mkdir(parents=True)
    config.write_text("# ENABLED or not\nENABLED=no\nLOGLEVEL=low\n")
    assert firewalls(tmp_path) == ()
    config.write_text("ENABLED=yes\n")
    assert firewalls(tmp_path) == ("ufw",)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/firewalld.pid").write_text("1")
    assert firewalls(tmp_path) == ("ufw", "firewalld")


@pytest.mark.parametrize(
    ("release", "says", "nat"),
    [
        ("5.15.153.1-microsoft-standard-WSL2", "nat", True),
        ("5.15.153.1-microsoft-standard-WSL2", "", True),
        ("5.15.153.1-microsoft-standard-WSL2", "mirrored", False),
        ("6.8.0-generic", "nat", False),
    ],
)
def test_wsl2(release: str, says: str, nat: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.sys, "platform", "linux")
    monkeypatch.setattr(module.platform, "release", lambda: release)
    monkeypatch.setattr(module, "_says", lambda *command: says)
    assert behind_nat() == nat


def test_tools_that_are_missing_or_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SYSTEM_TOOL_S", 0.1)
    assert module._says("/no/such/tool") == ""
    assert module._says("sleep", "5") == ""
    assert module._says("echo", "Mirrored") == "mirrored\n"


def test_macos(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module.sys, "platform", "darwin")
    monkeypatch.setattr(module, "_says", lambda *command: "firewall is enabled. (state = 1)")
    assert firewalls(tmp_path) == ("macos",)
    monkeypatch.setattr(module, "_says", lambda *command: "firewall is disabled. (state = 0)")
    assert firewalls(tmp_path) == ()


def test_the_role_is_in_the_files(tmp_path: Path) -> None:
    assert role_of(tmp_path / "none") == ("alone", "")
    (tmp_path / "listen").write_text(":7447\n")
    assert role_of(tmp_path) == ("head", "")
    head = NodeIdentity.of(tmp_path / "other", "pi3")
    Peers(tmp_path).add(PairedNode("pi3", "head", head.certificate))
    assert role_of(tmp_path) == ("worker", "pi3")
    (tmp_path / "peers.json").write_text("{")
    with pytest.raises(DaemonError, match=r"peers\.json"):
        role_of(tmp_path)
