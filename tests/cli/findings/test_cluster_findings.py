"""What doctor says of the cluster: each trouble with what to do about it, and nothing where there is no cluster."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from fakes.asking import CONFIG
from fakes.cli_fakes import shoal
from fakes.group.clusters import Cluster

from shoal.cli import doctor as doctor_room
from shoal.cli.findings import cluster_findings
from shoal.cli.findings.cluster_findings import findings
from shoal.cli.findings.finding import Finding
from shoal.comm.cluster_messages import NodesReply, NodeStatus
from shoal.comm.group.errors import DOES_NOT_KNOW, NOT_PROVED
from shoal.comm.home import Home
from shoal.daemon.cluster.routes.own_addresses import OwnAddress
from shoal.daemon.cluster.routes.surroundings import Surroundings
from shoal.daemon.cluster.worker import FORGOTTEN
from shoal.daemon.progress import no_progress

CABLE = OwnAddress("192.168.1.5", "eth0", "cable")
WIFI = OwnAddress("192.168.1.7", "wlan0", "wifi")
VPN = OwnAddress("10.8.0.2", "tun0", "vpn")
LOOPBACK = OwnAddress("127.0.0.1", "lo", "loopback")
GOOD = Surroundings(
    addresses=(CABLE, WIFI, VPN, LOOPBACK),
    multicast={"192.168.1.5": ""},
    tried=("192.168.1.5:7447", "127.0.0.1:7447"),
    used={"pi3": CABLE},
)


def node(name: str, role: str, **facts: object) -> NodeStatus:
    fields = {"fingerprint": "ab" * 32, "attached": True, "version": "0.1.0"} | facts
    return NodeStatus(name=name, role=role, **fields)


def head(*others: NodeStatus, listening: tuple[str, ...] = ("0.0.0.0:7447", "[::]:7447")) -> NodesReply:
    return NodesReply(role="head", nodes=[node("here", "head"), *others], listening=list(listening))


def worker(trouble: str = "", **facts: object) -> NodesReply:
    it = node("here", "worker", trouble=trouble, attached=not trouble)
    where = {"address": "192.168.1.9:7447", "rtt_s": 0.0002, "bytes_per_s": 117e6, "routes": 3}
    return NodesReply(role="worker", nodes=[it, node("big", "head", attached=not trouble, **where | facts)])


PI3 = node("pi3", "worker", address="192.168.1.20")


def said(reply: NodesReply, **changes: object) -> dict[str, list[Finding]]:
    found: dict[str, list[Finding]] = {}
    for one in findings(reply, replace(GOOD, **changes)):
        found.setdefault(one.name, []).append(one)
        assert one.state == "ok" or one.mend, "every trouble has a remedy"
        assert "\n" not in one.found
    return found


def only(reply: NodesReply, name: str, **changes: object) -> Finding:
    (found,) = said(reply, **changes)[name]
    return found


@pytest.mark.parametrize("reply", [head(PI3), worker()])
def test_where_all_is_well_there_is_no_note(reply: NodesReply) -> None:
    found = said(reply)
    assert {one.state for each in found.values() for one in each} == {"ok"}


def test_the_role() -> None:
    assert only(head(PI3), "cluster").found == "head; 1 of 1 machine attached"
    assert only(worker(), "cluster").found == "lent to big at 192.168.1.9:7447 (0.2 ms, 117 MB/s, best of 3)"
    away = only(head(PI3, node("pi4", "worker", attached=False)), "cluster")
    assert (away.state, away.found) == ("note", "head; 1 of 2 machines attached, away: pi4")
    assert "cluster init" in only(head(), "cluster").mend


def test_a_machine_that_prepares_is_not_away() -> None:
    pi4 = node("pi4", "worker", attached=False, preparing=True)
    found = only(head(PI3, pi4), "cluster")
    assert (found.state, found.found) == ("ok", "head; 1 of 2 machines attached, preparing: pi4")
    found = only(head(PI3, pi4, node("pi5", "worker", attached=False)), "cluster")
    assert found.found == "head; 1 of 3 machines attached, preparing: pi4, away: pi5"
    assert "forget pi5" in found.mend
    here = node("here", "worker", attached=False, preparing=True)
    found = only(NodesReply(role="worker", nodes=[here, node("big", "head", attached=False)]), "cluster")
    assert found.state == "ok"
    assert found.found == "lent to big, but not attached yet: it tests its kernels and measures itself first"


@pytest.mark.parametrize(
    ("trouble", "mend"),
    [
        ("the node cannot be reached (192.168.1.9:7447: No route to host)", "port"),
        ("the other node does not know this one, or no longer: pair them again", "join with a new code"),
        (f"10.0.0.9:7447: {NOT_PROVED}", "still the head's"),
        ("10.0.0.9:7447: the other node shows a certificate that is not the paired one", "still the head's"),
        ("this node speaks version 1, the other node version 2: update the older one", "pip install ."),
    ],
)
def test_a_worker_that_is_not_attached(trouble: str, mend: str) -> None:
    found = only(worker(trouble), "cluster")
    assert trouble in found.found
    assert mend in found.mend


@pytest.mark.parametrize("trouble", [FORGOTTEN, DOES_NOT_KNOW])
def test_to_join_anew_is_advised_first_only_if_the_head_has_said_so(trouble: str) -> None:
    assert only(worker(trouble), "cluster").mend.startswith("shoal cluster leave")


def test_ports() -> None:
    assert only(head(PI3), "port").found == "answers at 192.168.1.5:7447"
    assert only(head(listening=()), "port").state == "broken"
    closed, _ = said(head(), closed={"192.168.1.5:7447": "no answer"}, tried=(*GOOD.tried, "10.8.0.2:7447"))[
        "port"
    ]
    assert "192.168.1.5:7447 cannot be reached even from here: no answer" in closed.found
    assert "7447 TCP" in closed.mend
    local = head(listening=("127.0.0.1:7000",))
    assert "no other machine" in only(local, "port", tried=("127.0.0.1:7000",)).found
    with_one = head(PI3, listening=("127.0.0.1:7000",))
    assert only(with_one, "port", tried=("127.0.0.1:7000",)).state == "ok", "it is meant so"


@pytest.mark.parametrize("reply", [head(), worker("no answer")])
def test_without_a_network_nothing_else_is_said(reply: NodesReply) -> None:
    found = said(reply, addresses=(LOOPBACK,), tried=("127.0.0.1:7447",), multicast={})
    assert set(found) == {"cluster", "network"}


@pytest.mark.parametrize("wall", ["ufw", "firewalld", "macos"])
def test_firewalls(wall: str) -> None:
    found = only(head(listening=("0.0.0.0:7555",)), "firewall", firewalls=(wall,))
    assert "7555 TCP and 5353 UDP" in found.found
    if wall != "macos":
        assert "7555/tcp" in found.mend
    looking = only(worker("no answer"), "firewall", firewalls=(wall,))
    assert "7447" not in looking.found + looking.mend
    assert "firewall" not in said(head(PI3), firewalls=(wall,)), "one is attached: it is open"


def test_wsl2() -> None:
    found = only(head(), "wsl2", behind_nat=True, system="wsl2")
    assert "networkingMode=mirrored" in found.mend
    assert "\\.wslconfig" in found.mend
    assert only(worker(), "wsl2", behind_nat=True).state == "ok"
    assert "--address" in only(worker("no answer"), "wsl2", behind_nat=True).mend


def test_macos() -> None:
    deaf = {"192.168.1.5": "No route to host"}
    assert "Local Network" in only(head(), "permission", system="macos", multicast=deaf).mend
    assert "Local Network" in only(worker("No route to host"), "permission", system="macos").mend
    assert "permission" not in said(head(PI3), system="macos", multicast=deaf)
    assert "permission" not in said(head(), system="linux", multicast=deaf)


def test_multicast() -> None:
    works, not_there = said(head(), multicast={"a": "", "b": "No such device"})["multicast"]
    assert (works.found, works.state) == ("works at a", "ok")
    assert "b: No such device" in not_there.found
    assert "5353 UDP" in not_there.mend
    assert "--address" in only(head(), "multicast", multicast={}).mend


@pytest.mark.parametrize(("own", "over"), [(WIFI, "Wi-Fi (wlan0)"), (VPN, "a VPN (tun0)")])
def test_a_slow_link_although_a_cable_is_up(own: OwnAddress, over: str) -> None:
    found = only(head(PI3), "interface", used={"pi3": own})
    assert found.found == f"pi3 is reached over {over}, although eth0 is up"
    assert "interface" not in said(head(PI3), used={"pi3": own}, addresses=(WIFI, VPN)), "there is no other"


def test_versions() -> None:
    found = only(head(PI3, node("pi4", "worker", version="0.0.9")), "versions")
    assert found.found == "pi4 runs Shoal 0.0.9, this machine 0.1.0"
    assert "versions" not in said(head(PI3, node("pi4", "worker", attached=False, version="")))
    assert only(worker(version="0.2.0"), "versions").found.startswith("big runs Shoal 0.2.0")


def test_where_there_is_no_cluster_nothing_is_looked_at(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_findings, "look_around", lambda *_: pytest.fail("nothing to look at"))
    shown = json.loads(shoal("doctor", "--json").stdout)["findings"]
    assert [it["found"] for it in shown if it["name"] == "cluster"] == ["this machine is in none"]
    assert not {"port", "multicast", "firewall"} & {it["name"] for it in shown}


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_findings, "look_around", lambda listening, others: GOOD)


def test_without_a_daemon_the_files_tell(home: Home, quiet: None) -> None:
    home.cluster.mkdir(parents=True)
    (home.cluster / "listen").write_text(":7447\n")
    began_s = time.monotonic()
    result = shoal("doctor")
    assert time.monotonic() - began_s < 3
    assert result.exit_code == 0
    assert "it is a head, but no daemon runs here" in result.stdout
    (home.cluster / "peers.json").write_text("{")
    (home.cluster / "peers.json").chmod(0o600)
    damaged = shoal("doctor")
    assert damaged.exit_code == 1
    assert "peers.json" in damaged.stdout


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with Cluster(tmp_path, CONFIG, workers=1) as made:
        yield made


def test_of_a_real_cluster(cluster: Cluster, quiet: None) -> None:
    """Both ends say over which address they talk, and how good it is."""
    (own, other) = cluster.nodes()
    assert own.role == "head"
    assert other.rtt_s > 0
    assert other.routes == 1
    at_worker = cluster.workers[1]._nodes()
    far = at_worker.nodes[1]
    assert far.address == cluster.invite().addresses[0]
    assert far.rtt_s > 0
    assert far.bytes_per_s > 1e6
    assert far.version == own.version
    assert "lent to" in only(at_worker, "cluster").found


def test_a_worker_needs_no_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_HOME", str(tmp_path))
    home = Home.from_env()
    for role, state in (("alone", "note"), ("head", "note"), ("worker", "ok")):
        monkeypatch.setattr(doctor_room, "role_of", lambda directory, role=role: (role, ""))
        (found,) = (
            it for it in doctor_room.examine(home, deep=False, progress=no_progress) if it.name == "models"
        )
        assert found.state == state, role
