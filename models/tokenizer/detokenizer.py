"""Text as it is generated: token by token, never half a character.

Knows where characters end in UTF-8, and how long a text that the `tokenizers` library puts together can still change.
Does not know how tokens are spelled (tokenizer), nor when generation ends (stop_strings). O(1) amortised per token.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Sequence
from os.path import commonprefix

from .tokenizer import Tokenizer

# Stands for whatever token comes next: a byte that completes no character. Text that stays the same when it follows
# cannot be changed by any later token.
_NEXT = "<0xFF>"


class Detokenizer:
    """Ids one by one → text; all pieces together equal `decode(ids, skip_special=True)`.

    prompt_ids: the tokens before. If they have any text and tokens have bytes of their own, the answer's first word
    keeps its leading space.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = ()) -> None:
        join = tokenizer.join
        self._text = _Bytes(tokenizer, prompt_ids) if join is None else _Joined(tokenizer, join)

    def push(self, token_id: int) -> str:
        """Text that this token completes: "" for control tokens and while a character is incomplete."""
        return self._text.push(token_id)

    def flush(self) -> str:
        """At the end: the text that was held back, with U+FFFD for a character that never became complete."""
        return self._text.flush()


class _Bytes:
    """For tokens that have bytes of their own: a character is given out with its last byte."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Iterable[int]) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._drop_space = tokenizer.add_space_prefix and not any(map(tokenizer.token_bytes, prompt_ids))

    def push(self, token_id: int) -> str:
        data = self._token_bytes(token_id)
        if data and self._drop_space:
            self._drop_space = False
            data = data.removeprefix(b" ")
        return self._utf8.decode(data)

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class _Joined:
    """For tokens whose text depends on their neighbours: the last few are joined with and without one more after them.

    The text that is the same both times will not change any more. `_window` has the tokens whose text is not all
    shown yet, and before them as many others as are needed for something to stand before that text. Of the window's
    text the first `_shown` characters have been shown. If the join rewrites, all text comes at the end.
    """

    def __init__(self, tokenizer: Tokenizer, join: Callable[[list[str]], str]) -> None:
        self._tokenizer = tokenizer
        self._join = join
        self._window: list[str] = []
        self._shown = 0

    def push(self, token_id: int) -> str:
        texts = self._texts([token_id])
        self._window += texts
        if self._tokenizer.rewrites or not texts:
            return ""
        text = self._join(self._window)
        longer = self._join([*self._window, _NEXT])
        stays = commonprefix([text, longer]).rstrip("\ufffd")  # noqa: RUF071 (texts, no paths)
        piece = stays[self._shown :]
        self._shown += len(piece)
        self._forget(text)
        return piece

    def flush(self) -> str:
        text = self._join(self._window)
        piece = text[self._shown :]
        self._shown = len(text)
        return piece

    def _texts(self, ids: Sequence[int]) -> list[str]:
        return self._tokenizer.texts(ids, skip_special=True)

    def _forget(self, text: str) -> None:
        """Shorten the window to about the fewest tokens whose text ends in what is hidden and has more before it."""
        hidden, size = text[self._shown :], 1
        while size < len(self._window):
            short = self._join(self._window[-size:])
            if len(short) > len(hidden) and short.endswith(hidden):
                self._window = self._window[-size:]
                self._shown = len(short) - len(hidden)
                return
            size *= 2
