"""Why a model cannot be loaded: turns errors of other rooms into the daemon's, which name the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from shoal.daemon.error_codes import translated
from shoal.daemon.errors import DaemonError
from shoal.models.errors import CheckpointError, TokenizerError
from shoal.offload.errors import BudgetExceeded


@contextmanager
def refusing(name: str) -> Iterator[None]:
    """Raises whatever goes wrong within as DaemonError. Errors of a checkpoint name their file themselves."""
    try:
        yield
    except DaemonError:
        raise
    except BudgetExceeded as error:
        hint = "give it more `memory_bytes` or a smaller `context_tokens`"
        raise DaemonError("resources", f"{name} {error}", hint) from error
    except Exception as error:
        named = isinstance(error, CheckpointError | TokenizerError)
        raise translated(error, "" if named else name) from error
