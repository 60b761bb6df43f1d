"""Where answers come from: a node in this process, or the daemon. Verbs see no difference.

Knows how both are opened and closed. Does not print, but for progress while a model loads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from shoal.comm.messages import Accepted, Chat, Done, Generate, Load, ModelStatus, Stage, Token
from shoal.daemon.config import NodeConfig
from shoal.daemon.home import Home
from shoal.daemon.library import Library, is_path
from shoal.daemon.registry import canonical

from .imports import engine_imports
from .output import spinner, stage_text, transfer_bar

if TYPE_CHECKING:
    from shoal.daemon.client import Client
    from shoal.daemon.node import Node

Event = Accepted | Stage | Token | Done


class Answers(Protocol):
    """What `run` and `chat` need of either."""

    def load(self, model: str, draft: str | None) -> ModelStatus: ...
    def stream(self, request: Generate | Chat) -> AbstractContextManager[Iterator[Event]]: ...


def reference(model: str, library: Library) -> str:
    """`model` as the daemon understands it wherever it runs: a name in the store, or an absolute path.

    Raises DaemonError `not_found`, with what to do, before a daemon is asked.
    """
    path = library.resolve(model)
    in_store = not is_path(model) and path.is_relative_to(library.root)
    return canonical(model) if in_store else str(path)


class InProcess:
    """A node in this process."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def load(self, model: str, draft: str | None) -> ModelStatus:
        """`draft`: a model that guesses for it. Raises DaemonError."""
        with transfer_bar() as update:
            return self._node.load(Load(model=model, draft=draft), update).model

    @contextmanager
    def stream(self, request: Generate | Chat) -> Iterator[Iterator[Event]]:
        """Leaving the block cancels what is left. Raises DaemonError."""
        events = self._node.stream(request)
        try:
            yield events
        finally:
            _close(events)


class ThroughDaemon:
    """A daemon that is up."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def load(self, model: str, draft: str | None) -> ModelStatus:
        """Raises CommError."""
        with spinner(f"loading {model}") as update:
            return self._client.load(
                model, draft=draft, heard=lambda stage: update(f"{model}: {stage_text(stage)}")
            ).model

    @contextmanager
    def stream(self, request: Generate | Chat) -> Iterator[Iterator[Event]]:
        """Leaving the block cancels what is left. Raises CommError."""
        fields = {name: getattr(request, name) for name in request.__struct_fields__}
        ask = self._client.chat if isinstance(request, Chat) else self._client.generate
        events = ask(**fields)
        try:
            yield events
        finally:
            _close(events)


def _close(events: object) -> None:
    """Generators are closed at once, not when they are collected."""
    close = getattr(events, "close", None)
    if close is not None:
        close()


@contextmanager
def in_process(config: NodeConfig, library: Library) -> Iterator[InProcess]:
    """A node for one request at a time; closed at the end."""
    with spinner("starting"), engine_imports():
        from shoal.daemon.node import Node
        from shoal.daemon.packs import Packs
    packs = Packs(Home.from_env())
    with Node(replace(config, max_sequences=1), resolve=library.resolve, packs=packs) as node:
        yield InProcess(node)


@contextmanager
def from_daemon(home: Home) -> Iterator[ThroughDaemon | None]:
    """The daemon of this home, or None when none answers."""
    if not home.socket.exists():
        yield None
        return
    from shoal.comm.errors import CommError
    from shoal.daemon.client import Client

    with Client(home.address) as client:
        try:
            client.ping()
        except CommError:
            answers = None
        else:
            answers = ThroughDaemon(client)
        yield answers
