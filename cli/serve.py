"""`shoal serve` and `shoal stop`, the daemon's life; `shoal load` and `shoal unload`, what it has in memory.

Knows options and what the user is told. The daemon itself is `daemon.service`; processes are `cli.background`.
"""

from __future__ import annotations

from contextlib import suppress

import click

from shoal.comm.home import Home
from shoal.daemon.errors import DaemonError
from shoal.daemon.library.library import Library
from shoal.daemon.model_name import Reference

from . import background
from .answers import from_daemon, reference
from .interrupt import deferred_interrupt
from .options import PlanOptions, Whole, draft_option, examples, model_name, plan_options, quant_option, size
from .terminal.output import note, spinner, stage_text
from .wording import WORDS

DRAIN_LIMIT_S = 90.0  # a daemon gives its requests 30 s, and ends within 30 more
NOW_LIMIT_S = 40.0


@click.command(
    epilog=examples(
        "shoal serve",
        "shoal serve --detach --model smollm2",
        "shoal serve --memory 3GB --threads 4 --address tcp://127.0.0.1:7070",
        "shoal serve --sequences 32 --queue 200",
    )
)
@click.option("--model", type=model_name, metavar="MODEL", help="Load this model at once.")
@click.option(
    "--detach", "--background", is_flag=True, help="Run in the background; its log is shown by shoal logs."
)
@click.option(
    "--address",
    multiple=True,
    metavar="ADDRESS",
    help="Also listen here, e.g. tcp://127.0.0.1:7070; repeatable.",
)
@click.option(
    "--sequences",
    type=Whole(min=1),
    metavar="N",
    help="Requests computed at the same time (default 16).",
)
@click.option("--queue", type=Whole(min=0), metavar="N", help="Further requests that may wait (default 64).")
@click.option(
    "--kv-disk",
    type=size,
    metavar="SIZE",
    help="Disk space for the KV of conversations (default: 4GB, at most a tenth of the free disk); 0 keeps none.",
)
@click.option(
    "--shard-disk",
    type=size,
    metavar="SIZE",
    help="Disk space for parts of other machines' models, where this one is a worker (default: a quarter of the free "
    "disk); 0 keeps none.",
)
@click.option(
    "--models-only",
    is_flag=True,
    help="Load only models of the store: requests cannot name or probe any path.",
)
@quant_option
@draft_option
@plan_options
def serve(
    model: str | None,
    draft: str | None,
    detach: bool,
    address: tuple[str, ...],
    sequences: int | None,
    queue: int | None,
    kv_disk: int | None,
    shard_disk: int | None,
    models_only: bool,
    plan: PlanOptions,
) -> None:
    """Run the daemon, in the foreground unless --detach is given.

    It listens on a socket that only you can open; addresses beyond this machine need keys. SIGTERM or Ctrl-C lets
    running requests finish; a second one stops at once.
    """
    if draft and not model:
        raise click.UsageError("--draft needs the --model that it guesses for")
    home = Home.from_env()
    if models_only:
        for name in filter(None, (model, draft)):
            Library(home).resolve_stored(Reference.parse(name).model)
    limits = {
        "max_sequences": sequences,
        "max_queue": queue,
        "kv_disk_bytes": kv_disk,
        "shard_disk_bytes": shard_disk,
    }
    given = {name: value for name, value in limits.items() if value is not None}
    config = plan.config(**given)
    wanted = reference(model, Library(home)) if model else None
    guessing = reference(draft, Library(home)) if draft else None
    pid = background.running_pid(home)
    if pid is not None:
        raise DaemonError("busy", f"a daemon is already running, pid {pid}", "shoal stop ends it")
    if detach:
        arguments = plan.arguments()
        arguments += [part for place in address for part in ("--address", place)]
        arguments += [part for name, value in given.items() for part in (WORDS[name], str(value))]
        arguments += ["--models-only"] * models_only
        with spinner("starting the daemon"):
            pid = background.start(home, arguments)
        if wanted:
            with spinner(f"loading {wanted}") as update:
                background.load(home, pid, wanted, guessing, lambda stage: update(stage_text(stage)))
        note(f"the daemon is running (pid {pid}); its log is {background.log_path(home)}")
        return
    with deferred_interrupt():
        from shoal.daemon.service import serve as serve_here
    serve_here(
        config,
        home=home,
        model=wanted,
        draft=guessing,
        addresses=[home.address, *address] if address else (),
        models_only=models_only,
    )


@click.command(epilog=examples("shoal load smollm2", "shoal load smollm2 --ctx 4096"))
@click.argument("model")
@click.option(
    "--ctx", type=Whole(1, 1 << 26), metavar="N", help="Context length in tokens, at most the model's."
)
@quant_option
@draft_option
def load(model: str, ctx: int | None, draft: str | None) -> None:
    """Load MODEL into the daemon, or load it anew with another context or draft model.

    This holds for everybody who uses the daemon. While the model answers, it stays as it is. (run and chat load a model
    by themselves; their --ctx is one conversation's.)
    """
    home = Home.from_env()
    library = Library(home)
    name, guessing = reference(model, library), reference(draft, library) if draft else None
    with from_daemon(home) as answers:
        if answers is None:
            raise background.nobody()
        status = answers.load_for_all(name, guessing, ctx)
    note(
        f"{status.name} is loaded with a context of {status.context_tokens} tokens, for all who use the daemon"
    )


@click.command(epilog=examples("shoal unload smollm2"))
@click.argument("model")
def unload(model: str) -> None:
    """Take MODEL, a path or a name that shoal ps shows, out of the daemon's memory. What it is answering ends."""
    home = Home.from_env()
    if background.running_pid(home) is None:
        raise background.nobody()
    from shoal.client import Client

    with Client(home.address) as client:
        name = model
        if model not in {loaded.name for loaded in client.status().models}:
            with suppress(DaemonError):  # then the daemon says what it has
                name = reference(model, Library(home))
        client.unload(name)
    note(f"{model} is unloaded")


@click.command(epilog=examples("shoal stop", "shoal stop --now"))
@click.option("--now", is_flag=True, help="Drop running requests instead of waiting for them.")
def stop(now: bool) -> None:
    """Stop the daemon once its running requests have finished."""
    home = Home.from_env()
    pid = background.running_pid(home)
    if pid is None:
        raise background.nobody()
    with spinner("stopping the daemon" if now else "waiting for running requests to end"):
        limit_s = NOW_LIMIT_S if now else DRAIN_LIMIT_S
        by_itself = background.stop(home, pid, now=now, limit_s=limit_s)
    if by_itself:
        note("the daemon has stopped")
    else:
        note(
            f"the daemon (pid {pid}) did not end by itself and was killed; the next one finds all it needs on disk"
        )
