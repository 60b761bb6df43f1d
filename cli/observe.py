"""`shoal ps` and `shoal logs`: looking at the daemon.

Knows how its status and log are shown. Changes nothing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import click
from msgspec.structs import asdict

from shoal.comm.cluster_messages import NodesReply
from shoal.comm.home import Home
from shoal.comm.messages import ModelStatus
from shoal.daemon.errors import DaemonError
from shoal.partition.amounts import counted, format_bytes, format_duration

from . import background
from .options import Whole, examples, json_option
from .terminal.output import console, note, print_json, stage_text, table

FOLLOW_S = 0.25
TAIL_BYTES = 1 << 20


@click.command(epilog=examples("shoal ps", "shoal ps --json"))
@json_option
def ps(as_json: bool) -> None:
    """Show the daemon's models and how busy they are.

    "KV in use" counts running requests only. The prefix cache keeps what finished requests leave, for prompts that
    begin the same way, until the room is needed.
    """
    from shoal.client import Client

    home = Home.from_env()
    if background.running_pid(home) is None:
        raise background.nobody()
    with Client(home.address) as client:
        status, cluster = client.status(), client.nodes()
    if as_json:
        models = [asdict(model) for model in status.models]
        print_json({**asdict(status), "models": models})  # a message alone leaves out what has its default
        return
    screen = console()
    screen.print(
        f"daemon {status.version} · pid {status.pid} · up {format_duration(status.uptime_s)} · "
        f"{counted(status.threads, 'thread')} · {format_bytes(status.memory_bytes)} resident · "
        f"{counted(status.requests_total, 'request')} · {counted(status.tokens_total, 'token')}"
        + (" · stopping" if status.draining else ""),
    )
    if status.loading:
        screen.print(f"{status.loading}: {stage_text(status.stage) if status.stage else 'loading'}")
    if cluster.role == "worker":
        screen.print(_lent(cluster))
    if not status.models:
        if cluster.role != "worker":
            note("no other model is loaded yet" if status.loading else "no model is loaded")
        return
    numbers = ("size", "context", "running", "waiting", "KV in use")
    rows = table("model", "family", *numbers, right=numbers)
    for model in status.models:
        counts = (str(model.context_tokens), str(model.running), str(model.waiting))
        used = _percent(model.kv_used_tokens, model.kv_total_tokens)
        rows.add_row(model.name, model.family, format_bytes(model.parameters_bytes), *counts, used)
    screen.print(rows)
    if status.corrections:
        from shoal.daemon.throughput.profile_words import corrected

        if learnt := corrected(status.corrections):
            screen.print(f"as models ran: {learnt} as this machine's profile says")
    for model in status.models:
        for line in _about(model):
            screen.print(line)


def _about(model: ModelStatus) -> Iterator[str]:
    """What does not fit into a table."""
    yield f"{model.name}: {model.plan}"
    if model.device_why:
        yield model.device_why
    yield from model.warnings
    if model.predicted_tokens_per_s:
        came = (
            f"measured {model.measured_tokens_per_s:.3g}"
            if model.measured_tokens_per_s
            else "not measured yet"
        )
        yield f"predicted {model.predicted_tokens_per_s:.3g} tokens/s, {came}"
    if model.tried:
        yield f"tried: {model.tried}"
    if model.machines:
        held = (format_bytes(nbytes) for nbytes in model.rank_bytes)
        parts = zip(("this machine", *model.machines), held, strict=False)
        yield "computed by " + ", ".join(f"{name} ({nbytes})" for name, nbytes in parts)
    if model.machines_why:
        yield model.machines_why
    if model.sums:
        yield f"sums: {model.sums}"
    if model.stage is not None:
        yield f"now {stage_text(model.stage)}"
    if model.prompt_tokens_total:
        kept = _percent(model.kv_cached_tokens, model.kv_total_tokens)
        found = _percent(model.cached_tokens_total, model.prompt_tokens_total)
        preempted = counted(model.preemptions_total, "preemption")
        yield (
            f"prefix cache: holds {kept} of the KV, gave {found} of {model.prompt_tokens_total:,} prompt tokens; "
            f"{preempted}"
        )
    if model.kv_disk_bytes:
        written = counted(model.kv_disk_pages_written_total, "page")
        yield (
            f"KV on disk: {format_bytes(model.kv_disk_bytes)}, "
            f"{written} written, {model.kv_disk_pages_read_total} read"
        )
    if model.kv_disk_why:
        yield f"KV is not kept on disk: {model.kv_disk_why}"


def _lent(cluster: NodesReply) -> str:
    """What a worker does for its head."""
    own, head = cluster.nodes[0], next(node for node in cluster.nodes if node.role == "head")
    if own.preparing:
        return f"lent to {head.name}, not attached yet: it tests its kernels and measures itself first"
    if not own.attached:
        return f"lent to {head.name}, which is away: {own.trouble}"
    return f"lent to {head.name}" + (f", computes part of {', '.join(own.models)}" if own.models else "")


@click.command(epilog=examples("shoal logs -n 20", "shoal logs -f"))
@click.option(
    "-n",
    "--lines",
    metavar="N",
    type=Whole(min=0),
    default=50,
    show_default=True,
    help="Show this many lines from the end.",
)
@click.option("-f", "--follow", is_flag=True, help="Keep showing new lines until Ctrl-C.")
def logs(lines: int, follow: bool) -> None:
    """Show the log of a daemon that was started in the background."""
    path = background.log_path(Home.from_env())
    try:
        text, offset = tail(path, lines)
    except OSError as error:
        raise DaemonError(
            "not_found", f"there is no log at {path}: {error.strerror}", "shoal serve --detach writes one"
        ) from error
    click.echo(text, nl=False)
    if follow:
        for added in followed(path, offset, time.sleep):
            click.echo(added, nl=False)


def tail(path: Path, lines: int) -> tuple[str, int]:
    """The last `lines` lines of a file, but no more than a MiB, and the offset of their end. Raises OSError."""
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - TAIL_BYTES))
        found = file.read(end - file.tell()).splitlines(keepends=True)
    return b"".join(found[-lines:] if lines else []).decode(errors="replace"), end


def followed(path: Path, offset: int, sleep: Callable[[float], None]) -> Iterator[str]:
    """Yields what is added after `offset`, for ever. Starts over when the file is cut or replaced."""
    while True:
        try:
            with path.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                offset = offset if offset <= size else 0
                file.seek(offset)
                added = file.read(TAIL_BYTES)
        except FileNotFoundError:  # being replaced
            added, offset = b"", 0
        offset += len(added)
        if added:
            yield added.decode(errors="replace")
        else:
            sleep(FOLLOW_S)


def _percent(part: int, whole: int) -> str:
    return f"{100 * part // max(1, whole)}%"
