"""How good the throughput model is: predictions are written down first, then cells are measured.

    python bench/foresight.py predict --models DIR --out predictions.json     and commit that file; then
    python bench/foresight.py measure predictions.json --out measured.json [--only TEXT]
    python bench/foresight.py report predictions.json measured.json

`predict` takes the profile that `shoal profile` keeps, or measures it, and probes the floors of memory and disk. Each
cell is measured by `shoal bench` in a fresh process, with the floors probed before and after. Nothing else should run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import disk
import msgspec
from harness import machine
from harness.cells import WANTED, Cell, Floors, Foretold, Measured, summary, verdict

from shoal.comm.home import Home
from shoal.daemon.throughput.foresight import Asked, foresee
from shoal.daemon.throughput.profiling import machine_profile

JOBS = ((1, 128, 32), (1, 1024, 32), (4, 128, 32), (16, 64, 16))  # batch, prompt, new
SHARES = (0.4, 0.7, 0.9)  # of a model's bytes, as budgets; and all of it
LEAST_STREAMED = 300_000_000  # bytes of a model that it makes sense to stream
ROUNDS = 3


def cells(models: Path, threads: int) -> Iterator[Cell]:
    """All cells for the models of a directory: GGUF files and directories with config.json."""
    for path in sorted(models.iterdir()):
        if path.suffix != ".gguf" and not (path / "config.json").exists():
            continue
        size = path.stat().st_size if path.is_file() else sum(it.stat().st_size for it in path.iterdir())
        for count in sorted({1, threads}):
            for batch, prompt, new in JOBS:
                yield Cell(path.name, "keep", count, batch, prompt, new)
        for share in SHARES if size >= LEAST_STREAMED else ():
            for batch, prompt, new in JOBS[:3:2]:
                yield Cell(path.name, "keep", threads, batch, prompt, new, int(share * size) + 150_000_000)


def floors(threads: int, file: Path) -> Floors:
    """Of memory and of the disk, now."""
    return Floors(machine.dram_read_gb_per_s(threads), disk.read_gb_per_s(file))


def foretell(models: Path, threads: int) -> list[Foretold]:
    """Every cell's prediction. Cells that have no plan are left out."""
    home = Home.from_env()
    found: list[Foretold] = []
    profiles = {
        count: machine_profile(count, home.models, home.profile if count == threads else None)
        for count in sorted({1, threads})
    }
    largest = max((it for it in models.rglob("*") if it.is_file()), key=lambda it: it.stat().st_size)
    now = {count: floors(count, largest) for count in profiles}
    for cell in cells(models, threads):
        profile = profiles[cell.threads]
        assert profile is not None
        asked = Asked(
            cell.prompt_tokens,
            cell.new_tokens,
            cell.batch,
            "keep",
            "f16",
            None,
            cell.memory or None,
            cell.threads,
        )
        made = foresee(models / cell.model, profile, asked)
        names = ("memory", "stream")  # what `bench` does
        row = next((it for it in made.plans if it.fits and it.name in names), None)
        if row is not None:
            peak = max(row.peak_bytes.values())
            found.append(
                Foretold(
                    cell, row.name, row.ttft_s, row.token_s, row.band, peak, row.binding, now[cell.threads]
                )
            )
    return found


def measured(models: Path, foretold: Foretold) -> Measured:
    """One cell, by `shoal bench` in a process of its own."""
    cell = foretold.cell
    file = models / cell.model
    probed = file if file.is_file() else max(file.iterdir(), key=lambda it: it.stat().st_size)
    before = floors(cell.threads, probed)
    command = [sys.executable, "-P", "-m", "shoal.cli.main", "bench", str(file), "--json"]
    options = {
        "--prompt-tokens": cell.prompt_tokens,
        "--new-tokens": cell.new_tokens,
        "--batch": cell.batch,
        "--repeat": ROUNDS,
        "--threads": cell.threads,
        **({"--memory": cell.memory} if cell.memory else {}),
    }
    command += [str(part) for pair in options.items() for part in pair]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise SystemExit(f"{cell.name}: {ended.stderr.strip()}")
    result: dict[str, Any] = json.loads(ended.stdout)
    prefill, decode = (result[f"{part}_tokens_per_s"]["median"] for part in ("prefill", "decode"))
    return Measured(
        cell,
        cell.batch * cell.prompt_tokens / prefill,
        cell.batch / max(decode, 1e-9),
        result["peak_memory_bytes"],
        before,
        floors(cell.threads, probed),
    )


def report(foretold: list[Foretold], found: list[Measured]) -> None:
    """A line for each cell, and what counts."""
    by_cell = {it.cell: it for it in foretold}
    verdicts = [verdict(by_cell[it.cell], it) for it in found]
    for it in verdicts:
        said = "void" if it.void else "band" if it.within else "OUT"
        print(f"{it.name:64} token {it.token:+5.0%} (as it is {it.absolute:+5.0%}), first {it.ttft:+5.0%}, "
              f"memory {it.memory:+4.0%}, {said}")  # fmt: skip
    for kind in ("token", "ttft"):
        figures = summary(verdicts, kind)  # type: ignore[arg-type]
        print(kind, ", ".join(f"{name} {value:.3g}" for name, value in figures.items()))
    print("wanted:", ", ".join(f"{name} {value:.0%}" for name, value in WANTED.items()))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    predict = verbs.add_parser("predict")
    predict.add_argument("--models", type=Path, required=True)
    predict.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    predict.add_argument("--out", type=Path, required=True)
    measure = verbs.add_parser("measure")
    measure.add_argument("predictions", type=Path)
    measure.add_argument("--models", type=Path, required=True)
    measure.add_argument("--out", type=Path, required=True)
    measure.add_argument("--only", default="", help="only cells whose name has this")
    measure.add_argument("--limit-s", type=float, default=1e9, help="begin no cell after so many seconds")
    both = verbs.add_parser("report")
    both.add_argument("predictions", type=Path)
    both.add_argument("measured", type=Path)
    options = parser.parse_args()
    if options.verb == "predict":
        options.out.write_bytes(
            msgspec.json.format(msgspec.json.encode(foretell(options.models, options.threads)))
        )
        return
    foretold = msgspec.json.decode(options.predictions.read_bytes(), type=list[Foretold])
    if options.verb == "report":
        report(foretold, msgspec.json.decode(options.measured.read_bytes(), type=list[Measured]))
        return
    found: list[Measured] = []
    until_s = time.monotonic() + options.limit_s
    for item in foretold:
        if options.only in item.cell.name and time.monotonic() < until_s:
            found.append(measured(options.models, item))
            print(found[-1].cell.name, flush=True)
            options.out.write_bytes(msgspec.json.encode(found))
    report(foretold, found)


if __name__ == "__main__":
    main()
