"""What Triton's kernels compute is what weights and inputs say, in every type that they cover: here by Triton's
interpreter, on a graphics card where there is one. Tolerances are of the lengths of both rows that are multiplied, or
of the largest number of a result: one row of inputs is summed in float32 (2e-5), more rows are rounded to float16, as
are weights (2e-3)."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
from fakes.cuda_on_host import cuda
from fakes.torch_on_host import home_with, torch_home
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="triton is not installed (Linux on x86-64 only)")

from shoal.devices.device_home import DeviceHome
from shoal.devices.errors import DeviceFull, DeviceLost
from shoal.devices.in_triton import triton_kernels
from shoal.devices.in_triton.triton_kernels import ATTENTION, COVERED, ONE_ROW, TritonKernels, covers
from shoal.devices.in_triton.triton_kernels import MANY as MANY_ROWS
from shoal.devices.torch_kernels import TorchKernels
from shoal.kernels.arrays import Bytes, Floats
from shoal.kernels.band_layout import to_bands
from shoal.kernels.compute_home import Staged
from shoal.kernels.matrix import FeedForward, Linears, Matrix, Routes
from shoal.kernels.reference import ReferenceHome, decode
from shoal.kernels.self_test import disagreements
from shoal.kernels.types import F32, Q2_K, Q4_K, Q5_1, Q6_K, Q8_0, WEIGHT_TYPES, WeightType

KINDS = [kind for kind in WEIGHT_TYPES if kind.name in COVERED]
ONE, MANY = 2e-5, 2e-3
kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
families = pytest.mark.parametrize("kind", [Q5_1, Q8_0, Q4_K, Q6_K], ids=lambda kind: kind.name)


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interpreter runs one after the other; columns are still split where there are few rows."""
    monkeypatch.setattr(triton_kernels, "PROGRAMS", 6)


@pytest.fixture
def home() -> DeviceHome:
    return home_with(TritonKernels())


def stored(kind: WeightType, rows: int, cols: int, seed: int = 1, scales: object = None) -> Bytes:
    """Random bytes, whose numbers in half precision are within 1, or drawn from `scales`."""
    generator = np.random.default_rng(seed)
    blocks = generator.integers(0, 256, (rows * cols // kind.block_weights, kind.block_bytes)).astype(
        np.uint8
    )
    for start in kind.halves:
        drawn: Any = generator.uniform(-1, 1, len(blocks))
        drawn = drawn if scales is None else generator.choice(np.array(scales), len(blocks))
        blocks[:, start : start + 2] = drawn.astype(np.float16).view(np.uint8).reshape(-1, 2)
    return blocks.reshape(rows, -1)


def matrix(kind: WeightType, rows: Bytes) -> Matrix:
    cols = rows.shape[1] // kind.block_bytes * kind.block_weights
    return Matrix(kind, to_bands(kind, rows).reshape(-1), len(rows), cols)


def made(kind: WeightType, rows: int, cols: int, seed: int = 1) -> tuple[Matrix, Floats]:
    """A matrix, and the same in numbers."""
    its = stored(kind, rows, cols, seed)
    return matrix(kind, its), decode(kind, its)


def inputs(rows: int, cols: int, seed: int = 2) -> Floats:
    return np.random.default_rng(seed).standard_normal((rows, cols), np.float32)


def multiplied(x: Floats, w: Floats) -> Any:
    return x.astype(np.float64) @ w.astype(np.float64).T


def off(ours: Floats, true: Any) -> float:
    assert ours.shape == true.shape
    return float(np.abs(ours - true).max() / np.abs(true).max())


def away(ours: Floats, x: Floats, w: Floats) -> float:
    """From the products, of the lengths of the two rows."""
    lengths = [np.sqrt((it.astype(np.float64) ** 2).sum(1)) for it in (x, w)]
    assert ours.shape == (len(x), len(w))
    return float((np.abs(ours - multiplied(x, w)) / np.outer(*lengths).clip(1e-300)).max())


@kinds
def test_every_type_by_one_row_and_by_many(kind: WeightType, home: DeviceHome) -> None:
    """Rows that are no whole bands, columns that are no whole steps; as kept and as staged."""
    for rows, cols, tokens in ((1, max(64, kind.block_weights), 1), (37, 768, 1), (5, 256, 2), (33, 512, 17)):
        w, numbers = made(kind, rows, cols)
        assert covers(w)
        staging = home.staging(64 + w.nbytes)
        coming = Staged(w, staging, 64)
        home.stage([coming])
        there = home.staged(coming) if tokens == 2 else home.keep_matrix(w)
        x = inputs(tokens, cols)
        ours = home.fetch(home.linears(home.place(x), Linears([there]))[0])
        assert away(ours, x, numbers) < (ONE if tokens == 1 else MANY)


@settings(max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    st.sampled_from(KINDS), st.integers(1, 33), st.integers(1, 3), st.integers(1, 17), st.integers(0, 1 << 30)
)
@example(KINDS[8], 16, 17, 1, 0)  # more steps than one, of which the last is not whole
def test_any_shape(kind: WeightType, rows: int, blocks: int, tokens: int, seed: int) -> None:
    home, cols = home_with(TritonKernels()), blocks * max(64, kind.block_weights)
    w, numbers = made(kind, rows, cols, seed)
    x = inputs(tokens, cols, seed)
    ours = home.fetch(home.linears(home.place(x), Linears([home.keep_matrix(w)]))[0])
    assert away(ours, x, numbers) < (ONE if tokens == 1 else MANY)


@families
def test_extreme_numbers(kind: WeightType, home: DeviceHome) -> None:
    """Scales of 0, the smallest and large ones beside each other; inputs whose rows are of very different sizes."""
    its = stored(kind, 17, 256, scales=(0.0, 6e-8, 1e-4, -3.0, 16.0))
    w, numbers = home.keep_matrix(matrix(kind, its)), decode(kind, its)
    x = inputs(4, 256) * np.array([[1e-28], [1.0], [1e4], [1e25]], np.float32)
    x[1, :100] = 0
    for rows in ([0], [3], [0, 1, 2, 3]):
        ours = home.fetch(home.linears(home.place(x[rows]), Linears([w]))[0])
        assert away(ours, x[rows], numbers) < (ONE if len(rows) == 1 else MANY)
    zeros = home.fetch(home.linears(home.place(np.zeros((3, 256), np.float32)), Linears([w]))[0])
    assert not zeros.any()


@families
def test_what_is_no_number_stays_none(kind: WeightType, home: DeviceHome) -> None:
    """In its own row of weights, or its own row of inputs, and nowhere else."""
    its = stored(kind, 20, 256)
    start = kind.halves[0]
    its[5, start : start + 2] = np.array([np.nan], np.float16).view(np.uint8)
    w = home.keep_matrix(matrix(kind, its))
    x = inputs(3, 256)
    x[1, 7] = np.nan
    for rows in ([0], [0, 1, 2]):
        ours = home.fetch(home.linears(home.place(x[rows]), Linears([w]))[0])
        wrong = np.zeros(ours.shape, bool)
        wrong[:, 5] = True
        wrong[[place for place, row in enumerate(rows) if row == 1]] = True
        assert np.array_equal(np.isnan(ours), wrong)


def test_one_row_is_what_the_reference_computes() -> None:
    """Norms, biases, layers and experts of every type, with all that is left to torch."""
    assert disagreements(home_with(TritonKernels({ONE_ROW, ATTENTION})), ReferenceHome(), bits=False) == []


@pytest.mark.skipif("SHOAL_TEST_DEVICE" not in os.environ, reason="an interpreter takes a minute for it")
def test_many_rows_are_too_within_their_rounding() -> None:
    far = disagreements(home_with(TritonKernels()), ReferenceHome(), bits=False)
    assert [it for it in far if float(it.split(": ")[1].split()[0]) > MANY] == []


def test_matrices_of_several_types_in_one_launch(home: DeviceHome, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a norm and biases; five matrices, of which one is not covered and keeps its rows."""
    sizes = ((KINDS[6], 48), (KINDS[8], 17), (F32, 5), (KINDS[0], 16), (KINDS[4], 33))
    both = [made(kind, rows, 512, seed=rows) for kind, rows in sizes if kind is not F32]
    dense = np.random.default_rng(5).standard_normal((5, 512), np.float32)
    both.insert(2, (Matrix.of(dense), dense))
    biases = [None if place == 1 else inputs(1, len(w), place)[0] for place, (_, w) in enumerate(both)]
    there = Linears(
        [home.keep_matrix(w) for w, _ in both],
        [None if bias is None else home.keep_vector(bias) for bias in biases],
    )
    norm = np.random.default_rng(6).uniform(0.5, 2, 512).astype(np.float32)
    launches: list[int] = []
    real = triton_kernels._one_row

    def counted(x: Any, all: Linears) -> Any:
        launches.append(len(all.matrices))
        return real(x, all)

    monkeypatch.setattr(triton_kernels, "_one_row", counted)
    for tokens in (1, 6):
        x = 3 * inputs(tokens, 512)
        normed = x * (norm / np.sqrt((x.astype(np.float64) ** 2).mean(1, keepdims=True) + 1e-5))
        ours = home.linears(home.place(x), there, home.keep_vector(norm), 1e-5)
        for mine, (_, w), bias in zip(ours, both, biases, strict=True):
            true = multiplied(normed, w) + (0 if bias is None else bias)
            assert off(home.fetch(mine), true) < (ONE if tokens == 1 else MANY)
    assert launches == [3, 1]


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_a_feed_forward_layer_is_fused(activation: Any, home: DeviceHome) -> None:
    gate, up, down = made(KINDS[6], 128, 256, 1), made(KINDS[8], 128, 256, 2), made(KINDS[0], 40, 128, 3)
    reference = ReferenceHome()
    biases = [0.1 * inputs(1, 128, 8)[0], 0.1 * inputs(1, 128, 9)[0]]
    here = FeedForward(Linears([gate[0], up[0]], biases), Linears([down[0]]), activation)
    keep = home.keep_matrix
    there = FeedForward(
        Linears([keep(gate[0]), keep(up[0])], [home.keep_vector(it) for it in biases]),
        Linears([keep(down[0])]),
        activation,
    )
    for tokens in (1, 3) if activation == "silu" else (1,):
        x = 1e-4 * inputs(tokens, 256)
        ours = home.fetch(home.feed_forward(home.place(x), there))
        assert off(ours, reference.feed_forward(x, here)) < (1e-4 if tokens == 1 else 2 * MANY)


def test_experts_of_one_token_and_of_several(home: DeviceHome) -> None:
    parts = [[made(kind, *shape, seed=place) for shape in ((64, 256), (64, 256), (256, 64))]
             for place, kind in enumerate((KINDS[0], KINDS[4]))]  # fmt: skip
    here, there = (
        [
            FeedForward(Linears([keep(a), keep(b)]), Linears([keep(c)]), "silu")
            for (a, _), (b, _), (c, _) in parts
        ]
        for keep in (lambda w: w, home.keep_matrix)
    )
    routes = Routes((0, 1, 4), np.array([2, 0, 1, 2]), np.array([0.5, 1, 0.25, 2], np.float32))
    x = 1e-4 * inputs(3, 256)
    true = np.zeros((3, 256), np.float32)
    ours = home.place(true.copy())
    ReferenceHome().experts(x, here, routes, true)
    home.experts(home.place(x), there, routes, ours)
    assert off(home.fetch(ours), true) < 2 * MANY


def test_what_is_not_covered_is_torchs() -> None:
    home, other = home_with(TritonKernels()), torch_home()
    for w, _ in (made(Q2_K, 40, 512), made(KINDS[0], 16, 96)):
        assert not covers(w)
        x = inputs(1, w.cols)
        ours, theirs = (
            it.fetch(it.linears(it.place(x), Linears([it.keep_matrix(w)]))[0]) for it in (home, other)
        )
        assert np.array_equal(ours, theirs)


def test_weights_lie_as_on_the_host_and_change_places(home: DeviceHome) -> None:
    mine, hosts = made(KINDS[6], 40, 512, 1)[0], made(KINDS[6], 40, 512, 2)[0]
    before = mine.data.copy(), hosts.data.copy()
    assert TritonKernels().laid_out(mine) is mine.data
    there = home.keep_matrix(mine)
    home.exchange(there, hosts)
    assert np.array_equal(hosts.data, before[0])
    assert np.array_equal(home.fetch(there.data), before[1])


@pytest.mark.parametrize(("one", "many"), [(True, False), (False, True), (False, False)])
def test_torch_computes_what_triton_is_not_chosen_for(one: bool, many: bool) -> None:
    uses = [use for use, used in ((ONE_ROW, one), (MANY_ROWS, many)) if used]
    home, (w, numbers) = home_with(TritonKernels(uses)), made(KINDS[6], 40, 512)
    there = Linears([home.keep_matrix(w)])
    for tokens, chosen in ((1, one), (5, many)):
        x = inputs(tokens, 512)
        ours = home.fetch(home.linears(home.place(x), there)[0])
        theirs = torch_home()
        exact = theirs.fetch(theirs.linears(theirs.place(x), Linears([theirs.keep_matrix(w)]))[0])
        assert np.array_equal(ours, exact) is not chosen
        assert off(ours, multiplied(x, numbers)) < MANY


LOADED_WRONGLY = {
    "device kernel image is invalid": None,
    "no kernel image is available for execution on the device": None,
    "the provided PTX was compiled with an unsupported toolchain.": None,
    "out of memory": DeviceFull,
    "an illegal memory access was encountered": DeviceLost,
}


@pytest.mark.parametrize("said", LOADED_WRONGLY)
@pytest.mark.parametrize("rows", [1, 3])
def test_what_cannot_be_loaded_torch_computes(
    rows: int, said: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And the card is not given up for it."""
    device, kernels, tries = cuda(monkeypatch), TritonKernels(), []
    home, torch = DeviceHome(device, kernels), DeviceHome(device, TorchKernels())
    x = inputs(rows, 64)

    def fails(*_: Any, **__: Any) -> None:
        tries.append(rows)
        raise RuntimeError(f"Triton Error [CUDA]: {said}")

    monkeypatch.setattr(triton_kernels, "_arranged", fails)
    w, back = made(Q8_0, 64, 64)[0], made(Q8_0, 64, 64, seed=3)[0]

    def linears(its: DeviceHome) -> Any:
        return its.fetch(its.linears(its.place(x), Linears([its.keep_matrix(w)]))[0])

    def fed(its: DeviceHome) -> Any:
        keep = its.keep_matrix
        layer = FeedForward(Linears([keep(w), keep(back)]), Linears([keep(w)]), "silu")
        return its.fetch(its.feed_forward(its.place(x), layer))

    if (loss := LOADED_WRONGLY[said]) is not None:
        with pytest.raises(loss):
            linears(home)
        assert not kernels.refused
        return
    for compute in (fed, linears):
        assert np.array_equal(compute(home), compute(torch))
    assert (len(tries), device.lost) == (1, "")
    assert kernels.refused == f"RuntimeError: Triton Error [CUDA]: {said}"
    assert kernels.name.endswith("(many, attention)" if rows == 1 else "(one row, attention)")
    assert len(caplog.records) == 1
