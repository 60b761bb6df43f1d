"""Configuration of a node: frozen, built once at the edge, validated with field, value and limit.

Knows defaults and ranges. Does not know command lines or the environment.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from math import ceil
from typing import Literal, get_args

from shoal.comm.group.sums.wire_types import WireType
from shoal.comm.messages import Load
from shoal.devices.device_names import AUTO, CPU, DeviceNameError, read_name
from shoal.engine.learn.pacing import SLOWDOWN
from shoal.offload.pack.manifest import Quant
from shoal.partition.amounts import format_bytes

from . import cgroup
from .errors import DaemonError

KvType = Literal["f32", "f16", "bf16", "i8"]
CLUSTER_WIRES: tuple[WireType, ...] = get_args(WireType)


def default_threads() -> int:
    """Processors this process may use: the affinity mask and the cgroup's CPU quota, at least one."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if (quota := cgroup.processors()) is not None:
        allowed = min(allowed, ceil(quota))
    return max(1, allowed)


@dataclass(frozen=True)
class NodeConfig:
    """How one node runs models.

    `memory_bytes` bounds weights + KV + scratch; None leaves a tenth of the free memory alone.
    `context_tokens` is the longest sequence a request may reach; None takes min(the model's, 8192), or less where
    memory is short, but at least `least_context_tokens`.
    `kv_tokens` is the KV pool shared by all sequences; None sizes it for all
    sequences at full context, within memory. `kv_type` is what K and V are rounded to; i8, with a scale per token
    and head, takes about half the memory of f16. `kv_disk_bytes` bounds the KV kept on disk, where a node is given a
    place for it; 0 = none, None = what is usual (`kv_files`). `shard_disk_bytes` bounds the parts of others' models
    that are kept on disk; 0 = none, None = a quarter of what is free without them.
    """

    threads: int | None = None  # None = default_threads()
    memory_bytes: int | None = None
    context_tokens: int | None = None
    least_context_tokens: int = 1
    kv_tokens: int | None = None
    kv_type: KvType = "f16"
    kv_disk_bytes: int | None = None
    shard_disk_bytes: int | None = None
    max_sequences: int = 16  # decoded together in one step
    max_queue: int = 64  # waiting requests; one more is answered `busy`
    chunk_tokens: int = 256  # of prompts in one step, at most
    slowdown: float = SLOWDOWN  # of answers, by prompts read beside them; inf = whatever is fastest for all
    max_guesses: int = 32  # tokens guessed ahead in one step, where that pays; 0 = never
    cluster_wire: WireType = "f32"  # what sums may be rounded to between machines, where that is faster
    ranks: int | None = None  # machines that compute a model together; None = as many as make it faster
    quant: Quant = "keep"  # of a model that is loaded: what its weights are held in
    device: str = AUTO  # that computes as much of a model as fits there (`devices.opening`)

    def __post_init__(self) -> None:
        limits: dict[str, tuple[int, int]] = {
            "threads": (1, os.cpu_count() or 1),
            "memory_bytes": (1, 1 << 50),
            "context_tokens": (1, 1 << 26),
            "least_context_tokens": (1, 1 << 26),
            "kv_tokens": (1, 1 << 32),
            "kv_disk_bytes": (0, 1 << 50),
            "shard_disk_bytes": (0, 1 << 50),
            "max_sequences": (1, 4096),
            "max_queue": (0, 1 << 14),
            "chunk_tokens": (16, 1 << 16),
            "max_guesses": (0, 1024),
            "ranks": (1, 256),
        }
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                amount = format_bytes if name.endswith("_bytes") else str
                said = f"`{name}={amount(value)}`: must be from {amount(low)} to {amount(high)}"
                raise DaemonError("bad_request", said)
        if self.device != AUTO:
            try:
                read_name(self.device)
            except DeviceNameError as error:
                raise DaemonError("bad_request", f"`device={self.device[:40]!r}` {error}") from error
        if self.cluster_wire not in CLUSTER_WIRES:
            choices = ", ".join(CLUSTER_WIRES)
            raise DaemonError("bad_request", f"`cluster_wire={self.cluster_wire}`: must be one of {choices}")
        if self.kv_type not in get_args(KvType):
            raise DaemonError(
                "bad_request", f"`kv_type={self.kv_type}`: must be one of {', '.join(get_args(KvType))}"
            )

    @property
    def wires(self) -> tuple[WireType, ...]:
        """What sums may be rounded to: from exact numbers to those that were allowed."""
        return CLUSTER_WIRES[: 1 + CLUSTER_WIRES.index(self.cluster_wire)]

    def for_load(self, request: Load, quant: Quant) -> NodeConfig:
        """The same for one model that is asked for in these bits."""
        return replace(
            self,
            context_tokens=request.context or self.context_tokens,
            least_context_tokens=request.least_context or 1,
            ranks=request.ranks or self.ranks,
            quant=quant,
        )

    @property
    def names_device(self) -> bool:
        """Whether a device is to compute, not the CPU alone."""
        return self.device not in (AUTO, CPU)

    @property
    def thread_count(self) -> int:
        return self.threads or default_threads()


def beyond_the_model(asked: int, longest: int, made_for: int | None = None) -> DaemonError:
    """A context was asked for that the model cannot have. made_for: where its rope scaling extends that to `longest`.
    In tokens."""
    made = f"was made for {made_for or longest}"
    if made_for is not None and longest > made_for:
        made += f", and its rope scaling extends that to {longest}"
    return DaemonError(
        "context_overflow",
        f"a context of {asked} tokens was asked for, the model {made}",
        f"use `context_tokens={longest}` or less",
    )


def require_context_for(
    prompt_tokens: int, new_tokens: int, context_tokens: int | None, longest: int
) -> None:
    """Raises DaemonError `context_overflow` unless prompt and answer fit into the context asked for, if one was, and
    into the `longest` that the model can have. In tokens."""
    most = min(context_tokens or longest, longest)
    if prompt_tokens + new_tokens > most:
        whose = "the context" if most == context_tokens else "the model's context"
        raise DaemonError(
            "context_overflow",
            f"{prompt_tokens} + {new_tokens} tokens exceed {whose} of {most}",
            f"`prompt_tokens` and `new_tokens` may be {most} together",
        )


def beyond_what_is_loaded(asked: int, name: str, loaded: int, hint: str) -> DaemonError:
    """A request asked for more context than the model has, which is the same for all. In tokens."""
    said = f"a context of {asked} tokens was asked for, {name} is loaded with {loaded}, for all who use it"
    return DaemonError("context_overflow", said, hint)
