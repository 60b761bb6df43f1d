"""How a cell of the throughput model's test is measured: by `shoal bench` in a fresh process, or by a group of daemons
on loopback.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from cluster import ask, group

from .cells import Cell, Foretold
from .own_profiles import pins, rank_profile

PORT = 27650
TRIES = 4


class CellFailed(Exception):
    """A cell that cannot be measured."""


class Took(NamedTuple):
    """Seconds to the first token, and for each later one; bytes at most (0: not looked at); half of the range of
    rounds, as a share of their middle: of a token."""

    ttft_s: float
    token_s: float
    peak_bytes: int
    apart: float


def alone(file: Path, foretold: Foretold) -> Took:
    """By `shoal bench`."""
    cell = foretold.cell
    command = shoal("bench", *bench_arguments(file, cell, foretold.rounds))
    for _ in range(TRIES):
        result = _measured_alone(cell, command)
        if foretold.resident_bytes in (0, result["resident_weight_bytes"]):
            break
    else:  # some KB more or less for the process make it another at times
        raise CellFailed(f"{cell.name}: {TRIES} processes had another plan than was predicted")
    prefill, decode = (result[f"{part}_tokens_per_s"] for part in ("prefill", "decode"))
    ttft_s = cell.batch * cell.prompt_tokens / prefill["median"]
    usual = max(decode["median"], 1e-9)
    apart = (decode["max"] - decode["min"]) / (2 * usual)
    return Took(ttft_s, cell.batch / usual, result["peak_memory_bytes"], apart)


def bench_arguments(file: Path, cell: Cell, rounds: int) -> list[str]:
    """Of `shoal bench`."""
    named = f"{file}:{cell.quant}" if cell.quant != "keep" else str(file)
    options = {
        "--prompt-tokens": cell.prompt_tokens,
        "--new-tokens": cell.new_tokens,
        "--batch": cell.batch,
        "--repeat": rounds,
        "--threads": cell.threads,
        **({"--memory": cell.memory} if cell.memory else {}),
    }
    return [named, "--json", *(str(part) for pair in options.items() for part in pair)]


def _measured_alone(cell: Cell, command: list[str]) -> dict[str, Any]:
    # A process begins with the peak of the one that became it, which would be ours with the floors' buffer. The shell's
    # child is a process of its own.
    ended = subprocess.run(
        ["sh", "-c", '"$@"; exit $?', "sh", *command], capture_output=True, text=True, check=False
    )
    if ended.returncode:
        raise CellFailed(f"{cell.name}: {ended.stderr.strip()}")
    result: dict[str, Any] = json.loads(ended.stdout)
    return result


def in_group(file: Path, foretold: Foretold) -> Took:
    """The same by daemons on loopback, each with processors of its own; what they take is not looked at."""
    cell, source = foretold.cell, random.Random(0)
    exact = "--speculate", "off"  # one token a step, as is predicted
    known, places = rank_profile(cell, file.parent), pins(cell.ranks, cell.threads)
    with group(file.resolve(), cell.ranks, cell.threads, PORT, places, exact, known) as client:
        found = [
            ask(client, [source.randrange(1000) for _ in range(cell.prompt_tokens)], cell.new_tokens)
            for _ in range(foretold.rounds + 1)
        ][1:]
    firsts, tokens = zip(*found, strict=True)
    apart = (max(tokens) - min(tokens)) / (2 * median(tokens))
    return Took(median(firsts), median(tokens), 0, apart)


def shoal(*arguments: str) -> list[str]:
    return [sys.executable, "-P", "-m", "shoal.cli.main", *arguments]


def processor_s() -> dict[int, float]:
    """By process, what it has taken of processors; not this one."""
    found = {}
    for place in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = place.read_text().rpartition(")")[2].split()  # a name may have blanks
            found[int(place.parent.name)] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    found.pop(os.getpid(), None)
    return found
