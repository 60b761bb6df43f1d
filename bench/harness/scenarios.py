"""Scenarios: each takes a run and the sizes of a row, and returns figures.

Knows the order of calls and what is timed. Engines and daemons are started by `run` and `daemon_process`.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles
from typing import Any

from engines import worker
from engines.daemon_process import serving
from harness import machine
from harness.figures import Figure
from harness.run import Run

from shoal.client import AsyncClient, Client
from shoal.comm.messages import Token

PEER = "llama.cpp"
_AHEAD = 64  # tokens that the first of several answers may say while the other prompts are read
GREEDY: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}


@dataclass(frozen=True)
class Sizes:
    """The sizes of one row, in tokens; `streams` run together."""

    prompt: int = 512
    new: int = 64
    streams: int = 1
    requests: int = 1  # that are answered in all
    peer: str = PEER  # "" for none
    cap_gb: float = 0.0  # the limit of a cgroup; or as a share of the model's bytes
    cap_share: float = 0.0
    peer_read_ahead_kb: int = 0  # of the disk, while the peer runs; 0: as the machine has it
    # Decodes random tokens: a model of random weights repeats its likeliest tokens, and with them its routing.
    dictated: bool = False

    @property
    def engines(self) -> tuple[str, str]:
        return "shoal", self.peer


Scenario = Callable[[Run, Sizes], list[Figure]]


def speed(run: Run, sizes: Sizes) -> list[Figure]:
    """Prefill and decode, of one sequence or of many at once, from the beginning in each round."""
    many = sizes.streams > 1
    prefill = Figure(f"prefill of {f'{sizes.streams} × ' if many else ''}{sizes.prompt}", "tokens/s")
    decode = Figure(
        f"decode, {sizes.streams} streams" if many else "decode", "tokens/s", weights_gb_per_s=not many
    )
    return _from_the_beginning(run, sizes, prefill, decode)


def long_context(run: Run, sizes: Sizes) -> list[Figure]:
    """The same after a prompt of many tokens, where attention counts."""
    decode = Figure(f"decode, {sizes.prompt} tokens of context", "tokens/s")
    return _from_the_beginning(run, sizes, Figure(f"prefill of {sizes.prompt}", "tokens/s"), decode)


def _from_the_beginning(run: Run, sizes: Sizes, prefill: Figure, decode: Figure) -> list[Figure]:
    context = sizes.prompt + sizes.new + _AHEAD
    with run.engines(sizes.engines, context=context, streams=sizes.streams) as engines:
        for number, engine in run.turns(engines):
            begun = engine.call("begin", streams=sizes.streams, tokens=sizes.prompt, seed=number)
            prefill.note(engine.name, _rate(begun))
            decode.note(engine.name, _rate(engine.call("advance", tokens=sizes.new)))
            engine.call("end")
    return [prefill, decode]


def chat_turns(run: Run, sizes: Sizes) -> list[Figure]:
    """Time to the first token of a chat's first and second turn, through the daemon.

    The peer's is llama.cpp at its best: the second turn's new tokens alone, on the KV it has.
    """
    figures = [
        Figure(f"TTFT of a chat of {sizes.prompt} tokens, {turn} turn", "s", "less")
        for turn in ("first", "second")
    ]
    first, second = figures
    share = Figure("TTFT, second turn / first", "", "neither")
    question = "And what is the most important sentence of it?"
    context = 2 * sizes.prompt
    with (
        serving(run.model, context, run.threads) as daemon,
        Client(daemon.address, timeout_s=300) as client,
        run.engines((sizes.peer,), context=context) as engines,
    ):
        pieces = _pieces(client, run.text, sizes.prompt, run.rounds + 1)
        client.text(messages=[{"role": "user", "content": pieces[-1]}], max_tokens=sizes.new, **GREEDY)
        for number, engine in run.turns(engines):
            messages = [{"role": "user", "content": pieces[number]}]
            known = len(client.tokenize(messages=messages).ids) + sizes.new
            first_s, answer = _first_token_s(client, messages, sizes.new)
            messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": question}]
            added = len(client.tokenize(messages=messages).ids) - known
            second_s, _ = _first_token_s(client, messages, sizes.new)
            first.note("shoal", first_s)
            second.note("shoal", second_s)
            share.note("shoal", second_s / first_s)
            first_s = engine.call("begin", streams=1, tokens=sizes.prompt, seed=number)["seconds"]
            engine.call("advance", tokens=sizes.new)
            second_s = engine.call("extend", tokens=added, seed=number)["seconds"]
            engine.call("end")
            first.note(engine.name, first_s)
            second.note(engine.name, second_s)
            share.note(engine.name, second_s / first_s)
    return [first, second, share]


def interference(run: Run, sizes: Sizes) -> list[Figure]:
    """Gaps between the tokens of one stream, alone and while another prompt is prefilled, through the daemon.

    The stream goes on from prose, drawn at random: what repeats itself would come in bursts.
    """
    beside = f"beside a prefill of {sizes.prompt}"
    alone_p50, alone_p99, beside_p50, beside_p99 = figures = [
        Figure(f"gap between tokens, {share}, {when}", "ms", "less")
        for when in ("alone", beside)
        for share in ("p50", "p99")
    ]
    worse = Figure("p99 beside a prefill / p99 alone", "", "neither")
    wait = Figure("TTFT of that prefill", "s", "less")
    with serving(run.model, 2 * sizes.prompt, run.threads) as daemon:
        with Client(daemon.address, timeout_s=300) as client:
            beginnings = _pieces(client, run.text, 256, run.rounds)
        for number in range(run.rounds):
            run.look()
            alone, disturbed, first_s = asyncio.run(
                _gaps_ms(daemon.address, sizes, number, beginnings[number])
            )
            for gaps, p50, p99 in ((alone, alone_p50, alone_p99), (disturbed, beside_p50, beside_p99)):
                cuts = quantiles(gaps, n=100, method="inclusive")
                p50.note("shoal", cuts[49])
                p99.note("shoal", cuts[98])
            worse.note("shoal", beside_p99.values["shoal"][-1] / alone_p99.values["shoal"][-1])
            wait.note("shoal", first_s)
    return [*figures, worse, wait]


def memory(run: Run, sizes: Sizes) -> list[Figure]:
    """Memory of a fresh daemon and a fresh peer after the same work in the same context."""
    figures = {
        "peak": Figure("peak memory", "MB", "less"),
        "anonymous": Figure("in the end, anonymous", "MB", "neither"),
        "file": Figure("in the end, pages of files", "MB", "neither"),
    }
    context = 2048

    def note(engine: str, pid: int) -> None:
        for kind, value in machine.memory_of(pid).items():
            if kind in figures:
                figures[kind].note(engine, value / 1e6)

    for number in range(run.rounds):
        with (
            serving(run.model, context, run.threads) as daemon,
            Client(daemon.address, timeout_s=300) as client,
        ):
            prompt = worker.prompts(1, sizes.prompt, 1000, number)[0]
            client.text(None, prompt_tokens=prompt, max_tokens=sizes.new, **GREEDY)
            note("shoal", daemon.pid)
        with run.engines((sizes.peer,), context=context) as (engine,):
            engine.call("begin", streams=1, tokens=sizes.prompt, seed=number)
            engine.call("advance", tokens=sizes.new)
            note(engine.name, engine.pid)
    return list(figures.values())


def quality(run: Run, sizes: Sizes) -> list[Figure]:
    """Perplexity and greedy agreement on a text."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as text:
        text.write(run.text)
        text.flush()
        script = str(Path(__file__).parent.parent / "check_quality.py")
        command = [sys.executable, script, str(run.model), text.name, "--peer-python", run.peer_python]
        command += ["--threads", str(run.threads), "--windows", "4", "--json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=3600, check=False)
    if not done.stdout:
        raise RuntimeError(f"check_quality.py: {done.stderr.strip()[-300:]}")
    result = json.loads(done.stdout)
    return [
        Figure("perplexity", "", "less", {"shoal": [result["shoal"]], PEER: [result["llama.cpp"]]}),
        Figure("same likeliest token", "%", "more", {"shoal": [100 * result["agreement"]]}),
    ]


def _rate(call: dict[str, float]) -> float:
    return call["tokens"] / call["seconds"]


def _pieces(client: Client, text: str, tokens: int, count: int) -> list[str]:
    """Different parts of a text, each of about this many tokens."""
    ids = client.tokenize(text[: 8 * tokens * count]).ids
    if len(ids) < tokens * count:
        raise RuntimeError(f"the text has {len(ids)} tokens, {tokens * count} are needed")
    return [client.tokenize(tokens=ids[i * tokens : (i + 1) * tokens]).text for i in range(count)]


def _first_token_s(client: Client, messages: list[dict[str, str]], new: int) -> tuple[float, str]:
    """(seconds to the first token, the whole answer)."""
    started_s, first_s, parts = time.perf_counter(), 0.0, []
    for message in client.chat(messages, max_tokens=new, **GREEDY):
        if isinstance(message, Token):
            first_s = first_s or time.perf_counter() - started_s
            parts.append(message.text)
    return first_s, "".join(parts)


async def _gaps_ms(
    address: str, sizes: Sizes, seed: int, beginning: str
) -> tuple[list[float], list[float], float]:
    """Gaps of a stream before another prompt comes, and gaps until that has its first token; seconds that this took."""
    long = worker.prompts(1, sizes.prompt, 1000, seed)[0]
    drawn = {"temperature": 1.0, "seed": seed, "ignore_eos": True}
    alone: list[float] = []
    disturbed: list[float] = []

    async def prefill(client: AsyncClient) -> float:
        started_s = time.perf_counter()
        async with aclosing(client.generate(prompt_tokens=long, max_tokens=1, **GREEDY)) as stream:
            async for message in stream:
                if isinstance(message, Token):
                    break
        return time.perf_counter() - started_s

    async with (
        AsyncClient(address, timeout_s=300) as client,
        aclosing(client.generate(beginning, max_tokens=2 * sizes.prompt - 512, **drawn)) as stream,
    ):
        other: asyncio.Task[float] | None = None
        last_s = 0.0
        async for message in stream:
            if not isinstance(message, Token):
                continue
            now_s = time.perf_counter()
            if last_s:
                (alone if other is None else disturbed).append(1000 * (now_s - last_s))
            last_s = now_s
            if other is None and len(alone) == sizes.new:
                other = asyncio.create_task(prefill(client))
            if other is not None and other.done():
                return alone, disturbed, other.result()
        if other is not None:
            await other  # if it failed, its error says more
        raise RuntimeError("the stream ended before the other prompt was computed")
