"""Whether to look for bytes for a while before sleeping until they come: to wake a thread takes longer than most do.

Whoever looks gives way to others at each look, and stops when others take its processor. Knows what came of it lately;
not where bytes come from.
"""

from __future__ import annotations

from collections.abc import Iterable
from ctypes import byref, c_int32

from .native_bytes import NativeBytes, PolledFile, address_of, native_bytes

LOOK_NS = 1_000_000  # that one looks, at most
WORTH_LUCK = 0.5  # if that was of use more often than not …
TRY_AGAIN = 64  # … or has not been tried for so many times
LOOKED, CROWDED = 1, 2  # what it took: native/bytes.cpp; 0 is nothing


class Watching:
    """One thread uses it."""

    def __init__(self, native: NativeBytes) -> None:
        # How often bytes came while they were looked for, and nobody else wanted the processor.
        self.luck = 1.0
        self._native = native
        self._effort = c_int32()
        self._waits = 0

    def looked_for(self, descriptor: int, view: memoryview) -> int:
        """How many bytes a socket gives while one looks; 0 if none, or it is not likely. What is wrong, or that it is
        at its end, `recv` will say."""
        if not (limit_ns := self.limit_ns()):
            return 0
        count = self._native.look(descriptor, address_of(view), len(view), limit_ns, byref(self._effort))
        self.note(count > 0, self._effort.value)
        return max(0, int(count))

    def look_at_all(self, wanted: Iterable[tuple[int, int]]) -> None:
        """Return when `poll` will find something, or after a while. `wanted`: descriptors, and what of them."""
        if limit_ns := self.limit_ns():
            files = [PolledFile(*it) for it in wanted]
            all = (PolledFile * len(files))(*files)
            found = self._native.look_at_all(all, len(files), limit_ns, byref(self._effort))
            self.note(found > 0, self._effort.value)

    def limit_ns(self) -> int:
        """For how long to look now; 0: not at all."""
        self._waits += 1
        return 0 if self.luck < WORTH_LUCK and self._waits % TRY_AGAIN else LOOK_NS

    def note(self, came: bool, effort: int) -> None:
        """What looking was good for. If bytes were there at once, that says nothing."""
        if effort:
            self.luck += ((came and effort == LOOKED) - self.luck) / 8


def watching() -> Watching | None:
    """None without the native part: then nobody looks."""
    native = native_bytes()
    return Watching(native) if native is not None else None
