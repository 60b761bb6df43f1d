"""`tokenizer.json`, run by the `tokenizers` library exactly as transformers does.

Knows which decoders make a text of the bytes of its tokens, one after the other (GPT-2's alphabet, SentencePiece).
Such texts are put together by us, so that a character comes as soon as its last byte does; all others are put
together by the library. Files of unusual parts are run in a child process. Does not know the other files of a
directory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken

from shoal.models.errors import TokenizerError

from .file_costs import file_cost
from .holders import Here, holder, joiner
from .long_texts import shrinking, steps_of
from .parts import TOKEN_FLAGS, Parts, Stated
from .special import longest_of
from .vocabulary import BYTE_OF_CHAR, MAX_TOKENS, SPACE_MARK, TokenKind, Vocabulary, completed, packed

# What Gemma's files say, and with the last step Llama 2's.
_SENTENCE_PIECE = [
    {"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
]
_WITHOUT_FIRST_SPACE = [*_SENTENCE_PIECE, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]


def read_tokenizer_json(data: bytes, stated: Stated) -> Parts:
    """The parts of a file, without chat templates. Raises TokenizerError."""
    stated_tokens = {
        "names": [*stated.names.values()],
        "added": [*map(_fields, stated.added)],
        "extra": [*map(_fields, stated.extra)],
    }
    cost = file_cost(data)
    library = holder(data, stated_tokens)
    del data
    facts = library.facts()
    ids, added, around, decoder = (facts[name] for name in ("ids", "added", "around", "decoder"))
    longest_of(text for _, _, text in added)
    steps = steps_of(decoder)
    count = max(ids.values(), default=-1) + 1
    if count > MAX_TOKENS:
        raise TokenizerError(f"tokenizer.json has a token {count - 1}; ids are below {MAX_TOKENS}")
    if outside := [token_id for token_id in around if token_id >= count]:
        raise TokenizerError(
            f"tokenizer.json puts the token {outside[0]} around texts, its vocabulary has {count}"
        )
    byte_level = [step.get("type") for step in steps] == ["ByteLevel"]
    tokens = [""] * count
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
        packed(f"[EMPTY_{i}]" if kinds[i] == TokenKind.UNUSED else text for i, text in enumerate(tokens)),
        bytes(kinds),
        byte_level=byte_level,
        add_space_prefix=steps == _WITHOUT_FIRST_SPACE,
        bos_id=named.get("bos_token"),
        eos_id=named.get("eos_token"),
        unk_id=named.get("unk_token"),
    )
    vocab = completed(vocab, ids, [token_id for token_id in stated.ends if token_id < count])
    (longest, uncounted), nbytes = _longest_bytes(facts, vocab), cost.kept(len(vocab))
    if byte_level or steps in (_SENTENCE_PIECE, _WITHOUT_FIRST_SPACE):
        return Parts(vocab, library, nbytes, longest, uncounted)
    joining = library if isinstance(library, Here) else joiner(decoder)
    return Parts(vocab, library, nbytes, longest, uncounted, joining.join, _rewrites(steps))


def _fields(token: AddedToken) -> dict[str, Any]:
    return {name: getattr(token, name) for name in ("content", *TOKEN_FLAGS)}


def _longest_bytes(facts: Mapping[str, Any], vocab: Vocabulary) -> tuple[int | None, bytes]:
    """`longest_bytes` and `uncounted`, as in `Parts`."""
    ids = facts["ids"]
    byte_level = any(step["type"] == "ByteLevel" for step in steps_of(facts["pre_tokenizer"]))
    uncounted = bytes(byte for char, byte in BYTE_OF_CHAR.items() if char not in ids) if byte_level else b""
    if facts["fallback"] and all(f"<0x{byte:02X}>" in ids for byte in range(256)):
        uncounted, byte_level = b"", True
    factor = shrinking(facts["normalizer"], facts["pre_tokenizer"])
    # What a normalizer makes of a text may lack tokens where the text itself does not.
    dropping = uncounted and (facts["normalizer"] is not None or not facts["merging"])
    if factor is None or dropping or not byte_level or facts["touching"]:
        return None, b""
    return factor * vocab.tokens.longest_bytes, uncounted


def _rewrites(steps: list[Mapping[str, Any]]) -> bool:
    """Whether a step looks at the whole text at once, so that a later token may change the text before it."""
    kinds = [step.get("type") for step in steps]
    whole = next((i for i, kind in enumerate(kinds) if kind in ("Fuse", "ByteLevel")), len(kinds))
    return not {"Fuse", "Strip"}.issuperset(kinds[whole + 1 :])
