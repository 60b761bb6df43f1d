"""From GGUF metadata to the parts of a tokenizer.

Knows the `tokenizer.ggml.*` keys, their defaults for each vocabulary model, and which of llama.cpp's quirks are
needed for equal ids. Does not read files: it gets the metadata as a mapping, and checks all of it, because the file
comes from a download.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from shoal.models.errors import TokenizerError
from shoal.models.texts import Texts

from .bpe import ByteLevelBpe
from .file_costs import vocabulary_memory
from .parts import DEFAULT_TEMPLATE, Parts
from .special import Edges, SpecialSplitter
from .spm import SentencePieceBpe
from .vocabulary import TokenKind, Vocabulary, completed, inverse, packed
from .word_rules import PRE_TOKENIZERS

_PREFIX = "tokenizer.ggml."
_TEMPLATE = "tokenizer.chat_template"
_ROLES = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "sep_token": "seperator_token_id",  # as GGUF spells it
    "pad_token": "padding_token_id",
    "cls_token": "cls_token_id",
    "mask_token": "mask_token_id",
}


def read_gguf(metadata: Mapping[str, object]) -> Parts:
    """Build the parts; raises TokenizerError naming the key that is missing, damaged or unsupported."""
    keys = _Keys(metadata)
    model = keys.text("model")
    if model == "gpt2":
        return _byte_level(keys)
    if model == "llama":
        return _sentence_piece(keys)
    raise TokenizerError(
        f"the vocabulary model {model[:40]!r} is not supported; supported are 'gpt2' and 'llama'"
    )


def _byte_level(keys: _Keys) -> Parts:
    pre = keys.text("pre", "default")
    rule = PRE_TOKENIZERS.get(pre)
    if rule is None:
        known = ", ".join(sorted(PRE_TOKENIZERS))
        raise TokenizerError(f"the pre-tokenizer {pre[:40]!r} is not supported; supported are {known}")
    tokens = _tokens(keys)
    ids = inverse(tokens)
    vocab = _completed(keys, ids, Vocabulary(tokens, b"", byte_level=True))
    merger = ByteLevelBpe(ids, merges := keys.texts("merges"), rule)
    return _parts(keys, vocab, merger, len(merges), add_bos=rule.add_bos)


def _sentence_piece(keys: _Keys) -> Parts:
    tokens, prefix = _tokens(keys), keys.flag("add_space_prefix", True)
    ids = inverse(tokens)
    defaults = Vocabulary(
        tokens, b"", byte_level=False, add_space_prefix=prefix, bos_id=1, eos_id=2, unk_id=0
    )
    vocab = _completed(keys, ids, defaults)
    scores = keys.numbers("scores", len(vocab), 0.0)
    if not np.isfinite(scores).all():
        raise TokenizerError("tokenizer.ggml.scores holds values that are not finite; the file is damaged")
    return _parts(keys, vocab, SentencePieceBpe(vocab, ids, scores), 0, add_bos=True)


def _parts(
    keys: _Keys, vocab: Vocabulary, merger: ByteLevelBpe | SentencePieceBpe, merges: int, *, add_bos: bool
) -> Parts:
    encoder = SpecialSplitter(
        vocab,
        merger,
        add_bos=keys.flag("add_bos_token", add_bos) and not keys.lacks("bos_token_id", vocab.bos_id),
        add_eos=keys.flag("add_eos_token", False) and not keys.lacks("eos_token_id", vocab.eos_id),
        edges=_edges(keys, vocab),
    )
    return Parts(
        vocab,
        encoder,
        vocabulary_memory(len(vocab), merges, vocab.tokens.nbytes).kept,
        encoder.longest_bytes,
        encoder.uncounted,
        chat_templates=keys.templates(),
        template_tokens=keys.named_tokens(vocab),
        warnings=tuple(keys.outside.values()),
    )


def _tokens(keys: _Keys) -> Texts:
    tokens = keys.texts("tokens")
    if "" not in tokens:
        return tokens
    return packed(text or f"[EMPTY_{i}]" for i, text in enumerate(tokens))


def _completed(keys: _Keys, ids: Mapping[str, int], vocab: Vocabulary) -> Vocabulary:
    """With the kinds and the ids that the file names; `vocab` has the defaults of its vocabulary model."""
    kinds = keys.numbers("token_type", len(vocab), TokenKind.UNDEFINED).astype(np.int64)
    kinds[(kinds < 0) | (kinds > max(TokenKind))] = TokenKind.UNDEFINED
    count = len(vocab)
    named = [keys.token_id(name, None, count) for name in ("eot_token_id", "eom_token_id")]
    ends = [token_id for token_id in named if token_id is not None]
    vocab = replace(
        vocab,
        kinds=kinds.astype(np.uint8).tobytes(),
        bos_id=keys.token_id("bos_token_id", vocab.bos_id, count),
        eos_id=keys.token_id("eos_token_id", vocab.eos_id, count),
        unk_id=keys.token_id("unknown_token_id", vocab.unk_id, count),
    )
    return completed(vocab, ids, ends, marked=True)


def _edges(keys: _Keys, vocab: Vocabulary) -> dict[int, Edges]:
    """Phi-3 was trained with special tokens that swallow the white space after them.

    GGUF has no field for it, so the model's name decides, as in llama.cpp.
    """
    name = (keys.optional_text("general.name") or "").lower()
    if "phi-3" not in name and "phi3" not in name:
        return {}
    kinds = {TokenKind.CONTROL, TokenKind.UNKNOWN, TokenKind.USER_DEFINED}
    return {
        token_id: Edges(rstrip=True)
        for token_id, kind in enumerate(vocab.kinds)
        if kind in kinds and vocab.tokens[token_id] not in ("<unk>", "<s>", "<|endoftext|>")
    }


class _Keys:
    """Typed access to the metadata; names are relative to `tokenizer.ggml.` where not given in full."""

    def __init__(self, metadata: Mapping[str, object]) -> None:
        self._metadata = metadata
        self.outside: dict[str, str] = {}  # ids that are none, and a warning of each

    def optional_text(self, key: str) -> str | None:
        value = self._metadata.get(key)
        if value is not None and not isinstance(value, str):
            raise TokenizerError(f"{key} is a {type(value).__name__} instead of a text; the file is damaged")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        value = self.optional_text(_PREFIX + name)
        if value is None:
            value = default
        if value is None:
            raise TokenizerError(f"the file has no {_PREFIX + name}: it holds no tokenizer")
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self._metadata.get(_PREFIX + name, default)
        if not isinstance(value, bool):
            raise TokenizerError(
                f"{_PREFIX + name} is {value!r:.40} instead of true or false; the file is damaged"
            )
        return value

    def token_id(self, name: str, default: int | None, count: int) -> int | None:
        """An id in a vocabulary of `count` tokens. Where the file names one outside, as some converters do for "none",
        the default counts, as in llama.cpp."""
        value = self._metadata.get(_PREFIX + name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int):
            raise TokenizerError(
                f"{_PREFIX + name} is {value!r:.40} instead of a token id; the file is damaged"
            )
        if not 0 <= value < count:
            self.outside[name] = (
                f"{_PREFIX + name}={value} is outside the vocabulary of {count} tokens; it is not used"
            )
            return default
        return value

    def templates(self) -> dict[str, str]:
        """Chat templates by name."""
        found: dict[str, str] = {}
        for key in self._metadata:
            if key == _TEMPLATE or key.startswith(f"{_TEMPLATE}."):
                name = key.removeprefix(_TEMPLATE).removeprefix(".") or DEFAULT_TEMPLATE
                if (template := self.optional_text(key)) is not None:
                    found[name] = template
        return found

    def named_tokens(self, vocab: Vocabulary) -> dict[str, str]:
        """Role → text of the tokens that templates may ask for, with transformers' names for the roles."""
        found: dict[str, str] = {}
        for role, name in _ROLES.items():
            if (token_id := self.token_id(name, None, len(vocab))) is not None:
                found[role] = vocab.tokens[token_id]
        return found

    def lacks(self, name: str, used: int | None) -> bool:
        """Whether there is no such token because the file names one outside the vocabulary."""
        return used is None and name in self.outside

    def texts(self, name: str) -> Texts:
        value = self._metadata.get(_PREFIX + name)
        if value is None:
            raise TokenizerError(f"the file has no {_PREFIX + name}: it holds no tokenizer of this kind")
        if isinstance(value, Texts):
            return value
        if not isinstance(value, list) or not set(map(type, value)) <= {str}:
            raise TokenizerError(f"{_PREFIX + name} is not a list of texts; the file is damaged")
        return packed(value)

    def numbers(self, name: str, count: int, default: float) -> np.ndarray:
        value = self._metadata.get(_PREFIX + name)
        try:
            numbers = np.full(count, default) if value is None else np.asarray(value)
        except (ValueError, TypeError) as error:
            raise TokenizerError(f"{_PREFIX + name} is not a list of numbers; the file is damaged") from error
        if numbers.dtype.kind not in "iufb" or numbers.ndim != 1:
            raise TokenizerError(f"{_PREFIX + name} is not a list of numbers; the file is damaged")
        if len(numbers) != count:
            raise TokenizerError(
                f"{_PREFIX + name} has {len(numbers)} entries for {count} tokens; the file is damaged"
            )
        return numbers
