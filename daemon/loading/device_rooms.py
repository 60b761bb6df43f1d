"""Which device computes a model, and how much of its memory is free. Knows names, the ledger, and how to do without."""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from shoal.daemon.errors import DaemonError
from shoal.devices.device_names import AUTO, CPU
from shoal.devices.opening import device_home, present
from shoal.kernels import KernelError
from shoal.kernels.errors import HomeFull, HomeLost
from shoal.kernels.types import WEIGHT_TYPES
from shoal.offload.budget import Budget
from shoal.partition.amounts import format_bytes
from shoal.partition.placement import DeviceRoom, ExpertTimes
from shoal.partition.plan import Plan
from shoal.partition.throughput.weights_of import Weighed

if TYPE_CHECKING:
    from shoal.devices.device_home import DeviceHome

_TYPES = {kind.name: kind for kind in WEIGHT_TYPES}

log = logging.getLogger(__name__)


class Chosen(NamedTuple):
    """The device's room, or None if the CPU computes all; `trouble`: why, where a device was named."""

    room: DeviceRoom | None
    trouble: str = ""


def device_room(device: str, budget: Budget, model: Weighed, idle_bytes: int = 0) -> Chosen:
    """The room on the device that a configuration names, for a model. Of models that may go, `idle_bytes` on it count
    as free. A device that was lost is done without. `auto` is the CPU as long as nothing is known of how fast devices
    are: one that is slower would be chosen as readily. Raises DaemonError `unsupported` when one that was named cannot
    be used.
    """
    if device == AUTO:
        if cards := present():
            log.info("this machine has %s; `device=%s` uses it", ", ".join(cards), cards[0])
        return Chosen(None)
    if device == CPU:
        return Chosen(None)
    try:
        home = device_home(device)
    except KernelError as error:
        raise DaemonError("unsupported", str(error), "`device=cpu` does without it") from error
    there = home.device
    ledger = budget.on(device, there.budget.limit_bytes)
    expert = None
    with suppress(HomeLost):
        expert = _tried(home, model, ledger.free_bytes)
    if there.lost:
        said = f"device {device} is lost ({there.lost}), so the cpu computes; start anew to use it again"
        return Chosen(None, said)
    return Chosen(home.room(ledger.free_bytes + idle_bytes)._replace(expert=expert))


def _tried(home: DeviceHome, model: Weighed, free_bytes: int) -> ExpertTimes | None:
    """What an expert of the model takes there; None if it has none, or there is no room to try. Raises HomeLost."""
    from shoal.devices.expert_timing import Shape, expert_times, tried_bytes

    products = next((its for block, its in model.products.items() if block.kind == "expert"), ())
    expert = [Shape(_TYPES[it.kind], it.rows, it.cols) for it in products]
    if not expert or tried_bytes(expert) > free_bytes:
        return None
    try:
        return expert_times(home, expert)
    except HomeFull:
        return None


def require_whole(plan: Plan, room: DeviceRoom, name: str) -> None:
    """Where others can go, they do before model `name` is split: raises DaemonError `resources` if it would be."""
    taken = room.limit_bytes - room.free_bytes
    if taken and not plan.device_whole:
        raise DaemonError(
            "resources",
            f"of {name} only {plan.there} on device {room.name}: other models hold {format_bytes(taken)}",
        )
