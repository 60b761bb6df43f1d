"""What head and workers say to each other on control channels, as msgspec structs.

A worker begins with `Attach` and then sends a `Beat` twice a second. The head asks it to `Serve` a shard, hears how far
that is, and tells it to `Drop` it. It introduces the workers of a group to each other. Channels for data and weights
begin with the `Epoch` of the group that they are for, between workers, too.
On one for measuring the head says first where else it is (`HeadAt`), and then answers the worker's probes.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from shoal.comm.group.sums.wire_types import WireType
from shoal.daemon.library.kv_files import MOST_SLOTS
from shoal.offload.kv.disk_pages import buffer_bytes
from shoal.offload.pack.manifest import Quant
from shoal.partition.memory_layout import kv_page_bytes
from shoal.partition.plan import Plan
from shoal.partition.slicing import Shard
from shoal.partition.spec import ModelSpec

Text = Annotated[str, Meta(max_length=4096)]
Count = Annotated[int, Meta(ge=0, le=1 << 62)]
LentBytes = Annotated[int, Meta(ge=0, le=1 << 50)]
LentThreads = Annotated[int, Meta(ge=0, le=1 << 12)]
Speed = Annotated[float, Meta(ge=0, le=1e18)]
RankNumber = Annotated[int, Meta(ge=0, le=255)]
HostPort = Annotated[str, Meta(max_length=128)]

BEAT_S = 0.5
SILENT_S = 2.5  # without a beat, a node is lost
LAST_WORD_S = 0.5  # in which it has to go, or it is not said
FROZEN_S = 2.5  # computing without coming further, it is lost, too
PROBE_BYTES = 1 << 20  # that a link is measured with, at most
CONTROL_BYTES = PROBE_BYTES + (64 << 10)  # of one message


class Attach(Struct, tag=True, frozen=True, kw_only=True):
    """A worker is there. Bytes and speeds are what it has for shards."""

    name: Text
    version: Text
    kernels: Text
    threads: LentThreads
    memory_bytes: LentBytes
    memory_bytes_per_s: Speed = 0.0
    flops: Speed = 0.0
    disk_bytes_per_s: Speed = 0.0
    measured: Count = 1  # speeds are the best of so many measurements
    routes: Count = 1  # of this many addresses the one that is used is the best


class Beat(Struct, tag=True, frozen=True, kw_only=True):
    """How far a worker's compute thread is. `at_work`: it computes, and does not wait for the head. `epoch`: the group
    that it computes for, 0 = none."""

    epoch: Count = 0
    steps: Count = 0
    blocks: Count = 0
    at_work: bool = False
    moved: Count = 0  # bytes over channels of its groups
    free_bytes: LentBytes = 0
    shard_bytes: LentBytes = 0  # held for shards, at the same moment
    resident_bytes: LentBytes = 0


class Fellow(Struct, frozen=True, kw_only=True):
    """Another worker of the same group, by its certificate (DER)."""

    rank: RankNumber
    certificate: Annotated[bytes, Meta(max_length=2048)]


class KvOnDisk(Struct, frozen=True, kw_only=True):
    """KV that leaves memory is to be kept on the disks of all ranks. store: 64 hex digits that differ if anything
    differs that its bits depend on. slots: how many pages, at most."""

    store: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
    slots: Annotated[int, Meta(ge=1, le=MOST_SLOTS)]


class Serve(Struct, tag=True, frozen=True, kw_only=True):
    """Be a rank of a group: load this shard and follow. `fellows`: let these in, and say where (`Listens`). A head that
    names `files` answers `WantDigest`."""

    epoch: Count
    model: Text  # for people
    shard: Shard
    spec: ModelSpec  # of the shard
    plan: Plan
    quant: Quant
    wire: WireType
    fellows: Annotated[list[Fellow], Meta(max_length=256)] = []
    kv_on_disk: KvOnDisk | None = None
    fetch_only: bool = False  # into the cache on disk, for a group that is to come; nothing is computed
    files: Annotated[str, Meta(pattern="^([0-9a-f]{32})?$")] = ""  # `Description.key`; fellows lend of these

    @property
    def held_bytes(self) -> int:
        """What the shard takes of a machine's memory. The plan has to be one that was checked."""
        if self.fetch_only:
            return 0
        if self.kv_on_disk is None:
            return self.plan.peak_bytes
        return self.plan.peak_bytes + buffer_bytes(kv_page_bytes(self.spec, self.plan.kv.dtype))


class Listens(Struct, tag=True, frozen=True, kw_only=True):
    """Where this worker's fellows may reach it, as HOST:PORT; nowhere, if it cannot listen."""

    epoch: Count
    addresses: Annotated[list[HostPort], Meta(max_length=8)]


class FellowAt(Struct, frozen=True, kw_only=True):
    """Where a fellow listens, as it says and as the head sees it."""

    rank: RankNumber
    addresses: Annotated[list[HostPort], Meta(max_length=16)]


class Introduce(Struct, tag=True, frozen=True, kw_only=True):
    """Meet your fellows: dial those of lower rank, and wait for the others."""

    epoch: Count
    fellows: Annotated[list[FellowAt], Meta(max_length=256)]


class FellowMet(Struct, frozen=True, kw_only=True):
    """A fellow that was reached, and what the one that dialled has measured (the other: 0). `trouble`: why it was not
    reached."""

    rank: RankNumber
    latency_s: Speed = 0.0
    bytes_per_s: Speed = 0.0
    trouble: Text = ""


class Met(Struct, tag=True, frozen=True, kw_only=True):
    """The answer to `Introduce`."""

    epoch: Count
    fellows: Annotated[list[FellowMet], Meta(max_length=256)]


class Loading(Struct, tag=True, frozen=True, kw_only=True):
    epoch: Count
    done: Count
    total: Count


class Ready(Struct, tag=True, frozen=True, kw_only=True):
    """It is loaded. Said again when there is room for another number of pages of KV on disk. kv_trouble: why there is
    none for any though they were to be kept."""

    epoch: Count
    peak_bytes: Count
    kv_slots: Count = 0
    kv_trouble: Text = ""


class ShardRefused(Struct, tag=True, frozen=True, kw_only=True):
    """The worker does not serve that shard, or not any more."""

    epoch: Count
    code: Text
    reason: Text


class Drop(Struct, tag=True, frozen=True, kw_only=True):
    epoch: Count


class Alive(Struct, tag=True, frozen=True, kw_only=True):
    """The head's beat: it has nothing else to say."""


class Probe(Struct, tag=True, frozen=True, kw_only=True):
    """The head measures the link. The worker answers at once, with `reply_bytes` bytes."""

    number: Count
    data: Annotated[bytes, Meta(max_length=PROBE_BYTES)] = b""
    reply_bytes: Annotated[int, Meta(ge=0, le=PROBE_BYTES)] = 0


class Probed(Struct, tag=True, frozen=True, kw_only=True):
    number: Count
    data: Annotated[bytes, Meta(max_length=PROBE_BYTES)] = b""


class HeadAt(Struct, tag=True, frozen=True, kw_only=True):
    """Where the head listens, as HOST:PORT, and what it runs."""

    addresses: Annotated[list[HostPort], Meta(max_length=64)]
    version: Text = ""


class Left(Struct, tag=True, frozen=True, kw_only=True):
    """The worker lends this head nothing any more: it need not be waited for."""


class Dismissed(Struct, tag=True, frozen=True, kw_only=True):
    """The head's last word: it has forgotten this worker, which would have to be paired again."""


class Epoch(Struct, tag=True, frozen=True, kw_only=True):
    """The first message of a channel for data or weights."""

    epoch: Count


FromWorker = Attach | Beat | Listens | Met | Loading | Ready | ShardRefused | Probed | Left
FromHead = Serve | Introduce | Drop | Alive | Probe | Dismissed
