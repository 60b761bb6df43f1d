"""What sums cost: figures worked out by hand, and what holds for all links."""

from __future__ import annotations

import pytest
from fakes.group.group_cases import CABLE, WIFI, all_linked, machine
from hypothesis import given
from hypothesis import strategies as st

from shoal.partition.hardware_guesses import HANDED_S
from shoal.partition.machines import LinkSpeed
from shoal.partition.sum_cost import WIRE_BYTES, Means, Network, Topology, Wire

ROUNDS, HIDDEN = 64, 4096  # of a model of 8 billion weights


def network(ranks: int, link: LinkSpeed = CABLE) -> Network:
    return Network([machine(str(rank)) for rank in range(ranks)], all_linked(ranks, link), range(ranks))


@pytest.mark.parametrize(
    ("topology", "wire", "ms"), [("star", "f32", 63), ("exchange", "f32", 32), ("exchange", "int8", 13)]
)
def test_a_token_of_four_ranks(topology: Topology, wire: Wire, ms: float) -> None:
    """1 Gb/s, 0.2 ms there and back. A star: 6 messages of 16 KiB pass the hub's port, 0.79 ms, and a round trip; an
    exchange: 3 pass each port, and one way."""
    nbytes = WIRE_BYTES[wire] * HIDDEN
    assert 1000 * ROUNDS * network(4).network_s(topology, nbytes) == pytest.approx(ms, abs=0.6)


def test_a_prompt_of_four_ranks() -> None:
    """512 rows of 16 KiB: a star's hub passes on six times 8.4 MB for each sum, with slices each port one and a half
    times as much."""
    nbytes = 4 * HIDDEN * 512
    star, sliced = (ROUNDS * network(4).network_s(how, nbytes, 512) for how in ("star", "sliced"))  # type: ignore[arg-type]
    assert star == pytest.approx(26, abs=0.3)
    assert sliced == pytest.approx(6.4, abs=0.1)


def test_a_link_or_port_that_is_shared_is_the_limit() -> None:
    slow = machine("hub")._replace(port_bytes_per_s=25e6)
    links = all_linked(4, CABLE)
    hub = Network([slow, *[machine("spoke")] * 3], links, range(4))
    assert hub.network_s("star", 25e6) == pytest.approx(2 * (CABLE.latency_s + 3))
    one_far = Network([machine("a")] * 4, links | {(0, 2): WIFI}, range(4))
    assert one_far.network_s("star", 4e6) == pytest.approx(2 * (WIFI.latency_s + 1))
    assert one_far.broadcast_s(1, 10**6) >= WIFI.latency_s + 1


def test_what_a_topology_needs_to_know() -> None:
    three = [machine(str(rank)) for rank in range(3)]
    spokes = {(0, 1): CABLE, (0, 2): CABLE}
    star = Network(three, spokes, range(3))
    assert star.reached
    assert star.can("star")
    assert not star.can("exchange")
    assert not star.can("sliced")
    assert not Network(three, {(0, 1): CABLE}, range(3)).reached
    assert Network(three, {(1, 0): CABLE}, (0, 1)).reached, "links may be given in either order"


def test_rounding_for_the_wire_takes_time_too() -> None:
    """So on a fast link numbers travel as they are."""
    wires: tuple[Wire, ...] = ("f32", "bf16", "int8")
    fast = network(2, LinkSpeed(20e-6, 5e9))
    slow = network(2, LinkSpeed(20e-6, 5e6))
    assert min(wires, key=lambda wire: fast.sum_s(Means("star", wire), 1, HIDDEN)) == "f32"
    assert min(wires, key=lambda wire: slow.sum_s(Means("star", wire), 1, HIDDEN)) == "int8"


@given(
    ranks=st.integers(2, 6),
    topology=st.sampled_from(["star", "exchange", "sliced"]),
    wire=st.sampled_from(["f32", "bf16", "int8"]),
    rows=st.integers(1, 600),
    latency_s=st.floats(0, 0.1),
    bytes_per_s=st.floats(1e4, 1e10),
    faster=st.floats(1, 100),
)
def test_a_faster_link_and_fewer_rows_never_take_longer(
    ranks: int, topology: Topology, wire: Wire, rows: int, latency_s: float, bytes_per_s: float, faster: float
) -> None:
    means = Means(topology, wire)
    now = network(ranks, LinkSpeed(latency_s, bytes_per_s)).sum_s(means, rows, HIDDEN)
    assert network(ranks, LinkSpeed(latency_s / faster, bytes_per_s)).sum_s(means, rows, HIDDEN) <= now
    assert network(ranks, LinkSpeed(latency_s, bytes_per_s * faster)).sum_s(means, rows, HIDDEN) <= now
    assert network(ranks, LinkSpeed(latency_s, bytes_per_s)).sum_s(means, rows + 1, HIDDEN) >= now


def test_sums_of_many_rows_are_made_in_another_way_from_some_number_on() -> None:
    """The first power of two at which the way of prompts is no slower; where not all reach each other, the hub adds."""
    means = [Means(topology, "f32") for topology in ("exchange", "sliced", "star")]
    four = network(4)
    found = four.plan(means, 256, HIDDEN)
    assert found is not None
    assert (found.few.topology, found.many.topology) == ("exchange", "sliced")
    assert 1 < found.many_rows < 256
    for rows in (1, 4, 16, 64, 256):
        used = found.many if rows >= found.many_rows else found.few
        assert four.sum_s(used, rows, HIDDEN) <= 1.5 * min(four.sum_s(it, rows, HIDDEN) for it in means)
    known = {pair: link for pair, link in all_linked(4, CABLE).items() if 0 in pair}
    apart = Network([machine(str(rank)) for rank in range(4)], known, range(4)).plan(means, 256, HIDDEN)
    assert apart is not None
    assert (apart.few.topology, apart.many.topology) == ("star", "star")


def test_two_ranks_need_no_further_link_to_exchange() -> None:
    found = network(2).plan([Means("exchange", "f32"), Means("star", "f32")], 256, HIDDEN)
    assert found is not None
    assert found.few.topology == "exchange"


def test_bytes_are_work_as_far_as_no_wire_holds_them_up() -> None:
    """8 ns a byte: the wire's, but for 2 ns in which it is encrypted and copied. 1 ns: all of it is copying. Of slices,
    with three others, each rank sends a quarter of its rows to them, and their sum."""
    means, numbers, rows = Means("exchange", "f32"), 1000, 100
    nbytes = 4 * numbers * rows

    def passing_s(ranks: int, byte_s: float, means: Means = means) -> float:
        found = network(ranks, LinkSpeed(1e-3, 1 / byte_s))
        return found.busy_s(means, rows, numbers) - found.work_s(means, rows, numbers) - HANDED_S

    assert passing_s(2, 8e-9) == pytest.approx(nbytes * 2e-9)
    assert passing_s(2, 1e-9) == pytest.approx(nbytes * 1e-9)
    assert passing_s(4, 1e-9) == pytest.approx(3 * nbytes * 1e-9)
    assert passing_s(4, 1e-9, Means("sliced", "f32")) == pytest.approx(6 / 4 * nbytes * 1e-9)
    assert passing_s(4, 1e-9, Means("star", "f32")) == pytest.approx(3 * nbytes * 1e-9)
