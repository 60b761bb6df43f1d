"""Which device may compute a model, and how much of its memory is free. Knows names, the ledger, and how to do
without."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from shoal.daemon.config import NodeConfig
from shoal.daemon.errors import DaemonError
from shoal.daemon.memory import opening, pinned_for, take_runtimes
from shoal.daemon.throughput.device_figures import DeviceFigures, Tried, UsualBlocks, device_figures
from shoal.daemon.throughput.own_machine import OwnMachine
from shoal.devices.device_names import AUTO, CPU, read_name
from shoal.devices.opening import device_home, is_open, present
from shoal.kernels import KernelError
from shoal.kernels.errors import HomeLost
from shoal.offload.budget import Budget
from shoal.offload.errors import BudgetExceeded
from shoal.partition.amounts import format_bytes
from shoal.partition.hardware_guesses import DEVICE_HOST_BYTES
from shoal.partition.placement import PINNED_BYTES, DeviceRoom
from shoal.partition.plan import Plan
from shoal.partition.throughput.profile import Accelerator

from .grouping import Grouping

if TYPE_CHECKING:
    from shoal.devices.device import OpenDevice


class Chosen(NamedTuple):
    """The device's room, or None if the CPU computes all; `trouble`: what is not as it should be, in one line."""

    room: DeviceRoom | None
    trouble: str = ""


def device_asked_for(config: NodeConfig, grouping: Grouping | None) -> str:
    """The device that a configuration names. A device belongs to no group, so where other machines may take part, none
    is looked for."""
    others = (config.ranks or 1) > 1 or (grouping is not None and grouping.machines > 1)
    return CPU if config.device == AUTO and others else config.device


def may_have_device(config: NodeConfig) -> bool:
    """Whether a device may compute: one is named, or there is a card. Opens none."""
    return config.names_device or (config.device == AUTO and bool(present()))


def device_room(
    device: str,
    budget: Budget,
    model: Tried,
    machine: OwnMachine,
    idle_bytes: int = 0,
    *,
    laws: bool = False,
) -> Chosen:
    """The room on a device for a model. Of models that may go, `idle_bytes` on it count as free. A device that was lost
    is done without. With `auto` it is that of the first card that there is, if that can be used, and has laws, by which
    it is judged whether the processor alone would be quicker; `laws`: so has one that was named, which otherwise has
    them if they are kept. Raises DaemonError `unsupported` when one that was named cannot be used.
    """
    auto = device == AUTO
    laws = laws or auto
    name = next(iter(present()), CPU) if auto else device
    if name == CPU:
        return Chosen(None)
    if auto and not is_open(name) and (lacks := _no_room_for_libraries(name, budget)):
        return Chosen(None, f"{name} is left alone: {lacks}")
    try:
        with opening(name):
            home = device_home(name)
    except KernelError as error:
        if auto:
            return Chosen(None, f"{name} is left alone: {error}")
        raise DaemonError("unsupported", str(error), "`device=cpu` does without it") from error
    finally:
        take_runtimes(budget)
    there = home.device
    ledger = budget.on(name, there.budget.limit_bytes)
    troubles = [there.budget.trouble]
    figures, kept = DeviceFigures(), machine.home.devices if machine.home is not None else None
    free_bytes = max(0, min(ledger.limit_bytes, there.budget.room_bytes) - ledger.held_bytes)
    with suppress(HomeLost):  # now, or long ago
        troubles.insert(0, _pinned(there, budget))
        figures = device_figures(home, model, free_bytes, kept, budget, laws=laws)
    lacks = ""
    if there.lost:
        lacks = f"device {name} is lost ({there.lost}), so the cpu computes; start anew to use it again"
    elif auto and figures.laws is None:
        from shoal.devices.device_timing import HOST_TRIED_BYTES

        short = budget.free_bytes < HOST_TRIED_BYTES
        free = format_bytes(max(0, budget.free_bytes) if short else free_bytes)
        where = "of the memory budget" if short else "of its memory"
        lacks = f"{name} is left alone: {free} {where} are free, too little to try how fast it is"
        lacks = "; ".join(filter(None, (lacks, there.budget.trouble)))
    if lacks:
        let_be(name, budget)
        return Chosen(None, lacks)
    room = home.room(free_bytes + idle_bytes)
    trouble = "; ".join(filter(None, troubles))
    return Chosen(room._replace(expert=figures.expert, laws=figures.laws, optional=auto), trouble)


def let_idle_be(budget: Budget) -> None:
    """So it is with every device that was asked for."""
    for name in budget.devices:
        let_be(name, budget)


def let_be(name: str, budget: Budget) -> None:
    """Of a device that computes no model of this ledger nothing stays page-locked, unless it hangs: what it keeps then
    nobody else can have."""
    if budget.on(name).held_bytes:
        return
    device, purpose = device_home(name).device, pinned_for(name)
    device.unpin()
    if device.lost and device.locked_bytes:
        budget.take(purpose, device.locked_bytes)
    else:
        budget.release(purpose)


def _no_room_for_libraries(name: str, budget: Budget) -> str:
    """Why a card that nobody has named is not even opened; "" if it may be."""
    needs = DEVICE_HOST_BYTES if read_name(name).kind == "cuda" else 0
    if needs <= budget.free_bytes:
        return ""
    needed, free = format_bytes(needs), format_bytes(max(0, budget.free_bytes))
    return f"its libraries take about {needed} of this machine's memory, and {free} of the budget are free"


def device_laws(
    device: str, machine: OwnMachine, model: Tried | None = None
) -> tuple[tuple[Accelerator, ...], str]:
    """(what the device that is named can do for a model, or for usual ones, or with `auto` the first card;
    `Chosen.trouble`). Raises as `device_room`."""
    room, trouble = device_room(device, Budget(1 << 62), model or UsualBlocks.of_all(), machine, laws=True)
    return (room.laws,) if room is not None and room.laws is not None else (), trouble


def _pinned(device: OpenDevice, budget: Budget) -> str:
    """Have its copies go through page-locked memory, which the ledger has from then on. If there is none, or no room
    for it, they go as they did, and this says why. Raises HomeLost."""
    purpose, why = pinned_for(device.name), ""
    if not (device.pinned_bytes or budget.held_by(purpose)):
        try:
            budget.hold(purpose, PINNED_BYTES)
            device.pin()
            why = device.unpinned
        except BudgetExceeded as error:
            why = str(error)
        except HomeLost:
            budget.release(purpose)
            raise
    if device.pinned_bytes:
        budget.take(purpose, device.pinned_bytes)
        return ""
    budget.release(purpose)
    return f"copies to {device.name} are slower than they could be, without page-locked memory: {why}"


def require_whole(plan: Plan, room: DeviceRoom, name: str) -> None:
    """Where others can go, they do before model `name` is split: raises DaemonError `resources` if it would be."""
    taken = room.limit_bytes - room.free_bytes
    if taken and plan.device and not plan.device_whole:
        raise DaemonError(
            "resources",
            f"of {name} only {plan.there} on device {room.name}: other models hold {format_bytes(taken)}",
        )
