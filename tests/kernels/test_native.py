"""The native kernels equal the reference, and their bits do not depend on what is computed beside them."""

import os
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fakes.homes import HOMES, NATIVE, TRUTH, assert_close, frozen, layouts, linear, ones, randn, zeros
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs.random_weights import random_matrix, random_rows

from shoal import kernels
from shoal.kernels import (
    NARROW_INPUTS,
    WEIGHT_TYPES,
    WIDE_INPUTS,
    InputBits,
    KernelError,
    Linears,
    Matrix,
    OperandError,
    WeightType,
    reference,
)
from shoal.kernels import native_library as library
from shoal.kernels.arrays import Floats
from shoal.kernels.homes import choose, cpu
from shoal.kernels.types import BF16, F16, F32, IQ4_NL, Q4_0, Q4_1, Q4_K, Q6_K, Q8_0
from shoal.partition.memory_layout import INPUT_GROUP

each_type = pytest.mark.parametrize("kind", WEIGHT_TYPES, ids=lambda kind: kind.name)
each_bits = pytest.mark.parametrize("bits", [WIDE_INPUTS, NARROW_INPUTS])

ROUNDING_BF16 = ("avx2", "avxvnni")
"""Homes that multiply words where weights are bf16 (`reference.as_words`)."""


@pytest.fixture(params=NATIVE)
def home(request: pytest.FixtureRequest) -> Iterator[str]:
    choose(request.param)
    yield request.param
    choose()
    kernels.set_threads(2)


def test_a_native_home_was_built() -> None:
    assert library.LIBRARY.exists()
    assert "scalar" in NATIVE or "neon" in NATIVE


@each_type
@pytest.mark.parametrize("scale", [1.0, 0.01, 1e-6])
def test_decoding_is_that_of_the_reference(home: str, kind: WeightType, scale: float) -> None:
    w = random_matrix(kind, 5, 512, seed=kind.id, scale=scale, offset_bytes=1)
    truth = TRUTH.dequantize(w)
    assert np.array_equal(kernels.dequantize(w), truth)
    ids = np.array([4, 0, 0, 3])
    assert np.array_equal(kernels.gather_rows(w, ids), kernels.dequantize(w)[ids])


def assert_linear_close(x: Floats, w: Matrix, bias: Floats | None, bits: InputBits = WIDE_INPUTS) -> None:
    """Compares with float64, within what rounding does to a float32 sum: errors add up like steps of a random walk."""
    full = TRUTH.dequantize(w)
    x_seen = reference.quantised_inputs(x, bits) if w.type.quantised else x
    plain = TRUTH.linears(x, Linears((w,), (bias,), bits))[0]
    _assert_product(plain, x_seen, full, bias)
    if w.type is BF16 and cpu().name in ROUNDING_BF16:
        filled = np.pad(x, ((0, 0), (0, -w.cols % INPUT_GROUP)))
        x_seen, full = reference.quantised_inputs(filled, 14)[:, : w.cols], reference.as_words(full)
    _assert_product(linear(x, w, bias, bits), x_seen, full, bias)


def _assert_product(got: Floats, x: Floats, w: Floats, bias: Floats | None) -> None:
    full = w.astype(float)
    truth = x @ full.T + (0 if bias is None else bias)
    magnitude = np.abs(x) @ np.abs(full).T + (0 if bias is None else np.abs(bias))
    tolerance = 2**-24 * (8 + full.shape[1] ** 0.5)  # 8e-7 for a block of 32, 4e-6 for the longest rows here
    assert got.dtype == np.float32
    assert got.shape == truth.shape
    assert (np.abs(got - truth) <= tolerance * magnitude + 1e-30).all()


@each_type
@settings(deadline=None, max_examples=12)
@given(
    rows=st.integers(1, 21),
    blocks=st.integers(1, 11),
    tokens=st.integers(0, 70),
    offset_bytes=st.integers(0, 3),
    with_bias=st.booleans(),
    bits=st.sampled_from([WIDE_INPUTS, NARROW_INPUTS]),
)
def test_linear_is_that_of_the_reference(
    kind: WeightType,
    rows: int,
    blocks: int,
    tokens: int,
    offset_bytes: int,
    with_bias: bool,
    bits: InputBits,
) -> None:
    cols = blocks * kind.block_weights * (7 if kind.block_weights == 1 else 1)
    w = random_matrix(kind, rows, cols, seed=blocks, offset_bytes=offset_bytes)
    for name in NATIVE:
        choose(name)
        assert_linear_close(randn(tokens, cols), w, randn(rows) if with_bias else None, bits)


@each_type
def test_larger_shapes(home: str, kind: WeightType) -> None:
    w = random_matrix(kind, 203, 2816, scale=1e-3)
    assert_linear_close(randn(1, 2816), w, randn(203))
    assert_linear_close(randn(9, 2816), w, None)


@each_type
@each_bits
def test_no_bit_depends_on_batch_threads_or_rows(home: str, kind: WeightType, bits: InputBits) -> None:
    stored = random_rows(kind, 131, 768, seed=3)
    w = kernels.from_stored(kind, 131, 768, stored)
    x, bias = randn(200, 768), randn(131)
    alone = np.concatenate([linear(x[t : t + 1], w, bias, bits) for t in range(64)])
    for threads in (1, 2, 3):
        kernels.set_threads(threads)
        for tokens in (1, 2, 3, 5, 8, 12, 16, 17, 64, 200):
            assert np.array_equal(linear(x[:tokens], w, bias, bits)[:64], alone[:tokens]), (threads, tokens)
        assert np.array_equal(linear(x[7:40], w, bias, bits), alone[7:40])
        for start, stop in ((0, 1), (1, 131), (66, 70)):
            part = kernels.from_stored(kind, stop - start, 768, stored[start:stop].copy())
            assert np.array_equal(linear(x[:1], part, bias[start:stop], bits), alone[:1, start:stop])
            assert np.array_equal(linear(x[:9], part, bias[start:stop], bits), alone[:9, start:stop])


@pytest.mark.parametrize("kind", [F32, F16, BF16], ids=lambda kind: kind.name)
@pytest.mark.parametrize("cols", [1, 3, 17, 33, 70])
def test_float_rows_of_any_length(home: str, kind: WeightType, cols: int) -> None:
    w = random_matrix(kind, 6, cols, offset_bytes=1)
    x = randn(11, cols)
    assert np.array_equal(kernels.dequantize(w), TRUTH.dequantize(w))
    assert_linear_close(x, w, None)
    alone = np.concatenate([linear(x[t : t + 1], w) for t in range(11)])
    assert np.array_equal(linear(x, w), alone)


@given(st.integers(0, 2**32 - 1), st.integers(1, 300), st.integers(-60, 60))
@settings(deadline=None, max_examples=30)
def test_bf16_as_words_is_near(seed: int, cols: int, power: int) -> None:
    generator = np.random.default_rng(seed)
    spread = np.exp2(generator.integers(-12, 1, (7, cols))).astype(np.float32)
    numbers = generator.standard_normal((7, cols), np.float32) * spread * np.float32(2.0**power)
    weights = (numbers.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    words = reference.as_words(weights)
    for k in range(0, cols, reference.WORD_COLUMNS):
        part, got = (it[:, k : k + reference.WORD_COLUMNS] for it in (weights, words))
        reached = np.exp2(np.floor(np.log2(np.abs(part).max(-1, keepdims=True))))
        kept = np.abs(part) >= reached / 32
        assert np.array_equal(got[kept], part[kept])
        assert (np.abs(got - part) <= reached * 2**-13).all()


@pytest.mark.parametrize("tokens", [1, 4, 9])
def test_weights_that_are_no_numbers_stay_in_their_rows(home: str, tokens: int) -> None:
    clean = random_matrix(BF16, 21, 300)
    bits = clean.data.copy().view(np.uint16).reshape(21, 300)
    bits[3, 299], bits[17, 5] = 0x7FC0, 0xFF80  # NaN and minus infinity
    bits[8] = 0
    bits[9, :] = 1  # the smallest number above zero
    spoiled = kernels.from_stored(BF16, 21, 300, bits.view(np.uint8).reshape(21, 600))
    x = randn(tokens, 300)
    got, kept = linear(x, spoiled), [r for r in range(21) if r not in (3, 8, 9, 17)]
    assert np.array_equal(got[:, kept], linear(x, clean)[:, kept])
    assert np.isnan(got[:, 3]).all()
    assert not np.isfinite(got[:, 17]).any()
    assert not got[:, 8].any()
    assert (np.abs(got[:, 9]) < 1e-36).all()


def test_infinite_and_nan_inputs_stay_in_their_row(home: str) -> None:
    w = random_matrix(F32, 8, 70)
    x = randn(7, 70)
    clean = linear(x, w)
    x[2, 69], x[4, 0] = float("nan"), float("inf")
    got = linear(x, w)
    assert np.isnan(got[2]).all()
    assert not np.isfinite(got[4]).any()
    kept = [0, 1, 3, 5, 6]
    assert np.array_equal(got[kept], clean[kept])


def test_special_halves(home: str) -> None:
    values = np.array([0.0, -0.0, 6e-8, -6e-8, 6.1e-5, 65504, np.inf, -np.inf, np.nan], np.float16)[None]
    got = kernels.dequantize(Matrix.of(values))
    assert_close(got, values.astype(np.float32), rtol=0, atol=0, equal_nan=True)
    q8 = random_matrix(Q8_0, 1, 32)
    q8.data[:2] = np.array([-6e-8], np.float16).view(np.uint8)
    assert_close(kernels.dequantize(q8), TRUTH.dequantize(q8), rtol=0, atol=0)


@pytest.mark.parametrize("cols", [1, 15, 64, 576, 1000])
def test_norm(home: str, cols: int) -> None:
    x, weight = randn(70, cols) * 3, randn(cols, seed=1)
    got = cpu().rms_norm(x, weight, 1e-5)
    truth = x / np.sqrt(np.square(x.astype(float)).mean(-1, keepdims=True) + 1e-5) * weight
    assert_close(got, truth.astype(np.float32), rtol=2e-6, atol=1e-6)
    for threads in (1, 2):
        kernels.set_threads(threads)
        assert np.array_equal(
            np.concatenate([cpu().rms_norm(x[t : t + 1], weight, 1e-5) for t in range(70)]), got
        )


def test_operands_need_not_be_contiguous_or_writable(home: str) -> None:
    w = random_matrix(Q4_1, 10, 64)
    plain, bias, weight = randn(3, 64), randn(10), randn(64)
    product, normal = linear(plain, w, bias), cpu().rms_norm(plain, weight, 1e-5)
    for x in layouts(plain):
        assert np.array_equal(linear(x, w, bias), product)
        assert np.array_equal(cpu().rms_norm(x, weight, 1e-5), normal)
    for same in (frozen(bias), bias.repeat(2)[::2], bias[::-1].copy()[::-1]):
        assert np.array_equal(linear(plain, w, same), product)
    for same in (frozen(weight), weight.repeat(2)[::2]):
        assert np.array_equal(cpu().rms_norm(plain, same, 1e-5), normal)
        (got,) = cpu().linears(plain, Linears((w,), (bias,)), same, 1e-5)
        assert np.array_equal(got, linear(normal, w, bias))
    for ids in (np.arange(10)[::3], frozen(np.arange(0, 10, 3))):
        assert np.array_equal(kernels.gather_rows(w, ids), kernels.dequantize(w)[::3])


@each_type
def test_a_matrix_of_read_only_bytes(home: str, kind: WeightType) -> None:
    stored, x = random_rows(kind, 20, 256), randn(2, 256)
    w = kernels.from_stored(kind, 20, 256, stored)
    product = linear(x, w)
    for source in (stored.tobytes(), memoryview(stored.tobytes()), np.frombuffer(stored.tobytes(), np.uint8)):
        same = kernels.from_stored(kind, 20, 256, source)
        assert np.array_equal(same.data, w.data)
        assert np.array_equal(linear(x, same), product)
        assert np.array_equal(kernels.gather_rows(same, np.array([19])), kernels.dequantize(w)[19:])
    fixed = Matrix(kind, frozen(w.data), 20, 256)
    assert np.array_equal(linear(x, fixed), product)


@pytest.mark.parametrize("name", HOMES)
def test_doubles_are_refused_in_one_line(name: str) -> None:
    choose(name)
    w, doubles = random_matrix(Q4_0, 4, 64), np.zeros((2, 64))
    for call in (
        lambda: linear(doubles, w),
        lambda: linear(zeros(2, 64), w, np.zeros(4)),
        lambda: cpu().linears(zeros(2, 64), Linears((w,)), np.zeros(64), 1e-5),
        lambda: cpu().rms_norm(doubles, ones(64), 1e-5),
        lambda: cpu().rms_norm(zeros(2, 64), np.ones(64), 1e-5),
        lambda: Matrix.of(doubles),
    ):
        with pytest.raises(OperandError, match=r"^[^\n]*float32[^\n]*float64[^\n]*$"):
            call()
    choose()


def test_calls_from_many_threads_take_turns(home: str) -> None:
    kernels.set_threads(2)
    w = random_matrix(Q4_0, 512, 256)
    inputs = [randn(1 + 7 * (i % 2), 256, seed=i) for i in range(6)]
    truth = [linear(x, w) for x in inputs]
    wrong: list[int] = []

    def call(i: int) -> None:
        if not all(np.array_equal(linear(inputs[i], w), truth[i]) for _ in range(50)):
            wrong.append(i)

    callers = [threading.Thread(target=call, args=(i,)) for i in range(6)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(timeout=60)
    assert not wrong


@pytest.mark.parametrize("name", HOMES)
def test_what_does_not_fit_is_refused(name: str) -> None:
    choose(name)
    w = random_matrix(Q4_0, 4, 64)
    good = zeros(2, 64)
    for x in (good[:, :32], good[0], good.astype(float), good.astype(np.float16), zeros(1, 2, 64)):
        with pytest.raises(OperandError):
            linear(x, w)
    for bias in (zeros(3), zeros(4, 1), np.zeros(4)):
        with pytest.raises(OperandError):
            linear(good, w, bias)
    for ids in (
        np.array([4]),
        np.array([-1]),
        np.array([1], np.int32),
        np.array([[1]]),
    ):
        with pytest.raises(OperandError):
            kernels.gather_rows(w, ids)
    for norm_weight in (zeros(63), np.zeros(64)):
        with pytest.raises(OperandError):
            cpu().rms_norm(good, norm_weight, 1e-5)
    with pytest.raises(OperandError):
        kernels.set_threads(0)
    choose()


@pytest.mark.parametrize("name", HOMES)
def test_empty_operands(name: str) -> None:
    choose(name)
    w = random_matrix(Q6_K, 4, 256)
    assert linear(zeros(0, 256), w).shape == (0, 4)
    none = kernels.from_stored(Q6_K, 0, 256, b"")
    assert linear(zeros(2, 256), none).shape == (2, 0)
    assert kernels.gather_rows(w, np.empty(0, np.int64)).shape == (0, 256)
    assert kernels.dequantize(none).shape == (0, 256)
    assert cpu().rms_norm(zeros(0, 4), ones(4), 1e-5).shape == (0, 4)
    choose()


def test_more_jobs_than_one_run_holds() -> None:
    kernels.set_threads(2)
    w = random_matrix(F32, 5, 1)
    ids = np.arange(1_100_000) % 5
    assert np.array_equal(kernels.gather_rows(w, ids), TRUTH.dequantize(w)[ids])


def test_a_forked_child_computes_too() -> None:
    kernels.set_threads(2)
    w = random_matrix(IQ4_NL, 512, 256)
    x = randn(3, 256)
    truth = linear(x, w)
    child = os.fork()
    if child == 0:
        signal.alarm(30)  # a child that hangs is a failure
        os._exit(0 if np.array_equal(linear(x, w), truth) else 1)
    assert os.waitpid(child, 0)[1] == 0


def run_python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "always", "-c", code],
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_environment_names_the_home() -> None:
    code = "from shoal import kernels; print(kernels.home())"
    for name in (NATIVE[-1], "reference"):
        assert run_python(code, SHOAL_KERNELS=name).stdout.strip() == name
    for name in ("abacus", "\udcff"):
        failed = run_python(code, SHOAL_KERNELS=name).stderr.splitlines()[-1]
        assert f"NoSuchHome: SHOAL_KERNELS={name!r}: " in failed
        assert (
            f"do not run on this machine: must be one of {', '.join(NATIVE)}, reference, or absent" in failed
        )


def test_without_the_library_the_reference_serves_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(library, "LIBRARY", tmp_path / "libshoal.so")
    monkeypatch.setattr("shoal.kernels.homes._cpu", None)
    monkeypatch.delenv("SHOAL_KERNELS", raising=False)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        w = random_matrix(Q4_K, 3, 256)
        assert linear(zeros(1, 256), w).shape == (1, 3)
        linear(zeros(1, 256), w)
        kernels.set_threads(2)
    assert len(warned) == 1
    assert "install a C++ compiler" in str(warned[0].message)
    assert kernels.home() == "reference"
    with pytest.raises(KernelError, match="cannot be loaded"):
        choose("scalar")


def test_a_library_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "ABI_VERSION", -1)
    with pytest.raises(KernelError, match="version"):
        library.Native()
