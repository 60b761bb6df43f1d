"""A `tokenizer.json` as the `tokenizers` library holds it, in this process or as a script for child processes.

Knows how the library is asked, and what transformers tells it from other files. Does not know which files are fit for
this process (`ordinary_files`). Imports nothing else of Shoal, because a child should start at once.
"""

from __future__ import annotations

import json
import struct
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import tokenizers

_HEAD = struct.Struct("<I")
_PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
# Of a file, for each token and merge: objects for shorter ones would be a burden. Usual are 14 to 35.
_LEAST_BYTES = 12
_ADDED = {"id", "content", "single_word", "lstrip", "rstrip", "normalized", "special"}
_BPE = {"unk_token", "end_of_word_suffix", "fuse_unk", "byte_fallback", "ignore_merges"}


def first_job(data: bytes, tokens: dict[str, Any]) -> bytes:
    """What `begin` reads: the file and the tokens that `HfLibrary` is to add."""
    head = json.dumps(tokens).encode()
    return _HEAD.pack(len(head)) + head + data


def begin(first: bytes) -> Callable[[bytes], bytes]:
    """A library for the first job. Later ones are JSON: the name of a method and its arguments. So are answers: what
    it returned, and the seconds of processor time that it took."""
    (size,) = _HEAD.unpack_from(first)
    start = _HEAD.size + size
    library = HfLibrary(first[start:], json.loads(first[_HEAD.size : start]))

    def work(job: bytes) -> bytes:
        began_s = time.process_time()
        name, *arguments = json.loads(job)
        made = getattr(library, name)(*arguments)
        return json.dumps([made, time.process_time() - began_s]).encode()

    return work


class HfLibrary:
    """data: the file. tokens: `names`, `added`, `extra` as `parts.Stated` has them, tokens as their fields."""

    def __init__(self, data: bytes, tokens: dict[str, Any]) -> None:
        self._library = _compact(data) or tokenizers.Tokenizer.from_buffer(data)
        self._library.no_truncation()
        self._library.no_padding()
        self._special = self._special_ids()  # the library goes on taking them for that, whatever comes later
        self._add(**tokens)
        self._special |= self._special_ids()
        self._decoder = self._library.decoder
        # Whether control tokens are text is an attribute of the library's object, not an argument of its `encode`.
        self._lock = threading.Lock()

    def facts(self) -> dict[str, Any]:
        """ids: text → id. added: [id, whether it is special, text] of each added token. swallowing: texts of those that
        take the white space after them. touching: whether some take white space at all. single: whether some are only
        tokens where no letter touches them. around: ids that stand around
        an empty text. normalizer, pre_tokenizer, decoder: their JSON, or None. fallback: whether the model is a BPE
        that takes bytes for what is no token. merging: whether it is a BPE that drops single characters at most, where
        others make one unknown token of a word, however long."""
        added, model = self._library.get_added_tokens_decoder(), self._library.model
        return {
            "ids": self._library.get_vocab(with_added_tokens=True),
            # An added token's text is what the normalizer makes of it, and another token may have the same text.
            "added": [[i, i in self._special, self._library.id_to_token(i) or ""] for i in added],
            "swallowing": [token.content for token in added.values() if token.rstrip],
            "single": any(token.single_word for token in added.values()),
            "touching": any(token.lstrip or token.rstrip for token in added.values()),
            "around": self.encode("", True, True),
            "normalizer": _state(self._library.normalizer),
            "pre_tokenizer": _state(self._library.pre_tokenizer),
            "decoder": _state(self._decoder),
            "fallback": bool(getattr(model, "byte_fallback", False)),
            "merging": isinstance(model, tokenizers.models.BPE) and not model.continuing_subword_prefix,
        }

    def to_json(self) -> bytes:
        """The file anew, with all that was added."""
        text: str = self._library.to_str()
        return text.encode()

    def encode(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        with self._lock:
            self._library.encode_special_tokens = not parse_special
            # The post-processor, not add_bos_token, decides what stands around a text, as in transformers 5.
            ids: list[int] = self._library.encode(text, add_special_tokens=add_special).ids
        return ids

    def encode_within(self, text: str, add_special: bool, parse_special: bool, limit: int) -> list[int] | int:
        """The ids, or how many there are if there are more than `limit`."""
        ids = self.encode(text, add_special, parse_special)
        return ids if len(ids) <= limit else len(ids)

    def join(self, texts: list[str]) -> str:
        """Texts of tokens → text. Unlike the tokenizer itself the decoder needs no lock."""
        if self._decoder is None:
            return " ".join(texts)
        try:
            text: str = self._decoder.decode(texts)
        except BaseException as error:
            # The library's Strip panics where it would take the same space from both sides, with an exception that no
            # module exports. Answers go on nevertheless.
            if isinstance(error, Exception) or type(error).__name__ == "PanicException":
                return "".join(texts)
            raise
        return text

    def _special_ids(self) -> set[int]:
        added = self._library.get_added_tokens_decoder()
        return {token_id for token_id, token in added.items() if token.special}

    def _add(
        self, names: Sequence[str], added: Sequence[dict[str, Any]], extra: Sequence[dict[str, Any]]
    ) -> None:
        """Have the library look for tokens that stand in other files only, or differently there, as transformers does.

        Tokens that would get a new id are left out: the model has no row for them.
        """
        known = {token.content for token in self._library.get_added_tokens_decoder().values()}
        wanted = {token["content"]: tokenizers.AddedToken(**token) for token in added}
        for text, token in wanted.items():
            token.special = token.special or text in names
        for fields in extra:
            if fields["content"] not in known:
                wanted.setdefault(fields["content"], tokenizers.AddedToken(**fields))
        present = [token for text, token in wanted.items() if self._library.token_to_id(text) is not None]
        self._library.add_tokens(present)


def _compact(data: bytes) -> tokenizers.Tokenizer | None:
    """The same as the library's parser makes of a file, if that has a BPE of the usual form; else None, also where
    something is wrong with it. The parser leaves holes of 30 to 130 bytes a token between what it makes."""
    try:
        file = json.loads(data.decode())
        model, added = file["model"], file.pop("added_tokens", [])
        for option in ("dropout", "continuing_subword_prefix"):
            if model.pop(option, None):
                return None
        vocab, merges = model.pop("vocab"), model.pop("merges")
        forms = {*map(type, merges)}
        if model.pop("type") != "BPE" or type(merges) is not list or forms not in (set(), {str}, {list}):
            return None
        if {*map(type, vocab.values())} != {int} or min(vocab.values()) < 0 or not model.keys() <= _BPE:
            return None
        if any(it.keys() != _ADDED or type(it["id"]) is not int or it["id"] < 0 for it in added):
            return None
        if str in forms and any(it.startswith("#version") for it in merges):
            return None  # the parser leaves such lines out
        if len(data) < _LEAST_BYTES * (len(vocab) + len(merges)):
            return None
        pairs = [tuple(it.split(" ") if str in forms else it) for it in merges]
        options = {name: value for name, value in model.items() if value is not None}
        made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, pairs, **options))
        file["model"] = {"type": "BPE", "vocab": {}, "merges": []}
        rest = tokenizers.Tokenizer.from_buffer(json.dumps(file).encode())
        for name in _PARTS:
            if (part := getattr(rest, name)) is not None:
                setattr(made, name, part)
        made.add_tokens(
            [tokenizers.AddedToken(**{name: it[name] for name in it if name != "id"}) for it in added]
        )
    except Exception:  # the parser says what is wrong
        return None
    return made


def _state(part: Any) -> Any:
    return None if part is None else json.loads(part.__getstate__())
