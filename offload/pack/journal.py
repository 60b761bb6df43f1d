"""What an unfinished pack is to be (`DRAFT`), and has already: one line per block that is written, with its checksum.

Nothing in it is believed: a block is kept only if its bytes still have the checksum, so no line has to be on the disk
before the next. Does not know what is in a block.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from .manifest import BLOCKS, DRAFT, Manifest, PackedBlock
from .writer import PackFile

JOURNAL = "journal"


def noted(partial: Path, manifest: Manifest) -> dict[str, str] | None:
    """Block → checksum of what an attempt at `manifest` says it has written to `partial`; None = there was none."""
    draft, journal = partial / DRAFT, partial / JOURNAL
    if not (journal.is_file() and draft.is_file() and draft.read_bytes() == msgspec.json.encode(manifest)):
        return None
    lines = journal.read_text(errors="replace").splitlines()
    return {name: found for name, _, found in (line.partition(" ") for line in lines)}


class Journal:
    """The journal in the directory `partial` of the pack `manifest`. What is there of another pack is removed."""

    def __init__(self, partial: Path, manifest: Manifest) -> None:
        self._paths = draft, journal = partial / DRAFT, partial / JOURNAL
        self._written: dict[str, str] = {}
        if (written := noted(partial, manifest)) is not None:
            self._written = written
        else:
            (partial / BLOCKS).unlink(missing_ok=True)
            journal.unlink(missing_ok=True)
            draft.write_bytes(msgspec.json.encode(manifest))
        self._file = journal.open("a", buffering=1)

    def kept(self, item: PackedBlock, file: PackFile) -> str | None:
        """The checksum of a block that an earlier attempt wrote, if its bytes are still those."""
        written = self._written.get(str(item.block))
        if written is None:
            return None
        return written if file.checksum(item.offset, item.nbytes) == written else None

    def add(self, item: PackedBlock, checksum: str) -> None:
        self._file.write(f"{item.block} {checksum}\n")

    def remove(self) -> None:
        """When the pack is whole."""
        for path in self._paths:
            path.unlink()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
