"""`shoal plan`: what a model would do here, or on machines that are not here, and why the best plan is the best.

Knows options and how plans are shown. `daemon.throughput.foresight` finds them.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shoal.cli.exit_codes import Exit
from shoal.cli.interrupt import deferred_interrupt
from shoal.cli.options import (
    Decorator,
    InputFile,
    PlanOptions,
    Real,
    Whole,
    examples,
    json_option,
    plan_options,
)
from shoal.cli.terminal.output import console, note, print_json, spinner
from shoal.cli.terminal.paint import printable
from shoal.comm.home import Home
from shoal.daemon.library.library import Library
from shoal.daemon.model_name import Reference
from shoal.partition.amounts import format_rate, meets

from .axes import HEIGHT, WIDTH
from .figures import start_words
from .own_machines import own_machines
from .plan_plot import ChosenPlan, PlottedMachine, plot
from .shapes import writer_for

if TYPE_CHECKING:
    from shoal.daemon.throughput.foresight import Foresight

_RATE = re.compile(r"(.*?)\s*(tok(ens?)?\s*/\s*s(ec)?|t/s)?", re.IGNORECASE)


class Rate(Real):
    """Tokens a second: 10, 10tok/s, 10 tokens/s."""

    name = "number of tokens a second"
    example = "10tok/s"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        found = _RATE.fullmatch(str(value).strip())
        return super().convert(found[1] if found else value, param, ctx)


def guesses_at(text: str) -> tuple[int, float]:
    """4@0.7 as an option's type: four tokens guessed ahead in each step, each right with a chance of 70% if those
    before it were."""
    count, at, chance = text.partition("@")
    try:
        return Whole(1, 64).convert(count, None, None), Real(0, 1).convert(
            chance if at else "0.6", None, None
        )
    except click.BadParameter as error:
        shape = "must be a number of tokens from 1 to 64, or with their chance from 0 to 1, such as 4@0.7"
        raise click.BadParameter(f"{text!r}: {shape}") from error


def _count(option: str, default: int, what: str, most: int | None = None) -> Decorator:
    return click.option(
        option, type=Whole(1, most), default=default, show_default=True, metavar="N", help=what
    )


@click.command(
    epilog=examples(
        "shoal plan smollm2",
        "shoal plan --memory 3GB --ctx 8192 ./model.gguf",
        "shoal plan --profile laptop.json --target 10tok/s ./llama-70b/config.json",
        "shoal plan --batch 8 --quant q4 --json ~/models/llama-8b",
        "shoal plan --requests 10000 --prompt-tokens 98 --new-tokens 32 mixtral",
    )
)
@click.argument("model")
@_count("--prompt-tokens", 512, "Prompt length of each stream.")
@_count("--new-tokens", 128, "Tokens each stream writes.")
@_count("--batch", 1, "Streams at the same time.", 1024)
@click.option(
    "--requests",
    type=Whole(1, 10**9),
    metavar="N",
    help="For shoal batch: how long so many take, as many at once as is best.",
)
@click.option(
    "--quant", type=click.Choice(["keep", "q8", "q4"]), help="Only plans with weights in these bits."
)
@click.option(
    "--profile",
    "given",
    type=InputFile(),
    metavar="FILE",
    help="Predict for the machines of this file, measured elsewhere or written by hand, instead of those here.",
)
@click.option(
    "--target",
    type=Rate(0, 1e9, min_open=True),
    metavar="RATE",
    help="Say what would give so many tokens a second, e.g. 10tok/s.",
)
@click.option(
    "--guesses",
    type=guesses_at,
    metavar="N[@CHANCE]",
    help="With N tokens (1 to 64) guessed ahead in each step, each right with this chance, 0 to 1 (default 0.6).",
)
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE.png",
    help="Draw tokens/s by memory, all else as it is, as PNG or SVG.",
)
@click.option("--all", "all_", is_flag=True, help="Show all plans, those that do not fit, too.")
@json_option
@plan_options
def plan(
    model: str,
    prompt_tokens: int,
    new_tokens: int,
    batch: int,
    requests: int | None,
    quant: str | None,
    given: Path | None,
    target: float | None,
    guesses: tuple[int, float] | None,
    plot: Path | None,
    all_: bool,
    as_json: bool,
    plan: PlanOptions,
) -> int:
    """Predict what MODEL would do: the best plan and others, how fast each would be, what it would take and what binds.

    MODEL is a path or a name in the store; the header of a checkpoint is enough, and so is a config.json without any
    weights. Nothing is loaded. Without --profile this machine is measured, once; machines that are attached to its
    daemon count, too (--ranks 1 leaves them out). Ends with 3 if no plan fits.
    """
    if requests is not None:
        others = {
            "--batch": batch > 1,
            "--target": target,
            "--guesses": guesses,
            "--plot": plot,
            "--ranks": (plan.ranks or 1) > 1,
        }
        for option, value in others.items():
            if value:
                raise click.UsageError(f"{option} does not go with --requests")
    if plot is not None:
        if not plot.absolute().parent.is_dir():
            raise click.BadParameter(f"{plot.parent} is no directory", param_hint="--plot")
        try:
            writer_for(plot)
        except ValueError as error:
            raise click.BadParameter(str(error), param_hint="--plot") from None
    wanted = Reference.parse(model)
    bits = quant or (wanted.quant if wanted.quant != "keep" else None)
    # Other machines have more threads.
    config = (plan if given is None else replace(plan, threads=None)).config()
    home = Home.from_env()
    path = Path(wanted.model) if Path(wanted.model).exists() else Library(home).resolve(wanted.model)
    with spinner("starting"), deferred_interrupt():
        from shoal.daemon.throughput.batch_foresight import foresee_batch
        from shoal.daemon.throughput.foresight import Asked, foresee
        from shoal.daemon.throughput.own_machine import OwnMachine
        from shoal.daemon.throughput.profile_files import read_profile
    if given is not None:
        profile = read_profile(given)
        if plan.threads is not None and plan.threads > profile.head.threads:
            note(
                f"--threads {plan.threads} counts as {profile.head.threads}, which is what {profile.head.name} has"
            )
        if config.names_device:
            note(f"--device {config.device} is left out: --profile says what devices there are")
        for device in profile.devices[1:]:
            if profile.link(profile.head.name, device.name) is None:
                note(f"{device.name} is left out: `links` has none from {profile.head.name} to it")
            for accelerator in device.accelerators:
                note(f"{accelerator.name} of {device.name} is left out: a device belongs to no group")
    else:
        profile = own_machines(home, config.thread_count).profile
    asked = Asked(
        prompt_tokens,
        new_tokens,
        batch,
        bits,  # type: ignore[arg-type]
        plan.kv_type,
        plan.ctx,
        plan.memory,
        plan.threads,
        plan.ranks,
        target,
        *(guesses or (0, 0.0)),
        plot is not None,
    )
    machine = OwnMachine.of(home, config.thread_count) if given is None else None
    if requests is not None:
        from .batch_table import show_batch

        for device in profile.devices[1:]:
            note(f"{device.name} is left out: requests are predicted for one machine")
        with spinner("planning"):
            expected = foresee_batch(path, profile, asked, requests, config, machine)
        show_batch(expected, profile.head.name, as_json=as_json, all_=all_)
        return Exit.DONE if expected.chosen else Exit.REFUSED
    with spinner("planning"):
        found = foresee(path, profile, asked, config, machine)
    if isinstance(found.trouble, str):
        note(found.trouble)
    ends = Exit.DONE if found.chosen else Exit.REFUSED
    if plot is not None:
        head = PlottedMachine(profile.head.name, plan.memory or profile.head.memory_bytes)
        name = path.absolute().parent.name if path.name == "config.json" else path.name
        _draw(plot, f"{name}, {prompt_tokens} + {new_tokens} tokens, batch of {batch}", found, head, target)
    if as_json:
        print_json(found)
        return ends
    screen = console()
    if found.plans:
        from .plan_table import plans_table

        machines = {device.name for device in profile.devices}
        screen.print(plans_table(found.plans, found.best, found.chosen, machines, all_=all_))
        screen.print()
    screen.print(printable(f"{found.chosen}: {found.reason}" if found.chosen else found.reason))
    if found.start is not None and (said := start_words(found.start.load_s, found.start.pack_s)):
        screen.print(said)
    if target is not None:
        screen.print(printable(_target(found, target)))
    return ends


def _draw(to: Path, title: str, found: Foresight, machine: PlottedMachine, target: float | None) -> None:
    row = next((it for it in found.plans if it.name == found.chosen), None)
    chosen = ChosenPlan(row.name, row.tokens_per_s) if row is not None else None
    curves = found.curves if isinstance(found.curves, list) else []
    to.write_bytes(writer_for(to)(WIDTH, HEIGHT, plot(title, curves, machine, chosen, target)))
    note(f"drawn to {to}")


def _target(found: Foresight, target: float) -> str:
    reached = next((row for row in found.plans if row.name == found.chosen), None)
    if reached is not None and meets(reached.tokens_per_s, target):
        return f"{format_rate(target)} tokens/s: met"
    ways = found.changes if isinstance(found.changes, list) else []
    if not ways:
        return f"{format_rate(target)} tokens/s: nothing that was tried would do (fewer bits, memory, disk, machines)"
    said = "; ".join(f"{way.what} ({format_rate(way.tokens_per_s)})" for way in ways)
    return f"{format_rate(target)} tokens/s would take {said}"
