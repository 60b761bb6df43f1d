"""Scenarios for models larger than memory: each takes a run and the sizes of a row, and returns figures.

Knows the order of calls and what is timed. The cgroup, the cold cache and the process are `capped`'s.
"""

from __future__ import annotations

import random
from contextlib import ExitStack, nullcontext
from statistics import median

import disk
from engines.engine_process import EngineProcess
from harness.capped import Capped, budget_of, capped, largest_file
from harness.figures import Figure
from harness.run import Run
from harness.scenarios import Sizes
from speculation import prompts

from shoal.models.checkpoint.checkpoint import open_checkpoint

SHARES = (0.10, 0.20, 0.30, 0.45, 0.60, 0.75, 0.90, 1.10)  # of the model's bytes, as budgets
TURNS = 10  # times as many tokens if everything is in memory, where they are that much faster
FLOOR, STRAIGHT = "floor", "straight line"
WARM_TOKENS = 1  # decoded before the clock starts, so that what a pass leaves behind is there


def disk_bound(run: Run, sizes: Sizes) -> list[Figure]:
    """A prompt and some tokens in a fresh process each round: time, floor, peak and bytes read, and a peer's."""
    tuned = f", its disk reading {sizes.peer_read_ahead_kb} KB ahead" if sizes.peer_read_ahead_kb else ""
    per_token = Figure(f"time per token{tuned}", "s", "less")
    floor = Figure("time per token against the disk's floor", "s", "less")
    first = Figure(f"TTFT of {sizes.prompt} tokens", "s", "less")
    peak = Figure("peak memory against the budget", "GB", "less")
    peer_peak = Figure("peak memory", "GB", "neither")
    read = Figure("read for each token", "GB", "neither")
    load = Figure("loading", "s", "neither")
    cap_bytes = cap_of(run, sizes)
    context = sizes.prompt + sizes.new + 8
    told = _drawn(run, context) if sizes.dictated else []
    for _, name in run.names_in_turn(tuple(filter(None, sizes.engines))):
        ahead_kb = 0 if name == "shoal" else sizes.peer_read_ahead_kb
        with (
            disk.read_ahead(run.model, ahead_kb) if ahead_kb else nullcontext(),
            capped(run, name, cap_bytes, context=context) as engine,
        ):
            load.note(name, engine.facts["seconds"])
            if told:
                began = engine.call("dictate", prompt=told[: sizes.prompt], answer=told[sizes.prompt :])
            else:
                began = engine.call("begin", streams=1, tokens=sizes.prompt, seed=0)
            first.note(name, began["seconds"])
            token_s, token_bytes = _decode(engine, sizes.new)
            engine.look_again()
            per_token.note(name, token_s)
            read.note(name, token_bytes / 1e9)
            peer_peak.note(name, engine.peak_bytes() / 1e9)
            if name == "shoal":
                floor.note(name, token_s)
                floor.note(FLOOR, engine.facts["streamed_bytes"] / 1e9 / engine.disk_gb_per_s)
                peak.note(name, engine.peak_bytes() / 1e9)
                peak.note("budget", budget_of(cap_bytes) / 1e9)
    return [figure for figure in (per_token, floor, first, peak, peer_peak, read, load) if figure.values]


def budgets(run: Run, sizes: Sizes) -> list[Figure]:
    """Time per token at budgets from a little to more than the model, against the straight line between the ends."""
    model_bytes = largest_file(run.model).stat().st_size
    found: dict[float, list[float]] = {share: [] for share in SHARES}
    unbounded: list[float] = []
    peak = Figure("peak memory against the budget, the closest", "GB", "less")
    for number in range(run.rounds):
        for share in SHARES if number % 2 == 0 else reversed(SHARES):
            budget = share * model_bytes
            with ExitStack() as stack:
                context = sizes.prompt + TURNS * sizes.new + 8
                bounded = stack.enter_context(capped(run, "shoal", int(budget * 1.05), context=context))
                bounded.call("begin", streams=1, tokens=sizes.prompt, seed=0)
                if share == SHARES[-1]:
                    (free,) = stack.enter_context(run.engines(("shoal",), context=context))
                    free.call("begin", streams=1, tokens=sizes.prompt, seed=0)
                    token_s, free_s = _by_turns(bounded, free, TURNS * sizes.new)
                    unbounded.append(free_s)
                else:
                    token_s, _ = _decode(bounded, sizes.new)
                found[share].append(token_s)
                if not peak.values or bounded.peak_bytes() / 1e9 / budget > _closest(peak):
                    peak.values = {"shoal": [bounded.peak_bytes() / 1e9], "budget": [budget / 1e9]}
    low, high = (median(found[SHARES[end]]) for end in (0, -1))
    figures = []
    for share in SHARES:
        straight = low + (high - low) * (share - SHARES[0]) / (SHARES[-1] - SHARES[0])
        name = f"time per token at {share:.0%} ({share * model_bytes / 1e9:.2f} GB)"
        values = {"shoal": found[share], STRAIGHT: [straight] * run.rounds}
        figures.append(Figure(name, "s", "less", values, at=share * model_bytes / 1e9))
    whole = {"shoal": found[SHARES[-1]], "in memory, without a budget": unbounded}
    name = f"time per token at {SHARES[-1]:.0%}"
    return [*figures, Figure(name, "s", "less", whole), peak]


def crowd(run: Run, sizes: Sizes) -> list[Figure]:
    """Tokens/s of all streams together against tokens/s of one alone, disk-bound."""
    figure = Figure(f"{sizes.streams} streams against one", "tokens/s")
    for number in range(run.rounds):
        for streams in (1, sizes.streams) if number % 2 else (sizes.streams, 1):
            with capped(
                run, "shoal", cap_of(run, sizes), context=sizes.prompt + sizes.new + 8, streams=streams
            ) as engine:
                engine.call("begin", streams=streams, tokens=sizes.prompt, seed=0)
                engine.call("advance", tokens=WARM_TOKENS)
                call = engine.call("advance", tokens=sizes.new)
                figure.note("shoal" if streams > 1 else "one stream", call["tokens"] / call["seconds"])
    return [figure]


def guessing(run: Run, sizes: Sizes) -> list[Figure]:
    """Tokens/s of an answer that repeats its prompt, with and without guessing ahead, disk-bound."""
    figures = []
    texts = prompts(run.text[:1200])
    for kind in ("copy", "list"):
        figure = Figure(f"guessing ahead, {kind}", "tokens/s")
        accepted = Figure(f"tokens accepted for each step, {kind}", "", "neither")
        for number in range(run.rounds):
            for guesses in (0, 32) if number % 2 else (32, 0):
                with capped(run, "shoal", cap_of(run, sizes), context=2048, guesses=guesses) as engine:
                    engine.call("begin_chat", text=texts[kind])
                    call = engine.call("advance", tokens=sizes.new)
                    figure.note("shoal" if guesses else "without", call["tokens"] / call["seconds"])
                    accepted.note("shoal" if guesses else "without", call["tokens"] / call["steps"])
        figures += [figure, accepted]
    return figures


def cap_of(run: Run, sizes: Sizes) -> int:
    """The group's limit in bytes."""
    return int(sizes.cap_gb * 1e9 or sizes.cap_share * largest_file(run.model).stat().st_size)


def _decode(engine: Capped, tokens: int) -> tuple[float, float]:
    """(seconds, bytes read) for each token."""
    engine.call("advance", tokens=WARM_TOKENS)
    before = engine.bytes_read()
    seconds = engine.call("advance", tokens=tokens)["seconds"]
    return seconds / tokens, (engine.bytes_read() - before) / tokens


def _drawn(run: Run, tokens: int) -> list[int]:
    """Random ids of the model's vocabulary."""
    with open_checkpoint(run.model) as checkpoint:
        source = random.Random(0)
        return [source.randrange(checkpoint.spec.vocab) for _ in range(tokens)]


def _by_turns(one: Capped, other: EngineProcess, tokens: int) -> tuple[float, float]:
    """Median seconds per token of two engines that run side by side and take turns token by token, because the speed of
    memory changes by more than a tenth from one minute to the next."""
    taken: tuple[list[float], list[float]] = [], []
    for engine in (one, other):
        engine.call("advance", tokens=WARM_TOKENS)
    for number in range(tokens):
        for index in (0, 1) if number % 2 == 0 else (1, 0):
            taken[index].append((one, other)[index].call("advance", tokens=1)["seconds"])
    return median(taken[0]), median(taken[1])


def _closest(peak: Figure) -> float:
    return peak.values["shoal"][0] / peak.values["budget"][0]
