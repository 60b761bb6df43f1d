"""A running daemon as a Python library: `Client` for one thread, `AsyncClient` for an event loop.

from shoal.client import Client

with Client() as client:
    print(client.text("Why is the sky blue?"))
"""

from typing import TYPE_CHECKING, Any

from shoal.client.blocking import Client

if TYPE_CHECKING:
    from shoal.client.asynchronous import AsyncClient

__all__ = ["AsyncClient", "Client"]


def __getattr__(name: str) -> Any:
    """Import `AsyncClient` only when it is asked for: asyncio takes longer to import than everything else."""
    if name == "AsyncClient":
        from shoal.client.asynchronous import AsyncClient

        return AsyncClient
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
