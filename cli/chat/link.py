"""The chat's hold on what answers: a node in this process, or the daemon, started when there is none and found again
after it died.

Knows starting, connecting and loading the model again. Does not know conversations or terminals.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from shoal.cli import background
from shoal.cli.answers import Answers, ThroughDaemon
from shoal.cli.output import note, spinner
from shoal.comm.errors import CommError
from shoal.comm.home import Home
from shoal.comm.messages import Chat, ChatMessage, ModelStatus, StreamEvent
from shoal.daemon.errors import DaemonError

if TYPE_CHECKING:
    from shoal.client import Client


class ChatLink:
    """`here`: what answers in this process; None = the daemon. Methods raise CommError or DaemonError."""

    def __init__(self, home: Home, here: Answers | None = None) -> None:
        self._home = home
        self._here = here
        self._client: Client | None = None  # made anew whenever the daemon behind it is gone
        self.model: ModelStatus | None = None
        self.reference = ""  # of the model, to load it again
        self._context: int | None = None
        self._draft: str | None = None

    def load(self, reference: str, context: int | None, draft: str | None = None) -> ModelStatus:
        """Use this model from now on. After an error the one before stays in use."""
        model = self._answers().load(reference, draft, context)
        self.model, self.reference, self._context, self._draft = model, reference, context, draft
        return model

    def models(self) -> list[ModelStatus]:
        return self._answers().models()

    def ready(self) -> ModelStatus:
        """The model in use; brings daemon and model back if they are gone."""
        loaded = {model.name: model for model in self.models()}
        assert self.model is not None  # a chat begins with `load`
        if self.model.name not in loaded:
            return self.load(self.reference, self._context, self._draft)
        return loaded[self.model.name]

    def count(self, messages: list[ChatMessage]) -> int:
        """Tokens of a conversation as the model's template writes it."""
        assert self.model is not None
        return self._answers().count(messages, self.model.name)

    @contextmanager
    def stream(self, request: Chat) -> Iterator[Iterator[StreamEvent]]:
        """The events of an answer; leaving the block cancels what is left."""
        with self._answers().stream(request) as events:
            yield events

    def close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            client.close()

    def _answers(self) -> Answers:
        return self._here or ThroughDaemon(self._connected())

    def _connected(self) -> Client:
        """A client whose daemon answers."""
        if self._client is not None:
            try:
                self._client.ping()
                return self._client
            except CommError:
                self.close()
        if background.running_pid(self._home) is None:
            self._start()
        from shoal.client import Client

        client = Client(self._home.address)
        client.ping()
        self._client = client
        return client

    def _start(self) -> None:
        try:
            with spinner("starting the daemon"):
                pid = background.start(self._home, [])
        except DaemonError:
            if background.running_pid(self._home) is None:
                raise
            return  # another process was first
        note(f"started the daemon (pid {pid}); shoal stop ends it")
