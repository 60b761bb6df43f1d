"""The verbs of `shoal`, imported when they are called, and how each ends: one line and an exit code.

Knows names and one-line helps of the verbs, so that `shoal --help` imports none of them. What a verb does is
in its own module; what an error means is in `exit_codes`.
"""

from __future__ import annotations

import importlib
import os
import shutil
import sys
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import click

from .exit_codes import Exit, explain
from .terminal.output import folded
from .terminal.paint import printable
from .terminal.standard_output import OutputFailed
from .wording import nearest


class Verb(NamedTuple):
    module: str
    help: str
    group: str


VERBS = {
    "run": Verb("run", "Answer one prompt.", "Use"),
    "chat": Verb("chat.loop", "Hold a conversation.", "Use"),
    "batch": Verb("batch.batch_verb", "Answer a file of requests.", "Use"),
    "pull": Verb("store", "Fetch a model into the local store.", "Models"),
    "ls": Verb("store", "List the models in the store.", "Models"),
    "show": Verb("show", "Show what a model is and how it would run.", "Models"),
    "plan": Verb("throughput.plan_verb", "Predict how fast a model would be, here or elsewhere.", "Models"),
    "rm": Verb("store", "Remove a model from the store.", "Models"),
    "pack": Verb("packing", "Lay a model out for reading from disk.", "Models"),
    "serve": Verb("serve", "Run the daemon.", "Daemon"),
    "stop": Verb("serve", "Stop the daemon.", "Daemon"),
    "load": Verb("serve", "Load a model into the daemon.", "Daemon"),
    "unload": Verb("serve", "Take a model out of the daemon.", "Daemon"),
    "ps": Verb("observe", "Show what the daemon runs.", "Daemon"),
    "logs": Verb("observe", "Show the daemon's log.", "Daemon"),
    "cluster": Verb("cluster", "Compute on several machines together.", "Cluster"),
    "bench": Verb("measure", "Measure prefill and decode speed.", "Measure"),
    "perplexity": Verb("measure", "Measure a model's quality on a text.", "Measure"),
    "profile": Verb("throughput.profile_verb", "Measure what this machine can do.", "Measure"),
    "doctor": Verb("doctor", "Check this installation.", "Measure"),
}
_OTHER_NAMES = {
    **dict.fromkeys(("ask", "generate", "complete", "prompt", "exec"), "run"),
    **dict.fromkeys(("bulk", "offline"), "batch"),
    **dict.fromkeys(("talk", "interactive", "repl"), "chat"),
    **dict.fromkeys(("get", "fetch", "download", "install", "add", "import"), "pull"),
    **dict.fromkeys(("list", "models", "tags"), "ls"),
    **dict.fromkeys(("info", "inspect", "describe", "explain"), "show"),
    **dict.fromkeys(("remove", "delete", "del", "uninstall"), "rm"),
    **dict.fromkeys(("quantize", "convert"), "pack"),
    **dict.fromkeys(("start", "daemon", "server", "up"), "serve"),
    **dict.fromkeys(("kill", "quit", "exit", "shutdown", "down"), "stop"),
    **dict.fromkeys(("status", "top"), "ps"),
    **dict.fromkeys(("log",), "logs"),
    **dict.fromkeys(("benchmark", "measure", "speed"), "bench"),
    **dict.fromkeys(("ppl", "eval"), "perplexity"),
    **dict.fromkeys(("predict", "estimate", "fit"), "plan"),
    **dict.fromkeys(("calibrate", "probe"), "profile"),
    **dict.fromkeys(("check", "diagnose"), "doctor"),
}
"""What other programs call these verbs, by verb."""


class Shoal(click.Group):
    """The group of verbs. Whatever happens below ends here, as one line and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        verb = VERBS.get(cmd_name)
        if verb is None:
            return None
        module = importlib.import_module(f"shoal.cli.{verb.module}")
        command: click.Command = getattr(module, cmd_name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in VERBS and not args[0].startswith("-"):
            near = nearest(args[0], VERBS, _OTHER_NAMES)
            meant = f"; did you mean {near}?" if near else ""
            raise click.UsageError(f"There is no verb {args[0]!r}{meant}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = max(map(len, VERBS))
        for group in dict.fromkeys(verb.group for verb in VERBS.values()):
            with formatter.section(group):
                rows = [(name.ljust(width), verb.help) for name, verb in VERBS.items() if verb.group == group]
                formatter.write_dl(rows)

    def main(self, args: Any = None, prog_name: str | None = None, **extra: Any) -> NoReturn:  # type: ignore[override]
        extra["standalone_mode"] = False
        verbs_main = super().main
        given = sys.argv[1:] if args is None else list(args)
        sys.exit(_guarded(lambda: verbs_main(_texts(given), prog_name or "shoal", **extra)))


def _texts(arguments: list[str]) -> list[str]:
    """`arguments`, if messages and JSON can carry them; `help VERB` means `VERB --help`. Raises UsageError."""
    for number, argument in enumerate(arguments, 1):
        try:
            argument.encode()
        except UnicodeEncodeError as error:
            raise click.UsageError(f"argument {number} is not UTF-8 text: {ascii(argument)[:60]}") from error
    if arguments[:1] == ["help"]:
        return [*(verb for verb in arguments[1:2] if verb != "help"), "--help"]
    return arguments


def _version(ctx: click.Context, _param: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        from importlib.metadata import version

        click.echo(f"shoal {version('shoal')}")
        ctx.exit()


@click.group(
    name="shoal",
    cls=Shoal,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Example: shoal pull smollm2, then shoal chat. shoal help VERB shows a verb with examples.",
)
@click.option(
    "--version", is_flag=True, expose_value=False, is_eager=True, callback=_version, help="Show the version."
)
def cli() -> None:
    """Shoal runs language models on the machines you have."""


def _guarded(call: Callable[[], object]) -> int:
    """Run `call`; returns the exit code after one line on stderr for whatever it raised."""
    try:
        result = call()
        if sys.stdout is not None:
            sys.stdout.flush()
        return int(result) if isinstance(result, int) else Exit.DONE
    except BrokenPipeError:  # the reader has had enough
        _write_no_more()
        return Exit.FAILED
    except click.exceptions.Exit as ended:
        return ended.exit_code
    except click.exceptions.NoArgsIsHelpError as bare:
        click.echo(bare.format_message(), err=True)
        return Exit.USAGE
    except (Exception, KeyboardInterrupt) as error:
        line, code = explain(error)
        if isinstance(error, OutputFailed):
            _write_no_more()
        if os.environ.get("SHOAL_DEBUG") == "1":
            traceback.print_exc()
        if code != Exit.INTERRUPTED:
            said = f"shoal: {printable(line)}"
            columns = shutil.get_terminal_size().columns
            click.echo(folded(said, columns) if sys.stderr.isatty() else said, err=True)
        elif (
            isinstance(error, click.Abort) and error.__cause__ is None
        ):  # at a question, whose line is still open
            click.echo(err=True)
        return code


def _write_no_more() -> None:
    """What stdout has not taken yet would fail again when the process ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
