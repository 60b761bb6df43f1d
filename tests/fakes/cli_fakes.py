"""Stand-ins for what the command line calls: answers, a daemon's client, and verbs run in this process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from shoal.cli.verbs import cli
from shoal.comm.cluster_messages import NodesReply
from shoal.comm.messages import (
    Accepted,
    Chat,
    ChatMessage,
    Done,
    FinishReason,
    Generate,
    Loaded,
    ModelStatus,
    Pong,
    StatusReply,
    StreamEvent,
    Timings,
    Token,
    Tokens,
    Usage,
)

TIMINGS = Timings(ttft_s=0.25, prefill_tokens_per_s=80.0, decode_tokens_per_s=12.5)


def model_status(name: str = "tiny", **changed: Any) -> ModelStatus:
    fields: dict[str, Any] = {
        "name": name,
        "path": f"/models/{name}.gguf",
        "family": "llama",
        "parameters_bytes": 1_000_000,
        "context_tokens": 100,
        "running": 0,
        "waiting": 0,
        "kv_used_tokens": 10,
        "kv_total_tokens": 200,
        "plan": "1 rank, all in ram",
    }
    return ModelStatus(**{**fields, **changed})


class FakeAnswers:
    """Answers every request with the same words; `fails` is raised after them instead of `done`."""

    def __init__(self, *words: str, fails: BaseException | None = None, **status: Any) -> None:
        self.words = words
        self.fails = fails
        self.status = model_status(**status)
        self.loaded: list[str] = []
        self.drafts: list[str | None] = []
        self.contexts: list[int | None] = []
        self.requests: list[Generate | Chat] = []
        self.cancelled = 0
        self.reason: FinishReason = "stop"

    def load(
        self,
        model: str,
        draft: str | None,
        context: int | None = None,
        ranks: int | None = None,
        *,
        likely: int | None = None,
    ) -> ModelStatus:
        self.loaded.append(model)
        self.drafts.append(draft)
        self.contexts.append(context)
        return self.status

    def peak_memory_bytes(self) -> int:
        return 5_000_000

    def models(self) -> list[ModelStatus]:
        return [self.status]

    def count(self, messages: list[ChatMessage], model: str) -> int:
        return sum(len(str(message.content).split()) for message in messages)

    @contextmanager
    def stream(self, request: Generate | Chat) -> Iterator[Iterator[StreamEvent]]:
        self.requests.append(request)
        finished: list[Done] = []
        try:
            yield self._events(finished)
        finally:
            self.cancelled += not finished

    def _events(self, finished: list[Done]) -> Iterator[StreamEvent]:
        yield Accepted(model=self.status.name, prompt_tokens=7)
        for number, word in enumerate(self.words):
            yield Token(text=word, ids=[number])
        if self.fails is not None:
            raise self.fails
        usage = Usage(prompt_tokens=7, completion_tokens=len(self.words))
        finished.append(Done(finish_reason=self.reason, usage=usage, timings=TIMINGS, context_tokens=100))
        yield finished[0]


class FakeClient:
    """A daemon's client: one per daemon, however often it is opened. A message counts a token per word.

    `loads` are loads for everybody, (model, context); `asked` are those of one conversation, (model, least context).
    """

    def __init__(self, *models: ModelStatus, words: tuple[str, ...] = ("Hello", " there.")) -> None:
        self.models = {model.name: model for model in models}
        self.answers = FakeAnswers(*words)
        self.fails: Exception | None = None
        self.drafts: list[str | None] = []
        self.loads: list[tuple[str, int | None]] = []
        self.asked: list[tuple[str, int | None]] = []
        self.kept: list[bool] = []  # per load: whether a loaded model is to stay as it is
        self.unloaded: list[str] = []
        self.changed: dict[str, Any] = {}  # of its status

    def __call__(self, address: str | None = None, **options: Any) -> FakeClient:
        return self

    def __enter__(self) -> FakeClient:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def close(self) -> None:
        return

    def ping(self) -> Pong:
        if self.fails is not None:
            raise self.fails
        return Pong(time_s=0.0)

    def nodes(self) -> NodesReply:
        self.ping()
        return NodesReply(role="alone", nodes=[])

    def status(self) -> StatusReply:
        self.ping()
        return StatusReply(
            version="0.1.0",
            pid=4242,
            uptime_s=61.0,
            threads=2,
            memory_bytes=5_000_000,
            models=list(self.models.values()),
            requests_total=3,
            tokens_total=99,
            **self.changed,
        )

    def load(
        self,
        model: str,
        context: int | None = None,
        draft: str | None = None,
        heard: Any = None,
        *,
        ranks: int | None = None,
        least_context: int | None = None,
        keep: bool = False,
    ) -> Loaded:
        (self.asked if context is None else self.loads).append((model, context or least_context))
        self.drafts.append(draft)
        self.kept.append(keep)
        name = Path(model).stem
        if name not in self.models and least_context is not None:
            context = max(100, least_context)
        found = self.models.get(name, model_status(name, path=model))
        if context is not None:
            found = model_status(
                name, path=found.path, context_tokens=context, chat_template=found.chat_template
            )
        self.models[name] = found
        return Loaded(model=found, seconds=0.1)

    def unload(self, model: str = "") -> None:
        self.unloaded.append(model)

    def tokenize(self, *, messages: list[ChatMessage], model: str) -> Tokens:
        words = sum(len(str(message.content).split()) for message in messages)
        return Tokens(ids=[1] * words, text="")

    def stream(self, request: Generate | Chat) -> Iterator[StreamEvent]:
        with self.answers.stream(request) as events:
            yield from events


def shoal(*arguments: str, stdin: str | None = None) -> Result:
    """Run a verb in this process; `.exit_code`, `.stdout` and `.stderr` are what a user would see."""
    return CliRunner().invoke(cli, list(arguments), input=stdin, prog_name="shoal")


def shoal_process(code: str, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run `code` (which may prepare things) and then the command, in a process of its own."""
    program = (
        f"import sys; sys.argv[1:] = {list(arguments)!r}\n{code}\nfrom shoal.cli.main import main; main()"
    )
    return subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **options.pop("env", {})},
        **options,
    )
