"""The tokenizer: text → token ids and back, whatever files the model came in.

Knows how ids spell text. Does not know file formats (from_gguf, from_hf, tokenizer_json), special tokens within a text
(special), how words merge (bpe, spm), nor conversations (chat). All methods may be called from several threads.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from shoal.models.errors import TokenizerError, TooManyTokens

from .from_gguf import read_gguf
from .from_hf import read_hf
from .long_texts import ANY_NUMBER, PIECE_CHARS, far_beyond
from .parts import DEFAULT_TEMPLATE, Parts
from .vocabulary import SPECIAL_KINDS, TokenKind

_UTF_8_CHARS = 1 << 18  # that are encoded at once


class Tokenizer:
    """Text → ids → text for one model. Build it with `from_hf` or `from_gguf`.

    join, rewrites: as in `Parts`. bos_id, eos_id: None where the model has none. stop_ids: every token that ends
    generation. chat_templates: Jinja sources by name; chat_template: the one for conversations without tools, None
    where the files have none. template_tokens: role (`pad_token`) → text of tokens that templates may ask for.
    """

    def __init__(self, parts: Parts) -> None:
        vocabulary = parts.vocabulary
        self._vocabulary = vocabulary
        self._encoder = parts.encoder
        self._longest_bytes, self._uncounted = parts.longest_bytes, parts.uncounted
        self.nbytes = parts.nbytes  # of memory, as far as it grows with the vocabulary
        self.join = parts.join
        self.rewrites = parts.rewrites
        self.bos_id = vocabulary.bos_id
        self.eos_id = vocabulary.eos_id
        self.stop_ids = vocabulary.stop_ids
        self.warnings = parts.warnings
        self.add_space_prefix = vocabulary.add_space_prefix
        self.chat_templates = parts.chat_templates
        self.chat_template = next(iter(parts.chat_templates.values()), None)
        self.chat_template = parts.chat_templates.get(DEFAULT_TEMPLATE, self.chat_template)
        self.template_tokens = parts.template_tokens

    @classmethod
    def from_hf(cls, directory: Path) -> Tokenizer:
        """From a Hugging Face directory (tokenizer.json or tokenizer.model); raises TokenizerError."""
        return cls(read_hf(directory))

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, object]) -> Tokenizer:
        """From GGUF metadata as `gguf_header` gives it (lists of texts may be `list`); raises TokenizerError."""
        return cls(read_gguf(metadata))

    @property
    def vocab_size(self) -> int:
        """Number of tokens; a model's logits may have more rows, which are padding."""
        return len(self._vocabulary)

    def encode(
        self, text: str, *, add_special: bool = True, parse_special: bool = True, most: int | None = None
    ) -> list[int]:
        """Ids of a text.

        add_special: put BOS before and EOS after, where the model wants them (False for the text of a chat template,
        which prints them). parse_special: "<|im_start|>" in the text is that control token; False makes it plain
        text, which is right for what a user typed. most: how many ids are wanted; if it is clear early that there are
        more, TooManyTokens is raised. Else they may still be more. Lone surrogates become U+FFFD. Raises TextTooLarge.
        """
        text = _scalar_values(text)
        limit = ANY_NUMBER if most is None else far_beyond(most)
        if most is not None and (least := self._least_tokens(text)) > most:
            raise TooManyTokens(least)
        return self._encoder.encode(text, add_special, parse_special, limit)

    def _least_tokens(self, text: str) -> int:
        """How many tokens a text has at least, without a look at it."""
        if self._longest_bytes is None or len(text) <= PIECE_CHARS:
            return 0
        counted = sum(len(piece.translate(None, self._uncounted)) for piece in _utf_8(text))
        return -(-counted // max(1, self._longest_bytes))

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Text of ids; bytes that are not UTF-8 become U+FFFD. skip_special: leave control tokens out."""
        vocab = self._vocabulary
        if self.join is not None:
            return self.join(self.texts(ids, skip_special=skip_special))
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

    def text_bytes(self, ids: Sequence[int]) -> int:
        """About how long the text of ids is, in bytes, without making it."""
        return self._vocabulary.tokens.bytes_of(ids)

    def token_bytes(self, token_id: int) -> bytes:
        """Exact bytes of one token; b"" for control tokens and for ids outside the vocabulary.

        Where tokens have no bytes of their own (`join`), the bytes of its text when it stands alone.
        """
        if self.join is not None:
            return self.decode([token_id], skip_special=True).encode()
        return self._vocabulary.token_bytes(token_id)

    def texts(self, ids: Iterable[int], *, skip_special: bool) -> list[str]:
        """Texts of tokens as the files spell them, for `join`; ids that are not tokens are left out."""
        vocab = self._vocabulary
        left_out = {TokenKind.UNUSED, *(SPECIAL_KINDS if skip_special else ())}
        return [vocab.tokens[token_id] for token_id in ids if vocab.kind(token_id) not in left_out]

    def is_special(self, token_id: int) -> bool:
        """Whether a token is a control token (or the unknown token) rather than text."""
        return self._vocabulary.is_special(token_id)

    def id_to_token(self, token_id: int) -> str:
        """Text of a token as the files spell it; raises TokenizerError outside the vocabulary."""
        if not 0 <= token_id < self.vocab_size:
            raise TokenizerError(f"there is no token {token_id} in a vocabulary of {self.vocab_size} tokens")
        return self._vocabulary.tokens[token_id]

    def token_to_id(self, text: str) -> int | None:
        """Id of the token that the files spell like this, or None. Slow: it looks at all tokens."""
        return next((i for i, token in enumerate(self._vocabulary.tokens) if token == text), None)


def _scalar_values(text: str) -> str:
    """The text without lone surrogates, which have no UTF-8 form (a text that comes from JSON can have them)."""
    try:
        for _ in _utf_8(text):
            pass
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _utf_8(text: str) -> Iterator[bytes]:
    """The bytes of a text piece by piece: all at once they take four bytes for each character meanwhile. Raises
    UnicodeEncodeError for lone surrogates."""
    return (text[start : start + _UTF_8_CHARS].encode() for start in range(0, len(text), _UTF_8_CHARS))
