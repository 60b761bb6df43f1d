"""Errors of other rooms as the daemon's: the one place where each gets its stable code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from shoal.comm.errors import CommError
from shoal.comm.messages import ErrorCode
from shoal.engine.errors import DeviceTooFull, NeverFits, QueueFull, RankLost
from shoal.kernels.errors import HomeFull, HomeLost, NoSuchHome
from shoal.models.errors import (
    CheckpointError,
    CorruptCheckpoint,
    LogitsError,
    MissingCheckpoint,
    ModelError,
    Overloaded,
    SamplingError,
    TemplateError,
    TextTooLarge,
    TokenizerError,
    UnsupportedCheckpoint,
)
from shoal.offload.errors import BudgetExceeded, OffloadError, PackError, PackPointless
from shoal.partition.errors import PlanError, ShardError, SpecError

from .errors import DaemonError

_CODES: tuple[tuple[type[Exception], ErrorCode], ...] = (
    (MissingCheckpoint, "not_found"),
    (UnsupportedCheckpoint, "unsupported"),
    (CorruptCheckpoint, "corrupt"),
    (TokenizerError, "corrupt"),
    (SpecError, "corrupt"),
    (TemplateError, "bad_request"),
    (LogitsError, "corrupt"),
    (SamplingError, "bad_request"),
    (TextTooLarge, "resources"),
    (ShardError, "bad_request"),
    (PlanError, "bad_request"),
    (CommError, "internal"),
    (BudgetExceeded, "resources"),
    (NoSuchHome, "bad_request"),
    (HomeFull, "resources"),
    (HomeLost, "internal"),
    (DeviceTooFull, "resources"),
    (RankLost, "internal"),
    (PackPointless, "bad_request"),
    (PackError, "corrupt"),
    (MemoryError, "resources"),
    (OffloadError, "internal"),
    (ModelError, "internal"),
    (OSError, "internal"),
)


def describe(error: BaseException) -> str:
    """One line for an unexpected exception."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def translated(error: Exception, what: str = "") -> DaemonError:
    """`error` as a DaemonError; `what` (e.g. a model's name) is put before the message."""
    if isinstance(error, DaemonError):
        return error
    if isinstance(error, QueueFull):
        return DaemonError("busy", str(error), "try again later", retry_after_s=error.retry_after_s)
    if isinstance(error, NeverFits):
        return DaemonError(
            "resources", str(error), "shorten it, lower max_tokens, or give the model more `memory_bytes`"
        )
    if isinstance(error, Overloaded):
        return DaemonError("busy", str(error), "try again later", retry_after_s=1.0)
    prefix = f"{what}: " if what else ""
    for kind, code in _CODES:
        if isinstance(error, kind):
            return DaemonError(code, prefix + (" ".join(str(error).split()) or kind.__name__))
    return DaemonError(
        "internal", prefix + describe(error), "this is a bug in Shoal; the log has the details"
    )


def raise_translated(error: Exception, what: str = "") -> NoReturn:
    """Raise `error` as a DaemonError. What it was raised with is let go of at once, not by the garbage collector:
    so one that is a DaemonError does not become its own cause, and no frame that it passed keeps it."""
    try:
        if isinstance(error, DaemonError):
            raise error
        raise translated(error, what) from error
    finally:
        del error


@contextmanager
def refusing(name: str) -> Iterator[None]:
    """Raises whatever goes wrong with a model within as DaemonError. Errors of a checkpoint name their file themselves,
    others get the model's `name`."""
    try:
        yield
    except DaemonError:
        raise
    except BudgetExceeded as error:
        hint = "give it more `memory_bytes` or a smaller `context_tokens`"
        raise DaemonError("resources", f"{name} {error}", hint) from error
    except Exception as error:
        named = isinstance(error, CheckpointError | TokenizerError)
        raise_translated(error, "" if named else name)
