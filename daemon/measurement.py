"""Measurements without a daemon in the way: speed (`bench`) and quality (`perplexity`) of one model.

Both load the model in this process and drive the engine or executor directly, in the calling thread.
"""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from statistics import median

import msgspec
import numpy as np

from shoal.daemon.library.packs import Packs
from shoal.daemon.loading.assembly import Assembly
from shoal.daemon.loading.grouping import Grouping
from shoal.daemon.loading.loaded_model import LoadedModel
from shoal.engine.engine import Engine
from shoal.engine.executor import Executor
from shoal.engine.sequence import Emitted, Failed, Sequence
from shoal.kernels import set_threads
from shoal.kernels.arrays import Floats
from shoal.models.checkpoint.checkpoint import open_checkpoint
from shoal.models.regular_files import read_regular
from shoal.models.sampling import Sampler, SamplingParams
from shoal.models.step import Segment, Step
from shoal.offload.budget import Budget
from shoal.partition.amounts import counted
from shoal.partition.spec import length_class

from .config import NodeConfig, require_context_for
from .error_codes import refusing
from .errors import DaemonError
from .memory import budget_of, peak_memory_bytes
from .progress import Progress

TEXT_BYTES = 1 << 30  # longer texts are not read
LEAST_WINDOW = 4  # tokens
HEAD_ROWS = 32  # logits rows computed at a time, so that a large vocabulary stays within scratch


class Spread(msgspec.Struct, frozen=True):
    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        return cls(median(values), min(values), max(values))


class BenchResult(msgspec.Struct, frozen=True):
    """Speeds count all sequences of the batch together."""

    prefill_tokens_per_s: Spread
    decode_tokens_per_s: Spread
    peak_memory_bytes: int
    resident_weight_bytes: int  # that stayed in memory, of whichever experts
    threads: int
    ranks: int = 1


class PerplexityResult(msgspec.Struct, frozen=True):
    perplexity: float
    tokens: int  # tokens scored


def _load(
    name: str,
    model: Path,
    config: NodeConfig,
    budget: Budget,
    progress: Progress,
    packs: Packs | None,
    draft: Path | None = None,
    grouping: Grouping | None = None,
) -> LoadedModel:
    set_threads(config.thread_count)
    assembly = Assembly(budget, packs, grouping=grouping)
    return assembly.load(name, model, config, draft=draft, progress=progress)


def bench(
    model: Path,
    *,
    name: str = "",
    draft: Path | None = None,
    prompt_tokens: int,
    new_tokens: int,
    batch: int,
    repeat: int,
    config: NodeConfig,
    progress: Progress,
    packs: Packs | None = None,
    grouping: Grouping | None = None,
) -> BenchResult:
    """Prefill `prompt_tokens` random tokens, then decode `new_tokens`, for `batch` sequences at once.

    Repeated `repeat` times after one warm-up. Prefill is timed until every sequence has its first token, decode
    from there to the end, without the tokens that sequences ahead of the last had by then. `name`: of the model, if it
    is not its file's. Raises DaemonError.
    """
    context, name = prompt_tokens + new_tokens, name or model.name
    budget = budget_of(
        config.memory_bytes
    )  # before anything is read: it counts what this process takes without
    with refusing(name), open_checkpoint(model, whole=False) as header:
        require_context_for(prompt_tokens, new_tokens, config.context_tokens, header.spec.longest)
    if config.context_tokens is None:
        config = replace(config, context_tokens=context)
    config = replace(config, max_sequences=max(batch, config.max_sequences), kv_tokens=None)
    loaded = _load(name, model, config, budget, progress, packs, draft, grouping)
    vocab = loaded.checkpoint.spec.vocab
    prefill: list[float] = []
    decode: list[float] = []
    with refusing(loaded.name):
        for round_ in range(repeat + 1):
            progress("warming up" if round_ == 0 else "measuring", round_, repeat + 1)
            source = random.Random(round_)
            prompts = [[source.randrange(vocab) for _ in range(prompt_tokens)] for _ in range(batch)]
            prefill_s, decoded, decode_s = _timed(loaded.engine, prompts, context)
            if round_ > 0:
                prefill.append(batch * prompt_tokens / prefill_s)
                if decoded:
                    decode.append(decoded / decode_s)
    progress("done", repeat + 1, repeat + 1)
    return BenchResult(
        prefill_tokens_per_s=Spread.of(prefill),
        decode_tokens_per_s=Spread.of(decode or [0.0]),
        peak_memory_bytes=peak_memory_bytes(),
        resident_weight_bytes=loaded.plan.pinned_bytes + loaded.plan.expert_bytes,
        threads=config.thread_count,
        ranks=loaded.ranks,
    )


def _timed(engine: Engine, prompts: list[list[int]], limit: int) -> tuple[float, int, float]:
    """Answer all prompts up to the length `limit`. → seconds until each has its first token, how many tokens came after
    that, and in how many seconds"""
    tokens: Counter[Sequence] = Counter()

    def hear() -> None:
        for event in engine.events():
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Emitted):
                tokens[event.sequence] += len(event.sampled)

    for prompt in prompts:
        engine.submit(Sequence(prompt, limit, Sampler(SamplingParams(temperature=0.0), prompt)))
    began_s = time.monotonic()
    while len(tokens) < len(prompts) and engine.step():
        hear()
    first_s, early = time.monotonic(), tokens.total()
    while engine.step():
        hear()
    last_s = time.monotonic()
    return first_s - began_s, tokens.total() - early, last_s - first_s


def perplexity(
    model: Path,
    file: Path,
    *,
    name: str = "",
    ctx: int,
    config: NodeConfig,
    progress: Progress,
    packs: Packs | None = None,
) -> PerplexityResult:
    """Perplexity of a text by llama.cpp's method: windows of `ctx` tokens side by side, each on its own.

    The text is tokenised once; the first token of every window is replaced by BOS if the model wants one; in each
    window the tokens after the first ctx/2 are scored. `name` as for `bench`. Raises DaemonError.
    """
    if ctx < LEAST_WINDOW:
        raise DaemonError("bad_request", f"`ctx={ctx}`: must be at least {LEAST_WINDOW}")
    try:
        text = read_regular(file, TEXT_BYTES).decode()  # not as text, which would change line ends
    except (OSError, UnicodeDecodeError) as error:
        raise DaemonError("bad_request", f"cannot read {file}: {error}") from error
    config = replace(config, context_tokens=ctx, kv_tokens=None)
    loaded = _load(name or model.name, model, config, budget_of(config.memory_bytes), progress, packs)
    tokenizer = loaded.tokenizer
    prefix = [token for token in tokenizer.encode("")[:1] if token == tokenizer.bos_id]
    ids = tokenizer.encode(text, add_special=True, parse_special=False)
    windows = len(ids) // ctx
    if windows == 0:
        shorter = f"use `ctx={len(ids)}` or a longer text"
        raise DaemonError(
            "bad_request",
            f"{file} has {counted(len(ids), 'token')}: must have at least one window of {ctx}",
            shorter if len(ids) >= LEAST_WINDOW else "use a longer text",
        )
    pages = loaded.executor.kv.table.take(-(-ctx // loaded.executor.kv.page_tokens))
    assert pages is not None
    loss = 0.0
    with refusing(loaded.name):
        for window in range(windows):
            progress("scoring", window, windows)
            tokens = ids[window * ctx : (window + 1) * ctx]
            tokens[: len(prefix)] = prefix
            loss += _window_loss(loaded.executor, pages, tokens)
    progress("done", windows, windows)
    scored = windows * (ctx - 1 - ctx // 2)
    return PerplexityResult(perplexity=math.exp(min(loss / scored, 700.0)), tokens=scored)


def _window_loss(executor: Executor, pages: list[int], tokens: list[int]) -> float:
    """The cross entropy, summed, of the tokens of a window that are scored."""
    first, stop, chunk = len(tokens) // 2, len(tokens) - 1, executor.plan.chunk_tokens
    length = length_class(executor.model.spec.ropes, len(tokens))
    loss = 0.0
    for start in range(0, stop, chunk):
        end = min(start + chunk, stop)
        segment = Segment(tokens[start:end], start, pages, end - start, length)
        step = Step.build([segment], executor.plan.part_tokens)
        hidden = executor.forward(step)
        for row in range(max(start, first), end, HEAD_ROWS):
            last = min(row + HEAD_ROWS, end)
            logits = executor.head(hidden, slice(row - start, last - start))
            loss += _cross_entropy(logits, tokens[row + 1 : last + 1])
    return loss


@np.errstate(invalid="ignore")  # infinite logits give NaN
def _cross_entropy(logits: Floats, wanted: list[int]) -> float:
    """Minus the logarithms of the shares that logits (n, vocab) give the n tokens wanted, summed."""
    below = logits.astype(np.float64)
    below -= below.max(axis=1, keepdims=True)
    return float((np.log(np.exp(below).sum(axis=1)) - below[range(len(wanted)), wanted]).sum())
