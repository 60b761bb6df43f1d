"""What the server needs of a node: the one interface between sockets and models.

Knows signatures and which threads call. Has no code of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from shoal.comm.cluster_messages import Forget, Invitation, Invite, Nodes, NodesReply, Rejoin
from shoal.comm.messages import (
    Accepted,
    Chat,
    Done,
    Error,
    Generate,
    Load,
    Loaded,
    Ok,
    Stage,
    StatusReply,
    Token,
    Tokenize,
    Tokens,
    Unload,
)

STAGE_S = 1.0  # after so long without an event, a client is told what its request waits for

Event = Accepted | Token | Done | Error

Emit = Callable[[Event], None]
"""Takes one message of a stream; from any thread; never blocks."""

ClusterRequest = Invite | Nodes | Forget | Rejoin
ClusterReply = Invitation | NodesReply | Ok

CancelCall = Callable[[], None]
"""Asks a stream to end early; from any thread; idempotent; returns at once."""


class AnswersCluster(Protocol):
    """What knows of other machines."""

    def answer(self, request: ClusterRequest) -> ClusterReply:
        """May take seconds. Raises DaemonError."""
        ...


class Submitted(Protocol):
    """A request that the backend has."""

    def cancel(self) -> None:
        """Ask it to end early; from any thread; idempotent; returns at once."""

    def stage(self) -> Stage | None:
        """What it waits for just now; None = the next token, or it has ended. Returns at once."""


class Backend(Protocol):
    """All methods may be called from several threads at once, and raise DaemonError to refuse."""

    def submit(self, request: Generate | Chat, emit: Emit, client: str) -> Submitted:
        """Queue a request (tokenising it first, so this may take a while).

        `client` tells apart whose requests share the machine fairly.
        `emit` gets one Accepted, any Tokens, then exactly one Done or Error: also after a cancel.
        """

    def tokenize(self, request: Tokenize) -> Tokens: ...

    def load(self, request: Load) -> Loaded:
        """Returns when the model answers requests: seconds to minutes."""

    def unload(self, request: Unload) -> Ok: ...

    def has(self, model: str) -> bool:
        """Whether requests to that model need not wait until it is loaded. Returns at once."""

    def stage(self, model: str) -> Stage | None:
        """What a request to that model waits for before it is submitted; None when nothing is loaded. Returns at
        once."""

    def cluster(self, request: ClusterRequest) -> ClusterReply:
        """What concerns other machines. May take seconds."""
        ...

    def status(self) -> StatusReply:
        """Cheap: it is asked often."""

    def drain(self, timeout_s: float) -> None:
        """Admit nothing more; return when all running requests ended, or after `timeout_s`."""

    def close(self) -> None:
        """End everything now. Idempotent."""
