"""The tokenizer: text → token ids and back, whatever files the model came in.

Knows where special tokens stand in a text, what is put before and after it, and how ids spell text.
Deliberately does not know file formats (tokenizer_gguf, tokenizer_hf), how words merge (tokenizer_bpe,
tokenizer_spm), nor conversations (chat_template). Everything here may be called from several threads.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

from shoal.models.errors import TokenizerError

from .from_gguf import read_gguf
from .from_hf import read_hf
from .special import SpecialSplitter
from .vocabulary import Vocabulary


class Encoder(Protocol):
    """Text → ids, without what is put before and after. parse_special: control tokens are recognised."""

    def encode(self, text: str, parse_special: bool) -> list[int]: ...


class Tokenizer:
    """Text → ids → text for one model. Build it with `from_hf` or `from_gguf`.

    bos_id, eos_id: None where the model has none. stop_ids: every token that ends generation.
    chat_template: Jinja source, None where the files have none.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        encoder: Encoder,
        *,
        prefix: tuple[int, ...] = (),
        suffix: tuple[int, ...] = (),
        chat_template: str | None = None,
    ) -> None:
        self._vocabulary = vocabulary
        self._encoder = encoder
        self._prefix = list(prefix)
        self._suffix = list(suffix)
        self.bos_id = vocabulary.bos_id
        self.eos_id = vocabulary.eos_id
        self.stop_ids = vocabulary.stop_ids
        self.add_space_prefix = vocabulary.add_space_prefix
        self.chat_template = chat_template

    @classmethod
    def from_hf(cls, directory: Path) -> Tokenizer:
        """From a Hugging Face directory (tokenizer.json or tokenizer.model); raises TokenizerError."""
        parts = read_hf(directory)
        return cls(
            parts.vocabulary,
            parts.encoder,
            prefix=parts.prefix,
            suffix=parts.suffix,
            chat_template=parts.chat_template,
        )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, object]) -> Tokenizer:
        """From GGUF metadata (key → str, int, float, bool, list, Texts or numpy array); raises TokenizerError."""
        parts = read_gguf(metadata)
        vocab = parts.vocabulary
        return cls(
            vocab,
            SpecialSplitter(vocab, parts.merger, parts.strip_after),
            prefix=_one("BOS", vocab.bos_id) if parts.add_bos else (),
            suffix=_one("EOS", vocab.eos_id) if parts.add_eos else (),
            chat_template=parts.chat_template,
        )

    @property
    def vocab_size(self) -> int:
        """Number of tokens; a model's logits may have more rows (padding), which stand for nothing."""
        return len(self._vocabulary)

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Ids of a text.

        add_special: put BOS before and EOS after, where the model wants them (False for a text made by a
        chat template that prints them). parse_special: "<|im_start|>" in the text is that control token;
        False makes it plain text, as is right for what a user typed. Lone surrogates become U+FFFD.
        """
        ids = self._encoder.encode(_scalar_values(text), parse_special)
        return self._prefix + ids + self._suffix if add_special else ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Text of ids; bytes that are no UTF-8 become U+FFFD. skip_special: leave control tokens out."""
        vocab = self._vocabulary
        parts = []
        for token_id in ids:
            if not skip_special and vocab.is_special(token_id):
                parts.append(vocab.tokens[token_id].encode())
            else:
                parts.append(vocab.token_bytes(token_id))
        data = b"".join(parts)
        if vocab.add_space_prefix and data.startswith(b" "):
            data = data[1:]
        return data.decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """Exact bytes of one token; b"" for control tokens and for ids outside the vocabulary."""
        return self._vocabulary.token_bytes(token_id)

    def is_special(self, token_id: int) -> bool:
        """Whether a token is a control token (or the unknown token) rather than text."""
        return self._vocabulary.is_special(token_id)

    def id_to_token(self, token_id: int) -> str:
        """Text of a token as the files spell it; raises TokenizerError outside the vocabulary."""
        if not 0 <= token_id < self.vocab_size:
            raise TokenizerError(f"there is no token {token_id} in a vocabulary of {self.vocab_size} tokens")
        return self._vocabulary.tokens[token_id]

    def token_to_id(self, text: str) -> int | None:
        """Id of the token that the files spell so, or None. Looks at all of them."""
        return next((i for i, token in enumerate(self._vocabulary.tokens) if token == text), None)


def _one(name: str, token_id: int | None) -> tuple[int, ...]:
    if token_id is None:
        raise TokenizerError(f"the model wants a {name} token around texts but its files name none")
    return (token_id,)


def _scalar_values(text: str) -> str:
    """The text without lone surrogates, which have no UTF-8 form (JSON can smuggle them in)."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
