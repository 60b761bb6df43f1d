"""How good the throughput model is: predictions are written down first, then cells are measured.

    python bench/foresight.py predict --models DIR --out predictions.json     and commit that file; then
    python bench/foresight.py measure predictions.json --models DIR --out measured.json [--only TEXT] [--limit-s 840]
    python bench/foresight.py report predictions.json measured.json

`predict` measures profiles (a minute each for all threads, half of them and one), with the floors of memory, computing
and calls probed meanwhile, of the disk before and after, since a machine changes its speed within minutes. What running
has taught (`corrections`) is left out. It lists cells that take less than `CELL_S` each, in an order in which any first
part has some of every kind, and makes the packs that they need. What sums take ranks of one machine is tried
(`harness/taking_turns.py`).
`measure` goes on where it was ended: cells that `--out` has are not measured again, unless they were void. A cell is
`shoal bench` in a fresh process, or a group of two or four daemons on loopback, floors probed before and after.
Nothing else should run.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import NamedTuple

import msgspec
from harness.cells import (
    WANTED,
    Cell,
    Foretold,
    Measured,
    WithDisk,
    alternatives,
    memory_summary,
    ranked,
    summary,
    verdict,
)
from harness.measuring import CellFailed, alone, bench_arguments, in_group, processor_s, shoal
from harness.own_profiles import (
    floors,
    group_profile,
    half_of,
    loopback,
    nearest_round,
    processors,
    profile_of,
    ranks_a_processor,
)
from harness.taking_turns import SumWaits, in_turns, tried

from shoal.comm.home import Home
from shoal.daemon.config import NodeConfig
from shoal.daemon.errors import DaemonError
from shoal.daemon.library.packs import Packs
from shoal.daemon.loading.planning import make_plan
from shoal.daemon.throughput.model_sizes import described, weighed
from shoal.partition.group_choice import NoGroup
from shoal.partition.memory_layout import PAGE_TOKENS
from shoal.partition.plan import Misfit
from shoal.partition.throughput.cost import cost, round_bytes
from shoal.partition.throughput.explain import with_faster_disk
from shoal.partition.throughput.group_plans import Groups
from shoal.partition.throughput.peak import PROCESS_BYTES, peak_bytes
from shoal.partition.throughput.prediction import Job, Prediction
from shoal.partition.throughput.profile import Profile
from shoal.partition.throughput.solve import asks

# Batch, prompt, new. All prompts of a batch are read in one step: else those that begin first end first, and what is
# measured is the mean of many batches.
JOBS = ((1, 64, 32), (1, 512, 16), (4, 64, 24), (16, 16, 16))
STREAMED_JOBS = ((1, 64, 16), (4, 64, 12))
GROUP_JOBS = {2: ((1, 64, 32), (1, 512, 16)), 4: ((1, 64, 32),)}  # by ranks
SHARES = (0.4, 0.65, 0.85)  # of a model's bytes, as budgets, besides what the process takes
MORE_BYTES = 150_000_000  # of a budget, besides a share of the model
LEAST_STREAMED = 300_000_000  # bytes of a model that it makes sense to stream
FEWER_BITS = 500_000_000  # models of fewer bytes are also kept in 4 bits
# Disks so many times as fast as the profile's, with which streamed cells are predicted besides.
DISKS = (0.25, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.4, 1.6, 2.0, 2.5)
CELL_S = 18.0
ROUNDS = (3, 2, 1)
FIXED_S, GROUP_FIXED_S, LOAD_BYTES_PER_S = 4.5, 10.0, 0.7e9  # of a cell, besides what is predicted
INDEPENDENT = 1.0  # share of experts: routers of random weights choose as if by dice
ROOM_LIMIT_S = 120.0
# `shoal bench` until it would read weights: it says what it had left for the model.
ROOM = """
import os
from shoal.daemon.loading import budgeting, runnable
plain = budgeting.make_plan
def heard(model, config, memory_bytes, *rest, **more):
    heard.memory_bytes = memory_bytes
    return plain(model, config, memory_bytes, *rest, **more)
def told(*_, **more):
    print(heard.memory_bytes, flush=True)
    os._exit(0)
budgeting.make_plan, runnable.open_store = heard, told
from shoal.cli.main import main
main()
"""


def cells(models: Path, threads: int) -> Iterator[Cell]:
    """All cells for the models of a directory: GGUF files and directories with config.json."""
    for path in sorted(models.iterdir()):
        if path.suffix != ".gguf" and not (path / "config.json").exists():
            continue
        size = path.stat().st_size if path.is_file() else sum(it.stat().st_size for it in path.iterdir())
        for count in sorted({1, threads}):
            for job in JOBS:
                yield Cell(path.name, "keep", count, *job)
        for share in SHARES if size >= LEAST_STREAMED else ():
            for job in STREAMED_JOBS:
                yield Cell(path.name, "keep", threads, *job, int(share * size) + MORE_BYTES)
        if size < FEWER_BITS:
            for job in JOBS[::2]:
                yield Cell(path.name, "q4", threads, *job)
        for ranks, jobs in GROUP_JOBS.items() if threads > 1 else ():
            for job in jobs if threads % ranks == 0 or ranks % threads == 0 else ():
                yield Cell(path.name, "keep", max(1, threads // ranks), *job, ranks=ranks)


def _job(cell: Cell) -> Job:
    return Job(cell.prompt_tokens, cell.new_tokens, cell.batch, distinct=INDEPENDENT)


def fresh_share(pages: int, job: Job, rounds: int) -> float:
    """`Job.fresh` in the median of so many rounds after one to warm up, each with other texts, which take the pages of
    a pool that nobody had, as long as there are any."""
    each = job.batch * -(-(job.context_tokens - 1) // PAGE_TOKENS)
    return median(min(1.0, max(0, pages - number * each) / each) for number in range(1, 1 + rounds))


class Way(NamedTuple):
    """A plan: its name, bytes that come round in its steps, and, if the job is done so many times besides warming up,
    what is predicted of it, also with a disk that is so many times as fast, and the bytes that the process has at most
    (0: not looked at); and what stays of the weights if not all do."""

    name: str
    round_bytes: float
    prediction: Callable[[int, float], Prediction]
    peak_bytes: Callable[[int], int] = lambda rounds: 0
    resident_bytes: int = 0


def alone_foretold(cell: Cell, path: Path, profile: Profile) -> Way | None:
    """The plan that `shoal bench` makes; None if it would be refused."""
    with described(path) as checkpoint:
        model = weighed(checkpoint, cell.quant)  # type: ignore[arg-type]
    job = _job(cell)
    config = NodeConfig(
        threads=cell.threads,
        context_tokens=job.context_tokens,
        max_sequences=max(cell.batch, NodeConfig().max_sequences),
        max_guesses=0,
    )
    rest = int(profile.head.memory_bytes) - PROCESS_BYTES - model.tokenizer_bytes
    room = room_bytes(path, cell) if cell.memory else rest
    plan = make_plan(model, config, room or 0)  # like `shoal bench`, without laws of the machine
    if isinstance(plan, Misfit):
        return None
    plan = replace(plan, narrow_inputs=True)  # as of a machine that is in no cluster
    whole = round_bytes(model, plan, job.batch * job.context_tokens)

    def found(rounds: int, disk: float) -> Prediction:
        fresh = fresh_share(plan.kv.pages, job, rounds)
        return cost(model, plan, with_faster_disk(profile.head, disk), job._replace(fresh=fresh))

    name = "stream" if plan.streams else "memory"
    # Of a mixture, an expert more or less does not matter.
    held = plan.pinned_bytes if plan.streams and not plan.expert_slots else 0
    return Way(name, whole, found, lambda rounds: peak_bytes(model, plan, job, 1 + rounds), held)


def room_bytes(path: Path, cell: Cell) -> int | None:
    """What `shoal bench` has left for a cell's model; None if it refuses it. With some MB more or less other blocks
    stay in memory, which changes when the processor waits for the disk."""
    command = [sys.executable, "-P", "-c", ROOM, "bench", *bench_arguments(path, cell, 1)]
    ended = subprocess.run(command, check=False, capture_output=True, text=True, timeout=ROOM_LIMIT_S)
    if ended.returncode:
        print(ended.stderr.strip(), flush=True)
        return None
    return int(ended.stdout)


def group_foretold(cell: Cell, path: Path, profile: Profile, turns: float, waits: SumWaits) -> Way | None:
    """The same of a group of the profile's devices, which share caches, and processors, each of which has so many."""
    with described(path) as checkpoint:
        model = weighed(checkpoint, cell.quant)  # type: ignore[arg-type]
    job = _job(cell)
    usual = NodeConfig()
    asked = asks(job, None, usual.chunk_tokens, usual.max_sequences, 0)(model, "f16", cell.threads)[0]
    groups = Groups(model, asked, profile, job, ("f32",))
    choice = groups.of(cell.ranks)
    if isinstance(choice, NoGroup):
        return None
    found = in_turns(groups.cost(choice), choice, profile, model, job, turns, waits)
    return Way(f"group of {cell.ranks}", model.weights_bytes, lambda rounds, disk: found)


def foretell(models: Path) -> list[Foretold]:
    """Every cell's prediction. Cells that have no plan or would take too long are left out."""
    largest = max((it for it in models.rglob("*") if it.is_file()), key=lambda it: it.stat().st_size)
    threads, half = processors(), half_of(processors())
    every = list(cells(models, threads))
    waits = {ranks: tried(ranks, threads) for ranks in sorted({it.ranks for it in every} - {1})}
    known = {count: profile_of(count, largest) for count in sorted({1, half, threads})}
    link = loopback(half)
    found: list[Foretold] = []
    for cell in every:
        path = models / cell.model
        try:
            if cell.ranks > 1:
                ranks = group_profile(cell, known[half].profile, known[threads].profile, link)
                turns = ranks_a_processor(cell, known[threads].profile)
                made = group_foretold(cell, path, ranks, turns, waits[cell.ranks])
            else:
                made = alone_foretold(cell, path, known[cell.threads].profile)
        except DaemonError as error:  # it has few bits already
            print(error, flush=True)
            continue
        if made is None:
            continue
        name, whole, predicted, peak_bytes, resident_bytes = made
        row = predicted(1, 1.0)
        once_s = row.ttft_s + cell.new_tokens * row.token_s
        before_s = (GROUP_FIXED_S if cell.ranks > 1 else FIXED_S) + path.stat().st_size / LOAD_BYTES_PER_S
        rounds = next((it for it in ROUNDS if before_s + (1 + it) * once_s < CELL_S), 0)
        if not rounds:
            continue
        if name == "stream" or cell.quant != "keep":
            packing = shoal("pack", "--quant", cell.quant, str(path))
            subprocess.run(packing, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        row, size = predicted(rounds, 1.0), nearest_round(whole)
        others = [(times, predicted(rounds, times)) for times in DISKS if name == "stream"]
        floor = known[threads if cell.ranks > 1 else cell.threads].floors[size]
        found.append(
            Foretold(
                cell,
                name,
                row.ttft_s,
                row.token_s,
                row.band,
                peak_bytes(rounds),
                row.binding,
                floor,
                rounds,
                dict(row.parts),  # type: ignore[arg-type]
                dict(row.prompt_parts),  # type: ignore[arg-type]
                size,
                resident_bytes,
                [WithDisk(times, its.ttft_s, its.token_s) for times, its in others],
            )
        )
    random.Random(0).shuffle(found)
    return found


def measured(models: Path, foretold: Foretold) -> Measured:
    """One cell."""
    cell = foretold.cell
    file = models / cell.model
    probed = read_from(file, cell.quant if foretold.plan == "stream" else "")
    threads = min(processors(), cell.threads * cell.ranks)
    before = floors(threads, probed, foretold.round_bytes)
    began_s, known = time.monotonic(), processor_s()
    took = (in_group if cell.ranks > 1 else alone)(file, foretold)
    # What was started for the cell has ended.
    others_s = sum(max(0.0, used_s - known.get(pid, 0.0)) for pid, used_s in processor_s().items())
    others = others_s / (time.monotonic() - began_s)
    after = floors(threads, probed, foretold.round_bytes)
    return Measured(cell, took.ttft_s, took.token_s, took.peak_bytes, before, after, took.apart, others)


def read_from(path: Path, quant: str) -> Path:
    """The largest file of a model, or of its pack: each lies on the disk in its own way. `quant`: "" for no pack."""
    where = Packs(Home.from_env()).directory(path, quant) if quant else path  # type: ignore[arg-type]
    return where if where.is_file() else max(where.iterdir(), key=lambda it: it.stat().st_size)


def measure(foretold: list[Foretold], options: argparse.Namespace) -> list[Measured]:
    """What is not measured yet, as far as time allows; written down cell by cell."""
    by_cell = {it.cell: it for it in foretold}
    found: list[Measured] = []
    if options.out.exists():
        known = msgspec.json.decode(options.out.read_bytes(), type=list[Measured])
        found = [it for it in known if it.cell in by_cell and not by_cell[it.cell].void(it)]
    done = {it.cell for it in found}
    until_s = time.monotonic() + options.limit_s
    for item in foretold:
        if item.cell in done or options.only not in item.cell.name or time.monotonic() > until_s:
            continue
        began_s = time.monotonic()
        try:
            found.append(measured(options.models, item))
        except CellFailed as error:
            print(error, flush=True)
            continue
        options.out.write_bytes(msgspec.json.format(msgspec.json.encode(found)))
        print(
            f"{len(found)} of {len(foretold)}, {time.monotonic() - began_s:.0f} s: {item.cell.name}",
            flush=True,
        )
    return found


def report(foretold: list[Foretold], found: list[Measured]) -> None:
    """A line for each cell, and what counts."""
    by_cell = {it.cell: it for it in foretold}
    verdicts = [verdict(by_cell[it.cell], it) for it in found]
    for it in sorted(verdicts, key=lambda it: it.name):
        said = "void" if it.void else "band" if it.within else "OUT"
        peaks = (
            "{:.0f} → {:.0f} MB ({:+.1%}), ".format(*(n / 1e6 for n in it.peaks), it.memory)
            if it.memory
            else ""
        )
        print(f"{it.name:72} token {it.token:+5.0%} (as it is {it.absolute:+5.0%}), first {it.ttft:+5.0%}, "
              f"{peaks}{said}")  # fmt: skip
    kinds = ["all", *sorted({it.kind for it in verdicts})]
    for part in ("token", "ttft"):
        for kind in kinds:
            counted = [it for it in verdicts if kind in ("all", it.kind)]
            _show(f"{part}, {kind}", summary(counted, part))  # type: ignore[arg-type]
    for name, figures in (
        ("memory", memory_summary(verdicts)),
        ("choices", ranked(alternatives(by_cell, found))),
    ):
        _show(name, figures)
    _show("wanted", WANTED)


def _show(name: str, figures: Mapping[str, float]) -> None:
    print(f"{name:28}", ", ".join(f"{what} {value:.3g}" for what, value in figures.items()))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    predict = verbs.add_parser("predict")
    predict.add_argument("--models", type=Path, required=True)
    predict.add_argument("--out", type=Path, required=True)
    measuring = verbs.add_parser("measure")
    measuring.add_argument("predictions", type=Path)
    measuring.add_argument("--models", type=Path, required=True)
    measuring.add_argument("--out", type=Path, required=True)
    measuring.add_argument("--only", default="", help="only cells whose name has this")
    measuring.add_argument("--limit-s", type=float, default=1e9, help="begin no cell after so many seconds")
    both = verbs.add_parser("report")
    both.add_argument("predictions", type=Path)
    both.add_argument("measured", type=Path)
    options = parser.parse_args()
    if options.verb == "predict":
        made = foretell(options.models)
        options.out.write_bytes(msgspec.json.format(msgspec.json.encode(made)))
        print(f"{len(made)} cells")
        return
    foretold = msgspec.json.decode(options.predictions.read_bytes(), type=list[Foretold])
    if options.verb == "measure":
        found = measure(foretold, options)
    else:
        found = msgspec.json.decode(options.measured.read_bytes(), type=list[Measured])
    report(foretold, found)


if __name__ == "__main__":
    main()
