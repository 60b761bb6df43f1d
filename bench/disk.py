"""How fast a disk reads a file at best, directly into huge pages; and how to empty the page cache.

    python bench/disk.py FILE [--rounds 3]      GB/s by size and number of reads in flight

Knows files and Linux. The floor of a streamed model is its bytes over what `read_gb_per_s` gives in the same minute.
"""

from __future__ import annotations

import argparse
import os
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from harness.figures import spread

from shoal.kernels.huge_pages import mapped

READ_BYTES, IN_FLIGHT = 2 << 20, 2  # the fastest here: see docs/LOG.md
# As much memory as a window has. Reading into one small buffer again and again never leaves the processor's cache, and
# is a quarter faster than reading can be for anybody who keeps what is read.
TARGET_BYTES = 256 << 20
SAMPLE_BYTES = 2 << 30  # of a file, read to learn the speed of the disk
CURVE_BYTES = 1 << 30


def read_gb_per_s(
    path: Path,
    *,
    sample_bytes: int = SAMPLE_BYTES,
    read_bytes: int = READ_BYTES,
    in_flight: int = IN_FLIGHT,
    seed: int = 0,
) -> float:
    """GB/s of one sweep over consecutive bytes of the file, from a random place on. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        size = os.fstat(descriptor).st_size
        count = min(sample_bytes, size) // read_bytes
        if not count:
            raise OSError(f"{path} is shorter than one read of {read_bytes} bytes")
        start = random.Random(seed).randrange(size // read_bytes - count + 1) * read_bytes
        numbers = iter(range(count))
        lock = threading.Lock()
        places = TARGET_BYTES // read_bytes
        target = mapped(TARGET_BYTES)
        target.fill(1)  # so that no read has to wait for memory
        memory = target.data

        def work() -> None:
            while True:
                with lock:
                    number = next(numbers, None)
                if number is None:
                    return
                place = number % places * read_bytes
                os.preadv(descriptor, [memory[place : place + read_bytes]], start + number * read_bytes)

        threads = [threading.Thread(target=work) for _ in range(in_flight)]
        started_s = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return count * read_bytes / (time.perf_counter() - started_s) / 1e9
    finally:
        os.close(descriptor)


def forget_pages() -> None:
    """Empty the page cache of the whole machine; needs root. Mapped pages stay."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


@contextmanager
def read_ahead(path: Path, kilobytes: int) -> Iterator[None]:
    """Within the context the disk that has `path` reads this far ahead; needs root. Raises OSError."""
    number = path.stat().st_dev
    device = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve()
    knob = next(
        knob for place in (device, device.parent) if (knob := place / "queue" / "read_ahead_kb").exists()
    )
    before = knob.read_text()
    knob.write_text(str(kilobytes))
    try:
        yield
    finally:
        knob.write_text(before)


def bytes_read(pid: int) -> int:
    """Bytes that the disk has read for a process so far, by any call."""
    lines = (line.split() for line in Path(f"/proc/{pid}/io").read_text().splitlines())
    return next(int(value) for head, value in lines if head == "read_bytes:")


def main() -> None:
    parser = argparse.ArgumentParser(description="GB/s of direct reads by size and number in flight")
    parser.add_argument("file", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    points = [(1 << bits, flight) for bits in range(19, 25) for flight in (1, 2, 4, 8)]
    found: dict[tuple[int, int], list[float]] = {point: [] for point in points}
    for number in range(options.rounds):
        order = random.Random(number)
        for point in order.sample(points, len(points)):
            speed = read_gb_per_s(
                options.file,
                sample_bytes=CURVE_BYTES,
                read_bytes=point[0],
                in_flight=point[1],
                seed=order.randrange(1 << 30),
            )
            found[point].append(speed)
    for size in dict.fromkeys(size for size, _ in points):
        cells = (spread(found[size, flight]) for flight in (1, 2, 4, 8))
        print(f"{size >> 10:6d} KiB  " + "  ".join(f"{cell:18s}" for cell in cells))
    best = max(points, key=lambda point: median(found[point]))
    print(f"best: {best[0] >> 10} KiB, {best[1]} in flight")


if __name__ == "__main__":
    main()
