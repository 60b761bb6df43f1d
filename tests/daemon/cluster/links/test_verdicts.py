"""What figures of links mean: each kind of trouble has its verdict, and the costliest member is named."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.comm.cluster_messages import LinkStatus
from shoal.daemon.cluster.links.verdicts import culprit, judged
from shoal.partition.amounts import format_delay

CABLE = LinkStatus(
    name="cable", trips=200, rtt_s=4e-4, rtt_p99_s=9e-4, to_bytes_per_s=1.1e8, from_bytes_per_s=1.1e8
)


def link(name: str = "pi3", **changed: Any) -> LinkStatus:
    fields = {field: getattr(CABLE, field) for field in CABLE.__struct_fields__}
    return LinkStatus(**{**fields, "name": name, **changed})


TROUBLES = [
    ("far", {"rtt_s": 0.054, "rtt_p99_s": 0.07}, "54 ms there and back, 135 times the others"),
    ("far", {"rtt_s": 0.0031}, "3.1 ms there and back, 8 times the others"),
    ("thin", {"to_bytes_per_s": 1e6}, "1 MB/s to it, 17 ms for every sum"),
    ("thin", {"from_bytes_per_s": 2e6}, "2 MB/s from it, 8.3 ms for every sum"),
    ("unsteady", {"rtt_p99_s": 0.08}, "one message of a hundred takes 80 ms, the others 0.4 ms"),
    (
        "computes slowly",
        {"waits": 64, "wait_s": 0.03, "longest_wait_s": 0.05, "part_bytes": 16384},
        "the head waits 30 ms for each of its parts, and its link takes 0.7 ms of that",
    ),
    ("good", {"waits": 3, "wait_s": 0.03}, ""),
    ("good", {"waits": 64, "wait_s": 0.3, "part_bytes": 8 << 20}, ""),  # of a prompt: the link explains it
    ("lost", {"rtt_s": 0.0, "why": "it was forgotten"}, "it was forgotten"),
]


@pytest.mark.parametrize(("verdict", "changed", "why"), TROUBLES)
def test_each_trouble_has_its_verdict(verdict: str, changed: dict[str, Any], why: str) -> None:
    links = judged([CABLE, link(**changed), link("other")])
    assert [it.verdict for it in links] == ["good", verdict, "good"]
    assert links[1].why == why
    name, said = culprit(links)
    if verdict == "good":
        assert (name, said) == ("", "no member stands out")
    else:
        assert name == "pi3"
        assert why in said


def test_of_several_the_costliest_is_named() -> None:
    links = judged([CABLE, link("far", rtt_s=0.054), link("thin", to_bytes_per_s=1e6)])
    assert culprit(links)[0] == "far"
    links = judged([CABLE, link("far", rtt_s=0.005), link("thin", to_bytes_per_s=1e5)])
    assert culprit(links)[0] == "thin"


def test_one_member_has_no_others_to_be_compared_with() -> None:
    assert judged([link(rtt_s=0.054)])[0].why == "54 ms there and back"
    assert culprit(judged([CABLE])) == ("", "nothing is wrong with it")


def test_all_equally_far_are_far_and_none_is_times_the_others() -> None:
    links = judged([link("a", rtt_s=0.005), link("b", rtt_s=0.006)])
    assert [it.why for it in links] == ["5 ms there and back", "6 ms there and back"]
    assert culprit(links)[0] == "b"


AMOUNTS = st.floats(0, 1e12)
LINKS = st.builds(
    LinkStatus,
    name=st.just("n"),
    rtt_s=AMOUNTS,
    rtt_p99_s=AMOUNTS,
    to_bytes_per_s=AMOUNTS,
    from_bytes_per_s=AMOUNTS,
    waits=st.integers(0, 64),
    wait_s=AMOUNTS,
    part_bytes=st.integers(0, 1 << 40),
)


@given(st.lists(LINKS, max_size=5))
def test_any_figures_have_a_verdict(links: list[LinkStatus]) -> None:
    found = judged(links)
    name, why = culprit(found)
    assert why
    assert bool(name) == any(it.verdict != "good" for it in found)


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.00021, "0.21 ms"), (0.00996, "10 ms"), (0.054, "54 ms"), (1.23, "1.2 s")]
)
def test_delays_as_people_read_them(seconds: float, said: str) -> None:
    assert format_delay(seconds) == said
