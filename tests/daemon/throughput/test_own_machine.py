"""What a daemon knows of its machine: read, measured between requests, corrected, and kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

import shoal.comm.home
from shoal import kernels
from shoal.comm.home import Home
from shoal.daemon.throughput import (
    attention_laws,
    brief_profile,
    cache_laws,
    drift,
    fixed_costs,
    kept_profile,
    kernel_laws,
    own_machine,
)
from shoal.daemon.throughput.drift import Looked
from shoal.daemon.throughput.kept_profile import Kept, profile_key, read_kept, write_kept
from shoal.daemon.throughput.own_machine import OwnMachine, profile_file
from shoal.partition.throughput.prediction import Binding
from shoal.partition.throughput.profile import (
    CORRECTED,
    Device,
    Profile,
    ReadLaw,
    RingLaw,
    RowsLaw,
    unmeasured,
)
from shoal.partition.throughput.profile_checks import check_profile

PARTS = {"memory": 3.0, "compute": 1.0, "disk": 0.0, "link": 0.0, "overhead": 0.0}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = tuple(size._replace(nbytes=64 << 10, cols=256) for size in kernel_laws.SIZES)
    for module, name, value in (
        (kernel_laws, "CELL_S", 0.0),
        (kernel_laws, "CALLS", 3),
        (kernel_laws, "ROWS", (1, 8)),
        (kernel_laws, "SIZES", sizes),
        (kernel_laws, "POOL_BYTES", 8 << 20),
        (kernel_laws, "MOST_POOL_BYTES", 8 << 20),
        (cache_laws, "KEPT_BYTES", 1 << 20),
        (cache_laws, "SIZES", sizes),
        (attention_laws, "CONTEXTS", (64, 256)),
        (kernel_laws, "PASSING_BYTES", 1 << 16),
        (fixed_costs, "ANSWER_TOKENS", 8),
        (fixed_costs, "SWEEPS", (fixed_costs._Sweep(32 << 10),)),
        (fixed_costs, "LONG_S", (1e-4,)),
        (fixed_costs, "MANY", 4),
        (own_machine, "RESTED_S", 0.0),
        (own_machine, "ATTEMPTS_S", 0.0),
        (own_machine, "CONFIRMING_S", 0.0),
        (brief_profile, "others_compute", lambda threads: False),
    ):
        monkeypatch.setattr(module, name, value)


def looked(machine: OwnMachine, *kinds: str, idle: bool = True) -> None:
    machine.look(lambda: idle, lambda: kinds)
    if (thread := machine._measuring) is not None:
        thread.join(30)


@pytest.mark.parametrize("key", ["3 | ", f"{kept_profile.FORM} | another version of the kernels"])
def test_what_does_not_hold_any_more_is_replaced(tmp_path: Path, quick: None, key: str) -> None:
    """Also by something brief: nobody else would read it."""
    kept = tmp_path / "profile.json"
    write_kept(kept, key, Kept(Profile((replace(unmeasured(1, 1e9), measured=True),))))
    machine = OwnMachine(1, kept, tmp_path)
    assert not machine.device.measured
    looked(machine, "Q8_0")
    assert machine.device.measured
    assert OwnMachine(1, kept, tmp_path).device == machine.device


def test_it_is_measured_between_requests_and_kept(tmp_path: Path, quick: None) -> None:
    kept = tmp_path / "profile.json"
    machine = OwnMachine(1, kept, tmp_path)
    assert not machine.device.measured
    looked(machine, "Q8_0", idle=False)
    assert not kept.exists()
    looked(machine, "Q8_0")
    assert machine.device.measured
    assert {law.kind for law in machine.device.products} == {"Q8_0"}
    looked(machine, "Q8_0", "Q4_K")
    assert {law.kind for law in machine.device.products} == {"Q8_0", "Q4_K"}
    again = OwnMachine(1, kept, tmp_path)
    assert again.device == machine.device
    assert not OwnMachine(2, kept, tmp_path).device.measured
    found = read_kept(kept, profile_key(1, tmp_path))
    assert found is not None
    assert found.brief
    assert not found.settled
    check_profile(found.profile)


def test_measuring_stops_when_something_comes(tmp_path: Path, quick: None) -> None:
    answers = iter([True] * 4)
    machine = OwnMachine(1, tmp_path / "profile.json", tmp_path)
    machine.look(lambda: next(answers, False), lambda: ("Q4_K",))
    if machine._measuring is not None:
        machine._measuring.join(30)
    assert not machine.device.measured


def test_without_a_file_nothing_is_measured(quick: None) -> None:
    machine = OwnMachine(1)
    looked(machine, "Q4_K")
    assert not machine.device.measured


def test_corrections_follow_within_bounds_and_are_kept(tmp_path: Path) -> None:
    kept, key = tmp_path / "profile.json", profile_key(1, tmp_path)
    measured = replace(unmeasured(1, 1e9), measured=True)
    write_kept(kept, key, Kept(Profile((measured,))))
    machine = OwnMachine(1, kept, tmp_path)
    assert machine.device == measured
    for _ in range(100):
        machine.correct(PARTS, 9.0)  # type: ignore[arg-type]
    corrections = machine.device.corrections
    assert corrections.memory == corrections.compute == CORRECTED[1]
    assert corrections.disk == 1.0
    for _ in range(300):
        machine.correct(PARTS, 0.0)  # type: ignore[arg-type]
    assert machine.device.corrections.memory == CORRECTED[0]
    machine.save()
    assert OwnMachine(1, kept, tmp_path).device == machine.device


def test_what_somebody_measures_meanwhile_is_taken_and_not_overwritten(tmp_path: Path) -> None:
    kept, key = tmp_path / "profile.json", profile_key(1, tmp_path)
    first, second = (replace(unmeasured(1, 1e9), flops=flops, measured=True) for flops in (1e9, 2e9))
    write_kept(kept, key, Kept(Profile((first,))))
    machine = OwnMachine(1, kept, tmp_path)
    assert machine.device == first
    machine.correct(PARTS, 2.0)  # type: ignore[arg-type]
    write_kept(kept, key, Kept(Profile((second,))))
    machine.save()
    assert OwnMachine(1, kept, tmp_path).device == second
    assert machine.device == second


def test_a_file_that_is_damaged_is_as_none(tmp_path: Path) -> None:
    kept = tmp_path / "profile.json"
    for text in (b"", b"{", b"[]", b'{"key": 1, "profile": {}}', bytes(100)):
        kept.write_bytes(text)
        assert OwnMachine(1, kept, tmp_path).device == unmeasured(1)


def test_a_profile_is_kept_for_each_kernels_and_threads(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever tries other kernels or threads finds what was measured with the first ones again. A file of before that
    was so is let be."""
    home = Home(tmp_path)
    home.root.joinpath("profile.json").write_bytes(b'{"key": "7 | x86_64", "profile": {"devices": []}}')
    made = {}
    for name, threads in (("scalar", 1), ("scalar", 2), ("reference", 1)):
        monkeypatch.setattr(kernels, "home", lambda name=name: name)
        machine = OwnMachine.of(home, threads)
        assert not machine.device.measured
        looked(machine, "Q8_0")
        assert machine.device.measured
        made[name, threads] = machine.device
    assert len({device.products for device in made.values()}) == len(made)
    for (name, threads), device in made.items():
        monkeypatch.setattr(kernels, "home", lambda name=name: name)
        assert OwnMachine.of(home, threads).device == device
        assert profile_file(home, threads).parent == home.root


@pytest.fixture
def aged(tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch) -> Kept:
    """A profile of long ago, all of it measured by a machine as quick as this one."""
    monkeypatch.setattr(drift, "others_compute", lambda threads: False)
    machine = OwnMachine(1, tmp_path / "profile.json", tmp_path)
    looked(machine, "Q8_0")
    return Kept(Profile((machine.device,)), looked_s=1.0)


@pytest.fixture
def finding(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[drift.Looked]]:
    """Has looks find what it is given, the last of it again and again; returns the looks that were made."""

    def finds(*all: dict[Binding, float]) -> list[drift.Looked]:
        made: list[drift.Looked] = []

        def look(*_: object) -> drift.Looked:
            made.append(drift.Looked(all[min(len(made), len(all) - 1)]))
            return made[-1]

        monkeypatch.setattr(drift, "look_again", look)
        return made

    return finds


def slower(laws: tuple[RowsLaw, ...], times: float) -> tuple[RowsLaw, ...]:
    return tuple(replace(law, byte_s=tuple(times * it for it in law.byte_s)) for law in laws)


@pytest.mark.parametrize("times", [0.01, 100.0])
def test_what_has_changed_since_long_ago_is_taken_as_it_is_now(
    tmp_path: Path, aged: Kept, times: float, caplog: pytest.LogCaptureFixture
) -> None:
    kept, key, device = tmp_path / "profile.json", profile_key(1, tmp_path), aged.profile.head
    learnt = replace(device.corrections, memory=1.5, disk=1.5)
    was = replace(device, products=slower(device.products, times), corrections=learnt)
    write_kept(kept, key, replace(aged, profile=Profile((was,))))
    machine = OwnMachine(1, kept, tmp_path)
    assert machine.device == was
    with caplog.at_level("WARNING"):
        looked(machine, "Q8_0")
        assert machine.device == was, "a machine may have been slow for a moment"
        looked(machine, "Q8_0")
    now = machine.device
    assert now.products[-1].byte_s[0] == pytest.approx(device.products[-1].byte_s[0], rel=5)
    assert now.memory_bytes_per_s != was.memory_bytes_per_s
    assert (now.corrections.memory, now.corrections.disk) == (1.0, 1.5)
    found = read_kept(kept, key)
    assert found is not None
    assert "memory takes" in found.changed
    assert found.changed in caplog.text
    assert not found.settled  # whoever needs all of it measures
    assert found.looked_s > 1e9
    stands = kept.read_bytes()
    looked(machine, "Q8_0")
    assert kept.read_bytes() == stands


KINDS = pytest.mark.parametrize("kind", [{}, {"brief": True}, {"disturbed": True}], ids=str)


@KINDS
def test_what_is_kept_is_looked_at_when_a_daemon_begins_and_when_it_is_old(
    tmp_path: Path,
    aged: Kept,
    kind: dict[str, bool],
    finding: Callable[..., list[drift.Looked]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However it was measured, and were it an hour ago: since then a laptop may have been throttled."""
    kept, key = tmp_path / "profile.json", profile_key(1, tmp_path)
    write_kept(kept, key, replace(aged, looked_s=time.time() - 3600, **kind))
    looks = finding({})
    for begun in (1, 2):
        machine = OwnMachine(1, kept, tmp_path)
        for _ in range(3):
            looked(machine, "Q8_0")
        assert len(looks) == begun
    monkeypatch.setattr(own_machine, "AGED_S", 0.0)
    looked(machine, "Q8_0")
    assert len(looks) == 3


@KINDS
def test_a_machine_that_became_slower_becomes_quick_again(
    tmp_path: Path,
    aged: Kept,
    kind: dict[str, bool],
    finding: Callable[..., list[drift.Looked]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is looked at sooner than in a day, and not all the time."""
    kept, key, was = tmp_path / "profile.json", profile_key(1, tmp_path), aged.profile.head
    write_kept(kept, key, replace(aged, **kind))
    looks = finding({"memory": 2.0, "compute": 4.0})
    machine = OwnMachine(1, kept, tmp_path)
    for _ in range(4):
        looked(machine, "Q8_0")
    assert len(looks) == 2
    assert machine.device.memory_bytes_per_s == was.memory_bytes_per_s / 2
    found = read_kept(kept, key)
    assert found is not None
    assert found.drift == {"memory": 2.0, "compute": 4.0}
    assert not found.settled
    looks = finding({})
    write_kept(kept, key, replace(found, looked_s=time.time() - own_machine.SLOWER_S - 1))
    for _ in range(3):
        looked(machine, "Q8_0")
    assert len(looks) == 1
    found = read_kept(kept, key)
    assert found is not None
    assert "memory takes 2 times" in found.changed, "it is as slow as it was, not as it was measured"
    looks = finding({"memory": 0.5, "compute": 0.25})
    write_kept(kept, key, replace(found, looked_s=time.time() - own_machine.SLOWER_S - 1))
    for _ in range(4):
        looked(machine, "Q8_0")
    assert len(looks) == 2
    assert machine.device.products[0].byte_s == pytest.approx(was.products[0].byte_s)
    assert machine.device.memory_bytes_per_s == was.memory_bytes_per_s
    found = read_kept(kept, key)
    assert found is not None
    assert (found.drift, found.settled) == ({}, not kind)
    assert not found.slower


def test_further_types_do_not_make_what_is_known_younger(tmp_path: Path, aged: Kept) -> None:
    kept, key = tmp_path / "profile.json", profile_key(1, tmp_path)
    looked_s = time.time() - 60
    write_kept(kept, key, replace(aged, brief=True, looked_s=looked_s, drift={"disk": 2.0}))
    machine = OwnMachine(1, kept, tmp_path)
    machine._looked = True
    looked(machine, "F32")
    found = read_kept(kept, key)
    assert found is not None
    assert {law.kind for law in found.profile.head.products} == {"Q8_0", "F32"}
    assert (found.looked_s, found.drift) == (looked_s, {"disk": 2.0})


def test_what_was_measured_just_now_is_not_looked_at(
    tmp_path: Path, quick: None, finding: Callable[..., list[drift.Looked]]
) -> None:
    machine, looks = OwnMachine(1, tmp_path / "profile.json", tmp_path), finding({})
    for kinds in (("Q8_0",), ("Q8_0", "F32"), ("Q8_0", "F32")):
        looked(machine, *kinds)
    assert {law.kind for law in machine.device.products} == {"Q8_0", "F32"}
    assert not looks


def test_a_profile_that_somebody_wrote_while_this_measured_stays(
    tmp_path: Path, aged: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, key = tmp_path / "profile.json", profile_key(1, tmp_path)
    kept.unlink()
    machine = OwnMachine(1, kept, tmp_path)

    def measured(*_: object) -> Device:
        write_kept(kept, key, aged)
        assert machine.device == aged.profile.head  # somebody has asked
        return unmeasured(1)

    monkeypatch.setattr(brief_profile, "measure_briefly", measured)
    looked(machine, "Q8_0")
    assert read_kept(kept, key) == aged
    assert machine.device == aged.profile.head


def test_looking_again_stops_when_something_comes(tmp_path: Path, aged: Kept) -> None:
    kept, key = tmp_path / "profile.json", profile_key(1, tmp_path)
    write_kept(kept, key, aged)
    before = kept.read_bytes()
    machine, answers = OwnMachine(1, kept, tmp_path), iter([True] * 3)
    assert machine.device.measured
    machine.look(lambda: next(answers, False), lambda: ("Q8_0",))
    if (thread := machine._measuring) is not None:
        thread.join(30)
    assert kept.read_bytes() == before


def test_what_was_slow_for_a_moment_is_not_believed(
    tmp_path: Path, aged: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what has changed, what a second look sees, too, and no more of it than both."""
    kept, key = tmp_path / "profile.json", profile_key(1, tmp_path)
    write_kept(kept, key, aged)
    machine = OwnMachine(1, kept, tmp_path)
    before = machine.device
    looks = iter(
        [
            drift.Looked({"memory": 2.0, "compute": 3.0}, before.products),
            drift.Looked({"memory": 0.5}, before.products),
        ]
    )
    monkeypatch.setattr(drift, "look_again", lambda *_: next(looks))
    looked(machine, "Q8_0")
    assert read_kept(kept, key) == aged
    looked(machine, "Q8_0")
    assert machine.device == before
    found = read_kept(kept, key)
    assert found is not None
    assert (found.changed, found.settled) == ("", True)
    assert found.looked_s > 1e9
    both = drift.Looked({"memory": 2.0, "compute": 3.0, "disk": 1.5}, before.products)
    again = drift.Looked({"memory": 1.5, "compute": 4.0, "disk": 0.5}, before.products)
    assert again.also_in(both).changed == {"memory": 1.5, "compute": 3.0}


def test_a_suspicion_ends_with_the_profile_that_it_is_about(
    tmp_path: Path, aged: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, key = tmp_path / "profile.json", profile_key(1, tmp_path)
    write_kept(kept, key, aged)
    machine = OwnMachine(1, kept, tmp_path)
    slow = drift.Looked({"memory": 2.0}, machine.device.products)
    monkeypatch.setattr(drift, "look_again", lambda *_: slow)
    looked(machine, "Q8_0")
    anew = replace(aged.profile.head, memory_bytes_per_s=1e9)
    write_kept(kept, key, replace(aged, profile=Profile((anew,))))
    looked(machine, "Q8_0")
    assert machine.device == anew, "one look does not count"
    looked(machine, "Q8_0")
    assert machine.device.memory_bytes_per_s == pytest.approx(0.5e9)


def test_a_machine_that_is_as_it_was_has_not_changed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Tables of inputs of 8 bits are compared with such tables, and all sizes count, not the last one."""
    rows = (1, 64)
    wide = [RowsLaw("Q8_0", size, rows, (1e-10, 40e-10)) for size in (1e6, 8e6)]
    narrow = [RowsLaw("Q8_0", size, rows, (1e-10, 20e-10), 8) for size in (1e6, 8e6)]
    device = replace(unmeasured(1, 1e9), measured=True, products=(*wide, *narrow))
    laws = [*wide, *narrow]
    monkeypatch.setattr(drift, "others_compute", lambda threads: False)
    monkeypatch.setattr(drift, "table_rounds", lambda *_: [laws] * 3)
    found = drift.look_again(device, tmp_path, ["Q8_0"], lambda: True)
    assert found is not None
    assert not found.changed
    laws = [*wide, narrow[0], *slower((narrow[1],), 3.0)]
    odd = drift.look_again(device, tmp_path, ["Q8_0"], lambda: True)
    assert odd is not None
    assert not odd.changed, "one of four"
    laws = list(slower((*wide, *narrow), 1.5))
    slow = drift.look_again(device, tmp_path, ["Q8_0"], lambda: True)
    assert slow is not None
    assert slow.changed == pytest.approx({"memory": 1.5, "compute": 1.5})


def test_others_that_began_meanwhile_spoil_a_look(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, aged: Kept
) -> None:
    answers = iter([False, True])
    monkeypatch.setattr(drift, "others_compute", lambda threads: next(answers))
    assert drift.look_again(aged.profile.head, tmp_path, ["Q8_0"], lambda: True) is None


def test_rounds_that_differ_as_much_tell_nothing() -> None:
    assert drift._changed("memory", [1.3, 1.3, 1.35]) == {"memory": 1.3}
    assert drift._changed("memory", [0.5, 0.5, 0.5]) == {"memory": 0.5}
    assert drift._changed("memory", [1.0, 1.3, 1.5]) == {}
    assert drift._changed("memory", [1.1, 1.1, 1.1]) == {}
    assert drift._changed("disk", []) == {}


def test_a_disk_that_seems_quicker_is_not_believed_and_a_slower_one_is() -> None:
    """What lies behind a disk may have kept what was read lately. One that had become slower may be as it was."""
    assert drift._changed_disk([1.5, 1.5, 1.5], 1.0) == {"disk": 1.5}
    assert drift._changed_disk([0.5, 0.5, 0.5], 1.0) == {}
    assert drift._changed_disk([], 1.0) == {}
    assert drift._changed_disk([0.8, 0.8, 0.8], 2.0) == {"disk": 0.8}
    assert drift._changed_disk([0.3, 0.3, 0.3], 2.0) == {"disk": 0.5}


def test_a_disk_has_changed_for_all_blocks_and_rings() -> None:
    reads = ReadLaw((1, 2), (1e9, 2e9), RingLaw((3,), (3e9,)))
    device = replace(unmeasured(1, 1e9), disk_bytes_per_s=2e9, reads=reads)
    slow = drift.Looked({"disk": 2.0}).applied(device)
    assert slow.reads == ReadLaw((1, 2), (0.5e9, 1e9), RingLaw((3,), (1.5e9,)))
    assert slow.disk_bytes_per_s == 1e9
    assert drift.Looked({"disk": 0.5}).applied(slow) == device


def test_tables_that_were_not_looked_at_have_changed_as_much() -> None:
    """Reading takes twice as long and computing three times: of two units for a byte, one is reading."""
    device = replace(unmeasured(1, 1e9), memory_bytes_per_s=1e9, flops=6e9)
    laws = [RowsLaw(kind, 1e6, (1, 64), (1e-9, 2e-9)) for kind in ("Q4_K", "Q6_K")]
    before = replace(device, products=tuple(laws))
    now = RowsLaw("Q4_K", 1e6, (1, 64), (7e-9, 8e-9))
    found = drift.Looked({"memory": 2.0, "compute": 3.0}, (now,)).applied(before)
    assert {law.kind: law.byte_s for law in found.products} == {
        "Q4_K": now.byte_s,
        "Q6_K": pytest.approx((2e-9, 5e-9)),
    }
    assert (found.memory_bytes_per_s, found.flops) == (0.5e9, 2e9)


def test_it_is_asked_between_any_two_points_whether_something_is_to_be_done(
    tmp_path: Path, aged: Kept
) -> None:
    points = len(kernel_laws.SIZES) * len(kernel_laws.ROWS)
    asked = 0

    def idle() -> bool:
        nonlocal asked
        asked += 1
        return True

    found = drift.look_again(aged.profile.head, tmp_path, ["Q8_0"], idle)
    assert found is not None
    assert asked >= kernel_laws.ROUNDS * points


def test_an_attempt_that_failed_is_not_made_again_soon(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(brief_profile, "measure_briefly", fail)
    machine = OwnMachine(1, tmp_path / "profile.json", tmp_path)
    for _ in range(3):
        looked(machine, "Q8_0")
    assert caplog.text.count("could not be measured") == 1
    monkeypatch.setattr(own_machine, "FAILED_S", 0.0)
    machine._next_s = 0.0
    for _ in range(2):
        looked(machine, "Q8_0")
    assert caplog.text.count("could not be measured") == 3


@pytest.mark.parametrize("apart", [False, True])
def test_the_disk_that_counts_is_the_one_of_packs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, apart: bool
) -> None:
    """All that streams comes from packs. On the same disk, models are there to be read before any pack is."""
    home = Home(tmp_path)
    disks = {home.packs: 1, home.models: 2 if apart else 1}
    monkeypatch.setattr(shoal.comm.home, "disk_of", disks.get)
    assert OwnMachine.of(home, 1)._place == (home.packs if apart else home.models)


def test_small_drifts_are_not_forgotten_as_they_stand_in_the_figures() -> None:
    """A disk takes half as long again, comes back but for a fifth, and so on: that is what is believed of it, and that
    it has changed."""
    drift: Mapping[Binding, float] = {}
    true = 1.0
    for times in (1.5, 1.19 / 1.5) * 3:
        drift = Looked({"disk": times}).since_measured(drift)
        true *= times
    assert drift["disk"] == pytest.approx(true)
    kept = Kept(Profile((unmeasured(1, 1e9),)), drift=drift)
    assert (kept.settled, kept.slower) == (False, True)
    little = Kept(Profile((unmeasured(1, 1e9),)), drift={"disk": 1.1})
    assert (little.settled, little.slower, little.changed) == (True, False, "")
    assert Looked({"disk": 1 / true}).since_measured(drift) == {}


@pytest.mark.parametrize("text", ["", "{", '{"key":1}', '{"key":"\\ud800"}', '{"x":' + "[" * 100_000])
def test_a_file_that_is_no_profile_is_as_none(text: str, tmp_path: Path) -> None:
    (kept := tmp_path / "profile.json").write_text(text)
    assert read_kept(kept, profile_key(1, tmp_path)) is None
    assert not OwnMachine(1, kept, tmp_path).device.measured
