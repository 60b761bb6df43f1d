"""Two trees of Shoal against each other: did a change make anything slower or larger?

    python bench/trees.py BEFORE AFTER MODEL [--rounds 8] [--new 48] [--memory 300MB] [--threads 2] [--starts 5]

BEFORE and AFTER are roots of checkouts whose kernels are built. A daemon of each loads the model. They are asked in
alternating order, and each waits while the other answers; what counts is the ratio within a pair. With --memory both
stream what does not fit. Then daemons are started and stopped in turn.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from engines import worker

from shoal.client import AsyncClient, Client
from shoal.comm.errors import CommError
from shoal.comm.home import Home
from shoal.comm.messages import Done, Token

PROMPT_TOKENS, NEW_TOKENS = 512, 48
STREAMS = 8
STOPS = 64
START_S = 120.0
VOCAB = 30_000  # every model here has at least this many tokens

Figures = dict[str, float]


@dataclass(frozen=True)
class Daemon:
    pid: int
    address: str
    start_s: float

    def memory_mb(self, field: str) -> float:
        """VmHWM is the most that was resident so far, RssAnon what is private now."""
        found = re.search(
            rf"^{field}:\s+(\d+) kB$", Path(f"/proc/{self.pid}/status").read_text(), re.MULTILINE
        )
        assert found is not None
        return int(found[1]) * 1024 / 1e6


@contextmanager
def daemon(tree: Path, model: Path, options: list[str], root: Path) -> Iterator[Daemon]:
    """The daemon of a tree, with the model loaded; packs are kept in `root`."""
    command = [sys.executable, "-m", "shoal.cli.main", "serve", "--model", str(model), *options]
    environment = {**os.environ, "SHOAL_HOME": str(root), "PYTHONPATH": str(tree / ".typing")}
    began_s = time.perf_counter()
    with (root / "log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, cwd=root, stdout=log, stderr=log)
    try:
        address = Home(root).address
        while not _loaded(address):
            if process.poll() is not None or time.perf_counter() - began_s > START_S:
                raise RuntimeError(f"{tree}: {(root / 'log').read_text()[-500:]}")
            time.sleep(0.01)
        yield Daemon(process.pid, address, time.perf_counter() - began_s)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def _loaded(address: str) -> bool:
    with contextlib.suppress(CommError), Client(address) as client:
        return bool(client.status().models)
    return False


def ask(address: str, seed: int, new: int = NEW_TOKENS) -> Figures:
    """One long prompt and its answer; seconds as the client sees them."""
    (prompt,) = worker.prompts(1, PROMPT_TOKENS, VOCAB, seed)
    times = []
    with Client(address) as client:
        began_s = time.perf_counter()
        for event in client.generate(
            prompt_tokens=prompt, max_tokens=new, ignore_eos=True, temperature=0.0, stop=["\0never"]
        ):
            if isinstance(event, Token):
                times.append(time.perf_counter())
            elif isinstance(event, Done):
                done = event
    decode_s = times[-1] - times[0]
    return {
        "first token, s": times[0] - began_s,
        "prefill, s": done.timings.prefill_s,
        "decode, s per token": decode_s / (done.usage.completion_tokens - 1),
    }


def ask_many(address: str, seed: int) -> Figures:
    """Many short prompts at once."""

    async def one(client: AsyncClient, prompt: list[int]) -> int:
        count = 0
        async for event in client.generate(
            prompt_tokens=prompt, max_tokens=NEW_TOKENS, ignore_eos=True, temperature=0.0
        ):
            count += isinstance(event, Token) and len(event.ids)
        return count

    async def run() -> float:
        async with AsyncClient(address) as client:
            began_s = time.perf_counter()
            prompts = worker.prompts(STREAMS, 32, VOCAB, seed)
            counts = await asyncio.gather(*(one(client, prompt) for prompt in prompts))
            return (time.perf_counter() - began_s) / sum(counts)

    return {f"{STREAMS} streams, s per token": asyncio.run(run())}


def ask_beside_stops(address: str, seed: int) -> Figures:
    """One answer beside another whose stop strings, long ones, all begin as its text does to the end."""
    (prompt,) = worker.prompts(1, 32, VOCAB, seed)
    with Client(address) as client:
        text, _ = client.text(prompt_tokens=prompt, max_tokens=200, ignore_eos=True, temperature=0.0)
        stop = [text[:1000] + chr(ord("A") + number) for number in range(STOPS)]
    held = threading.Thread(target=_answer, args=(address, prompt, 200), kwargs={"stop": stop})
    held.start()
    try:
        time.sleep(0.2)
        return {f"beside {STOPS} stop strings, s per token": ask(address, seed)["decode, s per token"]}
    finally:
        held.join()


def _answer(address: str, prompt: list[int], tokens: int, **fields: Any) -> None:
    with Client(address) as client:
        for _ in client.generate(
            prompt_tokens=prompt, max_tokens=tokens, ignore_eos=True, temperature=0.0, **fields
        ):
            pass


def pairs(before: list[Figures], after: list[Figures]) -> None:
    print(f"{'':28} {'before':>10} {'after':>10}   after ÷ before, median (least–most)")
    for name in before[0]:
        ratios = [b[name] / a[name] for a, b in zip(before, after, strict=True)]
        middle = [median(found[name] for found in side) for side in (before, after)]
        print(
            f"{name:28} {middle[0]:10.4g} {middle[1]:10.4g}   "
            f"{median(ratios):.3f} ({min(ratios):.3f}–{max(ratios):.3f}), {len(ratios)} pairs"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="two trees of Shoal against each other")
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--starts", type=int, default=5)
    parser.add_argument("--new", type=int, default=NEW_TOKENS, help="tokens of an answer")
    parser.add_argument("--memory", default="")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()

    trees = [options.before.resolve(), options.after.resolve()]
    arguments = ["--threads", str(options.threads), "--kv-disk", "0", "--ctx", "2048"]
    arguments += ["--memory", options.memory] if options.memory else []
    model = options.model.resolve()
    with ExitStack() as held:
        roots = [Path(held.enter_context(tempfile.TemporaryDirectory(prefix="shoal-trees-"))) for _ in trees]
        found: list[list[Figures]] = [[], []]
        with ExitStack() as up:
            daemons = [
                up.enter_context(daemon(tree, model, arguments, root))
                for tree, root in zip(trees, roots, strict=True)
            ]
            for round_ in range(options.rounds + 1):
                for side in (0, 1) if round_ % 2 else (1, 0):
                    address = daemons[side].address
                    figures = ask(address, round_, options.new)
                    if not options.memory:  # passes that wait for a disk are too slow for more
                        figures |= ask_many(address, 1000 + round_)
                        figures |= ask_beside_stops(address, 2000 + round_)
                    if round_:  # the first round warms up
                        found[side].append(figures)
            for side, one in enumerate(daemons):
                more = {
                    "peak memory, MB": one.memory_mb("VmHWM"),
                    "private memory, MB": one.memory_mb("RssAnon"),
                }
                found[side] = [figures | more for figures in found[side]]
        pairs(*found)
        starts: list[list[Figures]] = [[], []]
        for round_ in range(options.starts):
            for side in (0, 1) if round_ % 2 else (1, 0):
                with daemon(trees[side], model, arguments, roots[side]) as one:
                    starts[side].append(
                        {"daemon start, s": one.start_s, "at start, MB": one.memory_mb("VmHWM")}
                    )
        if options.starts:
            pairs(*starts)


if __name__ == "__main__":
    main()
