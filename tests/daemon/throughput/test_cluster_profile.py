"""A cluster as a profile: machines and links that the head knows of, and nothing that cannot be true."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import pytest

from shoal.comm.cluster_messages import LinksReply, NodesReply, NodeStatus, PairStatus
from shoal.daemon.throughput.cluster_profile import clustered
from shoal.daemon.throughput.profile_files import parse_profile, profile_text
from shoal.partition.throughput.peak import PROCESS_BYTES
from shoal.partition.throughput.profile import Device, Profile, RowsLaw

GB = 10**9
OWN = Profile((Device("desk", 16e9, 20e9, 2e11, 2e9, 4, measured=True),))
HEAD = NodeStatus(name="desk", fingerprint="aa" * 32, role="head", attached=True)


def worker(name: str = "pi", mark: str = "b", **more: Any) -> NodeStatus:
    figures: dict[str, Any] = {
        "threads": 4,
        "memory_bytes": 4 * GB,
        "rtt_s": 4e-4,
        "bytes_per_s": 1.17e8,
        "memory_bytes_per_s": 1e10,
        "flops": 5e10,
    }
    return NodeStatus(name=name, fingerprint=mark * 64, role="worker", attached=True, **(figures | more))


def reply(*workers: NodeStatus, **more: Any) -> NodesReply:
    return NodesReply(role="head", nodes=[HEAD, *workers], **more)


def test_workers_and_their_links_are_there_and_survive_a_file() -> None:
    pair = PairStatus(between=["b" * 64, "c" * 64], rtt_s=1e-3, bytes_per_s=1e9)
    nodes = reply(worker(), worker("nuc", "c", disk_bytes_per_s=1e9), pairs=[pair])
    found, left_out = clustered(OWN, nodes, LinksReply(links=[], incast_bytes_per_s=1.1e8))
    assert not left_out
    assert [device.name for device in found.devices] == ["desk", "pi", "nuc"]
    assert found.head.port_bytes_per_s == 1.1e8
    pi = found.devices[1]
    assert (pi.memory_bytes, pi.memory_bytes_per_s, pi.flops, pi.threads) == (
        4 * GB + PROCESS_BYTES,
        1e10,
        5e10,
        4,
    )
    between = [
        (found.link(*ends), latency) for ends, latency in ((("desk", "pi"), 2e-4), (("nuc", "pi"), 5e-4))
    ]
    assert [link and link.latency_s for link, _ in between] == [latency for _, latency in between]
    assert parse_profile(profile_text(found), "a file") == found


def test_who_is_away_or_no_head_adds_nothing() -> None:
    away = msgspec.structs.replace(worker(), attached=False)
    assert clustered(OWN, reply(away)).profile == OWN
    alone = NodesReply(role="alone", nodes=[])
    assert clustered(OWN, alone).profile == OWN
    assert clustered(OWN, NodesReply(role="worker", nodes=[HEAD, worker()])).profile == OWN


@pytest.mark.parametrize(
    "lie",
    [{"flops": 0.0}, {"flops": float("nan")}, {"memory_bytes_per_s": 1e30}, {"bytes_per_s": 0.0}, {"rtt_s": -1.0}]
)  # fmt: skip
def test_what_cannot_be_true_is_left_out_and_said(lie: dict[str, Any]) -> None:
    pair = PairStatus(between=["b" * 64, "c" * 64], rtt_s=1e-3, bytes_per_s=1e9)
    found, left_out = clustered(OWN, reply(worker(**lie), worker("nuc", "c"), pairs=[pair]))
    assert [device.name for device in found.devices] == ["desk", "nuc"]
    assert len(left_out) == 1
    assert left_out[0].startswith("pi is left out: ")


def test_machines_that_are_called_alike_are_told_apart() -> None:
    found, left_out = clustered(OWN, reply(worker("desk"), worker("desk", "c")))
    assert not left_out
    assert [device.name for device in found.devices] == ["desk", "desk (bbbbbbbb)", "desk (cccccccc)"]
    bad = PairStatus(between=["b" * 64, "c" * 64], rtt_s=1e9, bytes_per_s=1e9)
    found, left_out = clustered(OWN, reply(worker("desk"), worker("desk", "c"), pairs=[bad]))
    assert len(found.devices) == 3
    assert len(found.links) == 2
    assert left_out


def test_a_worker_is_like_the_head_and_as_fast_as_its_two_speeds() -> None:
    law = RowsLaw("Q4_K", 1e6, (1, 64), (5e-11, 2e-10))
    head = replace(OWN.head, products=(law,))
    found, _ = clustered(Profile((head,)), reply(worker(disk_bytes_per_s=1e9)))
    pi = found.devices[1]
    # Half of the head's memory speed, a quarter of its operations.
    assert pi.products[0].byte_s == pytest.approx((1e-10, 1e-10 + 4 * 1.5e-10))
    assert (pi.memory_bytes_per_s, pi.flops, pi.disk_bytes_per_s, pi.threads, pi.measured) == (
        pytest.approx(1e10),
        pytest.approx(5e10),
        1e9,
        4,
        False,
    )
