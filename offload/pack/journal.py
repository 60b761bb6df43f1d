"""The journal of an unfinished pack: what it is to be (`DRAFT`), and a line with a checksum for each block written.

The next attempt believes none of it: it keeps a block only if its bytes still have the checksum. So no line has to be
on the disk before the next one. The journal does not know what is in a block.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import msgspec

from .manifest import BLOCKS, DRAFT, Manifest, PackedBlock
from .writer import PackFile

JOURNAL = "journal"


def noted(partial: Path, manifest: Manifest) -> dict[str, str] | None:
    """Block → checksum, as an earlier attempt at `manifest` noted them in `partial`; None if there was no attempt."""
    draft, journal = partial / DRAFT, partial / JOURNAL
    if not (journal.is_file() and draft.is_file() and draft.read_bytes() == msgspec.json.encode(manifest)):
        return None
    lines = journal.read_text(errors="replace").splitlines()
    return {name: found for name, _, found in (line.partition(" ") for line in lines)}


def note(directory: Path, manifest: Manifest, blocks: Iterable[PackedBlock]) -> None:
    """Makes it look as if an attempt at `manifest` had written these blocks, with the checksums that they have."""
    (directory / DRAFT).write_bytes(msgspec.json.encode(manifest))
    (directory / JOURNAL).write_text("".join(_line(item, item.checksum) for item in blocks))


class Journal:
    """The journal of the pack `manifest` in the directory `partial`. The remains of another pack there are removed."""

    def __init__(self, partial: Path, manifest: Manifest) -> None:
        self._paths = draft, journal = partial / DRAFT, partial / JOURNAL
        written = noted(partial, manifest)
        self._written = written or {}
        if written is None:
            (partial / BLOCKS).unlink(missing_ok=True)
            journal.unlink(missing_ok=True)
            draft.write_bytes(msgspec.json.encode(manifest))
        self._file = journal.open("a", buffering=1)

    def has(self, item: PackedBlock) -> bool:
        """Whether an earlier attempt wrote the block. It may have been altered since."""
        return str(item.block) in self._written

    def kept(self, item: PackedBlock, file: PackFile) -> str | None:
        """The checksum of a block that an earlier attempt wrote, if the file still has its bytes."""
        written = self._written.get(str(item.block))
        intact = written is not None and file.checksum(item.offset, item.nbytes) == written
        return written if intact else None

    def add(self, item: PackedBlock, checksum: str) -> None:
        self._file.write(_line(item, checksum))

    def remove(self) -> None:
        """Removes the journal, once the pack is whole."""
        for path in self._paths:
            path.unlink()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _line(item: PackedBlock, checksum: str) -> str:
    return f"{item.block} {checksum}\n"
