"""`shoal run`: one answer, streamed.

Knows where the prompt comes from and what is printed around the answer. Does not know how it is computed.
"""

from __future__ import annotations

import select
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import click

from shoal.comm.home import Home
from shoal.comm.messages import (
    Accepted,
    Chat,
    ChatMessage,
    Done,
    Generate,
    ModelStatus,
    Stage,
    StreamEvent,
    Timings,
    Token,
    Usage,
)
from shoal.daemon.errors import DaemonError
from shoal.daemon.library.library import Library
from shoal.partition.amounts import counted

from .answers import Answers, from_daemon, in_process, reference
from .interrupt import unechoed
from .options import (
    AnswerOptions,
    PlanOptions,
    answer_options,
    draft_option,
    examples,
    json_option,
    plan_options,
    quant_option,
)
from .store import reference_or_fetch
from .terminal.output import note, per_second, print_json, stage_text
from .terminal.paint import Painter

STDIN_NOTE_S = 1.0  # if stdin beside a PROMPT is silent for so long, the user is told about it
STDIN_LIMIT_S = 10.0  # and after so long it is not waited for any more

ENDS = {
    "length": "cut at the limit",
    "deadline": "cut at the deadline",
    "cancelled": "stopped",
    "repetition": "ended because it only repeated itself (--keep-repeating lets it go on)",
}


@click.command(
    epilog=examples(
        'shoal run smollm2 "Why is the sky blue?"',
        'shoal run smollm2 "Summarise this in one sentence:" < notes.txt',
        'shoal run --raw --max-tokens 40 model.gguf "Once upon a time"',
        'shoal run --json --seed 1 --memory 3GB smollm2 "Name three fish."',
        'shoal run --quant q4 ~/models/llama-70b "Name three fish."',
    )
)
@click.argument("model")
@click.argument("prompt", required=False)
@click.option("--system", metavar="TEXT", help="System message before the prompt.")
@click.option("--raw", is_flag=True, help="Use the prompt as it is, without the model's chat template.")
@click.option("--local", is_flag=True, help="Run in this process even if a daemon is running.")
@quant_option
@json_option
@draft_option
@answer_options
@plan_options
def run(
    model: str,
    prompt: str | None,
    system: str | None,
    raw: bool,
    local: bool,
    as_json: bool,
    draft: str | None,
    answer: AnswerOptions,
    plan: PlanOptions,
) -> None:
    """Answer one PROMPT with MODEL, a path or a name in the store.

    The answer goes to stdout as it is made, statistics to stderr. Text on stdin follows the PROMPT, or replaces it. A
    running daemon answers, unless --local, --memory, --threads, --device, --speculate, --kv-type or --cluster-wire is
    given: then this process does. --ctx bounds this answer and changes nothing for others who use the daemon. --draft
    is refused where it would; shoal load --draft loads the model anew for all.
    """
    if raw and system is not None:
        raise click.UsageError("--system needs the chat template that --raw leaves out")
    text = _prompt(prompt)
    config = plan.config()
    answer.request_fields("")  # wrong options are told before a model is loaded
    library = Library(Home.from_env())
    name = reference_or_fetch(model, library)
    guessing = reference(draft, library) if draft else None
    with ExitStack() as stack:
        stack.enter_context(unechoed())
        answers: Answers | None = None
        if not (local or plan.beyond_context):
            answers = stack.enter_context(from_daemon(Home.from_env()))
        answers = answers or stack.enter_context(in_process(config, library))
        status = answers.load(name, guessing, plan.ctx, plan.ranks)
        if not raw and not status.chat_template:
            lacks = f"{status.name} has no chat template"
            note(f"{lacks}: it continues the prompt as it is (--raw hides this note)")
            if system is not None:
                raise DaemonError("bad_request", f"{lacks}, so --system cannot be used")
        painter = Painter(quiet=as_json)
        fields = answer.request_fields(status.name)
        fields |= {"progress": painter.shows_stages, "context_tokens": plan.ctx}
        request: Generate | Chat
        if raw or not status.chat_template:
            request = Generate(prompt=text, **fields)
        else:
            told = [ChatMessage(role="system", content=system)] if system is not None else []
            request = Chat(messages=[*told, ChatMessage(role="user", content=text)], **fields)
        result = _Collected()
        with answers.stream(request) as events:
            _take(events, result, painter)
        if as_json:
            print_json(result.as_dict(status, answers.peak_memory_bytes()))
        else:
            note(statistics(result.done))


def _take(events: Iterator[StreamEvent], result: _Collected, painter: Painter) -> None:
    """Collect an answer, and show it as it comes."""
    try:
        for event in events:
            if isinstance(event, Stage):
                painter.stage(stage_text(event))
                continue
            result.take(event)
            if isinstance(event, Token):
                painter.write(event.text)
    finally:
        painter.end()


class _Collected:
    """The events of one answer, put together."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._ids: list[int] = []
        nothing = Usage(prompt_tokens=0, completion_tokens=0)
        self.done = Done(finish_reason="cancelled", usage=nothing, timings=Timings())

    def take(self, event: Accepted | Token | Done) -> None:
        if isinstance(event, Token):
            self._texts.append(event.text)
            self._ids += event.ids
        elif isinstance(event, Done):
            self.done = event

    def as_dict(self, model: ModelStatus, peak_memory_bytes: int) -> dict[str, Any]:
        usage, timings = self.done.usage, self.done.timings
        return {
            "text": "".join(self._texts),
            "token_ids": self._ids,
            "prompt_tokens": usage.prompt_tokens,
            "cached_tokens": usage.cached_tokens,
            "completion_tokens": usage.completion_tokens,
            "finish_reason": self.done.finish_reason,
            "ttft_s": timings.ttft_s,
            "prefill_tokens_per_s": timings.prefill_tokens_per_s,
            "decode_tokens_per_s": timings.decode_tokens_per_s,
            "peak_memory_bytes": peak_memory_bytes,
            "stall_s": timings.stall_s,
            "drafted_tokens": usage.drafted_tokens,
            "accepted_tokens": usage.accepted_tokens,
            "plan": model.plan,
            "ranks": model.ranks,
            "rank_bytes": model.rank_bytes,
        }


def statistics(done: Done) -> str:
    """One line: '34 prompt tokens (283/s) · first token after 0.15 s · 120 tokens (98/s), 9 of them guessed'."""
    timings, usage = done.timings, done.usage
    parts = [counted(usage.prompt_tokens, "prompt token") + _rate(timings.prefill_tokens_per_s)]
    if usage.cached_tokens:
        parts.append(f"{usage.cached_tokens} of them cached")
    if timings.queue_s >= 0.1:
        parts.append(f"queued {timings.queue_s:.1f} s")
    if timings.ttft_s:  # 0 = there was no first token
        parts.append(f"first token after {timings.ttft_s:.2f} s")
    guessed = f", {usage.accepted_tokens} of them guessed" if usage.accepted_tokens else ""
    parts.append(counted(usage.completion_tokens, "token") + _rate(timings.decode_tokens_per_s) + guessed)
    if timings.stall_s >= 0.01:
        parts.append(f"waited {timings.stall_s:.2f} s for the disk")
    if done.finish_reason in ENDS:
        parts.append(ENDS[done.finish_reason])
    return " · ".join(parts)


def _rate(tokens_per_s: float) -> str:
    return f" ({per_second(tokens_per_s)})" if tokens_per_s else ""


def _prompt(given: str | None) -> str:
    """The argument, stdin, or both with an empty line between. Raises UsageError when there is neither."""
    piped = "" if sys.stdin is None or sys.stdin.closed or sys.stdin.isatty() else _piped(given is not None)
    parts = [part for part in (given, piped.removesuffix("\n").removesuffix("\r")) if part]
    if not parts:
        raise click.UsageError("there is no prompt: give one as PROMPT or on stdin")
    return "\n\n".join(parts)


def _piped(optional: bool) -> str:
    """All of stdin, as it is. If it is optional, a pipe that nobody writes to or closes must not block for ever."""
    try:
        descriptor = sys.stdin.fileno()
        if optional and not _arrives(descriptor, STDIN_NOTE_S):
            note("waiting for text on stdin (end with Ctrl-D, or give < /dev/null)")
            if not _arrives(descriptor, STDIN_LIMIT_S - STDIN_NOTE_S):
                note("nothing came on stdin: going on with PROMPT alone")
                return ""
    except (OSError, ValueError):  # stdin is no real file, as in tests
        pass
    try:
        return sys.stdin.buffer.read().decode(sys.stdin.encoding)
    except UnicodeDecodeError as error:
        byte = f"byte {error.start + 1} is {error.object[error.start]:#04x}"
        raise DaemonError(
            "bad_request",
            f"stdin is not {error.encoding} text: {byte}",
            f"iconv -f … -t {error.encoding} converts it from another encoding",
        ) from error


def _arrives(descriptor: int, seconds: float) -> bool:
    """Whether bytes, or the end, come within that time."""
    return bool(select.select([descriptor], [], [], seconds)[0])
