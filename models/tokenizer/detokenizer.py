"""Text as it is generated: token by token, never half a character, never half a stop string.

Knows UTF-8's borders and which text might still become a stop string. Deliberately does not know tokens'
spelling (tokenizer) nor when generation ends (the caller's). Both classes are O(1) amortised per token.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from .tokenizer import Tokenizer


class Detokenizer:
    """Ids one by one → text; all pieces together equal `decode(ids, skip_special=True)`.

    prompt_ids: what stands before; after any text there, a first word keeps its leading space.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Iterable[int] = ()) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._drop_space = tokenizer.add_space_prefix and not any(map(tokenizer.token_bytes, prompt_ids))

    def push(self, token_id: int) -> str:
        """Text that this token completes: "" for control tokens and while a character is incomplete."""
        data = self._token_bytes(token_id)
        if data and self._drop_space:
            self._drop_space = False
            data = data.removeprefix(b" ")
        return self._utf8.decode(data)

    def flush(self) -> str:
        """The end: U+FFFD for a character that never became complete, else ""."""
        return self._utf8.decode(b"", final=True)
