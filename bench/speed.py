"""Prefill and decode speed of a GGUF, one sequence: Shoal and llama.cpp in turn, round by round.

    python bench/speed.py MODEL.gguf --peer-python PATH [--rounds 5] [--threads 2]

PATH is a python that has llama-cpp-python. Machines drift, so what counts is the ratio of each round; medians are
printed with their range.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

PEER = Path(__file__).with_name("peer_speed.py")
MEASURES = ("prefill_tokens_per_s", "decode_tokens_per_s")


def main() -> None:
    parser = argparse.ArgumentParser(description="speed: Shoal against llama.cpp")
    parser.add_argument("model", type=Path)
    parser.add_argument("--peer-python", required=True)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()

    sizes = [str(options.prompt_tokens), str(options.new_tokens)]
    shoal = [sys.executable, "-m", "shoal.cli.main", "bench", str(options.model), "--json", "--repeat", "1"]
    shoal += ["--prompt-tokens", sizes[0], "--new-tokens", sizes[1], "--threads", str(options.threads)]
    peer = [options.peer_python, str(PEER), str(options.model), *sizes, str(options.threads)]
    ours: list[dict[str, float]] = []
    theirs: list[dict[str, float]] = []
    for _ in range(options.rounds):
        result = run(shoal)
        ours.append({name: result[name]["median"] for name in MEASURES})
        theirs.append(run(peer))
    print(f"{options.model.name}, {options.threads} threads, {options.rounds} rounds")
    for name in MEASURES:
        ratios = [a[name] / b[name] for a, b in zip(ours, theirs, strict=True)]
        print(
            f"{name:22s} shoal {spread([a[name] for a in ours])}  llama.cpp {spread([b[name] for b in theirs])}  "
            f"ratio {spread(ratios, 2)}"
        )


def run(command: list[str]) -> Any:
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
    if done.returncode:
        sys.exit(f"{command[0]} failed: {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout)


def spread(values: list[float], digits: int = 0) -> str:
    return f"{median(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


if __name__ == "__main__":
    main()
