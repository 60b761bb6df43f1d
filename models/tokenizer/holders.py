"""Where a `tokenizer.json` is run: in this process, or in a child with limits of memory and time.

Knows what a text and a file may take. Which files are fit for this process is `ordinary_files`' to say.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from re import Pattern
from typing import Any, Protocol

from shoal.models.children import ChildKind, Confined, JobFailed, LimitPassed, Limits
from shoal.models.errors import ModelError, TextTooLarge, TokenizerError, TooManyTokens, one_line

from .file_costs import file_cost
from .hf_library import HfLibrary, first_job
from .long_texts import (
    NORMALISED_CHARS,
    PIECE_CHARS,
    SHORT_CHARS,
    STRETCH_CHARS,
    encode_in_turn,
    file_cut,
    normalised_chars,
    pieces,
)
from .ordinary_files import is_ordinary

# A child takes this beside what `file_cost` says of its file; a text takes a few hundred times its characters.
_FILE_BYTES, _FILE_S = 128 << 20, 60.0
_TEXT_BYTES, _TEXT_BYTES_PER_CHAR, _TEXT_S = 64 << 20, 400, 10.0
_MAX_FILE_BYTES, _MAX_TEXT_BYTES = 1 << 30, 512 << 20
_CHARS_PER_S, _MAX_TEXT_S = 100_000, 30.0  # beyond the first seconds, and in all
_JOIN_S, _LATE_S = 0.02, 2.0  # for putting a few tokens together, and how much longer it may take in all
_JOIN_SLACK_S = 3.0
_SCRIPT = Path(__file__).with_name("hf_library.py")
_CHILDREN, _JOINING_CHILDREN = ChildKind(_SCRIPT, ("tokenizers",)), ChildKind(_SCRIPT, ("tokenizers",))
_NO_TOKENS: dict[str, Any] = {"names": [], "added": [], "extra": []}


@contextmanager
def library_errors(doing: str) -> Iterator[None]:
    """Translate what the `tokenizers` library raises, its Rust panics included, into TokenizerError."""
    try:
        yield
    except BaseException as error:
        # A panic is an exception of pyo3's that derives from BaseException and that no module exports.
        if isinstance(error, ModelError):
            raise
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise TokenizerError(f"{doing}: {one_line(error)}") from error
        raise


class Holder(Protocol):
    """A `HfLibrary`, wherever it is. Raises TokenizerError, and for texts TextTooLarge or Overloaded."""

    def facts(self) -> dict[str, Any]: ...

    def encode(self, text: str, add_special: bool, parse_special: bool, limit: int) -> list[int]: ...

    def join(self, texts: list[str]) -> str: ...


def holder(data: bytes, tokens: dict[str, Any]) -> Holder:
    """For a file, with `tokens` as `HfLibrary` has them."""
    if is_ordinary(data, [*tokens["added"], *tokens["extra"]]):
        return Here(data, tokens)
    return _InChild(_CHILDREN, data, tokens)


def joiner(decoder: dict[str, Any] | None) -> Holder:
    """One that has nothing but a decoder. It waits for no text that is being tokenised."""
    model = {"type": "BPE", "vocab": {}, "merges": []}
    data = json.dumps({"model": model, "decoder": decoder, "added_tokens": []}).encode()
    return Here(data, _NO_TOKENS) if is_ordinary(data) else _InChild(_JOINING_CHILDREN, data, _NO_TOKENS)


class Here:
    """A library in this process, for files whose parts are bounded."""

    def __init__(self, data: bytes, tokens: dict[str, Any]) -> None:
        with library_errors("tokenizer.json is not a tokenizer"):
            self._library = HfLibrary(data, tokens)
            self._normalizer = json.loads(data).get("normalizer")
        self._cut: tuple[Pattern[str] | None, list[int], list[int]] | None = None
        self.join = self._library.join

    def facts(self) -> dict[str, Any]:
        with library_errors("tokenizer.json is not a tokenizer"):
            return self._library.facts()

    def encode(self, text: str, add_special: bool, parse_special: bool, limit: int) -> list[int]:
        with library_errors("this text cannot be tokenised"):
            if len(text) <= 2 * PIECE_CHARS and self._normalised_chars(text) <= NORMALISED_CHARS:
                return encode_in_turn(lambda it: self._library.encode(it, add_special, parse_special), text)
            if self._cut is None:
                self._cut = self._cutting()
            cut, before, after = self._cut
            ids = [*before] if add_special else []
            for piece in pieces(text, cut):
                ids += self._piece(piece, parse_special, limit)
                if len(ids) > limit:
                    raise TooManyTokens(len(ids))
            return ids + after if add_special else ids

    def _piece(self, piece: str, parse_special: bool, limit: int) -> list[int]:
        chars = self._normalised_chars(piece)
        if len(piece) <= STRETCH_CHARS and chars <= NORMALISED_CHARS:
            return encode_in_turn(lambda it: self._library.encode(it, False, parse_special), piece)
        return encode_in_child(self._library.to_json(), piece, parse_special, limit, chars)

    def _normalised_chars(self, text: str) -> int:
        return normalised_chars(text, self._normalizer) if len(text) > SHORT_CHARS else len(text)

    def _cutting(self) -> tuple[Pattern[str] | None, list[int], list[int]]:
        """Where texts can be cut, and the tokens that stand before and after a text."""
        facts = self._library.facts()
        special = [text for _, _, text in facts["added"]]
        cut = None
        if not facts["single"]:
            cut = file_cut(
                facts["normalizer"], facts["pre_tokenizer"], facts["ids"], special, facts["swallowing"]
            )
        bare, around = (self._library.encode("a", add_special, True) for add_special in (False, True))
        at = next((at for at in range(len(around)) if around[at : at + len(bare)] == bare), 0)
        return cut, around[:at], around[at + len(bare) :]


def encode_in_child(data: bytes, text: str, parse_special: bool, limit: int, chars: int = 0) -> list[int]:
    """Ids of a text that cannot be cut, without special tokens around it, by a tokenizer.json that serves just this
    once: the interpreter's lock is not kept meanwhile, and the memory is gone afterwards. chars: of the normalised
    text, if these are more."""
    return _InChild(_CHILDREN, data, _NO_TOKENS).encode(text, False, parse_special, limit, chars)


class _InChild:
    """A library in a child process, for files whose parts may do anything to memory and time."""

    def __init__(self, kind: ChildKind, data: bytes, tokens: dict[str, Any]) -> None:
        first = first_job(data, tokens)
        memory_bytes = min(_FILE_BYTES + file_cost(data).reading * len(first), _MAX_FILE_BYTES)
        self._late_s = 0.0
        with _child_errors("tokenizer.json is not a tokenizer"):
            self._confined = Confined(kind, first, Limits(memory_bytes, _FILE_S))

    def facts(self) -> dict[str, Any]:
        with _child_errors("tokenizer.json is not a tokenizer"):
            found: dict[str, Any] = self._do(Limits(_MAX_TEXT_BYTES, _TEXT_S), "facts")
        return found

    def encode(
        self, text: str, add_special: bool, parse_special: bool, limit: int, normalised_chars: int = 0
    ) -> list[int]:
        chars = max(len(text), normalised_chars)
        memory_bytes = min(_TEXT_BYTES + _TEXT_BYTES_PER_CHAR * chars, _MAX_TEXT_BYTES)
        limits = Limits(memory_bytes, min(_TEXT_S + chars / _CHARS_PER_S, _MAX_TEXT_S))
        long = chars if chars > STRETCH_CHARS else 0
        with _child_errors("this text cannot be tokenised", long):
            ids = self._do(limits, "encode_within", text, add_special, parse_special, limit)
        if isinstance(ids, int):
            raise TooManyTokens(ids)
        return list(ids)

    def join(self, texts: list[str]) -> str:
        """Those who wait for other answers wait for this, too, so it may not take long again and again."""
        if self._late_s >= _LATE_S:
            raise TokenizerError(f"the decoder of tokenizer.json takes more than {_JOIN_S:g} s for a token")
        memory_bytes = min(_TEXT_BYTES + _TEXT_BYTES_PER_CHAR * sum(map(len, texts)), _MAX_TEXT_BYTES)
        limits = Limits(memory_bytes, _LATE_S, slack_s=_JOIN_SLACK_S)
        with _child_errors("these tokens cannot be put together"):
            try:
                text, took_s = self._timed(limits, "join", texts)
            except LimitPassed:
                self._late_s += _LATE_S
                raise
        self._late_s = max(0.0, self._late_s + took_s - _JOIN_S)
        return str(text)

    def _do(self, limits: Limits, *job: Any) -> Any:
        return self._timed(limits, *job)[0]

    def _timed(self, limits: Limits, *job: Any) -> tuple[Any, float]:
        """What a method returned, and the seconds of processor time that it took."""
        made, seconds = json.loads(self._confined.do(json.dumps(job).encode(), limits))
        return made, float(seconds)


@contextmanager
def _child_errors(doing: str, chars: int = 0) -> Iterator[None]:
    """chars: of a long text. What passes the limits is its fault, else that of the file."""
    try:
        yield
    except JobFailed as error:
        raise TokenizerError(f"{doing}: {error}") from error
    except LimitPassed as error:
        if chars:
            what = f"tokenising {chars} characters without a place to cut them"
            raise TextTooLarge(f"{what} {error}; put spaces or line ends in") from error
        raise TokenizerError(f"{doing}: the tokenizer of tokenizer.json {error}") from error
