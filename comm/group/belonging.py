"""Whether this machine belongs to a cluster, as its head or as a worker: by the files below its home.

    <directory>/listen        where a head awaits others, an address in each line
    <directory>/peers.json    see `peers`

Knows that there are such files. Does not know what follows from it.
"""

from __future__ import annotations

from pathlib import Path

from ..errors import KeyFileError


def belongs(directory: Path) -> bool:
    """A file that cannot be read counts: once it is mended, this machine may be a member again."""
    if (directory / "listen").exists():
        return True
    if not (directory / "peers.json").exists():
        return False
    from .peers import Peers  # brings TLS, which machines that were never paired do without

    try:
        return any(peer.role == "head" for peer in Peers(directory).listed())
    except KeyFileError:
        return True
