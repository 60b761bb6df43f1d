"""`tokenizer.json`, run by the `tokenizers` library exactly as transformers does.

Knows which decoders make a text of the bytes of its tokens, one after the other (GPT-2's alphabet, SentencePiece).
Such texts are put together by us, so that a character comes as soon as its last byte does; all others are put
together by the library. Files of unusual parts are run in a child process. Does not know the other files of a
directory.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from tokenizers import AddedToken

from shoal.models.children import ChildKind, Confined, JobFailed, LimitPassed, Limits
from shoal.models.errors import TokenizerError

from .bpe import library_errors
from .library import Library, first_job
from .ordinary_files import is_ordinary
from .parts import TOKEN_FLAGS, Parts, Stated
from .vocabulary import MAX_TOKENS, SPACE_MARK, TokenKind, Vocabulary, completed, packed

# What Gemma's files say, and with the last step Llama 2's.
_SENTENCE_PIECE = [
    {"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
]
_WITHOUT_FIRST_SPACE = [*_SENTENCE_PIECE, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]


# A child that holds a file takes about ten times its bytes; a text takes a few hundred times its characters.
_FILE_BYTES, _FILE_BYTES_PER_BYTE, _FILE_S = 128 << 20, 16, 60.0
_TEXT_BYTES, _TEXT_BYTES_PER_CHAR, _TEXT_S = 64 << 20, 400, 10.0
_MAX_BYTES = 1 << 30
_CHARS_PER_S = 200_000  # beyond those 10 s; the library does several times as many
_JOIN_S, _LATE_S = 0.02, 2.0  # for putting a few tokens together, and how much longer it may take in all
_SCRIPT = Path(__file__).with_name("library.py")
_CHILDREN, _JOINING_CHILDREN = ChildKind(_SCRIPT, ("tokenizers",)), ChildKind(_SCRIPT, ("tokenizers",))


class Holder(Protocol):
    """`Library`, wherever it is. Raises TokenizerError."""

    def facts(self) -> dict[str, Any]: ...

    def encode(self, text: str, add_special: bool, parse_special: bool) -> list[int]: ...

    def join(self, texts: list[str]) -> str: ...


class _Here:
    """A library in this process."""

    def __init__(self, first: bytes, tokens: dict[str, Any]) -> None:
        with library_errors("tokenizer.json is not a tokenizer"):
            self._library = Library(first, tokens)
        self.join = self._library.join

    def facts(self) -> dict[str, Any]:
        with library_errors("tokenizer.json is not a tokenizer"):
            return self._library.facts()

    def encode(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        with library_errors("this text cannot be tokenised"):
            return self._library.encode(text, add_special, parse_special)


class _InChild:
    """A library in a child process, for files whose parts may do anything to memory and time."""

    def __init__(self, kind: ChildKind, data: bytes, tokens: dict[str, Any]) -> None:
        first = first_job(data, tokens)
        memory_bytes = min(_FILE_BYTES + _FILE_BYTES_PER_BYTE * len(first), _MAX_BYTES)
        self._late_s = 0.0
        with _child_errors("tokenizer.json is not a tokenizer"):
            self._confined = Confined(kind, first, Limits(memory_bytes, _FILE_S))

    def facts(self) -> dict[str, Any]:
        with _child_errors("tokenizer.json is not a tokenizer"):
            found: dict[str, Any] = self._do(Limits(_MAX_BYTES, _TEXT_S), "facts")
        return found

    def encode(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        memory_bytes = min(_TEXT_BYTES + _TEXT_BYTES_PER_CHAR * len(text), _MAX_BYTES)
        seconds = _TEXT_S + len(text) / _CHARS_PER_S
        with _child_errors("this text cannot be tokenised"):
            ids: list[int] = self._do(
                Limits(memory_bytes, seconds), "encode", text, add_special, parse_special
            )
        return ids

    def join(self, texts: list[str]) -> str:
        """Those who wait for other answers wait for this, too, so it may not take long again and again."""
        if self._late_s > _LATE_S:
            raise TokenizerError(
                f"the decoder of tokenizer.json takes more than {_JOIN_S:g} s for each token"
            )
        began_s = time.monotonic()
        memory_bytes = _TEXT_BYTES + _TEXT_BYTES_PER_CHAR * sum(map(len, texts))
        try:
            with _child_errors("these tokens cannot be put together"):
                text: str = self._do(Limits(memory_bytes, _LATE_S), "join", texts)
        finally:
            self._late_s = max(0.0, self._late_s + time.monotonic() - began_s - _JOIN_S)
        return text

    def _do(self, limits: Limits, *job: Any) -> Any:
        return json.loads(self._confined.do(json.dumps(job).encode(), limits))


def _holder(kind: ChildKind, data: bytes, tokens: dict[str, Any]) -> Holder:
    return _Here(data, tokens) if is_ordinary(data) else _InChild(kind, data, tokens)


def _joiner(decoder: Any) -> Holder:
    """A holder that has nothing but a decoder. It waits for no text that is being tokenised."""
    model = {"type": "BPE", "vocab": {}, "merges": []}
    empty = json.dumps({"model": model, "decoder": decoder, "added_tokens": []}).encode()
    return _holder(_JOINING_CHILDREN, empty, {"names": [], "added": [], "extra": []})


@contextmanager
def _child_errors(doing: str) -> Iterator[None]:
    try:
        yield
    except JobFailed as error:
        raise TokenizerError(f"{doing}: {error}") from error
    except LimitPassed as error:
        raise TokenizerError(f"{doing}: the tokenizer of tokenizer.json {error}") from error


def read_tokenizer_json(data: bytes, stated: Stated) -> Parts:
    """The parts of a file, without chat templates. Raises TokenizerError."""
    tokens: dict[str, Any] = {
        "names": [*stated.names.values()],
        "added": [*map(_fields, stated.added)],
        "extra": [*map(_fields, stated.extra)],
    }
    library = _holder(_CHILDREN, data, tokens)
    del data
    facts = library.facts()
    ids, added, around, decoder = (facts[name] for name in ("ids", "added", "around", "decoder"))
    steps = list(_steps(decoder)) if decoder is not None else []
    count = max(ids.values(), default=-1) + 1
    if count > MAX_TOKENS:
        raise TokenizerError(f"tokenizer.json has a token {count - 1}; ids are below {MAX_TOKENS}")
    if outside := [token_id for token_id in around if token_id >= count]:
        raise TokenizerError(
            f"tokenizer.json puts the token {outside[0]} around texts, its vocabulary has {count}"
        )
    byte_level = [step.get("type") for step in steps] == ["ByteLevel"]
    tokens = [f"[EMPTY_{i}]" for i in range(count)]
    kinds = bytearray([TokenKind.UNUSED]) * count
    for text, token_id in ids.items():
        tokens[token_id] = text
        kinds[token_id] = TokenKind.NORMAL
    if not byte_level:
        for byte in range(256):
            if (byte_id := ids.get(f"<0x{byte:02X}>")) is not None:
                kinds[byte_id] = TokenKind.BYTE
    for token_id, control, spelled in added:
        kinds[token_id] = TokenKind.CONTROL if control else TokenKind.USER_DEFINED
        tokens[token_id] = spelled
    named = {role: ids.get(text) for role, text in stated.names.items()}
    vocab = Vocabulary(
        packed(tokens),
        bytes(kinds),
        byte_level=byte_level,
        add_space_prefix=steps == _WITHOUT_FIRST_SPACE,
        bos_id=named.get("bos_token"),
        eos_id=named.get("eos_token"),
        unk_id=named.get("unk_token"),
    )
    vocab = completed(vocab, ids, [token_id for token_id in stated.ends if token_id < count])
    if byte_level or steps in (_SENTENCE_PIECE, _WITHOUT_FIRST_SPACE):
        return Parts(vocab, library)
    joiner = library if isinstance(library, _Here) else _joiner(decoder)
    return Parts(vocab, library, joiner.join, _rewrites(steps))


def _fields(token: AddedToken) -> dict[str, Any]:
    return {name: getattr(token, name) for name in ("content", *TOKEN_FLAGS)}


def _steps(decoder: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
    """A decoder's steps in order, sequences within sequences unrolled."""
    if decoder.get("type") == "Sequence":
        for step in decoder["decoders"]:
            yield from _steps(step)
    else:
        yield decoder


def _rewrites(steps: list[Mapping[str, Any]]) -> bool:
    """Whether a step looks at the whole text at once, so that a later token may change the text before it."""
    kinds = [step.get("type") for step in steps]
    whole = next((i for i, kind in enumerate(kinds) if kind in ("Fuse", "ByteLevel")), len(kinds))
    return not {"Fuse", "Strip"}.issuperset(kinds[whole + 1 :])
