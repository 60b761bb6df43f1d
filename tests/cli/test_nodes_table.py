"""`shoal cluster nodes` has a column only for what there is, so that it fits narrow terminals; what `init` says."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
from fakes.cli_fakes import FakeClient, shoal

from shoal.cli import background
from shoal.cli import cluster as cluster_room
from shoal.cli.terminal.node_table import _state
from shoal.comm.cluster_messages import (
    Invitation,
    LinksReply,
    LinkStatus,
    NodeRole,
    NodesReply,
    NodeStatus,
)
from shoal.comm.home import Home

THIS = NodeStatus(
    name="big",
    fingerprint="ab" * 32,
    role="head",
    attached=True,
    threads=8,
    memory_bytes=16 << 30,
    free_bytes=15 << 30,
)
IDLE = {"threads": 4, "memory_bytes": 8 << 30, "free_bytes": 7 << 30, "address": "192.168.1.7", "routes": 2}
IDLE |= {"rtt_s": 0.0002, "bytes_per_s": 117e6}
BUSY = IDLE | {"models": ["llama"], "shares": [0.25], "wait_s": 0.00025}


def laptop(**facts: object) -> NodeStatus:
    return NodeStatus(name="laptop", fingerprint="cd" * 32, role="worker", **facts)


@pytest.mark.parametrize(
    ("other", "there", "not_there"),
    [
        (laptop(attached=True, **IDLE), "0.2 ms, 117 MB/s, best of 2", ("waited for", "computes")),
        (laptop(attached=True, **BUSY), "25% of llama", ()),
        (laptop(attached=True, **IDLE | {"models": ["llama"]}), "llama", ("waited for",)),
        (laptop(attached=False), "away", ("waited for", "computes")),
        (laptop(attached=False, preparing=True), "preparing", ("waited for", "computes")),
    ],
)
def test_a_column_only_for_what_there_is(
    other: NodeStatus, there: str, not_there: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Asked:
        def nodes(self) -> NodesReply:
            return NodesReply(role="head", nodes=[THIS, other], listening=["192.168.1.5:7447"])

    @contextmanager
    def asked(home: Home) -> Iterator[Asked]:
        yield Asked()

    monkeypatch.setattr(cluster_room, "_client", asked)
    shown = shoal("cluster", "nodes")
    text = shown.stdout
    assert there in text
    assert ("laptop tests its kernels and measures itself before it first attaches" in shown.stderr) == (
        other.preparing
    )
    assert "other machines attach at 192.168.1.5:7447" in text
    for column in ("waited for", "computes"):
        assert (column in text) == (column not in not_there), column


def test_a_worker_that_prepares_has_not_asked_for_its_head() -> None:
    head = NodeStatus(name="big", fingerprint="ab" * 32, role="head", attached=False)
    assert _state(head, laptop(attached=False, preparing=True)) == "not asked yet"
    assert _state(head, laptop(attached=False)) == "away"


@pytest.mark.parametrize("links", [[], [LinkStatus(name="laptop")]])
def test_a_test_of_no_links_has_failed(
    links: list[LinkStatus], home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Asked(FakeClient):
        def measure_links(self) -> LinksReply:
            return LinksReply(links=links, why="no worker is attached")

    monkeypatch.setattr(background, "running_pid", lambda home: 4242)
    monkeypatch.setattr(cluster_room, "Client", Asked())
    for options in ((), ("--json",)):
        assert shoal("cluster", "test", *options).exit_code == (0 if links else 1)


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_a_join_line_that_no_other_machine_can_use_says_so(
    options: tuple[str, ...], home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = "only this machine itself can join at 127.0.0.1:7447: `listen=auto` lets others in"

    class Asked(FakeClient):
        def invite(self, listen: Sequence[str]) -> Invitation:
            return Invitation(code="7K3M-Q9TX-2BD4F", addresses=[*listen], seconds=600.0, caveat=said)

    monkeypatch.setattr(cluster_room, "_require_daemon", lambda home: None)
    monkeypatch.setattr(cluster_room, "Client", Asked())
    result = shoal("cluster", "init", "--listen", "127.0.0.1:7447", *options)
    assert "7K3M-Q9TX-2BD4F" in result.stdout
    if options:
        assert json.loads(result.stdout)["caveat"] == said
        assert result.stderr == ""
    else:
        assert result.stderr.split() == said.replace("`listen=auto`", "--listen auto").split()


@pytest.mark.parametrize("role", ["head", "worker", "alone"])
def test_who_leaves_tells_all_that_are_there(
    role: NodeRole, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    forgotten: list[str] = []

    class Asked(FakeClient):
        def nodes(self) -> NodesReply:
            there = [] if role == "alone" else [THIS, laptop(attached=True)]
            return NodesReply(role=role, nodes=there)

        def forget(self, node: str) -> None:
            forgotten.append(node)

        def rejoin(self) -> None:
            forgotten.append("all")

    monkeypatch.setattr(background, "running_pid", lambda home: 1)
    monkeypatch.setattr(cluster_room, "Client", Asked())
    assert shoal("cluster", "leave").exit_code == 0
    assert forgotten == ["all"] if role == "alone" else ["cd" * 32, "all"]
