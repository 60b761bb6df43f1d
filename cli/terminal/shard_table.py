"""How the shards that a worker keeps are shown: a row for each, or an object for `--json`."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TypedDict

from shoal.daemon.cluster.weights.shard_cache import CachedShard
from shoal.partition.amounts import format_bytes

from .output import console, table
from .paint import printable


class ShardRow(TypedDict):
    """`part` as 2/3, "" if it is not known. `used`: when it was last taken, ISO 8601."""

    model: str
    part: str
    bytes: int
    used: str
    complete: bool
    in_use: bool
    removed: bool


def shard_row(shard: CachedShard, in_use: bool) -> ShardRow:
    used = datetime.fromtimestamp(shard.used_ns / 1e9, UTC).isoformat(timespec="seconds")
    return ShardRow(
        model=shard.model,
        part=shard.part,
        bytes=shard.nbytes,
        used=used,
        complete=shard.complete,
        in_use=in_use,
        removed=False,
    )


def show_shards(rows: Sequence[ShardRow]) -> None:
    shown = table("model", "part", "size", "last used", "state", right=("size",))
    for row in rows:
        state = "in use" if row["in_use"] else "kept" if row["complete"] else "unfinished"
        used = row["used"][:16].replace("T", " ")
        shown.add_row(printable(row["model"]), row["part"], format_bytes(row["bytes"]), used, state)
    console().print(shown)
