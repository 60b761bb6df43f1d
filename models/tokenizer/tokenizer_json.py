"""`tokenizer.json`, run by the `tokenizers` library exactly as transformers does.

Knows which decoders make a text of the bytes of its tokens, one after the other (GPT-2's alphabet, SentencePiece).
Such texts are put together by us, so that a character comes as soon as its last byte does; all others are put
together by the library. Does not know the other files of a directory.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import tokenizers

from shoal.models.errors import TokenizerError

from .bpe import library_errors
from .parts import Parts, Stated
from .special import longest_of
from .vocabulary import MAX_TOKENS, SPACE_MARK, TokenKind, Vocabulary, completed, packed

# What Gemma's files say, and with the last step Llama 2's.
_SENTENCE_PIECE = [
    {"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
]
_WITHOUT_FIRST_SPACE = [*_SENTENCE_PIECE, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]


class LibraryEncoder:
    """Text → ids by the library."""

    def __init__(self, library: tokenizers.Tokenizer) -> None:
        self._library = library
        # Whether control tokens are text is an attribute of the library's object, not an argument of its `encode`.
        self._lock = threading.Lock()

    def encode(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        with self._lock, library_errors("this text cannot be tokenised"):
            self._library.encode_special_tokens = not parse_special
            # The post-processor, not add_bos_token, decides what stands around a text, as in transformers 5.
            ids: list[int] = self._library.encode(text, add_special_tokens=add_special).ids
        return ids


def parse(data: bytes) -> tokenizers.Tokenizer:
    """The file as the library holds it; `data` is as large and is not needed any more. Raises TokenizerError."""
    with library_errors("tokenizer.json is not a tokenizer"):
        return tokenizers.Tokenizer.from_buffer(data)


def read_tokenizer_json(library: tokenizers.Tokenizer, stated: Stated) -> Parts:
    """The parts, without chat templates. Raises TokenizerError."""
    with library_errors("tokenizer.json is not a tokenizer"):
        library.no_truncation()
        library.no_padding()
        special = _special_ids(library)  # the library goes on taking them for that, whatever comes later
        _add_stated(library, stated)
        special |= _special_ids(library)
        longest_of(token.content for token in library.get_added_tokens_decoder().values())
        ids = library.get_vocab(with_added_tokens=True)
        # An added token's text is what the normalizer makes of it, and another token may have the same text.
        added = {
            token_id: (token_id in special, library.id_to_token(token_id) or "")
            for token_id in library.get_added_tokens_decoder()
        }
        around = library.encode("", add_special_tokens=True).ids
        decoder = library.decoder
        steps = list(_steps(json.loads(decoder.__getstate__()))) if decoder is not None else []
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
    for token_id, (control, spelled) in added.items():
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
    encoder = LibraryEncoder(library)
    if byte_level or steps in (_SENTENCE_PIECE, _WITHOUT_FIRST_SPACE):
        return Parts(vocab, encoder)
    return Parts(vocab, encoder, _joined_by(decoder), _rewrites(steps))


def _special_ids(library: tokenizers.Tokenizer) -> set[int]:
    return {token_id for token_id, token in library.get_added_tokens_decoder().items() if token.special}


def _add_stated(library: tokenizers.Tokenizer, stated: Stated) -> None:
    """Have the library look for tokens that stand in other files only, or differently there, as transformers does.

    Tokens that would get a new id are left out: the model has no row for them.
    """
    known = {token.content for token in library.get_added_tokens_decoder().values()}
    added = {token.content: token for token in stated.added}
    for token in added.values():
        token.special = token.special or token.content in stated.names.values()
    for token in stated.extra:
        if token.content not in known:
            added.setdefault(token.content, token)
    library.add_tokens([token for text, token in added.items() if library.token_to_id(text) is not None])


def _steps(decoder: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
    """A decoder's steps in order, sequences within sequences unrolled."""
    if decoder.get("type") == "Sequence":
        for step in decoder["decoders"]:
            yield from _steps(step)
    else:
        yield decoder


def _joined_by(decoder: Any) -> Callable[[list[str]], str]:
    """The library's function from the texts of tokens to a text; unlike the tokenizer itself it needs no lock."""

    def join(texts: list[str]) -> str:
        try:
            with library_errors("these tokens cannot be put together"):
                text: str = decoder.decode(texts)
        except TokenizerError:
            # The library's Strip panics where it would take the same space from both sides. Answers go on nevertheless.
            return "".join(texts)
        return text

    return join if decoder is not None else " ".join


def _rewrites(steps: list[Mapping[str, Any]]) -> bool:
    """Whether a step looks at the whole text at once, so that a later token may change the text before it."""
    kinds = [step.get("type") for step in steps]
    whole = next((i for i, kind in enumerate(kinds) if kind in ("Fuse", "ByteLevel")), len(kinds))
    return not {"Fuse", "Strip"}.issuperset(kinds[whole + 1 :])
