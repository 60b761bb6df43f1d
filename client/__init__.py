"""A running daemon as a Python library: `Client` for one thread, `AsyncClient` for an event loop.

from shoal.client import Client

with Client() as client:
    answer, done = client.text(messages=[{"role": "user", "content": "Why is the sky blue?"}])

What goes wrong is raised as a ShoalError: NoDaemon where none runs, RequestFailed (with a stable code) for what the
daemon refuses, TimedOut.
"""

from typing import TYPE_CHECKING, Any

from shoal.client.blocking import Client
from shoal.comm.errors import NoDaemon, RequestFailed, ShoalError, TimedOut

if TYPE_CHECKING:
    from shoal.client.asynchronous import AsyncClient

__all__ = ["AsyncClient", "Client", "NoDaemon", "RequestFailed", "ShoalError", "TimedOut"]


def __getattr__(name: str) -> Any:
    """Import `AsyncClient` only when it is asked for: asyncio takes longer to import than everything else."""
    if name == "AsyncClient":
        from shoal.client.asynchronous import AsyncClient

        return AsyncClient
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
