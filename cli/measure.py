"""`shoal bench` and `shoal perplexity`: speed and quality of one model, without a daemon in the way.

Knows options and how results are shown. What is measured, and how, is `daemon.measurement`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from shoal.comm.home import Home
from shoal.daemon.library.library import Library, is_path
from shoal.daemon.model_name import Reference
from shoal.partition.amounts import counted, format_bytes

from .answers import machines
from .interrupt import deferred_interrupt
from .options import (
    Decorator,
    InputFile,
    PlanOptions,
    Whole,
    draft_option,
    examples,
    json_option,
    plan_options,
    quant_option,
)
from .terminal.output import console, facts, note, print_json, spinner, steps_bar, table

if TYPE_CHECKING:
    from shoal.daemon.config import NodeConfig
    from shoal.daemon.library.packs import Packs


def _count(option: str, default: int, what: str) -> Decorator:
    return click.option(option, type=Whole(min=1), default=default, show_default=True, metavar="N", help=what)


def _prepared(model: str, plan: PlanOptions) -> tuple[Path, str, NodeConfig, Packs]:
    """Where the model is, its name in the store ("": it is a path), how it is to run, and packs; before one is made,
    the user is told what that takes."""
    wanted, home = Reference.parse(model), Home.from_env()
    config = plan.config(quant=wanted.quant)
    path = Library(home).resolve(wanted.model)
    with spinner("starting"), deferred_interrupt():
        from shoal.daemon.library.packs import Packs
    return (
        path,
        "" if is_path(wanted.model) else str(wanted),
        config,
        Packs(home, lambda estimate: note(estimate.describe())),
    )


@click.command(
    epilog=examples(
        "shoal bench smollm2",
        "shoal bench smollm2 --prompt-tokens 512 --new-tokens 64 --batch 1 --repeat 3 --threads 2 --json",
        "shoal bench --quant q4 --memory 3GB ~/models/llama-8b",
    )
)
@click.argument("model")
@_count("--prompt-tokens", 512, "Prompt length of each sequence.")
@_count("--new-tokens", 64, "Tokens each sequence writes.")
@_count("--batch", 1, "Sequences at the same time.")
@_count("--repeat", 3, "Runs, after a warm-up.")
@quant_option
@json_option
@draft_option
@plan_options
def bench(
    model: str,
    prompt_tokens: int,
    new_tokens: int,
    batch: int,
    repeat: int,
    as_json: bool,
    draft: str | None,
    plan: PlanOptions,
) -> None:
    """Measure how fast MODEL reads a prompt (prefill) and writes an answer (decode).

    Prompts are random and sampling is greedy; speeds count all sequences of a batch together. Guessing ahead is off
    unless --speculate auto or --draft is given, as what it gains depends on the text.
    """
    plan = replace(plan, speculate=plan.speculate or ("auto" if draft else "off"))
    path, name, config, packs = _prepared(model, plan)
    draft_path = Library(Home.from_env()).resolve(draft) if draft else None
    with spinner("starting"), deferred_interrupt():
        from shoal.daemon import measurement as measure
    with machines(Home.from_env(), config) as grouping, steps_bar() as progress:
        result = measure.bench(
            path,
            name=name,
            draft=draft_path,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            batch=batch,
            repeat=repeat,
            config=config,
            progress=progress,
            packs=packs,
            grouping=grouping,
        )
    if as_json:
        print_json(result)
        return
    screen = console()
    rows = table("tokens/s", "median", "min", "max", right=("median", "min", "max"))
    for name, speed in (("prefill", result.prefill_tokens_per_s), ("decode", result.decode_tokens_per_s)):
        rows.add_row(name, f"{speed.median:.1f}", f"{speed.min:.1f}", f"{speed.max:.1f}")
    screen.print(rows)
    screen.print(
        f"{prompt_tokens} + {new_tokens} tokens, batch {batch}, {counted(repeat, 'run')}, "
        f"{counted(result.threads, 'thread')}, {f'{result.ranks} machines, ' * (result.ranks > 1)}"
        f"peak {format_bytes(result.peak_memory_bytes)}"
    )


@click.command(
    epilog=examples("shoal perplexity smollm2 wiki.txt", "shoal perplexity smollm2 wiki.txt --json")
)
@click.argument("model")
@click.argument("file", type=InputFile())
@quant_option
@json_option
@plan_options
def perplexity(model: str, file: Path, as_json: bool, plan: PlanOptions) -> None:
    """Measure how well MODEL predicts the text of FILE; lower is better.

    By llama.cpp's method: adjacent windows of --ctx tokens (default 512), of which the second half is scored.
    """
    path, name, config, packs = _prepared(model, plan)
    with spinner("starting"), deferred_interrupt():
        from shoal.daemon import measurement as measure
    ctx = plan.ctx or 512
    with steps_bar() as progress:
        result = measure.perplexity(
            path, file, name=name, ctx=ctx, config=config, progress=progress, packs=packs
        )
    if as_json:
        print_json(result)
        return
    rows = facts()
    rows.add_row("perplexity", f"{result.perplexity:.4f}")
    rows.add_row("tokens scored", str(result.tokens))
    console().print(rows)
