"""What is known of a device: what a profile says of it, and what the daemon finds when it opens one. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from ...placement import FEW_ROWS, MANY_ROWS, DeviceRoom, ExpertTimes
from ..profile import Accelerator
from ..weights_of import Product


def accelerator(room: DeviceRoom, expert: Sequence[Product]) -> Accelerator | None:
    """A device as it was found to be, or to compute with these matrices of an expert; None if neither was tried."""
    if room.laws is not None:
        return room.laws
    its = room.expert
    if its is None or not its.many_rows or not expert:
        return None
    numbers = sum(it.rows * it.cols for it in expert)
    return Accelerator(
        room.name,
        room.limit_bytes,
        memory_bytes_per_s=its.nbytes / its.computed_s,
        flops=2 * numbers * its.many_rows / its.many_s,
        host_bytes_per_s=its.nbytes / its.come_s,
        layer_s=0.0,
        mixture_s=0.0,
        copy_s=0.0,
        locked_bytes_per_s=its.nbytes / its.locked_s if its.locked_s else 0.0,
    )


def room_of(its: Accelerator, expert: Sequence[Product]) -> DeviceRoom:
    """The inverse: all of its memory, and what it should take for an expert with these matrices."""
    times, nbytes = None, sum(it.nbytes for it in expert)
    if expert:
        flops = 2 * sum(it.rows * it.cols for it in expert)
        few_s = max(nbytes / its.memory_bytes_per_s, FEW_ROWS * flops / its.flops)
        many_s = max(few_s, MANY_ROWS * flops / its.flops)
        times = ExpertTimes(nbytes, nbytes / its.host_bytes_per_s, FEW_ROWS, few_s, MANY_ROWS, many_s)
    memory_bytes = int(its.memory_bytes)
    return DeviceRoom(its.name, memory_bytes, int(its.scratch_bytes), True, memory_bytes, times, its)
