"""`shoal batch`: a file of requests in OpenAI's batch format, answered into another file.

Knows options, who answers, and what is printed. What becomes of the lines is `working_off`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shoal.cli.answers import Answers, NoAnswer, from_daemon, in_process, reference
from shoal.cli.exit_codes import Exit
from shoal.cli.interrupt import deferred_interrupt, ended_by_signals, unechoed
from shoal.cli.options import PlanOptions, Whole, examples, json_option, model_name, plan_options
from shoal.cli.terminal.output import console, counts_bar, note, per_second, print_json, spinner
from shoal.comm.errors import RequestFailed
from shoal.comm.home import Home
from shoal.daemon.errors import DaemonError
from shoal.daemon.library.library import Library
from shoal.daemon.model_name import Reference
from shoal.partition.amounts import counted, format_duration

if TYPE_CHECKING:
    from shoal.comm.messages import ModelStatus
    from shoal.daemon.config import NodeConfig

    from .batch_order import BatchOrder
    from .working_off import Tally, WorkingOff

LEAST_LIKELY, MOST_LIKELY = 1 << 12, 1 << 26  # tokens of context that are asked for
SHOWN_S = 0.2
_OF_A_MODEL = ("bad_request", "not_found", "unsupported", "corrupt")  # others may be there


def _no_dash(context: click.Context, parameter: click.Parameter, path: Path) -> Path:
    """Files are read and written at more than one place, so "-" can be no stream, and should not become a file."""
    if str(path) == "-":
        said = f"{parameter.metavar} must be a file, to be gone on with: name one (./- if it is called -)"
        raise click.UsageError(said, context)
    return path


@click.command(
    name="batch",
    epilog=examples(
        "shoal batch requests.jsonl answers.jsonl",
        "shoal batch --model smollm2 requests.jsonl answers.jsonl --json",
        "shoal batch --memory 3GB requests.jsonl answers.jsonl",
        "shoal batch --retry-failed requests.jsonl answers.jsonl",
    ),
)
@click.argument("requests", metavar="IN", type=click.Path(path_type=Path), callback=_no_dash)
@click.argument("answers", metavar="OUT", type=click.Path(path_type=Path), callback=_no_dash)
@click.option(
    "--model", type=model_name, metavar="MODEL", help="This model answers all requests, whichever they name."
)
@click.option(
    "--sequences",
    type=Whole(1, 4096),
    metavar="N",
    help="Requests computed at the same time (default: up to 256, if memory allows).",
)
@click.option("--retry-failed", is_flag=True, help="Answer those lines again that failed before.")
@click.option("--local", is_flag=True, help="Run in this process even if a daemon is running.")
@json_option
@plan_options
def batch(
    requests: Path,
    answers: Path,
    model: str | None,
    sequences: int | None,
    retry_failed: bool,
    local: bool,
    as_json: bool,
    plan: PlanOptions,
) -> int:
    """Answer all requests of the file IN, in OpenAI's batch format, into the file OUT.

    Each line of IN is {"custom_id": …, "method": "POST", "url": "/v1/chat/completions" or "/v1/completions", "body":
    {"model": …, …}}. Each line of OUT is an answer or says what is wrong with its line; they come as they are ready. If
    it is interrupted, the same command goes on where it stopped. The exit code is 1 if any line failed.

    A running daemon answers, unless --local, --sequences, --memory, --threads, --device, --speculate, --kv-type or
    --cluster-wire is given: then this process does.
    """
    config = replace(plan.config(), slowdown=math.inf)
    library = Library(Home.from_env())
    with spinner("starting"), deferred_interrupt():
        from .answer_file import AnswerFile
        from .batch_order import BatchOrder
        from .request_lines import RequestLines
        from .working_off import WorkingOff
    with ended_by_signals(), unechoed(), ExitStack() as files:
        lines = files.enter_context(RequestLines(requests, model or ""))
        out = files.enter_context(AnswerFile(answers, lines.stat, retry=retry_failed))
        if out.cut:
            note(f"{answers}: its last line was torn; that request is answered again")
        with spinner(f"reading {requests.name}"):
            order = BatchOrder(lines, out, model)
        if not order.lines:
            raise DaemonError("bad_request", f"{requests} has no requests")
        out.take_off_failed()
        names = _names(order, library, given=model is not None)
        work = WorkingOff(lines, out, order, model, plan.ctx)
        own = local or sequences is not None or plan.beyond_context
        try:
            work.refuse()
            for number, name in enumerate(names):
                if isinstance(name, DaemonError):
                    work.refuse_all(number, name)
            if any(isinstance(name, str) for name in names):
                there = [name for name in names if isinstance(name, str)]
                with _answerer(there, config, library, sequences, own=own) as found:
                    _answer(work, order, names, found, library, plan, quiet=as_json)
        except BaseException:
            if done := work.tally.lines - work.tally.left:
                note(f"{done:,} of {counted(work.tally.lines, 'request')} done; the same command goes on")
            if as_json:
                print_json(_summary(work.tally, answers))
            raise
    if as_json:
        print_json(_summary(work.tally, answers))
    else:
        console().print(_described(work.tally))
    return Exit.FAILED if work.tally.failed else Exit.DONE


def _names(order: BatchOrder, library: Library, *, given: bool) -> list[str | DaemonError]:
    """The models as they are known everywhere, or why there is no such model. Raises that if there is none at all.
    `given`: by an option, not by the lines."""
    names: list[str | DaemonError] = []
    for model in order.models:
        try:
            names.append(reference(model, library))
        except DaemonError as error:
            if error.code not in _OF_A_MODEL or given:
                raise
            names.append(error)
    errors = [name for name in names if isinstance(name, DaemonError)]
    if errors and len(errors) == len(names):
        hint = "with --model MODEL one of yours answers all requests, whichever they name"
        raise DaemonError(errors[0].code, errors[0].message, hint)
    return names


@contextmanager
def _answerer(
    names: list[str], config: NodeConfig, library: Library, sequences: int | None, *, own: bool
) -> Iterator[Answers]:
    """Who answers: a daemon, or this process, with as many sequences at the same time as is best."""
    with ExitStack() as stack:
        if not own and (daemon := stack.enter_context(from_daemon(Home.from_env()))) is not None:
            yield daemon
            return
        with spinner("starting"), deferred_interrupt():
            from shoal.daemon.library.packs import Packs
            from shoal.daemon.loading.batch_sizes import batch_size, given_size, with_size
            from shoal.daemon.throughput.own_machine import OwnMachine
        if sequences is not None:
            size = given_size(sequences)
        else:
            home = Home.from_env()
            machine = OwnMachine.of(home, config.thread_count)
            size = batch_size(names, config, library, Packs(home), machine)
        yield stack.enter_context(in_process(with_size(config, size), library, sequences=size.sequences))


def _answer(
    work: WorkingOff,
    order: BatchOrder,
    names: list[str | DaemonError],
    answers: Answers,
    library: Library,
    plan: PlanOptions,
    *,
    quiet: bool,
) -> None:
    """One model after the other. Lines of one that cannot be loaded fail if another can. Raises why, if none can."""
    unloadable: list[tuple[int, NoAnswer]] = []
    any_loaded = False
    for number, (name, likely) in enumerate(zip(names, order.models.values(), strict=True)):
        if isinstance(name, DaemonError):
            continue
        status: ModelStatus | None = None
        try:
            status = _loaded(answers, name, plan, min(likely, _longest(name, library)))
            any_loaded = True
        except (DaemonError, RequestFailed) as error:
            if error.code not in _OF_A_MODEL:
                raise
            unloadable.append((number, error))
        while unloadable and any_loaded:
            work.refuse_all(*unloadable.pop())
        if status is not None:
            with _progress(work.tally, quiet=quiet) as show:
                work.answer(answers, number, status, show)
    if unloadable:
        raise unloadable[0][1]


def _loaded(answers: Answers, name: str, plan: PlanOptions, likely: int) -> ModelStatus:
    """A model, with room for the longest request, or for half as much and so on; what is longer fails one by one."""
    wanted: int | None = likely
    while True:
        try:
            return answers.load(name, None, plan.ctx, plan.ranks, likely=wanted)
        except (DaemonError, RequestFailed) as error:
            short = error.code in ("context_overflow", "resources")
            if plan.ctx is not None or wanted is None or not short:
                raise
        wanted = wanted // 2 if wanted // 2 >= LEAST_LIKELY else None


def _longest(name: str, library: Library) -> int:
    """The most tokens of context that a model can have, as far as its files can be read."""
    from shoal.daemon.loading.checkpoint_facts import longest_context

    with suppress(DaemonError):  # loading will say what is wrong
        return longest_context(library.resolve(Reference.parse(name).model))
    return MOST_LIKELY


@contextmanager
def _progress(tally: Tally, *, quiet: bool) -> Iterator[Callable[[], None]]:
    """Show how far it is; yields what looks at the tally again."""
    with counts_bar("answering", tally.lines, quiet=quiet) as update:
        shown_s = 0.0
        began_s, began, tokens = time.monotonic(), tally.now, tally.written_tokens

        def show() -> None:
            nonlocal shown_s
            now_s = time.monotonic()
            if now_s - shown_s < SHOWN_S:
                return
            shown_s = now_s
            seconds = max(now_s - began_s, 1e-9)
            done = tally.now - began
            said = [per_second((tally.written_tokens - tokens) / seconds, "tokens")]
            if done > tally.under_way:  # before, those that have ended say little of all that were begun
                left = f"{format_duration(tally.left * seconds / done)} left"
                said = [left, per_second(done / seconds, "requests"), *said]
            update(tally.lines - tally.left, said)

        yield show


def _summary(tally: Tally, answers: Path) -> dict[str, Any]:
    seconds = max(tally.seconds, 1e-9)
    return {
        "requests": tally.lines,
        "answered": tally.lines - tally.left - tally.failed,
        "failed": tally.failed,
        "left": tally.left,
        "answered_now": tally.now,
        "prompt_tokens": tally.prompt_tokens,
        "cached_tokens": tally.cached_tokens,
        "completion_tokens": tally.completion_tokens,
        "seconds": tally.seconds,
        "requests_per_s": tally.now / seconds,
        "completion_tokens_per_s": tally.completion_tokens / seconds,
        "output": str(answers),
    }


def _described(tally: Tally) -> str:
    """The summary in one line."""
    parts = [f"{tally.lines - tally.left - tally.failed:,} of {counted(tally.lines, 'request')} answered"]
    if earlier := tally.lines - tally.left - tally.failed - tally.now:
        parts[0] += f", {earlier:,} of them earlier"
    if tally.failed:
        parts.append(f"{tally.failed:,} failed, as their lines say")
    if tally.now:
        cached = f", {tally.cached_tokens:,} of them shared" if tally.cached_tokens else ""
        parts.append(f"{tally.prompt_tokens:,} prompt tokens{cached}")
        speed = per_second(tally.completion_tokens / max(tally.seconds, 1e-9))
        parts.append(
            f"{counted(tally.completion_tokens, 'token')} ({speed}) in {format_duration(tally.seconds)}"
        )
    return " · ".join(parts)
