"""Requests with long texts: what they may take of the ledger while they are worked on, and giving it back afterwards.

A request has up to 16 MB of text or ids. Its ids and texts take several times as much, which no plan counts.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count

from shoal.comm.messages import Chat, Generate, Tokenize, Tokens
from shoal.daemon.loading.loaded_model import LoadedModel
from shoal.offload.budget import Budget
from shoal.partition.amounts import format_bytes

from .errors import DaemonError
from .memory import return_freed
from .request import chat_text

LONG_BYTES = 1 << 20  # what is shorter fits in what a process is given for its growth
ID_BYTES = 48  # of memory for a token: its id as Python has it, and in the reply
MAX_TEXT_BYTES = 32 << 20  # that ids are turned into
_SETTLE_S = 1.0  # until what a request held is freed


class LongRequests:
    """Thread-safe. `look` has to be called now and then."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._numbers = count(1)
        self._freed_s: float | None = None

    @contextmanager
    def holding(self, nbytes: int, what: str) -> Iterator[None]:
        """While the ledger holds so many bytes, if that is much. Raises BudgetExceeded, which says what for."""
        if nbytes < LONG_BYTES * ID_BYTES:
            yield
            return
        purpose = f"long request {next(self._numbers)}"
        self._budget.hold(purpose, nbytes, what)
        try:
            yield
        finally:
            self._budget.release(purpose)

    def ended(self, request: Generate | Chat | Tokenize) -> None:
        """The request has been worked on. If it was long, freed memory is given back to the system soon."""
        if _is_long(request):
            self._freed_s = time.monotonic()

    def look(self) -> None:
        if self._freed_s is not None and time.monotonic() - self._freed_s > _SETTLE_S:
            self._freed_s = None
            return_freed()  # a refused text hangs on its error's traceback


def _is_long(request: Generate | Chat | Tokenize) -> bool:
    if isinstance(request, Generate):
        return len(request.prompt or request.prompt_tokens or ()) >= LONG_BYTES
    if isinstance(request, Tokenize) and request.messages is None:
        return len(request.text or request.tokens or ()) >= LONG_BYTES
    messages = request.messages or []
    return len(messages) > 1000 or any(
        len(value) >= LONG_BYTES // 8
        for message in messages
        for value in message.values()
        if isinstance(value, (str, list, dict))
    )


def tokenized(model: LoadedModel, request: Tokenize, long: LongRequests) -> Tokens:
    """Text, messages or ids → ids and text. Raises DaemonError, BudgetExceeded, or what the models room says."""
    tokenizer = model.tokenizer
    if request.tokens is not None:
        # A model may have more rows than tokens, and say them.
        size = max(tokenizer.vocab_size, model.checkpoint.spec.vocab)
        ids = request.tokens
        if ids and max(ids) >= size:
            raise DaemonError("bad_request", f"token {max(ids)}: must be below the vocabulary's {size}")
        nbytes = tokenizer.text_bytes(ids)
        if nbytes > MAX_TEXT_BYTES:
            problem = f"the text of these {len(ids)} tokens has {format_bytes(nbytes)}"
            raise DaemonError("bad_request", f"{problem}: must be at most {format_bytes(MAX_TEXT_BYTES)}")
        with long.holding(3 * nbytes + 8 * len(ids), f"making text of {len(ids)} tokens"):
            return Tokens(ids=ids, text=tokenizer.decode(ids))
    add_special, parse_special = request.add_special, request.parse_special
    if request.messages is not None:
        text, add_special, parse_special = chat_text(model, request.messages), False, True
    else:
        text = request.text or ""
    with long.holding(ID_BYTES * len(text), f"tokenising text of {len(text)} characters"):
        ids = tokenizer.encode(text, add_special=add_special, parse_special=parse_special)
        return Tokens(ids=ids, text=tokenizer.decode(ids))
