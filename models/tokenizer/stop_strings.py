"""The place where a stop string ends an answer.

Knows which text may still become a stop string. Does not know tokens, nor who asked for the strings.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence

from shoal.models.errors import SamplingError

MAX_STOP_CHARS = 1024


class StopMatcher:
    """Finds the first stop string in text that comes in pieces.

    The first is the one whose last character comes first; if several end there, it is the longest of them. So the
    result does not depend on how the text is cut into pieces. Raises SamplingError for stop strings that are empty
    or longer than MAX_STOP_CHARS.
    """

    def __init__(self, stop_strings: Sequence[str] = ()) -> None:
        for stop in stop_strings:
            if not 0 < len(stop) <= MAX_STOP_CHARS:
                raise SamplingError(
                    f"a stop string has 1 to {MAX_STOP_CHARS} characters, this one has {len(stop)}"
                )
        self._stops = sorted(set(stop_strings))
        self._longest = max(map(len, self._stops), default=0)
        firsts = "|".join(re.escape(stop[0]) for stop in self._stops)
        self._first = re.compile(firsts or r"(?!)")
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """(text that is safe to show, whether a stop string was found); the text ends where one is found."""
        if not self._held and not self._first.search(text):
            return text, False
        # There is no whole stop string in what was held back, so one must end in the new text.
        before, text = len(self._held), self._held + text
        hits = [
            (at + len(stop), at)
            for stop in self._stops
            if (at := text.find(stop, max(0, before - len(stop) + 1))) >= 0
        ]
        if hits:
            _, at = min(hits)
            self._held = ""
            return text[:at], True
        at = self._possible_beginning(text)
        self._held = text[at:]
        return text[:at], False

    def flush(self) -> str:
        """The text that was held back, for when generation has ended without a stop string."""
        held, self._held = self._held, ""
        return held

    def _possible_beginning(self, text: str) -> int:
        """Where the text's longest suffix begins that is the beginning of a stop string; the text's length if none is.

        No place is looked at twice, so the time is proportional to the text's length, whatever the stop strings are.
        """
        at = max(0, len(text) - self._longest + 1)
        while found := self._first.search(text, at):
            at = found.start()
            end = text[at:]
            nearest = bisect_left(self._stops, end)  # the first that may begin with `end`
            if nearest < len(self._stops) and self._stops[nearest].startswith(end):
                return at
            at += 1
        return len(text)
