"""The errors of predictions: against floors that move, with cells that are void."""

from __future__ import annotations

from dataclasses import replace

import pytest
from foresight import fresh_share
from harness.cells import (
    Cell,
    Floors,
    Foretold,
    Measured,
    WithDisk,
    alternatives,
    memory_summary,
    percentile,
    ranked,
    summary,
    verdict,
)

from shoal.partition.throughput.prediction import Job

CELL = Cell("m.gguf", "keep", 2, 1, 128, 32)
FORETOLD = Foretold(CELL, "memory", 2.0, 0.1, (8.0, 12.0), 1000, "memory", Floors(40, 2))


def measured(token_s: float, before: float, after: float, peak: int = 1000) -> Measured:
    return Measured(CELL, 2.0, token_s, peak, Floors(before, 2), Floors(after, 2))


def test_a_slower_machine_is_no_error_of_the_prediction() -> None:
    found = verdict(FORETOLD, measured(0.2, 20, 20, 1030))
    assert found.token == pytest.approx(0)
    assert found.absolute == pytest.approx(1)
    assert found.within
    assert not found.void
    assert found.memory == pytest.approx(0.03)
    assert not verdict(FORETOLD, measured(0.2, 40, 40)).within


def test_only_what_reads_goes_with_the_floors() -> None:
    """Half of a token reads memory, which is half as quick now; the prompts compute."""
    found = replace(FORETOLD, parts={"memory": 0.05, "compute": 0.05}, prompt_parts={"compute": 2.0})
    there = verdict(found, measured(0.15, 20, 20))
    assert there.token == pytest.approx(0)
    assert there.ttft == pytest.approx(0)
    slower = replace(measured(0.15, 20, 20), before=Floors(20, 2, 50), after=Floors(20, 2, 50))
    found = replace(found, floors=Floors(40, 2, 100))
    assert verdict(found, slower).token == pytest.approx(-0.25)
    assert verdict(found, slower).ttft == pytest.approx(-0.5)


def test_fixed_costs_go_with_calls_where_these_were_probed() -> None:
    found = replace(FORETOLD, parts={"memory": 0.05, "overhead": 0.05}, floors=Floors(40, 2, 0, 30e3))
    slower = measured(0.15, 40, 40)
    assert verdict(found, slower).token == pytest.approx(0.5)
    now = Floors(40, 2, 0, 15e3)
    assert verdict(found, replace(slower, before=now, after=now)).token == pytest.approx(0)
    assert not found.void(replace(slower, before=now, after=now))
    assert found.void(replace(slower, before=now, after=Floors(40, 2, 0, 30e3)))
    unprobed = replace(found, floors=Floors(40, 2))
    assert verdict(unprobed, replace(slower, before=now, after=now)).token == pytest.approx(0.5)


def test_a_cell_that_streams_goes_with_the_disk_as_predicted() -> None:
    """Reading and computing go on beside each other: a token takes the longer."""
    disks = [WithDisk(times, max(2.0, 1.6 / times), max(0.1, 0.08 / times)) for times in (0.5, 0.8, 1.0, 2.0)]
    streamed = replace(FORETOLD, parts={"disk": 0.08, "memory": 0.1}, disks=disks)

    def token(seconds: float, dram: float, disk: float) -> float:
        now = Floors(dram, disk)
        return verdict(streamed, replace(measured(seconds, dram, dram), before=now, after=now)).token

    assert token(0.1, 40, 4) == pytest.approx(0)  # it hid behind computing already
    assert token(0.16, 40, 1) == pytest.approx(0)
    assert token(0.2, 20, 1) == pytest.approx(0)  # all is half as fast
    assert token(0.2, 20, 2) == pytest.approx(0)
    assert token(0.1, 40, 1) == pytest.approx(-0.375)
    assert streamed.void(Measured(CELL, 2.0, 0.1, 1, Floors(40, 2), Floors(40, 1)))
    assert not streamed.void(Measured(CELL, 2.0, 0.1, 1, Floors(40, 2), Floors(40, 4)))


def test_a_machine_that_changes_makes_a_cell_void() -> None:
    assert verdict(FORETOLD, measured(0.1, 40, 30)).void
    assert not verdict(FORETOLD, measured(0.1, 40, 37)).void
    other = Measured(CELL, 2.0, 0.1, 1, Floors(40, 2.0), Floors(10, 2.1))
    assert not replace(FORETOLD, binding="disk").void(other)
    assert not replace(FORETOLD, parts={"compute": 0.1, "memory": 0.01}).void(measured(0.1, 40, 30))
    assert FORETOLD.void(replace(measured(0.1, 40, 40), apart=0.2)), "its rounds differ"


def test_a_group_beside_which_others_compute_is_void() -> None:
    quiet = measured(0.1, 40, 40)
    busy = replace(quiet, others=0.5)
    group = CELL._replace(ranks=2)
    assert not FORETOLD.void(busy)
    assert replace(FORETOLD, cell=group).void(replace(busy, cell=group))
    assert not replace(FORETOLD, cell=group).void(replace(quiet, cell=group))


def test_what_counts() -> None:
    verdicts = [verdict(FORETOLD, measured(0.1 * factor, 40, 40)) for factor in (0.9, 1.0, 1.1, 1.5)]
    verdicts.append(verdict(FORETOLD, measured(9.0, 40, 10)))
    found = summary(verdicts, "token")
    assert found["cells"] == 4
    assert found["void"] == 1
    assert found["median"] == pytest.approx(0.1)
    assert found["90th percentile"] == pytest.approx(0.5)
    assert found["bias"] == pytest.approx(0.125)
    assert found["bands"] == 0.75
    assert summary([], "token") == {"cells": 0, "void": 0}
    assert percentile([], 0.9) == 0


def test_memory_may_be_a_little_more_than_said_and_rather_less() -> None:
    verdicts = [verdict(FORETOLD, measured(0.1, 40, 40, peak)) for peak in (960, 1000, 1010, 1030)]
    found = memory_summary([*verdicts, verdict(replace(FORETOLD, peak_bytes=0), measured(0.1, 40, 40))])
    assert found["cells"] == 4
    assert found["most over"] == pytest.approx(0.04)
    assert found["most under"] == pytest.approx(0.03)
    assert found["kept"] == 0.75
    assert memory_summary([]) == {"cells": 0}


def _ways(*took: tuple[float, float, float]) -> dict[str, float]:
    """Of ways to do one job that are predicted and measured to take so long for a token, and repeat within so much."""
    foretold, found = {}, []
    for threads, (predicted_s, measured_s, apart) in enumerate(took, 1):
        cell = CELL._replace(threads=threads)
        foretold[cell] = replace(FORETOLD, cell=cell, token_s=predicted_s, ttft_s=0.0)
        floors = Floors(40, 2), Floors(40, 2)
        found.append(Measured(cell, 0.0, measured_s, 1000, *floors, apart))
    return ranked(alternatives(foretold, found))


def test_a_choice_is_as_good_as_what_it_takes_against_the_best() -> None:
    found = _ways((1.0, 1.2, 0.0), (1.1, 1.0, 0.0), (3.0, 3.0, 0.0))
    assert found == {
        "pairs": 3,
        "ranks agree": pytest.approx(2 / 3),
        "jobs": 1,
        "regret median": pytest.approx(1.2),
        "regret worst": pytest.approx(1.2),
    }


def test_what_differs_by_less_than_noise_is_no_choice() -> None:
    found = _ways((1.0, 1.2, 0.1), (1.1, 1.0, 0.0))
    assert found["pairs"] == 0
    assert found["regret worst"] == 1.0
    assert ranked({}) == {"pairs": 0}


def test_ways_are_compared_as_with_the_same_floors() -> None:
    """Both took as long, but one of them while memory was half as quick: it is twice as good."""
    slow, other = CELL, CELL._replace(threads=1)
    foretold = {cell: replace(FORETOLD, cell=cell) for cell in (slow, other)}
    found = [
        Measured(slow, 2.0, 0.1, 1, Floors(20, 2), Floors(20, 2)),
        Measured(other, 2.0, 0.1, 1, Floors(40, 2), Floors(40, 2)),
        Measured(CELL._replace(batch=4), 2.0, 0.1, 1, Floors(40, 2), Floors(40, 2)),
    ]
    foretold[found[2].cell] = replace(FORETOLD, cell=found[2].cell)
    (each,) = alternatives(foretold, found).values()
    assert each[0].measured_s == pytest.approx(each[1].measured_s / 2)


def test_cells_are_summed_up_by_kind() -> None:
    kinds = [
        it.kind
        for it in (CELL, CELL._replace(batch=4), CELL._replace(memory=1), CELL._replace(memory=1, ranks=2))
    ]
    assert kinds == ["in memory, 1 stream", "in memory, 4 streams", "streamed", "groups"]


def test_later_rounds_find_pages_that_others_had() -> None:
    """Two texts of two pages each in a pool of nine: the second round of three takes the last one."""
    job = Job(100, 20, 2)
    assert fresh_share(16, job, 3) == 1.0
    assert fresh_share(9, job, 3) == 0.25
    assert fresh_share(4, job, 1) == 0.0
    assert fresh_share(8, Job(64, 1, 2), 3) == 1.0
