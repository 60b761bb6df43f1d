"""A profile in rows of words, as tables show it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from shoal.partition.amounts import format_bytes, format_delay
from shoal.partition.throughput.profile import CopyContention, Device, Profile

_SHOWN_ROWS = (1, 4, 16, 64, 256)
_NS = 1e9
WORTH_SAYING = 0.05  # of what a part takes: less lies within what is measured of it


def device_facts(device: Device) -> Iterator[tuple[str, str]]:
    """(what, how much) of one device."""
    over, both = device.overheads, device.contention
    yield (
        "device",
        f"{device.name}, {'measured' if device.measured else 'by a few figures'}, {device.threads} threads",
    )
    yield (
        "memory",
        f"{format_bytes(device.memory_bytes)} for Shoal, read at {format_bytes(device.memory_bytes_per_s)}/s",
    )
    if device.caches:
        yield "caches", _kept(device)
    yield "first touch", f"{format_bytes(device.first_touch_bytes_per_s)}/s"
    yield "arithmetic", f"{device.flops / 1e9:,.0f} GFLOP/s"
    if device.disk_bytes_per_s:
        reads = device.reads
        sizes = zip(reads.nbytes, reads.bytes_per_s, strict=True) if reads else ()
        by_size = ", ".join(f"{format_bytes(speed)}/s by {size >> 10} KiB" for size, speed in sizes)
        yield "disk", by_size or f"{format_bytes(device.disk_bytes_per_s)}/s"
        if reads and (rings := reads.rings):
            pairs = zip(rings.nbytes, rings.bytes_per_s, strict=True)
            by_ring = (f"{format_bytes(speed)}/s by {size >> 20} MiB" for size, speed in pairs)
            yield "through windows", ", ".join(by_ring)
        keeps = f"the processor keeps {both.compute_keeps:.0%}, the disk {both.disk_keeps:.0%}"
        yield "both at once", keeps
    else:
        yield "disk", "none"
    if device.port_bytes_per_s:
        yield "all links", f"{format_bytes(device.port_bytes_per_s)}/s together"
    costs = f"{_delay(over.step_s)} a step, {_delay(over.layer_s)} a layer, {_delay(over.mixture_s)} more with experts"
    yield "fixed costs", costs
    if learnt := corrected(device.corrections.learnt):
        yield "as models ran", learnt
    for one in device.accelerators:
        sizes_of = f"{format_bytes(one.memory_bytes)} at {format_bytes(one.memory_bytes_per_s)}/s"
        link = f"{format_bytes(one.host_bytes_per_s)}/s from its host"
        if one.locked_bytes_per_s:
            link += f", {format_bytes(one.locked_bytes_per_s)}/s from memory that is page-locked"
        yield f"accelerator {one.name}", f"{sizes_of}, {one.flops / 1e12:,.3g} TFLOP/s, {link}"
        if (its := one.contention) != CopyContention():
            keeps = f"the processor keeps {its.host_keeps:.0%}, {one.name} {its.device_keeps:.0%}"
            yield "beside its copies", f"{keeps}, and the link {its.link_keeps:.0%}"


def _kept(device: Device) -> str:
    """How fast weights are read that come round, from the fewest to the most that were tried."""
    assert device.caches
    sizes = device.caches.nbytes
    shown = dict.fromkeys((sizes[0], sizes[len(sizes) // 2], sizes[-1]))
    speeds = (f"{format_bytes(device.going_round(it).memory_bytes_per_s)}/s" for it in shown)
    said = (f"{speed} of {format_bytes(it)}" for speed, it in zip(speeds, shown, strict=True))
    return f"weights that come round in every step are read at {', '.join(said)}"


def corrected(learnt: Mapping[str, float]) -> str:
    """What running has taught of parts of steps, as far as it is worth saying; "" if nothing is."""
    worth = {part: times for part, times in learnt.items() if abs(times - 1) >= WORTH_SAYING}
    said = ", ".join(f"{part} {times:.2f} times" for part, times in worth.items())
    return f"{said} as long" if said else ""


def link_facts(profile: Profile) -> Iterator[tuple[str, str]]:
    for link in profile.links:
        speed = f"{format_delay(link.latency_s)} one way, {format_bytes(link.bytes_per_s)}/s"
        yield " – ".join(link.between), speed


def rows_table(device: Device) -> tuple[list[str], list[list[str]]]:
    """(columns, rows): GB/s of weights by stored type, size of matrices, bits of inputs and rows multiplied at once."""
    columns = [
        "GB/s of weights",
        "matrix",
        "inputs",
        *(f"{rows} row" + "s" * (rows > 1) for rows in _SHOWN_ROWS),
    ]
    table = []
    for law in device.products:
        known = dict(zip(law.rows, law.byte_s, strict=True))
        speeds = [f"{1 / known[rows] / 1e9:.3g}" if rows in known else "" for rows in _SHOWN_ROWS]
        size = format_bytes(law.nbytes) + " of an expert" * law.experts
        table.append([law.kind, size, f"{law.input_bits} bits", *speeds])
    return columns, table


def attention_table(device: Device) -> tuple[list[str], list[list[str]]]:
    """(columns, rows): billions of numbers of queries times tokens seen, per second."""
    contexts = sorted({context for law in device.attention for context in law.context})
    columns = ["attention, G/s", "of", *(f"{context:,} seen" for context in contexts)]
    table = []
    for law in device.attention:
        for name, values in (("a token", law.decode_s), ("a chunk", law.prompt_s)):
            known = dict(zip(law.context, values, strict=True))
            table.append(
                [
                    f"KV {law.kv_type}, one head of {law.head_dim} for {law.queries}",
                    name,
                    *(f"{1 / known[it] / _NS:.3g}" if it in known else "" for it in contexts),
                ]
            )
    return columns, table


def _delay(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} µs" if seconds < 1e-3 else format_delay(seconds)
