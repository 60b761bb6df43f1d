"""Who answers a chat: a node in this process, or the daemon, which is started when there is none, or none any more.

Knows how to start, to connect and to load the model again. Does not know conversations or terminals.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from shoal.cli import background
from shoal.cli.answers import Answers, ThroughDaemon, check_context
from shoal.cli.terminal.output import note, spinner, stage_text
from shoal.comm.errors import CommError
from shoal.comm.home import Home
from shoal.comm.messages import Chat, ChatMessage, ModelStatus, StreamEvent
from shoal.daemon.errors import DaemonError

if TYPE_CHECKING:
    from shoal.client import Client


LOADING_LOOK_S = 0.2  # between two looks at what the daemon loads


class ChatLink:
    """`here`: the node in this process, None = the daemon answers. Methods raise CommError or DaemonError."""

    def __init__(self, home: Home, here: Answers | None = None) -> None:
        self._home = home
        self._here = here
        self._client: Client | None = None  # made anew whenever the daemon behind it is gone
        self.reference = ""  # of the model, to load it again
        self.context: int | None = None  # the conversation's; None = the model's
        self._model: ModelStatus | None = None
        self._draft: str | None = None

    @property
    def model(self) -> ModelStatus:
        """The model in use; a chat begins with `load`."""
        assert self._model is not None
        return self._model

    @property
    def context_tokens(self) -> int:
        """The conversation's context. Others may have had the model loaded anew with less."""
        return min(self.context or self.model.context_tokens, self.model.context_tokens)

    def limit(self, context: int) -> None:
        """Give the conversation a context. A daemon's model stays as it is: more than it holds is refused."""
        model = self.ready()
        if self._here is not None and context > model.context_tokens:  # nobody else uses it
            self.load(self.reference, context, self._draft)
        check_context(self.reference, self.model, context)
        self.context = context

    def load(
        self, reference: str, context: int | None, draft: str | None = None, ranks: int | None = None
    ) -> ModelStatus:
        """Use this model from now on. After an error the one before stays in use."""
        model = self._answers().load(reference, draft, context, ranks)
        if not model.chat_template:
            if self._model is not None:  # the daemon may have dropped it to make room
                self._answers().load(self.reference, self._draft, self.context)
            reason = f"{model.name} has no chat template"
            raise DaemonError("unsupported", reason, "continue texts with: shoal run")
        self._model, self.reference, self.context, self._draft = model, reference, context, draft
        return model

    def models(self) -> list[ModelStatus]:
        return self._answers().models()

    def loaded(self) -> list[ModelStatus]:
        """What a running daemon has loaded. If it has none yet and is loading one, this waits for that."""
        client = self._connected()
        with spinner("waiting for the daemon") as update:
            while not (status := client.status()).models and status.loading:
                stage = f": {stage_text(status.stage)}" if status.stage else ""
                update(f"{status.loading}{stage}")
                time.sleep(LOADING_LOOK_S)
        return status.models

    def ready(self) -> ModelStatus:
        """The model in use; brings daemon and model back if they are gone."""
        loaded = {model.name: model for model in self.models()}
        if self.model.name not in loaded:
            return self.load(self.reference, self.context, self._draft)
        self._model = loaded[self.model.name]
        return self._model

    def count(self, messages: list[ChatMessage]) -> int:
        """Tokens of a conversation as the model's template writes it."""
        return self._answers().count(messages, self.model.name)

    def stream(self, request: Chat) -> AbstractContextManager[Iterator[StreamEvent]]:
        """The events of an answer; leaving the block cancels the rest."""
        return self._answers().stream(request)

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
