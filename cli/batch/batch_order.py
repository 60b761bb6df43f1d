"""In which order the lines of a batch are answered, and which of them cannot be.

Requests of one model stand together. Among these, requests that begin alike do, however long their answers may
become, so that what they share is computed once (the engine finds it in its prefix cache). What may have the longest
answer comes first, be it such a group, one within it or a request, so that no long answer is left over at the end.
Knows about a hundred bytes of each line, however long it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import IntEnum
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np

from shoal.comm.messages import Chat, Generate
from shoal.daemon.errors import DaemonError

from .answer_file import AnswerFile
from .openai_requests import BadLine, parse
from .request_lines import RequestLine, RequestLines

_PREFIX_BYTES = tuple(64 << doubling for doubling in range(8))  # of which lines may agree: 64 to 8192
_ENDED = 0  # in place of the digest of a beginning: the text has not so many bytes
_MODELS = 1 << 16
_TOKEN_BYTES = 2  # of text, if its tokens are short
_ANSWER_TOKENS = 512  # of answers that may get as long as they like
_TOGETHER = 4096  # rows that are put into an array at once


class Fate(IntEnum):
    """What becomes of a line."""

    DONE = 0  # it has its answer
    FAULTY = 1  # it cannot be answered, as it is
    REPEATED = 2  # another line has its `custom_id`
    ASKED = 3


_ROW = np.dtype(
    [
        ("fate", "u1"),
        ("model", "u2"),
        ("longest", "u1"),  # bits of the number of tokens that the answer may have
        ("beginnings", "u4", len(_PREFIX_BYTES)),  # their digests
        ("length", "u4"),  # of the text, in bytes
        ("custom", "S16"),  # digest of the custom_id
        ("line", "u4"),
        ("twin", "u4"),  # the line that has the same custom_id
        ("offset", "u8"),
        ("nbytes", "u8"),
        ("digest", "u8"),
    ]
)


class _Key(NamedTuple):
    """By what a line has its turn: fields of its row."""

    model: int
    longest: int
    beginnings: Sequence[int]
    length: int


_NO_KEY = _Key(0, 0, [_ENDED] * len(_PREFIX_BYTES), 0)


class BatchOrder:
    """The lines of a batch. `models`: as lines call them, in the order in which they first come, each with the context
    in tokens that its longest request probably needs. `left`: how many lines have no answer yet."""

    def __init__(self, requests: RequestLines, answers: AnswerFile, model: str | None) -> None:
        """Reads all requests once. Raises DaemonError if the answers belong to other ones."""
        self.models: dict[str, int] = {}
        self._numbers: dict[str, int] = {}
        self._model = model
        had = answers.had
        met, parts, rows = 0, [np.empty(0, _ROW)], list[tuple[Any, ...]]()
        for line in requests:
            before = had.get(line.number)
            if before is not None and before.digest != line.digest:
                raise _of_others(requests, answers, line.number)
            met += before is not None
            rows.append(self._row(line, done=before is not None))
            if len(rows) == _TOGETHER:
                parts.append(np.array(rows, _ROW))
                rows.clear()
        if met < len(had):
            raise _of_others(requests, answers, max(had))
        self._rows = np.concatenate([*parts, np.array(rows, _ROW)])
        self._find_twins()
        self.lines = len(self._rows)
        self.left = int((self._rows["fate"] != Fate.DONE).sum())

    def faulty(self) -> Iterator[tuple[RequestLine, int]]:
        """The lines that cannot be answered, without their texts, and which line has the same custom_id (0 = none)."""
        fates = self._rows["fate"]
        for row in self._rows[(fates == Fate.FAULTY) | (fates == Fate.REPEATED)]:
            yield _line(row), int(row["twin"])

    def of_model(self, number: int) -> Iterator[RequestLine]:
        """The lines that ask the model with that number, without their texts, in the order in which they are to be
        answered."""
        rows = self._rows[(self._rows["fate"] == Fate.ASKED) & (self._rows["model"] == number)]
        for row in rows[_turns(rows)]:
            yield _line(row)

    def _row(self, line: RequestLine, *, done: bool) -> tuple[Any, ...]:
        fate, key, custom = Fate.FAULTY, _NO_KEY, b""
        if line.text is not None:
            try:
                asked = parse(line.text, self._model)
            except BadLine as error:
                custom = _digest(error.custom_id) if error.custom_id else b""
            else:
                fate, custom = Fate.ASKED, _digest(asked.custom_id)
                if not done:
                    key = self._key(asked.model, asked.request)
        fate = Fate.DONE if done else fate
        return fate, *key, custom, line.number, 0, line.offset, line.nbytes, line.digest

    def _key(self, model: str, request: Generate | Chat) -> _Key:
        number = self._numbers.setdefault(model, len(self.models))
        if number == _MODELS:
            raise DaemonError("bad_request", f"the requests name more than {_MODELS} models")
        text, length = _text(request)
        context = length // _TOKEN_BYTES + (request.max_tokens or _ANSWER_TOKENS)
        self.models[model] = max(self.models.get(model, 0), context)
        longest = min((request.max_tokens or 1 << 26).bit_length(), 0xFF)
        beginnings = [_beginning(text[:size]) if length >= size else _ENDED for size in _PREFIX_BYTES]
        return _Key(number, longest, beginnings, length)

    def _find_twins(self) -> None:
        """Of the lines with one custom_id, only the first is asked."""
        rows = self._rows
        named = np.flatnonzero(rows["custom"] != b"")
        order = named[np.argsort(rows["custom"][named], kind="stable")]
        first = 0
        for place, row in enumerate(order):
            if rows["custom"][row] != rows["custom"][order[first]]:
                first = place
            elif place > first and rows["fate"][row] == Fate.ASKED:
                rows["fate"][row], rows["twin"][row] = Fate.REPEATED, rows["line"][order[first]]


def _turns(rows: Any) -> Any:
    """Where the rows (N,) of one model, in the order in which they are to be answered, are among these: indices (N,).

    What counts of each beginning, shorter ones first, is the longest answer of all who have it, then its digest; where
    a text has ended, its own answer.
    """
    alike = np.lexsort(rows["beginnings"].T[::-1])
    rows = rows[alike]
    keys, parts = [], np.arange(len(rows)) == 0  # where rows begin that do not agree with those before
    for digests in rows["beginnings"].T:
        parts[1:] |= digests[1:] != digests[:-1]
        (first,) = np.nonzero(parts | (digests == _ENDED))
        longest = np.maximum.reduceat(rows["longest"], first)
        keys += [~np.repeat(longest, np.diff(first, append=len(rows))), digests]
    keys += [~rows["longest"], ~rows["length"]]  # longer ones first
    return alike[np.lexsort(keys[::-1])]


def refetched(requests: RequestLines, line: RequestLine) -> bytes:
    """The text of a line that was met before. Raises DaemonError."""
    return requests.again(line.offset, line.nbytes, line.digest)


def _line(row: Any) -> RequestLine:
    return RequestLine(int(row["line"]), int(row["offset"]), int(row["nbytes"]), int(row["digest"]), None)


def _text(request: Generate | Chat) -> tuple[bytes, int]:
    """The beginning of what comes first in the prompt, as far as it counts, and how many bytes all of it has."""
    beginning, length = b"", 0
    for part in _parts(request):
        beginning += part[: _PREFIX_BYTES[-1] - len(beginning)]
        length += len(part)
    return beginning, length


def _parts(request: Generate | Chat) -> Iterator[bytes]:
    if isinstance(request, Chat):
        for message in request.messages:
            yield f"{message['role']}\0".encode(errors="replace")
            content = message.get("content")
            yield (content if isinstance(content, str) else str(content)).encode(errors="replace")
            yield b"\0"
    elif request.prompt is not None:
        yield request.prompt.encode(errors="replace")
    else:
        yield np.array(request.prompt_tokens, np.uint32).tobytes()


def _beginning(text: bytes) -> int:
    return int.from_bytes(blake2b(text, digest_size=4).digest(), "big")


def _digest(custom_id: str) -> bytes:
    return blake2b(custom_id.encode(errors="surrogatepass"), digest_size=15).digest() + b"\1"


def _of_others(requests: RequestLines, answers: AnswerFile, number: int) -> DaemonError:
    said = f"line {number} of {requests.path}, or --model, is another than when {answers.path} was begun"
    hint = "lines may be added at the end, no others changed: give another file for the answers"
    if answers.had[number].failed:
        hint = "lines that failed may be changed with --retry-failed, which answers them again"
    return DaemonError("bad_request", said, hint)
