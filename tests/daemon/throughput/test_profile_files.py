"""Profiles in files: what is written by hand, what is measured, and one clear line for whatever is wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.daemon.errors import DaemonError
from shoal.daemon.throughput.profile_files import parse_profile, profile_text, read_profile
from shoal.daemon.throughput.profile_words import device_facts, rows_table
from shoal.partition.throughput.laws import passing_bytes_per_s
from shoal.partition.throughput.profile import AttentionLaw, CacheLaw, Profile, ReadLaw, RowsLaw
from shoal.partition.throughput.profile_checks import MAX_LAWS

LAW = {"kind": "Q4_K", "nbytes": 1e6, "rows": [1], "byte_s": [1e-10]}
HAND: dict[str, Any] = {
    "devices": [
        {
            "name": "a",
            "memory_bytes": 4e9,
            "memory_bytes_per_s": 25e9,
            "flops": 2e11,
            "disk_bytes_per_s": 2e9,
            "threads": 8,
            "accelerators": [
                {
                    "name": "gpu",
                    "memory_bytes": 24e9,
                    "memory_bytes_per_s": 9e11,
                    "flops": 1e14,
                    "host_bytes_per_s": 3e10,
                }
            ],
        },
        {"name": "b", "memory_bytes": 8_000_000_000, "memory_bytes_per_s": 1e10, "flops": 1e11},
    ],
    "links": [{"between": ["a", "*"], "latency_s": 2e-4, "bytes_per_s": 1.25e8}],
}


def changed(path: str, value: Any = None) -> bytes:
    """HAND with one value changed; without it for None."""
    made: Any = json.loads(json.dumps(HAND))
    at, steps = made, path.split(".")
    for step in steps[:-1]:
        at = at[int(step)] if step.isdigit() else at[step]
    if value is None:
        del at[steps[-1]]
    else:
        at[steps[-1]] = value
    return json.dumps(made).encode()


def parse(text: bytes) -> Profile:
    return parse_profile(text, "p.json")


def test_a_profile_by_hand() -> None:
    profile = parse(json.dumps(HAND).encode())
    assert [device.name for device in profile.devices] == ["a", "b"]
    assert profile.head.accelerators[0].host_bytes_per_s == 3e10
    assert passing_bytes_per_s(profile.head.accelerators[0]) == 3e10  # where only one figure is known
    both = parse(changed("devices.0.accelerators.0.locked_bytes_per_s", 5e10))
    assert passing_bytes_per_s(both.head.accelerators[0]) == 5e10
    with pytest.raises(
        DaemonError, match=r"accelerators\[0\].locked_bytes_per_s=5: must be 0, or at least 1000"
    ):
        parse(changed("devices.0.accelerators.0.locked_bytes_per_s", 5))
    assert profile.devices[1].disk_bytes_per_s == 0
    link = profile.link("b", "a")
    assert link is not None
    assert link.latency_s == 2e-4
    assert profile.head.overheads.layer_s == 60e-6
    assert profile.head.pack_write_bytes_per_s == 1e9


def test_a_measured_profile_comes_back(tmp_path: Path) -> None:
    profile = parse(json.dumps(HAND).encode())
    full = profile.devices[0].__class__(
        **(
            vars(profile.devices[0])
            | {
                "products": (RowsLaw("Q4_K", 4e6, (1, 8), (5e-11, 1e-10)),),
                "attention": (AttentionLaw("f16", (128, 4096), (1e-11, 2e-11), (1e-12, 2e-12)),),
                "reads": ReadLaw((65536, 4 << 20), (5e8, 2e9)),
                "caches": CacheLaw((1, 9), (0.0, 1.0), (RowsLaw("Q4_K", 4e6, (1, 8), (2e-11, 9e-11)),)),
                "measured": True,
            }
        )
    )
    path = tmp_path / "p.json"
    path.write_bytes(profile_text(Profile((full,))))
    assert read_profile(path).head == full


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("devices.0.flops", None, "devices[0].flops is missing"),
        ("devices", None, "devices is missing"),
        ("links.0.latency_s", None, "links[0].latency_s is missing"),
        ("devices.0.flops", -1, "devices[0].flops=-1: must be a number from 1e+06 to 1e+20"),
        ("devices.0.memory_bytes_per_s", 0, "devices[0].memory_bytes_per_s=0"),
        ("devices.1.flops", float("nan"), "devices[1].flops=nan: must be a number"),
        ("devices.1.memory_bytes", float("inf"), "devices[1].memory_bytes=inf"),
        (
            "devices.1.memory_bytes",
            1e30,
            "devices[1].memory_bytes=1e+30: must be a number from 1e+06 to 1.15292e+18",
        ),
        (
            "devices.0.disk_bytes_per_s",
            1e-300,
            "devices[0].disk_bytes_per_s=1e-300: must be 0, or at least 1000",
        ),
        ("devices.1.port_bytes_per_s", 1.0, "devices[1].port_bytes_per_s=1: must be 0, or at least 1000"),
        ("devices.0.flops", "fast", 'devices[0].flops="fast": must be a number'),
        ("devices.0.flops", True, "devices[0].flops=true: must be a number"),
        ("devices.0.threads", 0, "devices[0].threads=0: must be a number from 1"),
        ("devices.0.threads", 1.5, "devices[0].threads=1.5: must be a whole number"),
        ("devices.0.threads", 10**400, "devices[0].threads=1000000000"),
        (
            "devices.0.caches",
            {"nbytes": [1, 9], "from_memory": [0.0, 1.5]},
            "devices[0].caches.from_memory[1]=1.5: must be a number from 0 to 1",
        ),
        (
            "devices.0.caches",
            {"nbytes": [9, 1], "from_memory": [0.0, 1.0]},
            "devices[0].caches.nbytes must rise",
        ),
        (
            "devices.0.caches",
            {"nbytes": [1], "from_memory": [0.0, 1.0]},
            "devices[0].caches.from_memory has 2 points: must have 1, as nbytes",
        ),
        (
            "devices.0.caches",
            {
                "nbytes": [1],
                "from_memory": [0.0],
                "products": [{"kind": "*", "nbytes": 1, "rows": [1], "byte_s": [-1]}],
            },
            "devices[0].caches.products[0].byte_s[0]=-1",
        ),
        ("devices.0.flop", 1e9, "devices[0].flop: there is no such field"),
        ("devices.0.accelerators.0.pcie", 1e9, "devices[0].accelerators[0].pcie: there is no such field"),
        ("devices.0.accelerators.0.flops", -2, "devices[0].accelerators[0].flops=-2"),
        ("devices.1.name", "a", "devices[1].name='a': another one has this name"),
        ("devices.1.name", "*", "devices[1].name='*'"),
        ("devices.1.name", "", "devices[1].name=''"),
        ("devices", [], "devices: there are 0"),
        ("devices", {"name": "a"}, 'devices={"name": "a"}: must be a list'),
        ("devices", [7], "devices[0]=7: must be an object"),
        ("devices.0.name", 7, "devices[0].name=7: must be a text"),
        ("devices.0.measured", "no", 'devices[0].measured="no": must be true or false'),
        ("devices.0.flops", 10**400, "000… (401 characters): must be a number"),
        ("links.0.between", ["a", "c"], "links[0].between has 'c': no device has this name (there are a, b)"),
        ("links.0.between", ["a", "a"], "links[0].between"),
        ("links.0.between", ["a"], "links[0].between: expected `array` of length 2"),
        ("links.0.bytes_per_s", 0, "links[0].bytes_per_s=0"),
        (
            "links",
            [{"between": pair, "latency_s": 1e-3, "bytes_per_s": 1e8} for pair in (["a", "b"], ["b", "a"])],
            "links[1].between=['b', 'a']: as links[0]; must be named once",
        ),
        (
            "devices.0.corrections",
            {"memory": 9},
            "devices[0].corrections.memory=9: must be a number from 0.5 to 2",
        ),
        ("devices.0.products", [{"kind": "Q4_K", "nbytes": 1e6, "rows": [], "byte_s": []}], "has 0 points"),
        (
            "devices.0.products",
            [{"kind": "Q4_K", "nbytes": 1e6, "rows": [2, 1], "byte_s": [1e-10, 1e-10]}],
            "devices[0].products[0].rows must rise",
        ),
        (
            "devices.0.products",
            [{"kind": "Q4_K", "nbytes": 1e6, "rows": [1, 2], "byte_s": [1e-10]}],
            "devices[0].products[0].byte_s has 1 points: must have 2",
        ),
        (
            "devices.0.products",
            [{"kind": "Q4_K", "nbytes": 1e6, "rows": [1], "byte_s": [-1.0]}],
            "devices[0].products[0].byte_s[0]=-1:",
        ),
        ("devices.0.contention", {"compute_keeps": 0}, "devices[0].contention.compute_keeps=0"),
        (
            "devices.0.accelerators.0.contention",
            {"device_keeps": 1.5},
            "devices[0].accelerators[0].contention.device_keeps=1.5",
        ),
        (
            "devices.0.products",
            [LAW] * (MAX_LAWS + 1),
            "devices[0].products has 257 laws: must be at most 256",
        ),
        (
            "devices.0.accelerators.0.products",
            [LAW] * (MAX_LAWS + 1),
            "devices[0].accelerators[0].products has 257 laws: must be at most 256",
        ),
        (
            "devices.0.accelerators",
            [HAND["devices"][0]["accelerators"][0] | {"name": f"gpu {place}"} for place in range(65)],
            "devices[0].accelerators: there are 65, must be at most 64",
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_line(path: str, value: Any, said: str) -> None:
    with pytest.raises(DaemonError) as caught:
        parse(changed(path, value))
    assert said in caught.value.message
    assert caught.value.message.startswith("p.json: ")
    assert "\n" not in caught.value.message
    assert caught.value.code == "bad_request"


def test_a_field_that_stands_twice_is_refused() -> None:
    with pytest.raises(DaemonError, match="flops stands twice in one object"):
        parse(json.dumps(HAND).replace('"flops": 100000000000.0', '"flops": 1e11, "flops": 1e12').encode())


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b'{"devices":' + b"[" * 900 + b"]" * 900 + b"}",
        b"3",
        b'"x"',
        b"null",
        b"[" * 100_000,
        b"\xff\xfe",
        b'{"devices": 3}',
    ],
)
def test_what_is_no_profile_at_all(text: bytes) -> None:
    with pytest.raises(DaemonError) as caught:
        parse(text)
    assert caught.value.code == "bad_request"
    assert len(caught.value.message) < 400


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DaemonError, match="cannot read"):
        read_profile(tmp_path / "none.json")
    with pytest.raises(DaemonError):
        read_profile(tmp_path)


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["name", "flops", "x"]), inner)
    ),
    max_leaves=5,
)


_PLACES = [
    "devices",
    "devices.0",
    "devices.0.name",
    "devices.0.reads",
    "devices.1.overheads",
    "links.0",
    "links.0.between",
    "devices.0.attention",
    "devices.0.accelerators.0.name",
]


@given(st.sampled_from(_PLACES), _VALUES)
def test_any_value_in_any_place_is_a_profile_or_one_line(path: str, value: Any) -> None:
    made: Any = json.loads(json.dumps(HAND))
    at, steps = made, path.split(".")
    for step in steps[:-1]:
        at = at[int(step)] if step.isdigit() else at[step]
    at[int(steps[-1]) if steps[-1].isdigit() else steps[-1]] = value
    said = "p.json: "
    try:
        parse(json.dumps(made).encode())
    except DaemonError as error:
        said = error.message
    assert said.startswith("p.json: ")
    assert "\n" not in said


def test_what_copies_leave_of_other_speeds_is_said_if_it_is_known() -> None:
    assert "beside its copies" not in dict(device_facts(parse(json.dumps(HAND).encode()).head))
    keeps = {"host_keeps": 0.7, "device_keeps": 0.85, "link_keeps": 0.95}
    head = parse(changed("devices.0.accelerators.0.contention", keeps)).head
    name = head.accelerators[0].name
    said = f"the processor keeps 70%, {name} 85%, and the link 95%"
    assert dict(device_facts(head))["beside its copies"] == said


def test_each_table_of_weights_is_shown_in_a_row_of_its_own() -> None:
    laws = [RowsLaw("Q4_K", 8e6, (1, 64), (1e-10, 2e-10), bits) for bits in (16, 8)]
    laws.append(RowsLaw("Q4_K", 8e6, (1, 64), (1e-10, 2e-10), experts=True))
    columns, rows = rows_table(replace(parse(changed("links", [])).head, products=tuple(laws)))
    assert columns[2] == "inputs"
    assert [row[2] for row in rows] == ["16 bits", "8 bits", "16 bits"]
    assert len({tuple(row) for row in rows}) == 3
    assert {len(row) for row in rows} == {len(columns)}


def test_files_of_before_are_read() -> None:
    """`shoal profile --out` wrote what networks had taught, which nothing ever did."""
    found = parse(changed("devices.0.corrections", {"memory": 1.1, "network": 1.0}))
    assert found.head.corrections.memory == 1.1
