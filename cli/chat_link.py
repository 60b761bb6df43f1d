"""The chat's hold on the daemon: started when there is none, found again after it died.

Knows starting, connecting and loading the model again. Does not know conversations or terminals.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from shoal.comm.errors import CommError
from shoal.comm.messages import Chat, ChatMessage, ModelStatus, StatusReply
from shoal.daemon.errors import DaemonError
from shoal.daemon.home import Home

from . import background
from .answers import Event, ThroughDaemon
from .output import note, spinner, stage_text

if TYPE_CHECKING:
    from shoal.daemon.client import Client


class DaemonLink:
    """One client, made anew whenever the daemon behind it is gone. Methods raise CommError or DaemonError."""

    def __init__(self, home: Home) -> None:
        self._home = home
        self._client: Client | None = None
        self.model: ModelStatus | None = None
        self._reference = ""
        self._context: int | None = None
        self._draft: str | None = None

    def load(self, reference: str, context: int | None, draft: str | None = None) -> ModelStatus:
        """Use this model from now on. After an error the one before stays in use."""
        client = self._connected()
        with spinner(f"loading {reference}") as update:
            model = client.load(
                reference, context, draft, lambda stage: update(f"{reference}: {stage_text(stage)}")
            ).model
        self.model, self._reference, self._context, self._draft = model, reference, context, draft
        return model

    def status(self) -> StatusReply:
        return self._connected().status()

    def ready(self) -> ModelStatus:
        """The model in use; brings daemon and model back if they are gone."""
        client = self._connected()
        loaded = {model.name: model for model in client.status().models}
        assert self.model is not None  # a chat begins with `load`
        if self.model.name not in loaded:
            return self.load(self._reference, self._context, self._draft)
        return loaded[self.model.name]

    def count(self, messages: list[ChatMessage]) -> int:
        """Tokens of a conversation as the model's template writes it."""
        assert self.model is not None
        return len(self._connected().tokenize(messages=messages, model=self.model.name).ids)

    @contextmanager
    def stream(self, request: Chat) -> Iterator[Iterator[Event]]:
        """The events of an answer; leaving the block cancels what is left."""
        with ThroughDaemon(self._connected()).stream(request) as events:
            yield events

    def _start(self) -> None:
        try:
            with spinner("starting the daemon"):
                pid = background.start(self._home, [])
        except DaemonError:
            if background.running_pid(self._home) is None:
                raise
            return  # another process was first
        note(f"started the daemon (pid {pid}); shoal stop ends it")

    def close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            client.close()

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
        from shoal.daemon.client import Client

        client = Client(self._home.address)
        client.ping()
        self._client = client
        return client
