"""Measuring this machine gives a profile that can be computed with and is kept; here with little of everything."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar, cast

import pytest
from fakes.throughput.throughput_cases import spec

from shoal.daemon.progress import Progress
from shoal.daemon.throughput import attention_laws, cache_laws, disk_laws, fixed_costs, kernel_laws, profiling
from shoal.daemon.throughput.profile_files import parse_profile, profile_text
from shoal.kernels import (
    WEIGHT_TYPES,
    ComputeHome,
    FeedForward,
    Linears,
    Routes,
    WeightType,
    home_of,
)
from shoal.kernels.arrays import Floats
from shoal.models.weights import Weights
from shoal.offload.block_store import Resident
from shoal.partition.spec import BlockId, MoeSpec
from shoal.partition.throughput.laws import attention, product
from shoal.partition.throughput.profile import (
    CacheLaw,
    Profile,
    Repeats,
    RowsLaw,
)
from shoal.partition.throughput.profile_checks import check_profile
from shoal.partition.throughput.weights_of import Product


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = tuple(kind for kind in WEIGHT_TYPES if kind.name in ("Q4_K", "F32"))
    sizes = tuple(size._replace(nbytes=64 << 10, cols=256) for size in kernel_laws.SIZES)
    for module, name, value in (
        (kernel_laws, "CELL_S", 0.0),
        (kernel_laws, "ROWS", (1, 8, 64)),
        (kernel_laws, "SIZES", sizes),
        (kernel_laws, "POOL_BYTES", 24 << 20),
        (kernel_laws, "MOST_POOL_BYTES", 24 << 20),
        (cache_laws, "KEPT_BYTES", 1 << 20),
        (cache_laws, "SIZES", sizes),
        (attention_laws, "CONTEXTS", (64, 256)),
        (kernel_laws, "PASSING_BYTES", 1 << 16),
        (profiling, "WEIGHT_TYPES", kinds),
        (disk_laws, "READ_S", 0.02),
        (disk_laws, "TURN_S", 0.03),
        (disk_laws, "WRITTEN_BYTES", 8 << 20),
        (fixed_costs, "ANSWER_TOKENS", 8),
        (fixed_costs, "MANY", 4),
        (fixed_costs, "SWEEPS", (fixed_costs._Sweep(32 << 10),)),
        (fixed_costs, "LONG_S", (1e-4,)),
    ):
        monkeypatch.setattr(module, name, value)


def test_what_is_measured_can_be_computed_with(tmp_path: Path) -> None:
    heard: list[tuple[int, int]] = []
    profile = profiling.measure(1, tmp_path / "models", lambda what, done, total: heard.append((done, total)))
    device = check_profile(profile).head
    assert device.measured
    assert {law.kind for law in device.products} == {"Q4_K", "F32"}
    assert {law.kv_type for law in device.attention} == {"f32", "f16", "bf16", "i8"}
    assert device.memory_bytes_per_s > 1e7
    assert device.disk_bytes_per_s > 0
    assert device.reads is not None
    assert device.write_bytes_per_s > 0
    assert 0 < device.overheads.layer_s < 1
    assert device.overheads.swept is not None
    assert len(device.overheads.swept.passing_s) == 2
    assert 0.05 <= device.contention.disk_keeps <= 1
    assert 0 < device.repeats.memory_apart <= 1
    assert device.overheads.stream_s >= 0
    one, many = (product(device, Product("Q4_K", 4096, 4096, 9 << 20), rows).seconds for rows in (1, 256))
    assert 0 < one < many
    assert heard[-1][0] == heard[-1][1]
    assert parse_profile(profile_text(profile), "p").head == device
    assert not list((tmp_path / "models").iterdir())
    assert attention(device, spec(), "i8", 1, 1000, None).seconds > 0


def test_it_is_kept_until_something_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, place = tmp_path / "profile.json", tmp_path / "models"
    monkeypatch.setattr(profiling, "others_compute", lambda threads: False)
    assert profiling.machine_profile(1, place, kept, only_kept=True) is None
    first = profiling.machine_profile(1, place, kept, memory_bytes=10**9)
    again = profiling.machine_profile(1, place, kept, memory_bytes=2 * 10**9, only_kept=True)
    assert first is not None
    assert again is not None
    assert again.head.products == first.head.products
    assert (first.head.memory_bytes, again.head.memory_bytes) == (1e9, 2e9)
    assert profiling.machine_profile(2, place, kept, only_kept=True) is None
    kept.write_text(kept.read_text().replace('"flops"', '"flop"'))
    assert profiling.machine_profile(1, place, kept, only_kept=True) is None


def test_the_speed_of_memory_is_that_of_several_types() -> None:
    """One that was lucky, some as they are, one that computes; small matrices lie in caches."""
    speeds = {20e6: (60e9, 30e9, 29e9, 28e9, 10e9), 1e6: (200e9,)}
    laws = [RowsLaw("*", size, (1,), (1 / it,)) for size, each in speeds.items() for it in each]
    assert kernel_laws.memory_bytes_per_s(laws) == pytest.approx(30e9)
    assert kernel_laws.memory_bytes_per_s(laws[:1]) == pytest.approx(60e9)


def test_measuring_ends_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "LIMIT_S", 0.0)
    profile = profiling.measure(1, tmp_path)
    assert {law.kind for law in profile.head.products} == {"Q4_K"}


class _Clock:
    """Time passes only where something is measured."""

    now_s = 1000.0

    def passing(self, monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str, seconds: float) -> None:
        """What the module calls so takes so long."""
        measured = getattr(module, name)

        def timed(*its: Any, **more: Any) -> Any:
            self.now_s += seconds
            return measured(*its, **more)

        monkeypatch.setattr(module, name, timed)


@pytest.mark.parametrize(
    ("table_s", "round_s", "kept_s", "kinds", "said"),
    [
        (1.0, 1.0, 0.5, 1, "what caches keep of F32 and others"),
        (7.0, 1.0, 1.0, 0, "what caches keep is left out"),
    ],
)
def test_measuring_ends_within_a_minute(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    table_s: float,
    round_s: float,
    kept_s: float,
    kinds: int,
    said: str,
) -> None:
    """On a machine so slow that each table takes so long, and each number of bytes that come round."""
    clock = _Clock()
    shown = SimpleNamespace(monotonic=lambda: clock.now_s)
    monkeypatch.setattr(profiling, "time", shown)
    monkeypatch.setattr(cache_laws, "_round_s", lambda home, x, each: float(len(each)))
    clock.passing(monkeypatch, kernel_laws, "table", table_s)
    clock.passing(monkeypatch, cache_laws, "_round_s", round_s)
    clock.passing(monkeypatch, cache_laws, "table", kept_s)
    profile = profiling.measure(1, tmp_path)
    assert clock.now_s - _Clock.now_s < 60
    caches = profile.head.caches
    assert len({law.kind for law in caches.products} if caches else ()) == kinds
    assert said in caplog.text


def test_what_others_disturbed_is_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = tmp_path / "profile.json"
    calls: list[object] = []
    measure = profiling.measure

    def counted(threads: int, place: Path, progress: Progress) -> Profile:
        calls.append(threads)
        return measure(threads, place, progress)

    monkeypatch.setattr(profiling, "measure", counted)
    for disturbed, times in ((True, 1), (True, 1), (False, 2), (False, 2), (True, 2)):
        monkeypatch.setattr(profiling, "others_compute", partial(_always, disturbed))
        profiling.machine_profile(1, tmp_path / "models", kept)
        assert len(calls) == times


def _always(answer: bool, threads: int) -> bool:
    return answer


def test_rounds_that_end_early_count_as_far_as_they_came() -> None:
    def law(kind: str, *byte_s: float) -> RowsLaw:
        return RowsLaw(kind, 1e6, (1, 64), byte_s)

    rounds = [
        [law("Q4_K", 1.0, 9.0), law("F32", 5.0, 5.0)],
        [law("Q4_K", 1.2, 10.0)],
        [law("Q4_K", 0.8, 11.0)],
    ]
    assert kernel_laws.middle(rounds) == (law("Q4_K", 1.0, 10.0), law("F32", 5.0, 5.0))
    assert kernel_laws.middle(rounds[:2]) == (law("Q4_K", 1.0, 9.0), law("F32", 5.0, 5.0))
    found = kernel_laws.kernel_repeats(rounds)
    assert found.memory_apart == pytest.approx(0.2)
    assert found.compute_apart == pytest.approx(0.1)
    assert kernel_laws.kernel_repeats(rounds[:1]) == Repeats()


def test_steps_have_what_few_calls_of_a_point_are_spared() -> None:
    """One round in three is held up, elsewhere each time: no median has it, the sum of a step does."""
    rounds = [
        [RowsLaw(f"T{kind}", 1e6, (1, 64), (1.6 if kind % 3 == number else 1.0, 10.0)) for kind in range(6)]
        for number in range(3)
    ]
    for law in kernel_laws.middle(rounds):
        assert law.byte_s == (pytest.approx(1.2), 10.0)


def test_a_round_that_was_slower_is_not_believed() -> None:
    rounds = [
        [RowsLaw(f"T{kind}", 1e6, (1, 64), (pace, pace)) for kind in range(5)] for pace in (1.0, 1.6, 1.0)
    ]
    assert {law.byte_s for law in kernel_laws.middle(rounds)} == {(1.0, 1.0)}


def test_a_point_counts_what_holds_calls_up_but_not_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    took = [0.001] * 8 + [0.0015, 0.5]
    clock = iter([0.0, *(it for one in took for it in (0.0, one)), 1e9])
    monkeypatch.setattr(kernel_laws, "CALLS", len(took))
    monkeypatch.setattr(kernel_laws.time, "perf_counter", lambda: next(clock))
    assert kernel_laws.usual_s(iter(lambda: list, None)) == pytest.approx((8 + 1.5 + 2) * 1e-4)


def test_small_matrices_with_narrow_inputs_have_tables() -> None:
    """An o of 207 KB took up to twice what the table of 1 MB said of it."""
    sizes = kernel_laws.narrow_sizes(next(kind for kind in WEIGHT_TYPES if kind.quantised))
    assert [it.name for it in sizes] == [it.name for it in kernel_laws.SIZES]
    assert {it.form for it in sizes} == {"linears"}


class _Reading:
    """A home that only counts the bytes of its products."""

    nbytes = 0

    def linears(self, x: Floats, all: Linears) -> None:
        self.nbytes += all.matrices[0].nbytes


def test_what_a_call_takes_by_itself_is_measured_behind_weights() -> None:
    """Else a table's weights would cost what a layer costs already: caches that its calls find swept."""
    cols = kernel_laws.SIZES[-1].cols

    class Home:
        columns: ClassVar[list[int]] = []

        def place(self, x: Floats) -> Floats:
            return x

        def linears(self, x: Floats, linears: Linears) -> None:
            assert x.shape[1] == linears.matrices[0].cols
            self.columns.append(x.shape[1])
            if self.columns[-3:-1] == [32, cols]:  # the one that counts: the clock shows that time passes
                time.sleep(1e-4)

    taken = kernel_laws.calls_s(cast(ComputeHome, Home()), kernel_laws.Pool(32 << 20))
    assert Home.columns == [32, cols, 32] * (len(Home.columns) // 3)
    assert len(taken) > 1
    assert min(taken.values()) >= 1e-4


def test_caches_are_swept_as_products_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread that reads all of the memory sweeps twice as much of its caches as a kernel on two threads."""
    reading = _Reading()
    monkeypatch.setattr(fixed_costs.kernels, "home_of", lambda device: reading)
    block = BlockId("attn", 0)
    sweeps = fixed_costs._sweeps(kernel_laws.Pool(1 << 20), 256 << 10)
    store = fixed_costs._Swept({block: Resident(Weights())}, sweeps)
    for times in (1, 2):
        with store.acquire(block):
            assert reading.nbytes == pytest.approx(times * (256 << 10), rel=0.2)
    assert store.swept_s > 0


def test_the_first_step_of_a_turn_does_not_count() -> None:
    steps = fixed_costs._Steps(2)
    for tokens, counted in ((3, 2), (1, 3), (2, 4)):
        steps.turn(tokens)
        assert len(steps.took) == counted


def test_how_long_a_layer_is_swept_is_measured() -> None:
    pool = kernel_laws.Pool(4 << 20)
    few, many = (fixed_costs._Steps(2, fixed_costs._Sweep(1 << 20, rows), pool) for rows in (1, 64))
    for steps in (few, many):
        steps.turn(3)
    assert (few.long, many.long) == (False, True)
    assert 0 < few.passing_s < many.passing_s


def test_whoever_comes_waits_for_one_turn_of_a_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[str] = []
    each: list[int] = []
    turn = fixed_costs._Steps.turn

    def counted(self: fixed_costs._Steps, tokens: int) -> None:
        each.append(len(said))
        turn(self, tokens)

    monkeypatch.setattr(fixed_costs._Steps, "turn", counted)
    fixed_costs.overheads(kernel_laws.Pool(8 << 20), said.append)
    made = fixed_costs.turns() - len(each)
    assert each == list(range(made + 1, fixed_costs.turns() + 1))
    assert made == 2 * (len(fixed_costs.SWEEPS) + len(fixed_costs.LONG_S)) + 6


class _SlowAtFirst:
    """A home that takes longer for weights that it never saw, and for so many rows that it never had."""

    def __init__(self) -> None:
        self.known: set[object] = set()
        self.rows: list[int] = []

    def place(self, x: Floats) -> Floats:
        return x

    def linears(self, x: Floats, linears: Linears) -> None:
        self._computed(x, linears)

    def feed_forward(self, x: Floats, layer: FeedForward) -> None:
        self._computed(x, layer)

    def experts(self, x: Floats, layers: list[FeedForward], routes: Routes, into: Floats) -> None:
        assert len(into) == len(x)
        rows = len(routes.tokens) // len(layers)
        assert not len(x) or max(routes.tokens) < len(x) <= kernel_laws.SPREAD * rows
        x = x[:rows]
        self._computed(x, *layers)

    def _computed(self, x: Floats, *its: object) -> None:
        new = [it for it in (*its, len(x)) if it not in self.known]
        self.known.update(its)
        if len(x) and x.shape[1] != kernel_laws.PASSING_COLUMNS:  # these are to be forgotten
            self.rows.append(len(x))
            self.known.add(len(x))
            time.sleep(0.02 * len(new) + 1e-4)


@pytest.mark.parametrize("size", kernel_laws.SIZES, ids=lambda size: size.name)
def test_what_calls_take_only_at_first_is_no_weight_s(size: kernel_laws.SizeClass) -> None:
    """Results of many rows lie in memory that is new, in the one call for which there is time: 63 ms instead of 34. And
    what a call works out about weights costs as much as a small matrix; models have done that long ago."""
    home, kind = _SlowAtFirst(), WEIGHT_TYPES[0]
    home.known.update((1, 8))
    calls = dict.fromkeys((64 << 10, 3 * (64 << 10), 3 * kernel_laws.EXPERTS * (64 << 10)), 0.0)
    size = size._replace(nbytes=64 << 10, cols=256)
    pool = kernel_laws.Pool(8 << 20)
    law = kernel_laws.table(cast(ComputeHome, home), pool, kind, size, 16, calls, lambda what: None)
    assert home.rows == [1, 8, 64, 64]
    times = [it * law.nbytes for it in law.byte_s]
    assert max(times) < 0.02


def test_a_point_has_enough_calls_at_some_time() -> None:
    calls: list[float] = []
    kernel_laws.usual_s(iter(lambda: partial(calls.append, 0.0), None))
    assert len(calls) == kernel_laws.CALLS  # there is no time here
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel_laws, "CELL_S", 60.0)
        kernel_laws.usual_s(iter(lambda: partial(calls.append, 0.0), None))
    assert len(calls) == kernel_laws.CALLS + kernel_laws.ENOUGH_CALLS


def test_with_most_rows_it_does_not_matter_where_weights_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    """So these are measured once. All of the tables have the same rows."""
    said: list[str] = []
    monkeypatch.setattr(cache_laws, "COMPUTED_ROWS", 64)
    law = _cache_law(monkeypatch, 1.0, 1.6, 1.5, 2.0, done=said.append)
    assert law is not None
    kinds = _kinds("Q4_K")
    measured = kernel_laws.table_points(kinds, 64)
    assert len([it for it in said if it.startswith("Q4_K")]) == measured < kernel_laws.table_points(kinds)
    assert {it.rows for it in law.products} == {(1, 8, 64), kernel_laws.NARROW_ROWS}
    for it in law.products:
        more = [byte_s for rows, byte_s in zip(it.rows, it.byte_s, strict=True) if rows >= 64]
        assert set(more) == {7.0}


def _kinds(name: str) -> list[WeightType]:
    return [kind for kind in WEIGHT_TYPES if kind.name == name]


def _cache_law(
    monkeypatch: pytest.MonkeyPatch, *seconds: float, done: Callable[[str], None] = lambda what: None
) -> CacheLaw | None:
    """If products take so long in rounds of 1 MiB and of parts of 24 MiB, and any from memory 7 seconds a byte."""
    kept = iter(seconds * kernel_laws.ROUNDS)
    monkeypatch.setattr(cache_laws, "PARTS", (1 / 4, 1 / 2, 1))
    monkeypatch.setattr(cache_laws, "_round_s", lambda home, x, each: next(kept))
    home, pool, kinds = home_of("cpu"), kernel_laws.Pool(), _kinds("Q4_K")
    measured, *_ = kernel_laws.table_rounds(home, pool, kinds, lambda what: None)
    laws = [replace(law, byte_s=(7.0,) * len(law.rows)) for law in measured]
    return cache_laws.cache_law(home, pool, kinds, laws, done)


def test_caches_keep_less_of_more(monkeypatch: pytest.MonkeyPatch) -> None:
    found = _cache_law(monkeypatch, 1.0, 1.6, 1.5, 2.0)
    assert found is not None
    assert found.from_memory == (0.0, 0.5, 0.5, 1.0)
    assert found.nbytes[0] < found.nbytes[1] < found.nbytes[2] < found.nbytes[3] <= kernel_laws.POOL_BYTES
    assert {law.kind for law in found.products} == {"Q4_K"}


def test_what_was_held_up_is_no_kernel_s() -> None:
    """Three rows that take a tenth longer than four stay; two that take ten times as long as four do not."""
    times = [1.0, 20.0, 2.2, 2.0, 9.0]
    assert kernel_laws.not_held_up(times) == (1.0, pytest.approx(2.6), 2.2, 2.0, 9.0)


def test_texts_that_are_attended_to_come_from_all_pages_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else K and V of short ones would lie in the nearest cache, where no step finds them."""
    seen: list[list[int]] = []
    kv = attention_laws._kv_pages("f16", 64, 2)
    assert (kv.heads, kv.kv_heads) == (2 * attention_laws.KV_HEADS, attention_laws.KV_HEADS)
    calls = 2 * (kv.pages // 3)

    def first(its: Iterator[partial[object]]) -> float:
        for call in islice(its, calls):
            seen.append(list(call.args[1].pages))
        return 1.0

    monkeypatch.setattr(attention_laws, "usual_s", first)
    assert attention_laws._attention_s(home_of("cpu"), kernel_laws.Pool(16 << 20), kv, 64, 128) == 1.0
    assert seen[:2] == [[0, 1, 2], [3, 4, 5]]
    assert seen[: calls // 2] == seen[calls // 2 :]
    assert kv.pages - len({page for its in seen for page in its}) < 3


@pytest.mark.parametrize(("rows", "passing"), [(1, 0), (attention_laws.CHUNK_ROWS, 5)])
def test_weights_pass_before_a_chunk_is_attended_to(
    monkeypatch: pytest.MonkeyPatch, rows: int, passing: int
) -> None:
    """Else its inputs would lie where the last call left them, and a prompt's attention be three times as quick."""
    home, pool, passed = home_of("cpu"), kernel_laws.Pool(16 << 20), list[int]()

    class Counting:
        place = staticmethod(home.place)
        attention = staticmethod(home.attention)

        def linears(self, x: Floats, all: Linears) -> None:
            passed.append(all.matrices[0].nbytes)

    monkeypatch.setattr(attention_laws, "usual_s", lambda its: float(len(list(islice(its, 5)))))
    kv = attention_laws._kv_pages("f16", 64, 1)
    assert attention_laws._attention_s(cast(ComputeHome, Counting()), pool, kv, rows, 128) == 5
    assert len(passed) == passing
    assert all(it > kernel_laws.PASSING_BYTES // 2 for it in passed)


def test_more_streams_use_more_of_a_mixture_s_experts() -> None:
    moe = MoeSpec(32, 8, 32, True)
    one, many = (fixed_costs._Steps(2, streams=streams, moe=moe) for streams in (1, fixed_costs.STREAMS))
    for steps in (one, many):
        steps.turn(3)
    assert one.experts == 2 * 8
    assert 2 * 16 < many.experts <= 2 * 32


def test_caches_that_keep_nothing_are_no_law(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _cache_law(monkeypatch, 1.0, 1.05, 1.02, 1.05) is None
