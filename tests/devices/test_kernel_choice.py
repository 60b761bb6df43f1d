"""Which kernels a card gets: Triton's if they are there, right and quicker; else torch's, and why."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from fakes.torch_on_host import TorchOnHost

from shoal.devices import cuda_device, kernel_choice, opening
from shoal.devices.device_home import DeviceHome
from shoal.devices.errors import DeviceLost, NoSuchDevice
from shoal.devices.kernel_choice import VARIABLE, chosen
from shoal.kernels.arrays import Floats
from shoal.kernels.matrix import Matrix
from shoal.kernels.types import Q4_K


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> TorchOnHost:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(kernel_choice, "TRIED_KINDS", (Q4_K,))
    monkeypatch.setattr(kernel_choice, "TRIED_ROWS", 16)
    monkeypatch.setattr(kernel_choice, "TRIED_COLS", 256)
    monkeypatch.setattr(kernel_choice, "TRIED_PAGES", 2)
    monkeypatch.setattr(kernel_choice, "TRIED_HEADS", (2, 1, 8))
    monkeypatch.setattr(kernel_choice, "_CALLS", 1)
    return TorchOnHost("sim:test", 1 << 30)


def taking(monkeypatch: pytest.MonkeyPatch, triton_s: dict[int, float], off: float = 0.0) -> None:
    """Triton's kernels take so long by the number of rows (0: to attend), torch's 1 s; results are `off` times too
    large."""
    products, looks = kernel_choice._tried, kernel_choice._looked

    def taken(found: Floats, home: DeviceHome, rows: int) -> tuple[Floats, float]:
        ours = home.kernels.startswith("triton")
        return (found * (1 + off), triton_s[rows]) if ours else (found, 1.0)

    def tried(w: Matrix, x: Floats, home: DeviceHome) -> tuple[Floats, float]:
        return taken(products(w, x, home)[0], home, len(x))

    def looked(kind: str, home: DeviceHome) -> tuple[Floats, float]:
        return taken(looks(kind, home)[0], home, 0)

    monkeypatch.setattr(kernel_choice, "_tried", tried)
    monkeypatch.setattr(kernel_choice, "_looked", looked)


def test_what_is_quicker(device: TorchOnHost, monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(kernel_choice, "SOME", 2)
    with monkeypatch.context() as patch:
        taking(patch, {0: 0.5, 1: 0.5, 2: 0.5})
        kernels, why = chosen(device)
        assert (kernels.name, why) == (f"triton {triton.__version__} (one row, many, attention)", "")
    with monkeypatch.context() as patch:
        taking(patch, {0: 0.5, 1: 0.5, 2: 1.5})
        kernels, why = chosen(device)
        assert kernels.name == f"triton {triton.__version__} (one row, attention)"
        assert why == "torch computes with more rows: it takes 1000000 µs where triton takes 1500000"
    with monkeypatch.context() as patch:
        taking(patch, {0: 1.5, 1: 0.5, 2: 0.5})
        kernels, why = chosen(device)
        assert kernels.name == f"triton {triton.__version__} (one row, many)"
        assert why == "torch computes attention: it takes 2000000 µs where triton takes 3000000"
    with monkeypatch.context() as patch:
        taking(patch, {0: 0.5, 1: 0.5, 2: 0.5}, off=0.1)
        kernels, why = chosen(device)
        assert kernels.name == "torch"
        assert "torch computes with one row: triton's are 1.0e-01 away from it with Q4_K" in why
        assert "torch computes attention: triton's are 1.0e-01 away from it with f16 K and V" in why


def test_a_compiler_that_fails(device: TorchOnHost, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from shoal.devices.in_triton import triton_kernels

    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("Failed to find C compiler.\nPlease specify")

    monkeypatch.setattr(triton_kernels, "_arranged", fails)
    kernels, why = chosen(device)
    assert kernels.name == "torch"
    assert "triton's kernels cannot be made: RuntimeError: Failed to find C compiler. Please specify" in why

    def is_not_loaded(*_: Any, **__: Any) -> None:
        raise RuntimeError("Triton Error [CUDA]: device kernel image is invalid")

    monkeypatch.setattr(triton_kernels, "_arranged", is_not_loaded)
    kernels, why = chosen(device)
    assert kernels.name == "torch"
    said = "triton's kernels cannot be had: RuntimeError: Triton Error [CUDA]: device kernel image is invalid"
    assert f"torch computes with one row: {said}" in why

    def loses(*_: Any, **__: Any) -> None:
        raise DeviceLost("cuda:0", "an illegal memory access")

    monkeypatch.setattr(triton_kernels, "_arranged", loses)
    with pytest.raises(DeviceLost):
        chosen(device)


def test_a_card_that_is_too_old_for_triton(device: TorchOnHost, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (6, 1))
    kernels, why = chosen(device)
    assert kernels.name == "torch"
    assert why == "triton is for cards of compute capability 7.0 or more, this one has 6.1"


def test_a_card_that_is_lost_while_it_is_tried(device: TorchOnHost, monkeypatch: pytest.MonkeyPatch) -> None:
    def loses(_: Any) -> None:
        raise DeviceLost("cuda:7", "an illegal memory access")

    monkeypatch.setattr(cuda_device, "CudaDevice", lambda *_: device)
    monkeypatch.setattr(kernel_choice, "chosen", loses)
    with pytest.raises(
        NoSuchDevice, match=r"illegal memory access, while .* SHOAL_DEVICE_KERNELS=torch tries none"
    ):
        opening.device_home("cuda:7")
    assert not opening.is_open("cuda:7")


def test_without_triton(device: TorchOnHost, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("shoal.devices.in_triton.triton_")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("shoal.devices.in_triton.triton_kernels", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    kernels, why = chosen(device)
    assert kernels.name == "torch"
    assert why.startswith("triton cannot be imported: ModuleNotFoundError")


def test_what_a_variable_says(device: TorchOnHost, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "torch")
    assert chosen(device).kernels.name == "torch"
    monkeypatch.setenv(VARIABLE, "abacus")
    with pytest.raises(NoSuchDevice, match=r"^SHOAL_DEVICE_KERNELS=abacus is neither torch nor triton$"):
        chosen(device)
    pytest.importorskip("triton")
    monkeypatch.setenv(VARIABLE, "triton")
    assert chosen(device).kernels.name.startswith("triton")


def test_a_card_without_room_to_try(device: TorchOnHost) -> None:
    pytest.importorskip("triton")
    kernels, why = chosen(TorchOnHost("sim:test", 1000))
    assert kernels.name == "torch"
    assert "there is no room to try triton: device sim:test is full" in why
