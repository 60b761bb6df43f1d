"""What devices compute in torch is what the reference computes: every type of weights and of K and V, experts, norms.
Here in the CPU's memory; on a graphics card where there is one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from fakes.torch_on_host import torch_home
from torch.utils._python_dispatch import TorchDispatchMode

from shoal.devices import torch_kernels
from shoal.devices.errors import NoSuchDevice
from shoal.devices.opening import device_home
from shoal.kernels.band_layout import to_bands
from shoal.kernels.compute_home import Staged
from shoal.kernels.homes import cpu
from shoal.kernels.matrix import Linears, Matrix
from shoal.kernels.reference import ReferenceHome, _constant
from shoal.kernels.self_test import disagreements
from shoal.kernels.types import WEIGHT_TYPES, WeightType

GENERATOR = np.random.default_rng(3)


def test_they_compute_what_the_reference_computes() -> None:
    assert disagreements(torch_home(), ReferenceHome(), bits=False) == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no graphics card")
def test_so_does_a_graphics_card() -> None:
    assert disagreements(device_home("cuda:0,8GB"), ReferenceHome(), bits=False) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a graphics card")
def test_without_a_graphics_card_one_is_told_so() -> None:
    with pytest.raises(NoSuchDevice, match=r"^device cuda:0 (is not there|cannot be used): "):
        device_home("cuda:0")


@pytest.mark.parametrize("kind", WEIGHT_TYPES, ids=lambda kind: kind.name)
def test_staged_weights_lie_as_on_the_host(kind: WeightType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are no whole bands, and more than are decoded at once."""
    home, cols = torch_home(), 512
    monkeypatch.setattr(torch_kernels, "TILE_NUMBERS", 32 * cols)
    for rows in (16, 40, 160):
        stored = GENERATOR.integers(0, 256, (rows, kind.row_bytes(cols))).astype(np.uint8)
        w = Matrix(kind, to_bands(kind, stored).reshape(-1), rows, cols)
        staging = home.staging(256 + w.nbytes)
        x = home.place(GENERATOR.standard_normal((3, cols), np.float32))
        kept, coming = home.keep_matrix(w), Staged(w, staging, 256)
        home.stage([coming])
        staged = home.staged(coming)
        ours, theirs = (home.fetch(home.linears(x, Linears([it]))[0]) for it in (staged, kept))
        assert np.array_equal(ours, theirs, equal_nan=True)


def test_small_operations() -> None:
    home, other = torch_home(), cpu()
    rows = GENERATOR.standard_normal((5, 32), np.float32)
    x, norm = home.place(rows), home.keep_vector(rows[0, :8].copy())
    x2, norm2 = rows.copy(), rows[0, :8].copy()
    for ours, theirs in (
        (home.pad(x, (2, 3)), other.pad(x2, (2, 3))),
        (home.scale(x, 0.3), other.scale(x2, 0.3)),
        (home.rms_norm_heads(x, norm, 1e-5), other.rms_norm_heads(x2, norm2, 1e-5)),
        (squares := home.squares([x, x], [True, False]), squares2 := other.squares([x2, x2], [True, False])),
        (home.rows(x, np.array([3, 0])), other.rows(x2, np.array([3, 0]))),
    ):
        assert np.allclose(home.fetch(ours), theirs, rtol=1e-5, atol=1e-6)
    wide = home.keep_vector(rows[1].copy())
    ours = home.normed_by(x, wide, squares, 0, 64, 1e-5)
    assert np.allclose(home.fetch(ours), other.normed_by(x2, rows[1], squares2, 0, 64, 1e-5), rtol=1e-5)
    gates = rows[:, :1].copy()
    home.gate(x, home.place(gates)), other.gate(x2, gates)
    home.clip(x, 0.5), other.clip(x2, 0.5)
    home.add(home.rows(x, slice(1, 3)), home.place(rows[:2])), other.add(x2[1:3], rows[:2])
    assert np.allclose(home.fetch(x), x2, rtol=1e-5, atol=1e-6)
    assert not home.fetch(home.zeros_like(x)).any()


class _Copies(TorchDispatchMode):
    """Notes copies to other devices: how many bytes, and whether they block."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default and "device" in kwargs:
            self.seen.append((args[0].nbytes, not kwargs.get("non_blocking")))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "kind", [kind for kind in WEIGHT_TYPES if kind.quantised], ids=lambda kind: kind.name
)
def test_what_decoding_needs_besides_is_brought_without_waiting(kind: WeightType) -> None:
    """Of up to 64 KB a driver takes a copy before it returns; more, or a copy that blocks, waits for the device."""
    with _Copies() as copies:
        torch_kernels._order_in_band.__wrapped__(kind, torch.device("meta"))
        _constant.__wrapped__((0, 2, 4, 6), torch.uint8, torch.device("meta"))
    assert len(copies.seen) == 2
    for nbytes, blocks in copies.seen:
        assert nbytes <= 64 << 10
        assert not blocks
