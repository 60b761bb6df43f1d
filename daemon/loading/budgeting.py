"""What a budget leaves for a model: the plan within that, or how much memory is missing, and for what.

Knows the ledger and what a model takes besides its plan; `planning` makes the plan.
"""

from __future__ import annotations

from dataclasses import dataclass

from shoal.daemon.config import NodeConfig
from shoal.daemon.errors import DaemonError
from shoal.daemon.memory import PROCESS, RUNTIMES, pinned_for
from shoal.models.checkpoint.checkpoint import Checkpoint
from shoal.models.checkpoint.shard import AnyCheckpoint
from shoal.offload.budget import Budget
from shoal.offload.kv.disk_pages import buffer_bytes
from shoal.partition.amounts import format_bytes, rounded_up
from shoal.partition.memory_layout import kv_page_bytes
from shoal.partition.placement import DeviceRoom
from shoal.partition.plan import Plan
from shoal.partition.throughput.profile import Device
from shoal.partition.throughput.weights_of import Weighed

from .planning import make_plan


@dataclass(frozen=True)
class Shortfall:
    """A budget is too small. This is what it would have to hold."""

    budget_bytes: int
    model_bytes: int  # the least that a plan takes
    extra_bytes: int  # of KV on its way to disk, and of a draft model
    process_bytes: int
    others_bytes: int  # of models that stay
    reading_bytes: int = 0  # of the tokenizer, before the model is there

    @property
    def by_reading(self) -> bool:
        """Reading the tokenizer takes more than the model afterwards."""
        return self.reading_bytes > self.model_bytes + self.extra_bytes

    @property
    def least_bytes(self) -> int:
        """The smallest budget that would do, in as few digits as it is said in."""
        own = max(self.model_bytes + self.extra_bytes, self.reading_bytes)
        return int(rounded_up(own + self.process_bytes + self.others_bytes))

    @property
    def remedy(self) -> str:
        least = format_bytes(self.least_bytes).replace(" ", "")
        return f"`memory_bytes={least}` would do" + (
            "" if self.by_reading else ", or a smaller `context_tokens`"
        )

    def __str__(self) -> str:
        parts = (
            {"reading the tokenizer": self.reading_bytes}
            if self.by_reading
            else {
                "the model": self.model_bytes,
                "KV-to-disk buffers and any draft model": self.extra_bytes,
            }
        )
        parts |= {"the process": self.process_bytes, "other models": self.others_bytes}
        needs = ", ".join(f"{format_bytes(nbytes)} for {what}" for what, nbytes in parts.items() if nbytes)
        budget = format_bytes(self.budget_bytes)
        return f"needs at least {format_bytes(self.least_bytes)}: {needs}; the budget is {budget}"


def plan_within_budget(
    checkpoint: Checkpoint,
    model: Weighed,
    config: NodeConfig,
    budget: Budget,
    device: Device | None = None,
    *,
    idle_bytes: int = 0,
    extra_bytes: int = 0,
    tokenizer_bytes: int | None = None,
    streaming: bool = True,
    room: DeviceRoom | None = None,
) -> Plan | Shortfall:
    """The plan within what the budget has left. `model`: what the checkpoint weighs in the bits of `config`; `device`:
    what this machine can do, if that is known. `idle_bytes` of other models count as left; `extra_bytes`, for KV on
    its way to disk and a draft model, do not. Reading the tokenizer, which comes first, has to fit, too;
    `tokenizer_bytes`: what it takes afterwards, if it was read. `room`: of a device that computes as much as fits
    there. Raises as `make_plan` does."""
    tokenizer = checkpoint.tokenizer_memory()
    if tokenizer_bytes is not None:
        tokenizer = tokenizer._replace(kept=tokenizer_bytes)
    free = budget.free_bytes + idle_bytes
    memory_bytes = max(0, free - extra_bytes - tokenizer.kept)
    made = make_plan(model, config, memory_bytes, device, streaming=streaming, room=room)
    if isinstance(made, Plan) and tokenizer.reading <= free:
        return made
    least = tokenizer.kept + (made.peak_bytes if isinstance(made, Plan) else made.least_bytes)
    process = budget.held_by(PROCESS) + budget.held_by(RUNTIMES)
    process += budget.held_by(pinned_for(room.name)) if room is not None else 0
    others = budget.held_bytes - idle_bytes - process
    return Shortfall(budget.limit_bytes, least, extra_bytes, process, others, tokenizer.reading)


def require_plan(found: Plan | Shortfall, name: str) -> Plan:
    """The plan, if model `name` has one. Raises DaemonError `resources`, naming the budget that would do."""
    if isinstance(found, Plan):
        return found
    raise DaemonError("resources", f"{name} {found}", found.remedy)


def disk_buffer_bytes(checkpoint: AnyCheckpoint, config: NodeConfig) -> int:
    """Memory for KV pages on their way to and from disk, if KV is kept there."""
    page_bytes = kv_page_bytes(checkpoint.spec, config.kv_type)
    return buffer_bytes(page_bytes) if config.kv_disk_bytes != 0 else 0
