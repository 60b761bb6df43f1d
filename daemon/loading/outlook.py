"""What loading a model on this machine would give: its plan, who takes how much of the memory, and how long a token
waits for the disk.

Reads headers and, if weights would be streamed, a little of the disk to see how fast it is. Loads and builds nothing.
"""

from __future__ import annotations

from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from shoal.daemon.config import NodeConfig
from shoal.daemon.error_codes import refusing
from shoal.daemon.library.packs import Packs
from shoal.daemon.memory import budget_of
from shoal.daemon.model_name import Quant
from shoal.daemon.throughput.expectation import Expectation
from shoal.daemon.throughput.own_machine import OwnMachine
from shoal.models.checkpoint.checkpoint import Checkpoint, open_checkpoint
from shoal.offload.budget import Budget
from shoal.offload.pack.builder import source_of
from shoal.offload.pack.layout import layout
from shoal.offload.read_speed import read_speed
from shoal.partition.throughput.alone import usual_job
from shoal.partition.throughput.placing.device_choice import batch_rate
from shoal.partition.throughput.placing.device_ways import expert_of, with_laws
from shoal.partition.throughput.placing.rooms import accelerator
from shoal.partition.throughput.prediction import Binding

from .budgeting import Shortfall, disk_buffer_bytes, plan_within_budget
from .device_rooms import device_room
from .kept_uses import weighed_as_used


class Uses(Struct, frozen=True):
    """Bytes of the budget by what they are for. `kv` includes the buffers on its way to disk, `scratch` the
    tokenizer."""

    weights: int
    window: int
    kv: int
    scratch: int
    process: int
    free: int


class Outlook(Struct, frozen=True):
    """How the daemon would run a model. `plan` is in words. `pack_bytes`: size of the pack that its weights would come
    from, 0 if from none; `packed` says whether this pack exists. `read_bytes_per_s`: speed of the disk just now;
    `step_s`: what the disk takes for a token. Both are 0 if nothing is streamed. `tokens_per_s`, between the two of
    `band`: of an answer of usual length, whose first token comes after `first_s`, with a prompt of `prompt_tokens`;
    `binding` is what decides the speed.
    `measured`: whether this machine's speed is known. `device`: which one computes blocks besides the CPU, "" if none;
    with one of which nothing is known, nothing is predicted (0). `batch_tokens_per_s`, of answers to many requests at
    once, is predicted where a device may compute, whether it does or not; 0: it is not. `device_bytes`: of the
    device's memory; `placed`: what lies where, in words; `why` that, where it was a choice; `trouble`: what is not as
    it should be with the device."""

    plan: str
    quant: Quant
    budget_bytes: int
    memory_bytes: Uses
    weights_bytes: int
    streamed_bytes: int
    context_tokens: int
    kv_tokens: int
    kv_type: str
    pack_bytes: int = 0
    packed: bool = False
    read_bytes_per_s: float = 0.0
    step_s: float = 0.0
    tokens_per_s: float = 0.0
    band: tuple[float, float] = (0.0, 0.0)
    first_s: float = 0.0
    prompt_tokens: int = 0
    binding: Binding = "memory"
    measured: bool = False
    device: str = ""
    device_bytes: int = 0
    placed: str = ""
    why: str = ""
    trouble: str = ""
    batch_tokens_per_s: float = 0.0


class TooLarge(Struct, frozen=True):
    """The model cannot run within the budget: why, the budget that would do, and what to do, in words."""

    refused: str
    budget_bytes: int
    least_bytes: int
    remedy: str = ""


def outlook(path: Path, config: NodeConfig, packs: Packs, machine: OwnMachine) -> Outlook | TooLarge:
    """How the daemon would run the checkpoint at `path` on this machine. Raises DaemonError if it could not, for other
    reasons than memory."""
    budget = budget_of(config.memory_bytes)
    with refusing(path.name), open_checkpoint(path) as checkpoint:
        return _outlook(checkpoint, config, budget, packs, machine)


def _outlook(
    checkpoint: Checkpoint, config: NodeConfig, budget: Budget, packs: Packs, machine: OwnMachine
) -> Outlook | TooLarge:
    on_disk = disk_buffer_bytes(checkpoint, config)
    model, *_ = weighed_as_used(checkpoint, config.quant, machine)
    room, trouble = device_room(config.device, budget, model, machine)
    plan = plan_within_budget(
        checkpoint, model, config, budget, machine.device, extra_bytes=on_disk, room=room
    )
    if isinstance(plan, Shortfall):
        return TooLarge(str(plan), plan.budget_bytes, plan.least_bytes, plan.remedy)
    process, tokenizer = budget.held_bytes, checkpoint.tokenizer_memory().kept  # no model is loaded here
    pack_bytes, packed, speed = 0, False, 0.0
    if plan.streams or config.quant != "keep":
        pack = packs.find(checkpoint, config.quant)
        packed = pack is not None
        pack_bytes = layout(checkpoint, config.quant, source_of(checkpoint)).nbytes
        if plan.streams:
            largest = max(checkpoint.files, key=lambda file: file.stat().st_size)
            speed = read_speed(pack.path if pack else largest)
    found = Outlook(
        plan=plan.describe(speed),
        quant=config.quant,
        budget_bytes=budget.limit_bytes,
        memory_bytes=Uses(
            weights=plan.pinned_bytes + plan.expert_bytes,
            window=plan.window_bytes,
            kv=plan.kv.nbytes - plan.device_kv_bytes + on_disk,
            scratch=plan.scratch_bytes + tokenizer,
            process=process,
            free=budget.free_bytes - plan.peak_bytes - on_disk - tokenizer,
        ),
        weights_bytes=plan.weights_bytes,
        streamed_bytes=plan.streamed_bytes,
        context_tokens=plan.context_tokens,
        kv_tokens=plan.kv.tokens,
        kv_type=plan.kv.dtype,
        pack_bytes=pack_bytes,
        packed=packed,
        read_bytes_per_s=round(speed),
        step_s=plan.step_s(speed),
        device=plan.device,
        device_bytes=plan.device_bytes,
        placed=plan.placed,
        why=plan.why,
        trouble=trouble,
    )
    if room is not None and (host := with_laws(model, machine.device, room)) is not None:
        found = replace(found, batch_tokens_per_s=batch_rate(model, plan, host))
    there = accelerator(room, expert_of(model)) if room is not None else None
    usual = Expectation(model, plan, machine, speed, there=there).usual
    if usual is None:
        return found
    return replace(
        found,
        tokens_per_s=usual.tokens_per_s,
        band=usual.band,
        first_s=usual.ttft_s,
        prompt_tokens=usual_job(plan.context_tokens).prompt_tokens,
        binding=usual.binding,
        measured=machine.device.measured,
    )
