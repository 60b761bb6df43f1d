"""Text as it is generated: token by token, never half a character, never half a stop string.

Knows UTF-8's borders and which text might still become a stop string. Deliberately does not know tokens'
spelling (tokenizer) nor when generation ends (the caller's). Both classes are O(1) amortised per token.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence

from shoal.models.errors import SamplingError

from .tokenizer import Tokenizer

MAX_STOP_CHARS = 1024


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


class StopMatcher:
    """Finds the first stop string in text that comes in pieces.

    The first is the one whose last character comes first (of several ending there, the longest), so the
    result does not depend on how the text was cut into pieces. Raises SamplingError for stop strings that
    are empty or longer than MAX_STOP_CHARS.
    """

    def __init__(self, stop_strings: Sequence[str] = ()) -> None:
        for stop in stop_strings:
            if not 0 < len(stop) <= MAX_STOP_CHARS:
                raise SamplingError(
                    f"a stop string has 1 to {MAX_STOP_CHARS} characters, this one has {len(stop)}"
                )
        self._stops = tuple(stop_strings)
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """(text that is safe to show, whether a stop string was hit); a hit is the end of the text."""
        if not self._stops:
            return text, False
        text = self._held + text
        hits = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if hits:
            _, at = min(hits)
            self._held = ""
            return text[:at], True
        held = self._possible_beginning(text)
        self._held = text[len(text) - held :]
        return text[: len(text) - held], False

    def flush(self) -> str:
        """What was held back, when generation has ended without a hit."""
        held, self._held = self._held, ""
        return held

    def _possible_beginning(self, text: str) -> int:
        """Length of the longest end of the text with which a stop string begins."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0
