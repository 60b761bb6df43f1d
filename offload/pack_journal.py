"""What an unfinished pack already has: one line per block that is written, with its checksum.

Nothing in it is believed: a block is kept only if its bytes still have the checksum, so no line has to be on the disk
before the next. Does not know what is in a block.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import msgspec
import xxhash

from .pack import BLOCKS, Manifest, PackedBlock
from .pack_file import PackFile

JOURNAL = "journal"


class Journal:
    """The journal in the directory `partial` of the pack `manifest`. What is there of another pack is removed."""

    def __init__(self, partial: Path, manifest: Manifest) -> None:
        self._path = partial / JOURNAL
        claim = xxhash.xxh3_128_hexdigest(msgspec.json.encode(manifest))
        lines = self._path.read_text(errors="replace").splitlines() if self._path.is_file() else []
        self._written: dict[str, str] = {}
        if lines[:1] == [claim]:
            self._written = {name: found for name, _, found in (line.partition(" ") for line in lines[1:])}
        else:
            (partial / BLOCKS).unlink(missing_ok=True)
            self._path.write_text(claim + "\n")
        self._file = self._path.open("a", buffering=1)

    def kept(self, item: PackedBlock, file: PackFile) -> str | None:
        """The checksum of a block that an earlier attempt wrote, if its bytes are still those."""
        written = self._written.get(str(item.block))
        if written is None:
            return None
        digest = xxhash.xxh3_64()
        for chunk in file.stored(item.offset, item.nbytes):
            digest.update(chunk.numpy().data)
        return written if digest.hexdigest() == written else None

    def add(self, item: PackedBlock, checksum: str) -> None:
        self._file.write(f"{item.block} {checksum}\n")

    def remove(self) -> None:
        self._path.unlink()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
