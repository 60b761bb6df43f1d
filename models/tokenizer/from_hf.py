"""From a Hugging Face directory to the parts of a tokenizer.

Knows which files say what: `tokenizer.json`, `tokenizer.model` (SentencePiece BPE, where there is no
tokenizer.json), `tokenizer_config.json`, `special_tokens_map.json`, `generation_config.json`, `config.json`,
`chat_template.jinja` and `additional_chat_templates/`. Runs no code from the directory and reads no weights. Every
value is checked, because the files come from a download.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from shoal.models.errors import TokenizerError, one_line
from shoal.models.regular_files import (
    MAX_OBJECT_BYTES,
    FileTooLong,
    object_of,
    read_advice,
    read_regular,
    without_mark,
)

from .file_costs import MAX_TOKENIZER_FILE_BYTES, vocabulary_memory
from .parts import DEFAULT_TEMPLATE, TOKEN_FLAGS, Parts, Stated
from .special import Edges, SpecialSplitter
from .spm import SentencePieceBpe
from .spm_file import read_model
from .tokenizer_json import read_tokenizer_json
from .vocabulary import SPACE_MARK, TokenKind, Vocabulary, completed, inverse, packed

MAX_TEMPLATES = 64
_ROLES = frozenset(f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_LISTS = ("additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens")


def read_hf(directory: Path) -> Parts:
    """Build the parts; raises TokenizerError naming the file that is missing, damaged or unsupported."""
    odd: list[str] = []
    config = _read_json(directory / "tokenizer_config.json", odd)
    special = _read_json(directory / "special_tokens_map.json", odd)
    odd += _odd_tokens(directory / "tokenizer_config.json", config)
    odd += _odd_tokens(directory / "special_tokens_map.json", special)
    added = [token for _, token in _added_by_id(config)]
    ends, origin = _end_ids(directory, odd)
    # as in transformers: a tokenizer_config.json without added_tokens_decoder is older and says less
    files = (config, special) if "added_tokens_decoder" in config else (special, config)
    stated = Stated(_named(*files), added, _extra(config, special), [end for end in ends if end >= 0])
    templates = _chat_templates(directory, config)
    if os.path.lexists(file := directory / "tokenizer.json"):
        data, marked = without_mark(_read_bytes(file), file)
        odd += marked
        parts = read_tokenizer_json(data, stated)
    elif os.path.lexists(directory / "tokenizer.model"):
        parts = _from_sentence_piece(directory / "tokenizer.model", config, stated)
    else:
        raise TokenizerError(
            f"{directory} has no tokenizer.json and no tokenizer.model; download one of the model's"
        )
    count = len(parts.vocabulary)
    odd += (
        f"{directory}: eos_token_id={end} of {origin} is outside the vocabulary of {count} tokens; it is not used"
        for end in ends
        if not 0 <= end < count
    )
    return replace(parts, chat_templates=templates, template_tokens=stated.names, warnings=tuple(odd))


def _from_sentence_piece(path: Path, config: Mapping[str, Any], stated: Stated) -> Parts:
    model = read_model(_read_bytes(path))
    tokens, kinds, scores = list(model.tokens), bytearray(model.kinds), list(model.scores)
    edges = _add_tokens(config, tokens, kinds, scores)
    for i, kind in enumerate(kinds):
        if kind == TokenKind.USER_DEFINED:  # looked for in the text before its spaces are marked
            tokens[i] = tokens[i].replace(SPACE_MARK, " ")
    ids = inverse(tokens)
    bos, eos = stated.names.get("bos_token"), stated.names.get("eos_token")
    vocab = Vocabulary(
        packed(tokens),
        bytes(kinds),
        byte_level=False,
        add_space_prefix=model.add_space_prefix,
        bos_id=ids.get(bos) if bos else model.bos_id,
        eos_id=ids.get(eos) if eos else model.eos_id,
        unk_id=model.unk_id,
    )
    vocab = completed(vocab, ids, [token_id for token_id in stated.ends if token_id < len(tokens)])
    encoder = SpecialSplitter(
        vocab,
        SentencePieceBpe(vocab, ids, scores),
        add_bos=vocab.bos_id is not None and bool(config.get("add_bos_token", True)),
        add_eos=vocab.eos_id is not None and bool(config.get("add_eos_token", False)),
        edges=edges,
    )
    nbytes = vocabulary_memory(len(vocab), 0, vocab.tokens.nbytes).kept
    return Parts(vocab, encoder, nbytes, encoder.longest_bytes, encoder.uncounted)


def _add_tokens(
    config: Mapping[str, Any], tokens: list[str], kinds: bytearray, scores: list[float]
) -> dict[int, Edges]:
    """Add the tokens of tokenizer_config.json's `added_tokens_decoder` to a SentencePiece vocabulary. Returns the edges
    of those that have any."""
    edges: dict[int, Edges] = {}
    for token_id, token in _added_by_id(config):
        text = token.content
        if not 0 <= token_id <= len(tokens):
            raise TokenizerError(
                f"the added token {text[:40]!r} has id {token_id}; the next free one is {len(tokens)}"
            )
        kind = TokenKind.CONTROL if token.special else TokenKind.USER_DEFINED
        if token_id == len(tokens):
            tokens.append(text)
            kinds.append(kind)
            scores.append(0.0)
        elif kinds[token_id] != TokenKind.UNKNOWN:
            tokens[token_id] = text
            kinds[token_id] = kind
        if token.lstrip or token.rstrip or token.single_word:
            edges[token_id] = Edges(token.lstrip, token.rstrip, token.single_word)
    return edges


def _named(*files: Mapping[str, Any]) -> dict[str, str]:
    """The texts of the tokens that the files name (`bos_token`, `pad_token`, `image_token` …), as templates get them.
    What an earlier file says counts."""
    told = [_by_role(file) for file in files]
    keys = dict.fromkeys(key for file in told for key in file)
    texts = {key: _token_text(*(file.get(key) for file in told)) for key in keys}
    return {key: text for key, text in texts.items() if text is not None}


def _by_role(file: Mapping[str, Any]) -> dict[str, Any]:
    """What a file says of tokens by their role. Roles of the model's own (`boi_token`) may lie one level deeper."""
    deeper = [file.get(key) for key in ("model_specific_special_tokens", "extra_special_tokens")]
    own = {key: token for it in deeper if isinstance(it, Mapping) for key, token in it.items()}
    return own | {key: token for key, token in file.items() if key.endswith("_token")}


def _extra(*files: Mapping[str, Any]) -> list[AddedToken]:
    """The control tokens that the files name or list."""
    found: dict[str, AddedToken] = {}
    for file in files:
        listed = file.get("extra_special_tokens", file.get("additional_special_tokens"))
        values = (
            listed.values() if isinstance(listed, Mapping) else listed if isinstance(listed, list) else ()
        )
        for value in (*(value for key, value in file.items() if key.endswith("_token")), *values):
            if (text := _token_text(value)) is not None:
                flags = value if isinstance(value, Mapping) else {"normalized": False}
                found.setdefault(text, _added_token({**flags, "content": text, "special": True}))
    return list(found.values())


def _added_by_id(config: Mapping[str, Any]) -> list[tuple[int, AddedToken]]:
    try:
        entries = [
            (int(key), _added_token(token))
            for key, token in (config.get("added_tokens_decoder") or {}).items()
        ]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise TokenizerError(
            f"added_tokens_decoder of tokenizer_config.json is damaged: {one_line(error)}"
        ) from error
    return sorted(entries, key=lambda entry: entry[0])


def _added_token(entry: Mapping[str, Any]) -> AddedToken:
    flags = {name: bool(entry[name]) for name in TOKEN_FLAGS if name in entry}
    return AddedToken(str(entry["content"]), **flags)


def _token_text(*values: object) -> str | None:
    """The first that is a token's text: either the text itself or {"content": text}."""
    for value in values:
        if isinstance(value, Mapping):
            value = value.get("content")
        if isinstance(value, str):
            return value
    return None


def _odd_tokens(path: Path, file: Mapping[str, Any]) -> Iterator[str]:
    """What a file says of its tokens and cannot mean, each in one line."""
    for key, value in file.items():
        if key in _ROLES and value is not None and _token_text(value) is None:
            yield f"{path}: {key}={value!r:.60} is not used: must be a token's text"
        if key in _LISTS and value is not None:
            tokens = value.values() if isinstance(value, Mapping) else value
            if not isinstance(value, Mapping | list) or any(_token_text(token) is None for token in tokens):
                yield f"{path}: {key}={value!r:.60} is used only where it names tokens by their texts"


def _end_ids(directory: Path, odd: list[str]) -> tuple[list[int], str]:
    """`eos_token_id`, one or several, of generation_config.json, or of config.json where that names none, and which it
    was. They may be outside the vocabulary. What cannot be an id is left out, and told in `odd`."""
    file = directory / "generation_config.json"
    try:
        generation, said = read_advice(file)
    except OSError as error:
        raise _unreadable(file, error) from error
    odd += said
    config = _read_json(directory / "config.json", odd)
    for name, found in (
        ("generation_config.json", generation),
        ("config.json", config),
        ("text_config of config.json", config.get("text_config")),
    ):
        value = found.get("eos_token_id") if isinstance(found, Mapping) else None
        if value is None:
            continue
        told = value if isinstance(value, list) else [value]
        ids = [token_id for each in told if (token_id := _whole(each)) is not None]
        if any(type(each) is not int for each in told):
            used = f"{ids!r:.60}" if ids else "nothing"
            odd.append(
                f"{directory}: eos_token_id={value!r:.60} of {name} must be token ids; {used} of it is used"
            )
        if ids:
            return ids, name
    return [], ""


def _whole(value: object) -> int | None:
    """A number as a whole one; some writers know only floats. None if it is no number, or has a fraction."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _chat_templates(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Jinja sources by name. Files of their own count more than tokenizer_config.json."""
    stored = config.get("chat_template")
    if isinstance(stored, list):
        entries = [entry for entry in stored if isinstance(entry, Mapping)]
        stored = {str(entry.get("name")): entry.get("template") for entry in entries}
    templates = stored if isinstance(stored, dict) else {DEFAULT_TEMPLATE: stored}
    # In the store all files of a model lie in one directory.
    found = [*sorted(directory.glob("*.jinja")), *sorted(directory.glob("additional_chat_templates/*.jinja"))]
    paths = {path.stem: path for path in found}
    if (alone := paths.pop("chat_template", None)) is not None:
        paths[DEFAULT_TEMPLATE] = alone
        templates = {}
    if len(paths) > MAX_TEMPLATES:
        raise TokenizerError(f"{directory} has {len(paths)} chat templates; at most {MAX_TEMPLATES} are read")
    templates = templates | {name: _decode(_read_bytes(path), path) for name, path in paths.items()}
    for template in templates.values():
        if template is not None and not isinstance(template, str):
            raise TokenizerError(
                f"chat_template of tokenizer_config.json is a {type(template).__name__} instead of a text"
            )
    return {name: template for name, template in templates.items() if template is not None}


def _read_json(path: Path, odd: list[str]) -> dict[str, Any]:
    """A JSON object, {} if there is no such file. What is odd about the file is told in `odd`."""
    if not os.path.lexists(path):
        return {}
    data, said = without_mark(_read_bytes(path, MAX_OBJECT_BYTES), path)
    odd += said
    try:
        return object_of(data)
    except ValueError as error:
        raise TokenizerError(f"{path}: {error}") from error


def _decode(data: bytes, path: Path) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path} is not UTF-8 text: {one_line(error)}") from error


def _read_bytes(path: Path, limit_bytes: int = MAX_TOKENIZER_FILE_BYTES) -> bytes:
    try:
        return read_regular(path, limit_bytes)
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> TokenizerError:
    failed = "is refused" if isinstance(error, FileTooLong) else "cannot be read"
    return TokenizerError(f"{path} {failed}: {error.strerror or one_line(error)}")
