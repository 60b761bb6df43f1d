"""Which devices there are, and the home of each, which is opened when it is first asked for.

Until then nothing of a device is imported.
"""

from __future__ import annotations

import logging
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from shoal.kernels import ComputeHome
from shoal.kernels.errors import HomeLost
from shoal.kernels.homes import cpu

from .device_names import CPU, read_name
from .errors import LostOpening, NoSuchDevice

if TYPE_CHECKING:
    from .device_home import DeviceHome

log = logging.getLogger(__name__)

NVIDIA = Path("/proc/driver/nvidia/gpus")  # has a directory for each card, once the driver is there
NODES = Path("/dev")  # has a file for each card, also where that of the driver is not seen

_opened: dict[str, DeviceHome] = {}
_given_up: dict[str, str] = {}  # and why
_lock = threading.Lock()


def present() -> list[str]:
    """Names of the cards that this machine seems to have. Imports nothing and asks no driver."""
    cards = 0
    with suppress(OSError):  # somebody may hide them from us
        cards = len(list(NVIDIA.iterdir())) if NVIDIA.is_dir() else 0
    cards = max(cards, len(list(NODES.glob("nvidia[0-9]*"))))
    return [f"cuda:{number}" for number in range(cards)]


def home_of(name: str) -> ComputeHome:
    """The home that computes the blocks of this device (`BlockPlan.device`). Raises NoSuchDevice."""
    return cpu() if name == CPU else device_home(name)


def is_open(name: str) -> bool:
    """Whether somebody has asked for the home of this device, and got it."""
    return name in _opened


def device_home(name: str) -> DeviceHome:
    """The home of a device other than the CPU; the same for everybody. One that was lost while it was opened is not
    tried again. Raises NoSuchDevice."""
    with _lock:
        if name in _given_up:
            raise NoSuchDevice(_given_up[name])
        if (home := _opened.get(name)) is None:
            try:
                home = _opened[name] = _open(name)
            except LostOpening as error:
                _given_up[name] = str(error)
                raise
        return home


def _open(name: str) -> DeviceHome:
    from .device_home import DeviceHome

    said = read_name(name)
    if said.kind == "sim":
        from .sim_device import SimDevice
        from .sim_kernels import SimKernels

        assert said.limit_bytes is not None
        speeds = said.link_bytes_per_s, said.unpinned_bytes_per_s
        return DeviceHome(SimDevice(name, said.limit_bytes, *speeds, said.pinnable_bytes), SimKernels(cpu()))
    try:
        from .cuda_device import CudaDevice  # and with them torch: 125 MB and 1.4 s that others do without
        from .kernel_choice import VARIABLE, chosen
    except (ImportError, OSError) as error:  # OSError: a library of the driver's or of torch's is missing
        raise NoSuchDevice(f"device {name} needs torch, which cannot be imported: {error}") from error
    device = CudaDevice(name, said.number, said.limit_bytes)
    try:
        kernels, why = chosen(device)
    except HomeLost as error:
        raise LostOpening(f"{error}, while kernels were tried; {VARIABLE}=torch tries none") from error
    if why:
        log.info("device %s: %s", name, why)
    return DeviceHome(device, kernels, why)
