"""Shares stay as they were while machines are measured to be nearly as quick as before."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path

import pytest
from fakes.group.group_cases import block_bytes, model, wanted

from shoal.daemon.cluster.speed import STARTS, NodeSpeed
from shoal.daemon.cluster.steady_shares import MOST_KEPT, SteadyShares, UsedCut
from shoal.partition.group_choice import Choice, KeptCut
from shoal.partition.group_search import choose
from shoal.partition.machines import LinkSpeed, Machine

SPEC = model()
WANTED = wanted(SPEC)
SIZES = block_bytes(SPEC)
LINK = LinkSpeed(2e-5, 1e9)
WORKERS = ("a", "b")
USED = KeptCut((128, 77, 51), "columns")


def cut(
    model: str = "m", shares: tuple[float, ...] = USED.shares, there: tuple[str, ...] = WORKERS
) -> UsedCut:
    return UsedCut(model, WORKERS, shares, "columns", there)


def start(path: Path, measured: Mapping[str, NodeSpeed]) -> tuple[float, ...]:
    """A head with workers, all new processes: the shares of its model."""
    steady, workers = SteadyShares(path), sorted(set(measured) - {""})
    speeds = steady.speeds(measured)
    machines = [
        Machine(who or "head", 1 << 34, it.memory_bytes_per_s, it.flops, it.disk_bytes_per_s)
        for who in ("", *workers)
        for it in [speeds[who]]
    ]
    links = {(0, place): LINK for place in range(1, len(machines))}
    ranks = len(machines)
    found = choose(WANTED, SIZES, machines, links, ranks=ranks, kept=steady.cuts("m", workers))
    assert isinstance(found, Choice)
    steady.use(speeds, UsedCut("m", tuple(workers), found.shares, found.experts, tuple(workers)))
    return found.shares


def wobbling(
    true: Mapping[str, float], seed: int, best: dict[str, NodeSpeed], measured: int
) -> dict[str, NodeSpeed]:
    """What machines say at a start: every figure up to 30% off, the best of all so far. `true`: times usual speed."""
    luck = random.Random(seed)
    for who, pace in true.items():
        memory, flops = (max(0.7, min(1.3, luck.gauss(1, 0.3))) * pace * it for it in (1e10, 2e11))
        so_far = best.get(who, NodeSpeed(0, 0))
        best[who] = NodeSpeed(
            max(memory, so_far.memory_bytes_per_s), max(flops, so_far.flops), 1e9, min(STARTS, measured)
        )
    return dict(best)


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("seed", range(6))
def test_starts_whose_speeds_wobble_give_the_same_cut(workers: int, seed: int, tmp_path: Path) -> None:
    who = ["", *"abcd"[:workers]]
    best: dict[str, NodeSpeed] = {}
    found = [
        start(tmp_path / "shares.json", wobbling(dict.fromkeys(who, 1.0), 100 * seed + number, best, number))
        for number in range(1, 5)
    ]
    assert len(set(found)) == 1


@pytest.mark.parametrize("seed", range(6))
def test_a_machine_that_is_three_times_slower_has_it_cut_anew_once(seed: int, tmp_path: Path) -> None:
    path, best = tmp_path / "shares.json", dict[str, NodeSpeed]()
    before = [start(path, wobbling({"": 1, "a": 1}, 100 * seed + number, best, number)) for number in (1, 2)]
    del best["a"]
    slow = {"": 1.0, "a": 1 / 3}
    after = [start(path, wobbling(slow, 100 * seed + 9 + number, best, number)) for number in range(1, 5)]
    assert len(set(before)) == len(set(after)) == 1
    assert after[0][1] < 0.7 * before[0][1]


def test_what_was_measured_long_enough_counts(tmp_path: Path) -> None:
    """Two machines that looked alike turn out to be 1.5 and 1: that is a fifth of the time, and no mistake any more."""
    path = tmp_path / "shares.json"
    alike = {who: NodeSpeed(1e10, 2e11, 1e9) for who in ("", "a")}
    first = start(path, alike)
    better = alike | {"a": NodeSpeed(1.5e10, 3e11, 1e9, STARTS - 1)}
    assert start(path, better) == first
    settled = {who: NodeSpeed(it.memory_bytes_per_s, it.flops, 1e9, STARTS) for who, it in better.items()}
    assert start(path, settled)[1] > 1.15 * first[1]
    slightly = settled | {"a": NodeSpeed(1.7e10, 3.4e11, 1e9, STARTS)}
    assert start(path, slightly) == start(path, settled), "less than a tenth of the time"


def test_which_cut_is_the_last(tmp_path: Path) -> None:
    steady = SteadyShares(tmp_path / "shares.json")
    steady.use({}, cut())
    again = SteadyShares(tmp_path / "shares.json")
    assert again.cuts("m", ["a", "b"]) == ({(0, 1, 2): USED}, (0, 1, 2))
    assert again.cuts("m", ["a", "b", "c"]) == ({(0, 1, 2): USED}, None), "another machine is there"
    assert again.cuts("m", ["a0", "a", "b"]) == ({(0, 2, 3): USED}, None)
    assert again.cuts("m", ["a"]) == again.cuts("n", ["a", "b"]) == ({}, None)
    again.use({}, UsedCut("m", ("b",), (1, 1), "whole", WORKERS))
    assert again.cuts("m", ["a", "b"]) == ({(0, 1, 2): USED, (0, 2): KeptCut((1, 1), "whole")}, (0, 2))
    again.use({}, cut())
    assert again.cuts("m", ["a", "b"]).last == (0, 1, 2)
    again.use({}, UsedCut("m", ("b",), (1, 1), "columns", WORKERS, "prompts"))
    assert again.cuts("m", ["a", "b"]).by_places[0, 2] == KeptCut((1, 1), "columns", "prompts")


def test_a_number_of_ranks_that_is_asked_for_is_more_than_what_is_kept(tmp_path: Path) -> None:
    """Though the last cut, of other machines, is as good or better."""
    steady = SteadyShares(tmp_path / "shares.json")
    links = {(0, place): LINK for place in (1, 2)}

    def chosen(ranks: int | None, slow: float = 1.0, true: float = 1.0) -> tuple[str, ...]:
        machines = [Machine("head", 1 << 34, 1e10, 2e11, 1e9), Machine("a", 1 << 34, 1e10, 2e11, 1e9)]
        machines.append(Machine("b", 1 << 34, 1e10 * slow, 2e11 * slow * true, 1e9))
        found = choose(WANTED, SIZES, machines, links, ranks=ranks, kept=steady.cuts("m", WORKERS))
        assert isinstance(found, Choice)
        return tuple(rank.machine for rank in found.ranks)

    steady.use({}, UsedCut("m", ("a",), (1, 1), "columns", WORKERS))
    assert chosen(3, 0.05) == ("head", "a", "b")
    steady.use({}, UsedCut("m", WORKERS, (1, 1, 1), "columns", WORKERS))
    assert len(chosen(2)) == 2
    assert chosen(None) == ("head", "a", "b")
    assert "b" not in chosen(None, true=float("nan")), "what cannot be true is not used, kept or not"


@pytest.mark.parametrize("members", [("a", "a"), ("b", "a")])
def test_members_that_cannot_have_been_are_passed_over(members: tuple[str, ...], tmp_path: Path) -> None:
    steady = SteadyShares(tmp_path / "shares.json")
    steady.use({}, UsedCut("m", members, (1, 1, 1), "columns", WORKERS))
    assert steady.cuts("m", WORKERS) == ({}, None)


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"{",
        b"[]",
        b'{"cuts": [1]}',
        b"\xff\x00",
        b'{"m a b": [0.5, 0.5]}',
        b'{"x": ' + b"[" * 100_000,
        b'{"cuts": [{"model": "m", "members": ["a"], "shares": [1e999, 1], "experts": "columns"}]}',
    ],
)
def test_a_damaged_file_is_none(damage: bytes, tmp_path: Path) -> None:
    path = tmp_path / "shares.json"
    path.write_bytes(damage)
    steady = SteadyShares(path)
    assert steady.cuts("m", WORKERS) == ({}, None)
    steady.use({}, cut())
    assert steady.cuts("m", WORKERS).last == (0, 1, 2)


def test_what_cannot_be_kept_and_what_is_too_much(tmp_path: Path) -> None:
    SteadyShares(tmp_path / "nowhere" / "shares.json").use({}, cut())
    SteadyShares().use({}, cut())
    assert SteadyShares().cuts("m", WORKERS) == ({}, None)
    steady = SteadyShares(tmp_path / "shares.json")
    for number in range(MOST_KEPT + 1):
        steady.use({f"{number}": NodeSpeed(1e10, 1e11)}, cut(f"m{number}"))
    assert steady.cuts("m0", WORKERS) == ({}, None)
    assert steady.cuts("m1", WORKERS).last
    now = {who: NodeSpeed(1.2e10, 1e11) for who in ("0", "1")}
    assert [it.memory_bytes_per_s for it in steady.speeds(now).values()] == [1.2e10, 1e10]
