"""`shoal chat`: the loop of a conversation.

    read → (command | trim to the context → ask → paint tokens as they come → remember)

Knows what happens when an answer is stopped, overflows or loses its daemon: the user is told, and the conversation is
kept. Keys are in `line_input`, commands in `commands`, the daemon in `link`.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from itertools import chain

import click

from shoal.cli import background
from shoal.cli.answers import in_process, reference
from shoal.cli.exit_codes import Exit, explain
from shoal.cli.interrupt import ended_by_signals, unechoed
from shoal.cli.options import (
    AnswerOptions,
    PlanOptions,
    answer_options,
    draft_option,
    examples,
    plan_options,
    quant_option,
)
from shoal.cli.store import asks, reference_or_fetch
from shoal.cli.terminal.output import note, spinner, stage_text
from shoal.cli.terminal.paint import Painter
from shoal.cli.terminal.standard_output import OutputFailed
from shoal.comm.errors import CommError
from shoal.comm.home import Home
from shoal.comm.messages import (
    Accepted,
    Chat,
    Done,
    Stage,
    StreamEvent,
    Timings,
    Token,
    Usage,
)
from shoal.daemon.errors import DaemonError
from shoal.daemon.library.library import Library
from shoal.daemon.library.registry import DEFAULT_MODEL
from shoal.daemon.model_name import Reference
from shoal.daemon.private_files import private_dir
from shoal.partition.amounts import format_bytes

from .commands import ChatState, completions, is_command, obey, save
from .conversation import Conversation
from .line_input import LineReader, PlainReader, Reader, Said
from .link import ChatLink

RESCUED = "rescued"  # what a conversation is saved as whose chat ends without its user's doing
ANSWER_ROOM_TOKENS = 512  # kept free in the context for an answer, but at most a quarter of it


@click.command(
    epilog=examples(
        "shoal chat",
        "shoal chat smollm2 --system 'You are terse.'",
        "shoal chat --memory 3GB ~/models/llama-8b.gguf",
        "printf 'Hello!\\nAnd in French?\\n' | shoal chat smollm2",
    )
)
@click.argument("model", required=False)
@click.option("--system", default="", metavar="TEXT", help="System message for the conversation.")
@quant_option
@draft_option
@answer_options
@plan_options
def chat(model: str | None, system: str, draft: str | None, answer: AnswerOptions, plan: PlanOptions) -> int:
    """Hold a conversation with MODEL, a path or a name in the store.

    Without MODEL: the one that the daemon has loaded, else one from the store. A daemon is started if none is running;
    with --memory, --threads, --device, --speculate, --kv-type or --cluster-wire the model runs in this process. --ctx
    bounds this conversation and changes nothing for others; --draft is refused where it would. Type /help for commands;
    Ctrl-C stops an answer, Ctrl-D leaves.
    """
    home = Home.from_env()
    library = Library(home)
    config = plan.config()
    answer.request_fields("")  # wrong options are told before a model is loaded
    named = reference_or_fetch(model, library) if model else None
    guessing = reference(draft, library) if draft else None
    with ExitStack() as stack:
        own = replace(config, context_tokens=None)  # --ctx is the conversation's, not a later model's
        here = stack.enter_context(in_process(own, library)) if plan.beyond_context else None
        link = ChatLink(home, here)
        stack.callback(link.close)
        stack.enter_context(ended_by_signals())
        state = ChatState(home, link, Conversation(system))
        wanted = named or reference_or_fetch(_default(state), library)
        stack.enter_context(unechoed())
        reader = _reader(state, stack)
        with reader.listening():  # what is typed or pasted now is for the first line
            link.load(wanted, plan.ctx, guessing, plan.ranks)
        if isinstance(reader, LineReader):
            _greet(link)
        return ChatLoop(state, answer, reader).run()


class ChatLoop:
    """Reads until the end. An error is told to the user and ends its own turn only."""

    def __init__(self, state: ChatState, options: AnswerOptions, reader: Reader) -> None:
        self._state = state
        self._options = options
        self._reader = reader

    def run(self) -> int:
        """Returns the exit code of the last turn. Raises KeyboardInterrupt when the user insists on leaving.

        What ends it otherwise is raised after the conversation has been saved.
        """
        try:
            return self._turns()
        except (Exception, SystemExit):
            self._rescue()
            raise

    def _rescue(self) -> None:
        if not self._state.conversation.turns:
            return
        with suppress(DaemonError, OSError):  # nothing else can be done; the terminal may be gone, too
            save(self._state, RESCUED)
            note(f"the conversation is kept: /load {RESCUED} in a new chat goes on with it")

    def _turns(self) -> int:
        code = Exit.DONE
        while not self._state.leaving and (said := self._reader.read()) is not None:
            if said.text.strip():
                code = self._turn(said)
        return code

    def _turn(self, said: Said) -> Exit:
        try:
            with self._reader.listening():
                asked: str | None = said.text
                if not said.literal and is_command(said.text):
                    asked = obey(self._state, said.text)
                if asked:
                    self._ask(asked)
        except KeyboardInterrupt:
            note("stopped")
        except (OutputFailed, BrokenPipeError):  # nothing that follows could be shown
            raise
        except Exception as error:  # of whatever kind: a conversation must not be lost by one of its turns
            line, code = explain(error)
            note(line.replace("(use --ctx ", "(use /ctx "))  # here it is a command
            return code
        return Exit.DONE

    def _ask(self, asked: str) -> None:
        """One turn. When it raises DaemonError or CommError, the conversation has kept what came of the answer."""
        state, conversation = self._state, self._state.conversation
        conversation.unanswered = asked  # so that /retry works whatever happens
        state.link.ready()
        self._make_room(asked)
        parts: list[str] = []
        done: Done | None = None
        meter = _Meter()
        try:
            done = self._paint(asked, parts, meter)
        except KeyboardInterrupt:
            note("stopped; the conversation goes on")
        except (DaemonError, CommError):
            if parts:
                note("the answer broke off; the conversation is kept, and /retry asks again")
            raise
        finally:
            conversation.answered(asked, "".join(parts), complete=done is not None)
            self._remember(done or meter.stopped())

    def _paint(self, asked: str, parts: list[str], meter: _Meter) -> Done | None:
        """Write the answer as it comes, and into `parts`."""
        state = self._state
        fields = self._options.request_fields(state.link.model.name)
        painter = Painter()
        fields |= {"progress": painter.shows_stages, "context_tokens": state.link.context_tokens}
        request = Chat(messages=state.conversation.messages(asked), **fields)
        done: Done | None = None
        try:
            with state.link.stream(request) as events:
                with spinner("reading") as update:
                    first = _first(events, update)
                for event in chain(first, events):
                    meter.take(event)
                    if isinstance(event, Stage):
                        painter.stage(stage_text(event))
                    elif isinstance(event, Accepted):
                        state.used_tokens = event.prompt_tokens
                    elif isinstance(event, Token):
                        state.used_tokens += len(event.ids)
                        parts.append(event.text)
                        painter.write(event.text)
                    else:
                        done = event
        finally:
            painter.end()
        return done

    def _remember(self, done: Done) -> None:
        state = self._state
        if not done.usage.completion_tokens:
            return
        state.last = done
        state.answers_total += 1
        state.used_tokens = done.usage.prompt_tokens + done.usage.completion_tokens
        state.tokens_total += done.usage.completion_tokens
        if done.finish_reason == "repetition":
            note(
                "the answer only repeated itself, so it was ended (shoal chat --keep-repeating lets it go on)"
            )
        if done.finish_reason == "length" and self._options.max_tokens != done.usage.completion_tokens:
            note(
                "the context is full, so the answer was cut; the next turn drops the oldest (/ctx N enlarges it)"
            )

    def _make_room(self, asked: str) -> None:
        context = self._state.link.context_tokens
        room = context - min(ANSWER_ROOM_TOKENS, context // 4)
        dropped = self._state.conversation.fit(asked, self._state.link.count, room)
        if dropped is None:
            raise DaemonError(
                "context_overflow",
                f"this message alone fills the context of {context} tokens",
                "shorten it, or use /ctx N for a larger context",
            )
        if dropped:
            turns = "turn" if dropped == 1 else f"{dropped} turns"
            note(f"dropped the oldest {turns} to fit the context of {context} tokens (/ctx N enlarges it)")


class _Meter:
    """What an answer takes, as it looks from here: for one that is stopped, and so never comes to say it."""

    def __init__(self) -> None:
        self._asked_s = time.monotonic()
        self._first_s = self._last_s = self._asked_s
        self._prompt_tokens = self._tokens = self._first_tokens = 0

    def take(self, event: StreamEvent) -> None:
        if isinstance(event, Accepted):
            self._prompt_tokens = event.prompt_tokens
        elif isinstance(event, Token):
            self._last_s = time.monotonic()
            if not self._tokens:
                self._first_s, self._first_tokens = self._last_s, len(event.ids)
            self._tokens += len(event.ids)

    def stopped(self) -> Done:
        took_s = self._last_s - self._first_s
        speed = (self._tokens - self._first_tokens) / took_s if took_s else 0.0
        return Done(
            finish_reason="cancelled",
            usage=Usage(prompt_tokens=self._prompt_tokens, completion_tokens=self._tokens),
            timings=Timings(ttft_s=self._first_s - self._asked_s, decode_tokens_per_s=speed),
        )


def _first(events: Iterator[StreamEvent], update: Callable[[str], None]) -> list[StreamEvent]:
    """Accepted and the event after it; until then `update` is told what the answer waits for."""
    found: list[StreamEvent] = []
    for event in events:
        if isinstance(event, Stage):
            update(stage_text(event))
            continue
        found.append(event)
        if len(found) == 2:
            break
    return found


def toolbar(state: ChatState) -> str:
    """One line below the prompt: model, speed, how much of the context is used."""
    name, context = state.link.model.name, state.link.context_tokens
    rest = f"context {state.used_tokens}/{context} ({100 * state.used_tokens // context}%) · /help"
    if state.last is not None and state.last.timings.decode_tokens_per_s:
        rest = f"{state.last.timings.decode_tokens_per_s:.1f} tokens/s · {rest}"
    room = max(8, shutil.get_terminal_size().columns - len(f"  · {rest} "))
    return f" {name if len(name) <= room else name[: room - 1] + '…'} · {rest}"


def _greet(link: ChatLink) -> None:
    model = link.model
    note(
        f"{model.name} · {model.family}, {format_bytes(model.parameters_bytes)}, context {link.context_tokens} · "
        "/help lists commands, Ctrl-D leaves"
    )


def _reader(state: ChatState, stack: ExitStack) -> Reader:
    if sys.stdin is None or not sys.stdin.isatty() or not sys.stdout.isatty():
        return PlainReader()
    history = private_dir(state.home.root) / "chat_history"
    reader = LineReader(history, lambda text: completions(state, text), lambda: toolbar(state))
    stack.enter_context(reader.opened())
    return reader


def _default(state: ChatState) -> str:
    """The model to talk to when none is named. Raises DaemonError when there is none."""
    names = [entry.name for entry in state.library.list()]
    if background.running_pid(state.home) is not None and (loaded := state.link.loaded()):
        known, first = Reference.parse(loaded[0].name), loaded[0]
        return first.name if known.model in names else str(known._replace(model=first.path))
    if not names and not asks():
        raise DaemonError("not_found", "there is no model yet", f"get one with: shoal pull {DEFAULT_MODEL}")
    return names[0] if names and DEFAULT_MODEL not in names else DEFAULT_MODEL
