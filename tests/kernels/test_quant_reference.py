"""The stored types: the reference reads the same weights from bytes as the `gguf` package."""

import gguf
import numpy as np
import pytest
from fakes.homes import TRUTH, assert_close, randn, zeros
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs.random_weights import random_matrix, random_rows

from shoal.kernels import (
    WEIGHT_TYPES,
    Linears,
    Matrix,
    OperandError,
    UnsupportedTypeError,
    WeightType,
    from_stored,
    interleave,
    reference,
    weight_type,
)
from shoal.kernels.band_layout import from_bands, to_bands
from shoal.kernels.types import BF16, F16, F32, Q4_0, Q6_K, UNSUPPORTED_NAMES

kinds = pytest.mark.parametrize("kind", WEIGHT_TYPES, ids=lambda kind: kind.name)


@kinds
def test_geometry_is_that_of_gguf(kind: WeightType) -> None:
    assert GGMLQuantizationType(kind.id).name == kind.name
    assert GGML_QUANT_SIZES[GGMLQuantizationType(kind.id)] == (kind.block_weights, kind.block_bytes)
    assert weight_type(kind.id) is kind


def test_every_gguf_type_is_supported_or_named() -> None:
    known = {kind.id: kind.name for kind in WEIGHT_TYPES} | UNSUPPORTED_NAMES
    assert {t.value: t.name for t in GGMLQuantizationType}.items() <= known.items()


@pytest.mark.parametrize(("id", "words"), [(39, "MXFP4"), (16, "IQ2_XXS"), (-1, "id -1"), (999, "id 999")])
def test_refusal_names_the_type(id: int, words: str) -> None:
    with pytest.raises(UnsupportedTypeError, match=words):
        weight_type(id)


@kinds
@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0), (0.01, 1), (1e-6, 3)])  # 1e-6: subnormal halves
def test_decoding_equals_gguf_exactly(kind: WeightType, scale: float, offset: int) -> None:
    w = random_matrix(kind, 7, 1024, seed=kind.id, scale=scale, offset_bytes=offset)
    stored = random_rows(kind, 7, 1024, seed=kind.id, scale=scale)
    expected = gguf.quants.dequantize(stored, GGMLQuantizationType(kind.id))
    got = TRUTH.dequantize(w)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, expected.reshape(7, 1024))


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_quantised_weights_come_back_close(name: str) -> None:
    kind = next(k for k in WEIGHT_TYPES if k.name == name)
    values = np.random.default_rng(1).standard_normal((4, 256)).astype(np.float32)
    stored = gguf.quants.quantize(values, GGMLQuantizationType(kind.id))
    w = from_stored(kind, 4, 256, memoryview(stored.tobytes()))
    assert np.abs(TRUTH.dequantize(w) - values).max() < 0.3


@kinds
def test_linear_and_gather_are_those_of_the_decoded_weights(
    kind: WeightType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "TILE_BYTES", 4 * 512 * 2)  # two rows a tile
    w = random_matrix(kind, 9, 512)
    x, bias = randn(3, 512), randn(9)
    full = TRUTH.dequantize(w)
    seen = reference.quantised_inputs(x) if kind.quantised else x
    (got,) = TRUTH.linears(x, Linears((w,), (bias,)))
    assert_close(got, seen @ full.T + bias, rtol=1e-4, atol=1e-3)
    ids = np.array([8, 0, 8])
    assert np.array_equal(TRUTH.gather_rows(w, ids), full[ids])
    assert TRUTH.gather_rows(w, ids[:0]).shape == (0, 512)


@kinds
@settings(deadline=None, max_examples=10)
@given(rows=st.integers(1, 40), blocks=st.integers(1, 3))
def test_bands_are_a_permutation_within_sixteen_rows(kind: WeightType, rows: int, blocks: int) -> None:
    stored = random_rows(kind, rows, blocks * kind.block_weights, seed=rows)
    bands = to_bands(kind, stored)
    assert np.array_equal(from_bands(kind, bands)[:rows], stored)
    assert bands.size == kind.matrix_bytes(rows, blocks * kind.block_weights)
    for i, band in enumerate(bands):
        part = stored[i * kind.band_rows : (i + 1) * kind.band_rows]
        assert np.array_equal(band, to_bands(kind, part)[0])
        assert np.array_equal(np.sort(band)[-part.size :], np.sort(part, None))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_arrays_are_wrapped_without_copy(dtype: type[np.float32 | np.float16]) -> None:
    array = randn(3, 10).astype(dtype)
    w = Matrix.of(array)
    assert np.shares_memory(w.data, array)
    for other in (array, array.T, np.asfortranarray(array), array[:, ::2], array[::-1]):
        assert np.array_equal(TRUTH.dequantize(Matrix.of(other)), other)


def test_float_rows_as_stored_are_wrapped_without_copy() -> None:
    for kind in (F32, F16, BF16):
        stored = random_rows(kind, 3, 10)
        assert np.shares_memory(from_stored(kind, 3, 10, stored).data, stored)
        file = stored.tobytes()
        w = from_stored(kind, 3, 10, file)
        assert np.shares_memory(w.data, np.frombuffer(file, np.uint8))
        assert np.array_equal(TRUTH.dequantize(w), reference.decode(kind, stored))


@kinds
def test_read_only_rows_can_be_stored(kind: WeightType) -> None:
    stored = random_rows(kind, 5, 256)
    read_only = np.frombuffer(stored.tobytes(), np.uint8)
    memory = np.full(kind.matrix_bytes(5, 256), 255, np.uint8)
    w = from_stored(kind, 5, 256, read_only, memory)
    assert w.data is memory
    assert np.array_equal(
        from_bands(kind, w.data.reshape(-1, kind.band_rows * kind.row_bytes(256)))[:5], stored
    )
    if kind.quantised:
        assert not from_bands(kind, w.data.reshape(1, -1))[5:].any()


def test_bytes_must_be_those_of_the_shape() -> None:
    buffer = np.zeros(36, np.uint8)
    assert from_stored(Q4_0, 2, 32, buffer).nbytes == Q4_0.matrix_bytes(2, 32) == 16 * 18
    assert from_stored(Q4_0, 0, 32, b"").rows == 0
    for rows, cols, wrong in [
        (2, 32, buffer[:-1]),
        (3, 32, buffer),
        (-2, 32, buffer),
        (2, 33, buffer),
        (2, 0, buffer),
        (2, 32, buffer.view(np.int8)),
        (1, 32, buffer[::2]),
        (2, 32, bytes(35)),
    ]:
        with pytest.raises(OperandError):
            from_stored(Q4_0, rows, cols, wrong)
    memory = np.zeros(16 * 18, np.uint8)
    read_only = memory.view()
    read_only.flags.writeable = False
    assert from_stored(Q4_0, 2, 32, buffer, memory).data is memory
    with pytest.raises(OperandError):
        from_stored(Q4_0, 2, 32, buffer, memory[:-1])
    with pytest.raises(OperandError):
        from_stored(Q4_0, 2, 32, buffer, read_only)
    with pytest.raises(OperandError):
        interleave(Q4_0, buffer.reshape(2, 18), memory[:36])
    with pytest.raises(OperandError):
        interleave(Q4_0, np.zeros((2, 36), np.uint8)[:, :18], memory)
    for data in (
        buffer,
        memory.view(np.int8),
        memory.reshape(16, 18),
        np.zeros(576, np.uint8)[::2],
    ):
        with pytest.raises(OperandError):
            Matrix(Q4_0, data, 2, 32)
    for bad in (zeros(3), np.zeros((2, 2), np.int64), np.zeros((2, 2))):
        with pytest.raises(OperandError):
            Matrix.of(bad)


def test_descriptions() -> None:
    assert Q6_K.bits_per_weight == 6.5625
    assert F16.row_bytes(3) == 6
    assert repr(Matrix.of(zeros(2, 3))) == f"Matrix(2×3 {F32.name}, 24 bytes)"
