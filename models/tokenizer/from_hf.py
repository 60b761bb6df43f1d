"""From a Hugging Face directory to the parts of a tokenizer.

Knows which files say what: `tokenizer.json`, `tokenizer.model` (SentencePiece BPE, where there is no
tokenizer.json), `tokenizer_config.json`, `special_tokens_map.json`, `generation_config.json`, `config.json` and
`chat_template.jinja`. Runs no code from the directory and reads no weights. Every value is checked, because the files
come from a download.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from shoal.models.errors import TokenizerError, one_line
from shoal.models.regular_files import FileTooLong, read_regular

from .parts import Parts
from .special import SpecialSplitter
from .spm import SentencePieceBpe
from .spm_file import read_model
from .tokenizer_json import parse, read_tokenizer_json
from .vocabulary import SPACE_MARK, TokenKind, Vocabulary, completed, inverse, packed

MAX_TOKENIZER_FILE_BYTES = 256 << 20
MAX_SETTINGS_FILE_BYTES = 8 << 20  # as JSON it may become twenty times as much in memory


def read_hf(directory: Path) -> Parts:
    """Build the parts; raises TokenizerError naming the file that is missing, damaged or unsupported."""
    config = _read_json(directory / "tokenizer_config.json")
    special = _read_json(directory / "special_tokens_map.json")
    names = {
        role: _token_text(config.get(f"{role}_token"), special.get(f"{role}_token"))
        for role in ("bos", "eos", "unk")
    }
    ends = _end_ids(directory)
    template = _chat_template(directory, config)
    if os.path.lexists(directory / "tokenizer.json"):
        library = parse(_read_bytes(directory / "tokenizer.json"))
        return read_tokenizer_json(library, names, ends, template)
    if os.path.lexists(directory / "tokenizer.model"):
        return _from_sentence_piece(directory / "tokenizer.model", config, names, ends, template)
    raise TokenizerError(
        f"{directory} has no tokenizer.json and no tokenizer.model; download one of the model's"
    )


def _from_sentence_piece(
    path: Path,
    config: Mapping[str, Any],
    names: Mapping[str, str | None],
    ends: Iterable[int],
    template: str | None,
) -> Parts:
    model = read_model(_read_bytes(path))
    tokens, kinds, scores = list(model.tokens), bytearray(model.kinds), list(model.scores)
    _add_tokens(config, tokens, kinds, scores)
    for i, kind in enumerate(kinds):
        if kind == TokenKind.USER_DEFINED:  # looked for in the text before its spaces are marked
            tokens[i] = tokens[i].replace(SPACE_MARK, " ")
    ids = inverse(tokens)
    vocab = Vocabulary(
        packed(tokens),
        bytes(kinds),
        byte_level=False,
        add_space_prefix=model.add_space_prefix,
        bos_id=ids.get(names["bos"]) if names["bos"] else model.bos_id,
        eos_id=ids.get(names["eos"]) if names["eos"] else model.eos_id,
        unk_id=model.unk_id,
    )
    vocab = completed(vocab, ids, [token_id for token_id in ends if token_id < len(tokens)])
    encoder = SpecialSplitter(
        vocab,
        SentencePieceBpe(vocab, ids, scores),
        add_bos=vocab.bos_id is not None and bool(config.get("add_bos_token", True)),
        add_eos=vocab.eos_id is not None and bool(config.get("add_eos_token", False)),
    )
    return Parts(vocab, encoder, template)


def _add_tokens(config: Mapping[str, Any], tokens: list[str], kinds: bytearray, scores: list[float]) -> None:
    """Add the tokens of tokenizer_config.json's `added_tokens_decoder` to a SentencePiece vocabulary."""
    added = config.get("added_tokens_decoder") or {}
    try:
        entries = sorted(
            (int(key), str(token["content"]), bool(token.get("special"))) for key, token in added.items()
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise TokenizerError(
            f"added_tokens_decoder of tokenizer_config.json is damaged: {one_line(error)}"
        ) from error
    for token_id, text, is_control in entries:
        if not 0 <= token_id <= len(tokens):
            raise TokenizerError(
                f"the added token {text[:40]!r} has id {token_id}; the next free one is {len(tokens)}"
            )
        kind = TokenKind.CONTROL if is_control else TokenKind.USER_DEFINED
        if token_id == len(tokens):
            tokens.append(text)
            kinds.append(kind)
            scores.append(0.0)
        elif kinds[token_id] != TokenKind.UNKNOWN:
            tokens[token_id] = text
            kinds[token_id] = kind


def _token_text(*values: object) -> str | None:
    """The first that is a token's text: either the text itself or {"content": text}."""
    for value in values:
        if isinstance(value, Mapping):
            value = value.get("content")
        if isinstance(value, str):
            return value
    return None


def _end_ids(directory: Path) -> list[int]:
    """`eos_token_id`, one or several, of generation_config.json, or of config.json where there is none."""
    for name in ("generation_config.json", "config.json"):
        value = _read_json(directory / name).get("eos_token_id")
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            raise TokenizerError(f"eos_token_id of {name} is {value!r:.60}; it must be token ids")
        return ids
    return []


def _chat_template(directory: Path, config: Mapping[str, Any]) -> str | None:
    path = directory / "chat_template.jinja"
    if os.path.lexists(path):
        return _decode(_read_bytes(path), path)
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, Mapping)}
        template = named.get("default", next(iter(named.values()), None))
    if template is not None and not isinstance(template, str):
        raise TokenizerError(
            f"chat_template of tokenizer_config.json is a {type(template).__name__} instead of a text"
        )
    return template


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object, {} if there is no such file."""
    if not os.path.lexists(path):
        return {}
    try:
        value = json.loads(_decode(_read_bytes(path, MAX_SETTINGS_FILE_BYTES), path))
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path} is not JSON: {one_line(error)}") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path} holds a {type(value).__name__} instead of a JSON object")
    return value


def _decode(data: bytes, path: Path) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path} is not UTF-8 text: {one_line(error)}") from error


def _read_bytes(path: Path, limit_bytes: int = MAX_TOKENIZER_FILE_BYTES) -> bytes:
    try:
        return read_regular(path, limit_bytes)
    except FileTooLong as error:
        raise TokenizerError(f"{path} is refused: {error.strerror}") from error
    except OSError as error:
        raise TokenizerError(f"{path} cannot be read: {error.strerror or one_line(error)}") from error
