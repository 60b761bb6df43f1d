"""Which KV pages are on disk, in which slot of the file, and which goes first when all slots are taken.

A page is found as in the prefix cache: below the text before it, by its token ids themselves. A chain of hashes names
the text before, so that a page is found again after a restart. Pure bookkeeping: no files, no arrays. Thread-safe: one
thread looks pages up while another enters the pages that it has written.
"""

from __future__ import annotations

import threading
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from heapq import heappop, heappush
from typing import NamedTuple, TypeVar

TOKEN_BYTES = 4
DIGEST_BYTES = 32
NO_TEXT = bytes(DIGEST_BYTES)  # the digest of the text before a first page

_Text = TypeVar("_Text", bytes, tuple[int, ...])
_Page = TypeVar("_Page")


def packed(tokens: Sequence[int]) -> bytes:
    """Token ids in the form in which they are kept and compared, 4 bytes each."""
    return array("i", tokens).tobytes()


def chained(parent: bytes, tokens: bytes) -> bytes:
    """The digest of a text that ends in a page, from the digest of the text before that page and its packed tokens."""
    return blake2b(parent + tokens, digest_size=DIGEST_BYTES).digest()


class Slot(NamedTuple):
    """Where a page lies, for ranks that know no texts: its slot, and the digest of what it holds."""

    slot: int
    digest: bytes


@dataclass(eq=False, slots=True)
class Entry:
    """A page in a slot. It holds `tokens` (packed) after the text whose digest is `parent`.

    `checksum` is of its bytes. `used` orders pages by when they were last wanted; `stored_used` is what the file has.
    """

    slot: int
    parent: bytes
    tokens: bytes
    checksum: int
    used: int = 0
    stored_used: int = 0

    @property
    def digest(self) -> bytes:
        """Of the text that ends with this page."""
        return chained(self.parent, self.tokens)


class KvIndex:
    """At most `slots` pages; the least recently used goes first. `entries` were found on disk, in any order."""

    def __init__(self, slots: int, entries: Iterable[Entry] = ()) -> None:
        self.slots = slots
        self._lock = threading.RLock()
        self._used: OrderedDict[int, Entry] = OrderedDict()  # by slot, least recently used first
        self._children: dict[bytes, dict[bytes, Entry]] = {}
        self._clock = 0
        self._end = 0  # slots from here on were never used
        for entry in sorted(entries, key=lambda entry: entry.used):
            if entry.slot < slots:
                self._enter(entry)
                self._clock = max(self._clock, entry.used)
                self._end = max(self._end, entry.slot + 1)
        self._free = [slot for slot in range(self._end) if slot not in self._used]  # a heap

    def __len__(self) -> int:
        return len(self._used)

    def entries(self) -> list[Entry]:
        """Least recently used first."""
        with self._lock:
            return list(self._used.values())

    # --- looking up ----------------------------------------------------------------------------------------

    def find(self, parent: bytes, tokens: bytes) -> Entry | None:
        with self._lock:
            return self._children.get(parent, {}).get(tokens)

    def nearest(self, parent: bytes, wanted: bytes) -> tuple[Entry | None, int]:
        """The page after `parent` that begins most like `wanted`, and how many tokens they share."""
        with self._lock:
            return most_alike(self._children.get(parent, {}), wanted, TOKEN_BYTES)

    def touch(self, parent: bytes, tokens: bytes) -> bool:
        """Whether a page holds these tokens, maybe with more after them. If so, note that it was used just now."""
        with self._lock:
            entry = self.find(parent, tokens) or self.nearest(parent, tokens)[0]
            if entry is None or not entry.tokens.startswith(tokens):
                return False
            self._clock += 1
            entry.used = self._clock
            self._used.move_to_end(entry.slot)
            return True

    def holds(self, entry: Entry) -> bool:
        """Whether the entry is still in its slot."""
        return self._used.get(entry.slot) is entry

    # --- changing ------------------------------------------------------------------------------------------

    def claim(self, parent: bytes, tokens: bytes, checksum: int) -> Entry | None:
        """A slot to write a page into. If none is free, the least recently used page is forgotten. None if there are
        no slots at all."""
        with self._lock:
            if self._free:
                slot = heappop(self._free)
            elif self._end < self.slots:
                slot = self._end
                self._end += 1
            elif self._used:
                oldest = next(iter(self._used.values()))
                self._leave(oldest)
                slot = oldest.slot
            else:
                return None
            self._clock += 1
            return Entry(slot, parent, tokens, checksum, self._clock)

    def refuse(self, claimed: Entry) -> None:
        """The slot cannot be written. It is not used again, and the file does not grow any more."""
        with self._lock:
            if claimed.slot == self._end - 1:
                self._end -= 1
            self.slots = min(self.slots, self._end)

    def release(self, claimed: Entry) -> None:
        """The slot is not needed after all."""
        with self._lock:
            if claimed.slot < self.slots:
                heappush(self._free, claimed.slot)

    def add(self, claimed: Entry) -> None:
        """The slot has been written. Forget pages whose tokens are the beginning of this one's."""
        with self._lock:
            for known in list(self._children.get(claimed.parent, {}).values()):
                if claimed.tokens.startswith(known.tokens):
                    self.forget(known)
            self._enter(claimed)

    def resize(self, slots: int) -> None:
        """Keep only the first `slots` slots from now on, and forget what is in the others."""
        with self._lock:
            self.slots = slots
            for entry in [entry for entry in self._used.values() if entry.slot >= slots]:
                self._leave(entry)
            self._end = min(self._end, slots)
            self._free = sorted(slot for slot in self._free if slot < slots)

    def forget(self, entry: Entry) -> None:
        """Forget a page, if it is still there."""
        with self._lock:
            if self.holds(entry):
                self._leave(entry)
                heappush(self._free, entry.slot)

    def _enter(self, entry: Entry) -> None:
        siblings = self._children.setdefault(entry.parent, {})
        if (twin := siblings.get(entry.tokens)) is not None:  # left by a crash; the later one counts
            del self._used[twin.slot]
        siblings[entry.tokens] = entry
        self._used[entry.slot] = entry

    def _leave(self, entry: Entry) -> None:
        del self._used[entry.slot]
        siblings = self._children[entry.parent]
        del siblings[entry.tokens]
        if not siblings:
            del self._children[entry.parent]


def most_alike(pages: Mapping[_Text, _Page], wanted: _Text, unit: int = 1) -> tuple[_Page | None, int]:
    """Of pages by their tokens, the one that begins most like `wanted`, and how many tokens they share.

    `unit`: items of a text that make one token.
    """
    best, shared = None, 0
    for tokens, page in pages.items():
        more = (shared + 1) * unit
        if len(wanted) >= more and tokens[:more] == wanted[:more]:
            best, shared = page, _common_length(tokens, wanted) // unit
    return best, shared


def _common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """How many items both have in common from the beginning on."""
    for index, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return index
    return min(len(first), len(second))
