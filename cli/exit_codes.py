"""Exceptions as one clear line and a stable exit code: only this module decides on them.

Knows the error trees of daemon and comm, and click's. Does not print.
"""

from __future__ import annotations

from enum import IntEnum

import click

from shoal.comm.errors import CommError, HomeError, NoDaemon, RequestFailed, TimedOut
from shoal.daemon.errors import NO_ROOM, DaemonError, more_room

from .terminal.standard_output import OutputFailed
from .wording import nearest, worded


class Exit(IntEnum):
    """Exit codes, the same for every verb."""

    DONE = 0
    FAILED = 1  # also where what was named is not there
    USAGE = 2  # the command itself is wrong, whatever there is
    REFUSED = 3  # would not fit into memory, context, queue or disk, or another process is at it
    NO_DAEMON = 4
    INTERRUPTED = 130


_BY_CODE = {
    "bad_request": Exit.USAGE,
    "resources": Exit.REFUSED,
    "context_overflow": Exit.REFUSED,
    "busy": Exit.REFUSED,
    "cancelled": Exit.INTERRUPTED,
    "shutting_down": Exit.NO_DAEMON,
}


def explain(error: BaseException) -> tuple[str, Exit]:
    """(what to print after `shoal: `, exit code) for any exception."""
    if isinstance(error, DaemonError | RequestFailed):
        return _line(error.message, error.hint), _BY_CODE.get(error.code, Exit.FAILED)
    if isinstance(error, NoDaemon):
        return _text(error), Exit.NO_DAEMON
    if isinstance(error, HomeError):
        return _line(_text(error), "set it to one of your own"), Exit.USAGE
    if isinstance(error, TimedOut):
        return _line(f"the daemon does not answer: {_text(error)}", "see shoal logs"), Exit.FAILED
    if isinstance(error, CommError):
        return _line(f"talking to the daemon failed: {_text(error)}", "see shoal logs"), Exit.FAILED
    if isinstance(error, click.UsageError):
        if isinstance(error, click.NoSuchOption) and error.ctx:
            near = _options_like(error.option_name, error.ctx)
            error = click.NoSuchOption(error.option_name, possibilities=near, ctx=error.ctx)
        path = error.ctx.command_path if error.ctx else "shoal"
        return _line(_lower(error.format_message()), f"see {path} --help"), Exit.USAGE
    if isinstance(error, click.ClickException):
        return _line(_lower(error.format_message())), Exit.FAILED
    if isinstance(error, KeyboardInterrupt | click.Abort):
        return "interrupted", Exit.INTERRUPTED
    if isinstance(error, MemoryError):
        return _line("out of memory", "give --memory or a smaller --ctx"), Exit.REFUSED
    if isinstance(error, OutputFailed):
        return f"standard output could not be written: {error.strerror}", (
            Exit.REFUSED if error.errno in NO_ROOM else Exit.FAILED
        )
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        if error.errno in NO_ROOM:
            hint = f"{more_room(error.errno)}, or set SHOAL_HOME to another disk"
            return _line(f"{where}{error.strerror}", hint), Exit.REFUSED
        return f"{where}{error.strerror}", Exit.FAILED
    if isinstance(error, Exception) and type(error).__module__.startswith("shoal."):
        # Imported here, since it brings all rooms; one that has raised is there already.
        from shoal.daemon.error_codes import translated

        known = translated(error)
        if known.code != "internal":
            return explain(known)
    what = f"{type(error).__name__}: {_text(error)}"
    return _line(f"unexpected error: {what}", "SHOAL_DEBUG=1 shows where; please report it"), Exit.FAILED


def _options_like(written: str, context: click.Context) -> list[str]:
    """The options of a verb that somebody may have meant: those that begin so, else the nearest."""
    names = [
        name for option in context.command.get_params(context) for name in option.opts if name[:2] == "--"
    ]
    if begun := [name for name in names if name.startswith(written)]:
        return begun
    near = nearest(written, names)
    return [near] if near else []


def _text(error: BaseException) -> str:
    return " ".join(str(error).split())[:500] or type(error).__name__


def _lower(message: str) -> str:
    """click's sentences, to follow `shoal: `."""
    message = message.rstrip(".")
    return message[:1].lower() + message[1:] if message[1:2].islower() else message


def _line(message: str, hint: str = "") -> str:
    text = " ".join(message.split())
    return worded(f"{text} ({' '.join(hint.split())})" if hint else text)
