"""Where answers come from: a node in this process, or the daemon. Verbs see no difference.

Knows how both are opened and closed. Prints nothing but progress while a model loads.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Protocol, TypeVar

from shoal.comm.errors import RequestFailed
from shoal.comm.home import Home
from shoal.comm.messages import (
    Chat,
    ChatMessage,
    Done,
    Error,
    Generate,
    Load,
    ModelStatus,
    Stage,
    StreamEvent,
    Tokenize,
)
from shoal.daemon.config import NodeConfig, beyond_the_model, beyond_what_is_loaded
from shoal.daemon.errors import DaemonError
from shoal.daemon.library.library import Library, is_path
from shoal.daemon.library.registry import canonical
from shoal.daemon.memory import peak_memory_bytes
from shoal.daemon.model_name import Reference

from .background import running_pid
from .interrupt import deferred_interrupt
from .terminal.output import note, spinner, stage_text, transfer_bar

if TYPE_CHECKING:
    from shoal.client import Client
    from shoal.daemon.backend import Event
    from shoal.daemon.loading.grouping import Grouping
    from shoal.daemon.node import Node
    from shoal.daemon.underway import Underway

K = TypeVar("K")
NoAnswer = DaemonError | RequestFailed
"""What a request fails with: by a node here, or by the daemon. Both have a code, a message and a hint."""


class Answers(Protocol):
    """What `run` and `chat` need of either. Methods raise DaemonError or CommError."""

    def load(
        self,
        model: str,
        draft: str | None,
        context: int | None = None,
        ranks: int | None = None,
        *,
        likely: int | None = None,
    ) -> ModelStatus:
        """Have a model that can hold a conversation of `context` tokens. What others use stays as it is for them.
        `draft`: a model that guesses for it. `ranks`: so many machines compute it, for all who use it. None: as it
        is. `likely`: tokens for which it gets context if it is loaded now and nobody asked for another."""
        ...

    def peak_memory_bytes(self) -> int:
        """Of the process that computes."""
        ...

    def models(self) -> list[ModelStatus]: ...

    def count(self, messages: list[ChatMessage], model: str) -> int:
        """Tokens of a conversation as the model's template writes it."""
        ...

    def stream(self, request: Generate | Chat) -> AbstractContextManager[Iterator[StreamEvent]]:
        """The events of an answer; leaving the block cancels the rest."""
        ...

    def places(self) -> int:
        """How many requests should be under way, so that there is always one to be taken up."""
        ...

    def many(
        self, requests: Iterator[tuple[K, Generate | Chat] | None], at_once: int
    ) -> Generator[tuple[K, StreamEvent | NoAnswer], None, None]:
        """The events of many answers, as `Client.many` has them."""
        ...


def reference(model: str, library: Library) -> str:
    """`model` as the daemon understands it wherever it runs: a name in the store or an absolute path, and its bits.

    Raises DaemonError `not_found`, with what to do, before a daemon is asked.
    """
    wanted = Reference.parse(model)
    path = library.resolve(wanted.model)
    in_store = not is_path(wanted.model) and path.is_relative_to(library.root)
    return str(wanted._replace(model=canonical(wanted.model) if in_store else str(path)))


def check_context(model: str, status: ModelStatus, context: int | None) -> None:
    """Raises DaemonError `context_overflow`, which names the way out, if a loaded model holds less than `context`."""
    loaded, limit = status.context_tokens, status.context_limit_tokens
    if context is not None and 0 < limit < context:
        raise beyond_the_model(context, limit)
    if context is not None and context > loaded:
        hint = f"shoal load {shlex.quote(model)} --ctx {context} loads it anew, for all of them"
        raise beyond_what_is_loaded(context, status.name, loaded, hint)


def _note_warnings(status: ModelStatus) -> None:
    """Say what is odd about a model that a daemon has. (In this process the log says it.)"""
    for warning in status.warnings:
        note(warning)


class InProcess:
    """A node in this process."""

    def __init__(self, node: Node, sequences: int) -> None:
        self._node = node
        self._sequences = sequences

    def load(
        self,
        model: str,
        draft: str | None,
        context: int | None = None,
        ranks: int | None = None,
        *,
        likely: int | None = None,
    ) -> ModelStatus:
        least = likely if context is None else None
        request = Load(model=model, draft=draft, context=context, ranks=ranks, least_context=least)
        with transfer_bar() as update:
            return self._node.load(request, update).model

    def peak_memory_bytes(self) -> int:
        return peak_memory_bytes()

    def models(self) -> list[ModelStatus]:
        return self._node.status().models

    def count(self, messages: list[ChatMessage], model: str) -> int:
        return len(self._node.tokenize(Tokenize(messages=messages, model=model)).ids)

    def stream(self, request: Generate | Chat) -> AbstractContextManager[Iterator[StreamEvent]]:
        return closing(self._node.stream(request))

    def places(self) -> int:
        return 2 * self._sequences

    def many(
        self, requests: Iterator[tuple[K, Generate | Chat] | None], at_once: int
    ) -> Generator[tuple[K, StreamEvent | NoAnswer], None, None]:
        from shoal.client.keep_full import NOTHING_S, keep_full

        heard: SimpleQueue[tuple[K, Event]] = SimpleQueue()
        under_way: dict[K, Underway] = {}

        def begin(key: K, request: Generate | Chat) -> None:
            under_way[key] = self._node.submit(request, partial(_put, heard, key))

        def events() -> Iterator[tuple[K, StreamEvent | DaemonError] | None]:
            while True:
                try:
                    key, event = heard.get(timeout=NOTHING_S)
                except Empty:
                    self._node.check_threads()
                    yield None
                    continue
                if isinstance(event, Error | Done):
                    del under_way[key]
                yield key, DaemonError.of(event) if isinstance(event, Error) else event

        try:
            yield from keep_full(requests, at_once, begin, events(), DaemonError)
        finally:
            for each in under_way.values():
                each.cancel()


def _put(heard: SimpleQueue[tuple[K, Event]], key: K, event: Event) -> None:
    heard.put((key, event))


class ThroughDaemon:
    """A daemon that is up."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def load(
        self,
        model: str,
        draft: str | None,
        context: int | None = None,
        ranks: int | None = None,
        *,
        likely: int | None = None,
    ) -> ModelStatus:
        with self._loading(model) as heard:
            status = self._client.load(
                model, None, draft, heard, least_context=context or likely, ranks=ranks, keep=ranks is None
            ).model
        _note_warnings(status)
        check_context(model, status, context)
        return status

    def load_for_all(self, model: str, draft: str | None, context: int | None) -> ModelStatus:
        """Load a model, or load it anew with another context or draft model, for everybody who uses the daemon."""
        with self._loading(model) as heard:
            status = self._client.load(model, context, draft, heard).model
        _note_warnings(status)
        return status

    @contextmanager
    def _loading(self, model: str) -> Iterator[Callable[[Stage], None]]:
        """Show how far loading is."""
        wanted = Reference.parse(model)
        name = wanted._replace(model=Path(wanted.model).name)
        with spinner(f"loading {name}") as update:
            yield lambda stage: update(f"{name}: {stage_text(stage)}")

    def peak_memory_bytes(self) -> int:
        return self._client.status().peak_memory_bytes

    def models(self) -> list[ModelStatus]:
        return self._client.status().models

    def count(self, messages: list[ChatMessage], model: str) -> int:
        return len(self._client.tokenize(messages=messages, model=model).ids)

    def stream(self, request: Generate | Chat) -> AbstractContextManager[Iterator[StreamEvent]]:
        return closing(self._client.stream(request))

    def places(self) -> int:
        return self._client.hello().limits["requests_per_client"]

    def many(
        self, requests: Iterator[tuple[K, Generate | Chat] | None], at_once: int
    ) -> Generator[tuple[K, StreamEvent | NoAnswer], None, None]:
        return self._client.many(requests, at_once)


@contextmanager
def in_process(config: NodeConfig, library: Library, *, sequences: int = 1) -> Iterator[InProcess]:
    """A node that computes so many requests at the same time; closed at the end."""
    with spinner("starting"), deferred_interrupt():
        from shoal.daemon.library.packs import Packs
        from shoal.daemon.node import Node
        from shoal.daemon.throughput.own_machine import OwnMachine
    home = Home.from_env()
    packs = Packs(home, lambda estimate: note(estimate.describe()))
    config = replace(config, max_sequences=sequences, max_queue=max(sequences, config.max_queue))
    machine = OwnMachine.of(home, config.thread_count)
    with (
        machines(home, config) as grouping,
        Node(config, resolve=library.resolve, packs=packs, grouping=grouping, machine=machine) as node,
    ):
        yield InProcess(node, sequences)


@contextmanager
def machines(home: Home, config: NodeConfig) -> Iterator[Grouping | None]:
    """The machines of the cluster that compute with this process, if `config` wants any."""
    if config.ranks in (None, 1):
        yield None
        return
    if home.socket.exists() and (pid := running_pid(home)) is not None:
        message = f"{config.ranks} ranks were asked for, and the daemon (pid {pid}) has the other machines"
        raise DaemonError("busy", message, "let it answer, or shoal stop first")
    from shoal.daemon.cluster.gathering import gathered

    with spinner("waiting for the other machines"), ExitStack() as stack:
        grouping = stack.enter_context(gathered(home, config))
        stack = stack.pop_all()
    with stack:
        yield grouping


@contextmanager
def from_daemon(home: Home) -> Iterator[ThroughDaemon | None]:
    """The daemon of this home, or None when none answers."""
    if not home.socket.exists():
        yield None
        return
    from shoal.client import Client
    from shoal.comm.errors import CommError

    answers: ThroughDaemon | None = None
    with Client(home.address) as client:
        with suppress(CommError):
            client.ping()
            answers = ThroughDaemon(client)
        yield answers
