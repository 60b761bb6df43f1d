"""Machines are known by tables of their kernels where there are some, and else by two speeds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest
from fakes.throughput.throughput_cases import device, spec, weighed

from shoal.daemon.cluster.choosing.known_machines import known_machines
from shoal.daemon.cluster.control_messages import Attach
from shoal.daemon.cluster.member import Member
from shoal.daemon.cluster.speed import NodeSpeed
from shoal.partition.machines import Machine, StepRows
from shoal.partition.rank_sizes import Portion
from shoal.partition.throughput.profile import Device, RowsLaw
from shoal.partition.throughput.rank_laws import RankLaws

MODEL = weighed(spec())
TABLES = (RowsLaw("BF16", 1e6, (1, 64), (6e-11, 3e-10)),)
MEASURED = device(products=TABLES, measured=True)
SPEEDS = {"": NodeSpeed(20e9, 200e9), "w": NodeSpeed(10e9, 50e9, 1e9)}


class Channel:
    """As much of one as a member needs that is never heard."""

    peer = "w"

    class agreed:  # noqa: N801
        features = frozenset[str]()

    def send_message(self, message: object) -> None: ...


def member(its: Device | None = None) -> Member:
    attach = Attach(name="pi", version="1", kernels="k", threads=4, memory_bytes=1 << 30, device=its)
    return Member(cast(Any, Channel()), attach, lambda *_: None, lambda: 0.0)


def known(own: Device | None, its: Device | None = None) -> list[Machine]:
    return known_machines(own, [member(its)], [10, 20], 2, SPEEDS, MODEL)


def layers_s(machine: Machine) -> float:
    assert machine.laws is not None
    found = machine.laws.times(Portion.even(MODEL.spec, 1.0), StepRows(1, 1.0), 1.0)
    return found.attn_s + found.ffn_s


def test_where_this_machine_was_not_measured_two_speeds_count() -> None:
    for own in (None, device(products=TABLES), replace(MEASURED, products=())):
        head, worker = known(own, MEASURED)
        assert (head.laws, worker.laws) == (None, None)
        assert (head.memory_bytes, worker.memory_bytes, worker.threads) == (10, 20, 4)
        assert (worker.memory_bytes_per_s, worker.flops, worker.disk_bytes_per_s) == (10e9, 50e9, 1e9)


def test_a_worker_has_its_own_tables_or_those_of_this_machine_as_many_times_as_fast() -> None:
    slow = replace(MEASURED, products=(RowsLaw("BF16", 1e6, (1, 64), (6e-10, 3e-9)),))
    head, worker = known(MEASURED, slow)
    assert layers_s(worker) == pytest.approx(10 * layers_s(head), rel=0.02)
    head, worker = known(MEASURED)
    # A byte takes 60 ps: 50 of them are reading, which takes twice as long there, and computing four times.
    assert layers_s(worker) == pytest.approx(140 / 60 * layers_s(head), rel=0.02)
    assert isinstance(worker.laws, RankLaws)


def test_what_cannot_be_true_of_kernels_is_not_used() -> None:
    for wrong in (
        replace(MEASURED, products=(RowsLaw("BF16", 1e6, (1, 64), (6e-11, float("nan"))),)),
        replace(MEASURED, products=(RowsLaw("BF16", 1e6, (64, 1), (6e-11, 3e-10)),)),
        replace(MEASURED, flops=0.0),
    ):
        assert member(wrong).device is None
    assert member(MEASURED).device == MEASURED
    assert member(replace(MEASURED, products=())).device is None
