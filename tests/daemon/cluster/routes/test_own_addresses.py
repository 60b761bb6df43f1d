"""Which of this machine's addresses are told first: those of real links, whatever order the system has them in."""

from __future__ import annotations

import ipaddress
import random
import socket
from collections import namedtuple
from pathlib import Path

import psutil
import pytest

from shoal.comm.group.streams import Address
from shoal.daemon.cluster.routes import own_addresses as module
from shoal.daemon.cluster.routes.own_addresses import (
    OwnAddress,
    caveat,
    kind_of,
    own_addresses,
    parse_address,
    reachable,
    spelled,
    towards,
)

State = namedtuple("State", "isup speed")
Shown = namedtuple("Shown", "family address")

# interface → whether it is up, Mb/s, addresses
MACHINE = {
    "docker0": (True, 0, ["172.17.0.1"]),
    "br-4f1e": (True, 0, ["172.18.0.1"]),
    "veth9a": (True, 10000, ["fe80::9"]),
    "tun0": (True, 0, ["10.8.0.2"]),
    "wg0": (True, 0, ["10.9.0.2", "fd00:9::2"]),
    "tailscale0": (True, 0, ["100.101.1.2", "fd7a:115c:a1e0::1"]),
    "wlp3s0": (True, 0, ["192.168.1.7", "2001:db8::7", "fe80::7%wlp3s0"]),
    "lo": (True, 0, ["127.0.0.1", "::1"]),
    "eth1": (False, 1000, ["192.168.3.5"]),
    "usb0": (True, 100, ["169.254.3.4"]),
    "enp2s0": (True, 100, ["192.168.2.5"]),
    "enp1s0": (True, 1000, ["192.168.1.5", "2001:db8::5"]),
}
BEST_FIRST = [
    *("192.168.1.5", "192.168.2.5", "2001:db8::5"),
    *("192.168.1.7", "2001:db8::7"),
    *("10.8.0.2", "10.9.0.2", "100.101.1.2", "fd00:9::2", "fd7a:115c:a1e0::1"),
    *("172.17.0.1", "172.18.0.1"),
    *("169.254.3.4", "127.0.0.1", "::1"),
]


@pytest.fixture(params=range(4))
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    names = list(MACHINE)
    random.Random(request.param).shuffle(names)
    states = {name: State(*MACHINE[name][:2]) for name in names}
    shown = {
        name: [
            Shown(psutil.AF_LINK, "00:11:22:33:44:55"),
            *(Shown(socket.AF_INET6 if ":" in host else socket.AF_INET, host) for host in MACHINE[name][2]),
        ]
        for name in names
    }
    monkeypatch.setattr(psutil, "net_if_stats", lambda: states)
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: shown)
    monkeypatch.setattr(module, "_system_says", lambda name: None)


def in_kinds(hosts: list[str]) -> list[tuple[str, int]]:
    kinds = {one.host: (one.kind, one.version) for one in own_addresses()}
    return [kinds[host] for host in hosts]


def test_real_links_come_first(machine: None) -> None:
    found = [one.host for one in own_addresses()]
    assert set(found) == set(BEST_FIRST)
    assert found[:5] == BEST_FIRST[:5]
    assert in_kinds(found) == in_kinds(BEST_FIRST)  # of equal ones the system's order


def test_what_listens_everywhere_is_reached_at_each(machine: None) -> None:
    both = reachable([("0.0.0.0", 7447), ("::", 7447)])
    assert both[:3] == ["192.168.1.5:7447", "192.168.2.5:7447", "[2001:db8::5]:7447"]
    assert len(both) == len(BEST_FIRST)
    four = reachable([("0.0.0.0", 7447)])
    assert four
    assert not any("[" in text for text in four)
    assert all(text.startswith("[") for text in reachable([("::", 7447)]))
    assert reachable([("10.8.0.2", 1), ("192.168.1.5", 2)]) == ["192.168.1.5:2", "10.8.0.2:1"]
    assert reachable([("example.org", 7447)]) == ["example.org:7447"]
    assert reachable([]) == []


@pytest.mark.parametrize(
    ("listening", "only"),
    [
        ([("127.0.0.1", 7447)], "this machine itself can join at 127.0.0.1:7447: `listen=auto`"),
        ([("::1", 7447)], "this machine itself can join at [::1]:7447: "),
        ([("127.0.0.2", 1), ("::1", 1)], "this machine itself can join at 127.0.0.2:1, [::1]:1: "),
        (
            [("172.17.0.1", 7447)],
            "containers and virtual machines on this machine can join at 172.17.0.1:7447: ",
        ),
        ([("169.254.3.4", 7447)], "machines on the same cable can join at 169.254.3.4:7447: "),
        ([("fe80::7", 7447)], "machines on the same cable can join at [fe80::7]:7447: "),
        (
            [("127.0.0.1", 1), ("172.18.0.1", 1)],
            "containers and virtual machines on this machine and this machine itself can join at ",
        ),
        ([("127.0.0.1", 7447), ("192.168.1.5", 7447)], ""),
        ([("", 7447)], ""),
        ([("100.101.1.2", 7447)], ""),
        ([("192.168.1.7", 7447)], ""),
        ([("example.org", 7447)], ""),
        ([], ""),
    ],
)
def test_who_can_join_where_others_cannot(machine: None, listening: list[Address], only: str) -> None:
    said = caveat(reachable(listening))
    assert said.startswith(f"only {only}") if only else not said


def test_who_can_join_a_machine_without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    own = [OwnAddress("172.17.0.1", "docker0", "bridge"), OwnAddress("127.0.0.1", "lo", "loopback")]
    monkeypatch.setattr(module, "own_addresses", lambda: own)
    assert caveat(["172.17.0.1:7447"]).endswith(": it has no address that others reach")


NAMED = {
    "cable": ("eth0", "enp1s0", "eno1", "en0", "br0", "vmbr0", "bond0", "usb0", "nothing-like-it"),
    "wifi": ("wlan0", "wlp3s0", "wlx00", "wifi0", "ath0"),
    "mobile": ("wwan0", "wwp0s20f0u6"),
    "vpn": (
        "tun0",
        "tap3",
        "wg0",
        "utun4",
        "tailscale0",
        "zt7nn",
        "ppp0",
        "ipsec0",
        "nordlynx",
        "CloudflareWARP",
    ),
    "bridge": (
        *("docker0", "br-12ab", "veth1", "virbr0", "vmnet8", "vboxnet0", "podman1", "bridge100"),
        *("cni0", "flannel.1", "cali12", "lxcbr0", "incusbr0", "vEthernet (WSL)"),
    ),
}


@pytest.mark.parametrize(
    ("name", "host", "kind"),
    [
        *((name, "192.0.2.1", kind) for kind, names in NAMED.items() for name in names),
        ("eth0", "169.254.1.1", "link-local"),
        ("docker0", "127.0.0.1", "loopback"),
        ("eth0", "100.64.0.1", "vpn"),
        ("eth0", "fd7a:115c:a1e0::5", "vpn"),
        ("nothing-like-it", "2001:db8::1", "cable"),
    ],
)
def test_names_tell_the_kind(name: str, host: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_system_says", lambda name: None)
    assert kind_of(name, ipaddress.ip_address(host)) == kind


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        ({"uevent": "DEVTYPE=wlan\nINTERFACE=lan0\n"}, "wifi"),
        ({"uevent": "INTERFACE=lan0\n", "wireless/retry": ""}, "wifi"),
        ({"uevent": "DEVTYPE=wireguard\nINTERFACE=home\n"}, "vpn"),
        ({"uevent": "DEVTYPE=wwan\n"}, "mobile"),
        ({"uevent": "INTERFACE=office\n", "tun_flags": "0x1\n", "type": "1\n"}, "vpn"),
        ({"uevent": "INTERFACE=office\n", "type": "65534\n"}, "vpn"),
        ({"uevent": "INTERFACE=eth0\n", "type": "1\n"}, None),
        ({}, None),
    ],
)
def test_linux_knows_it_whatever_the_name(files: dict[str, str], kind: str | None, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / "lan0" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "lan0" / name).write_text(text)
    assert module._system_says("lan0", tmp_path) == kind


def test_from_where_this_machine_sends() -> None:
    own = towards("127.0.0.1")
    assert own is not None
    assert own.kind == "loopback"
    for host in ("nonsense", "300.1.1.1", "", "::zz"):
        assert towards(host) is None


@pytest.mark.parametrize("text", ["192.0.2.5:7447", "[2001:db8::5]:7447", "name:1"])
def test_addresses_are_spelled_as_they_are_read(text: str) -> None:
    assert spelled(parse_address(text)) == text
