"""The stored types: what the reference reads from bytes is what the `gguf` package reads."""

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st

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
from shoal.kernels.bands import from_bands, to_bands
from shoal.kernels.sample import random_matrix, random_rows
from shoal.kernels.types import F16, F32, Q4_0, Q6_K, UNSUPPORTED_NAMES

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
    expected = gguf.quants.dequantize(stored.numpy(), GGMLQuantizationType(kind.id))
    got = reference.dequantize(w)
    assert got.dtype == torch.float32
    np.testing.assert_array_equal(got.numpy(), expected.reshape(7, 1024))


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_quantised_weights_come_back_close(name: str) -> None:
    kind = next(k for k in WEIGHT_TYPES if k.name == name)
    values = np.random.default_rng(1).standard_normal((4, 256)).astype(np.float32)
    stored = gguf.quants.quantize(values, GGMLQuantizationType(kind.id))
    w = from_stored(kind, 4, 256, memoryview(stored.tobytes()))
    assert np.abs(reference.dequantize(w).numpy() - values).max() < 0.3


@kinds
def test_linear_and_gather_are_those_of_the_decoded_weights(
    kind: WeightType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "TILE_BYTES", 4 * 512 * 2)  # two rows a tile
    w = random_matrix(kind, 9, 512)
    x, bias = torch.randn(3, 512), torch.randn(9)
    full = reference.dequantize(w)
    seen = reference.quantised_inputs(x) if kind.quantised else x
    (got,) = reference.linears(x, Linears((w,), (bias,)), None, 0.0)
    torch.testing.assert_close(got, seen @ full.T + bias, rtol=1e-4, atol=1e-3)
    ids = torch.tensor([8, 0, 8])
    assert torch.equal(reference.gather_rows(w, ids), full[ids])
    assert reference.gather_rows(w, ids[:0]).shape == (0, 512)


@kinds
@settings(deadline=None, max_examples=10)
@given(rows=st.integers(1, 40), blocks=st.integers(1, 3))
def test_bands_are_a_permutation_within_sixteen_rows(kind: WeightType, rows: int, blocks: int) -> None:
    stored = random_rows(kind, rows, blocks * kind.block_weights, seed=rows)
    bands = to_bands(kind, stored)
    assert torch.equal(from_bands(kind, bands)[:rows], stored)
    assert bands.numel() == kind.matrix_bytes(rows, blocks * kind.block_weights)
    for band, part in zip(bands, stored.split(kind.band_rows), strict=True):
        assert torch.equal(band, to_bands(kind, part)[0])
        assert torch.equal(band.sort()[0][-part.numel() :], part.flatten().sort()[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tensors_are_wrapped_without_copy(dtype: torch.dtype) -> None:
    tensor = torch.randn(3, 10).to(dtype)
    w = Matrix.from_tensor(tensor)
    assert w.data.data_ptr() == tensor.data_ptr()
    assert torch.equal(reference.dequantize(w), tensor.float())
    assert torch.equal(reference.dequantize(Matrix.from_tensor(tensor.T)), tensor.T.float())


def test_bytes_must_be_those_of_the_shape() -> None:
    buffer = torch.zeros(36, dtype=torch.uint8)
    assert from_stored(Q4_0, 2, 32, buffer).nbytes == Q4_0.matrix_bytes(2, 32) == 16 * 18
    assert from_stored(Q4_0, 0, 32, b"").rows == 0
    for rows, cols, wrong in [
        (2, 32, buffer[:-1]),
        (3, 32, buffer),
        (-2, 32, buffer),
        (2, 33, buffer),
        (2, 0, buffer),
        (2, 32, buffer.to(torch.int8)),
        (1, 32, buffer[::2]),
        (2, 32, bytes(35)),
    ]:
        with pytest.raises(OperandError):
            from_stored(Q4_0, rows, cols, wrong)
    memory = torch.zeros(16 * 18, dtype=torch.uint8)
    assert from_stored(Q4_0, 2, 32, buffer, memory).data is memory
    with pytest.raises(OperandError):
        from_stored(Q4_0, 2, 32, buffer, memory[:-1])
    with pytest.raises(OperandError):
        interleave(Q4_0, buffer.view(2, 18), memory[:36])
    for data in (
        buffer,
        memory.view(torch.int8),
        memory.view(16, 18),
        torch.zeros(576, dtype=torch.uint8)[::2],
    ):
        with pytest.raises(OperandError):
            Matrix(Q4_0, data, 2, 32)
    for bad in (torch.zeros(3), torch.zeros(2, 2, dtype=torch.int64)):
        with pytest.raises(OperandError):
            Matrix.from_tensor(bad)


def test_descriptions() -> None:
    assert Q6_K.bits_per_weight == 6.5625
    assert F16.row_bytes(3) == 6
    assert repr(Matrix.from_tensor(torch.zeros(2, 3))) == f"Matrix(2×3 {F32.name}, 24 bytes)"
