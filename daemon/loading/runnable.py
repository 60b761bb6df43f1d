"""A checkpoint in memory, ready to compute: what a model and its draft model have in common.

Knows how plan, store, KV and executor are made within a budget. Does not know requests.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from shoal.daemon.config import NodeConfig
from shoal.daemon.errors import DaemonError
from shoal.daemon.library.packs import Packs
from shoal.daemon.memory import bounded, forget_files, keep_freed, return_freed
from shoal.daemon.progress import Progress, no_progress
from shoal.daemon.throughput.expectation import Expectation
from shoal.daemon.throughput.model_sizes import weighed
from shoal.daemon.throughput.own_machine import OwnMachine
from shoal.devices.device_names import CPU
from shoal.devices.opening import home_of
from shoal.engine.collective import Alone
from shoal.engine.executor import Executor, attention_homes
from shoal.engine.expert_places import splits_experts, with_used_experts
from shoal.engine.learn.expert_use import NONE_YET
from shoal.models.checkpoint.checkpoint import Checkpoint, open_checkpoint
from shoal.models.checkpoint.shard import AnyCheckpoint
from shoal.models.tokenizer.tokenizer import Tokenizer
from shoal.models.transformer import Transformer
from shoal.offload.block_store import BlockStore, ResidentStore
from shoal.offload.budget import Budget
from shoal.offload.kv.pool import KvPool
from shoal.partition.hardware_guesses import DISK_BYTES_PER_S
from shoal.partition.plan import Plan
from shoal.partition.slicing import cut_rows
from shoal.partition.throughput.placing.device_ways import expert_of
from shoal.partition.throughput.placing.rooms import accelerator

from .budgeting import Shortfall, disk_buffer_bytes, plan_within_budget, require_plan
from .device_rooms import device_asked_for, device_room, let_be, require_whole
from .grouping import FormedGroup, Grouping, OwnShare, Seated, Unseated
from .kept_uses import KeptUses, weighed_as_used
from .stores import open_store


@dataclass(eq=False)
class Runnable:
    """A checkpoint that is ready to compute. `read_bytes_per_s`: the disk's speed while loading, 0 if none streams.
    `expectation`: how long it takes, with a device and with a `group`, too."""

    checkpoint: Checkpoint
    plan: Plan
    tokenizer: Tokenizer
    executor: Executor
    peak_bytes: int  # including the buffers of KV on disk
    expectation: Expectation
    group: FormedGroup | None = None  # if other machines compute with this one
    why: str = ""  # they do or do not
    share: Executor | None = None  # of this machine in a group that is for prompts only, and …
    share_bytes: int = 0  # … what it takes
    read_bytes_per_s: float = 0.0
    kv_trouble: str = ""  # why its KV is not kept on disk though it was to be
    device_trouble: str = ""  # why the device that was named does not compute it, or not as fast as it could
    kept_uses: KeptUses | None = None  # of its experts, if they are in different places

    @classmethod
    def read(
        cls,
        name: str,
        purpose: str,
        path: Path,
        config: NodeConfig,
        budget: Budget,
        progress: Progress,
        machine: OwnMachine,
        *,
        packs: Packs | None = None,
        streaming: bool = True,
        reserve_bytes: int = 0,
        grouping: Grouping | None = None,
    ) -> Runnable:
        """Reads checkpoint `name` into memory, which the budget holds under `purpose`; if this fails, the caller has to
        release that. `reserve_bytes` of the budget are left free. `streaming`: weights may come from disk, from one
        of `packs`; weights in fewer bits always come from a pack. Unless `config.kv_disk_bytes` is 0, KV will be kept
        on disk, which takes buffers. `grouping` decides whether other machines take part; `machine` knows how fast this
        one is."""
        tight, device = bounded(config.memory_bytes), machine.device
        with ExitStack() as undo, open_checkpoint(path) as checkpoint:
            extra_bytes = disk_buffer_bytes(checkpoint, config)
            model, uses, used = weighed_as_used(checkpoint, config.quant, machine)
            room, trouble = device_room(device_asked_for(config, grouping), budget, model, machine)
            if room is not None:
                grouping = None  # a device belongs to no group, and for others none was looked for

            def planned(tokenizer_bytes: int | None = None) -> Plan | Shortfall:
                found = plan_within_budget(
                    checkpoint,
                    model,
                    config,
                    budget,
                    device,
                    extra_bytes=reserve_bytes + extra_bytes,
                    tokenizer_bytes=tokenizer_bytes,
                    streaming=streaming,
                    room=room,
                )
                if room is not None and isinstance(found, Plan) and not streaming:
                    require_whole(found, room, name)
                return found

            found = planned()
            if grouping is None:
                require_plan(found, name)
            tokenizer = read_tokenizer(name, checkpoint, budget)
            if tokenizer.nbytes != checkpoint.tokenizer_memory().kept:
                found = planned(tokenizer.nbytes)
            part: AnyCheckpoint = checkpoint
            seated: Seated | Unseated = Unseated("")
            if grouping is not None:
                free_bytes = budget.free_bytes - reserve_bytes - tokenizer.nbytes
                seated = grouping.seat(name, checkpoint, config, free_bytes)
            group: FormedGroup | None = None
            kept_uses, counts = None, NONE_YET
            besides: OwnShare | None = None
            if isinstance(seated, Seated):
                part, plan, group, _, besides, _ = seated
                undo.callback(group.close)
                peak_bytes = plan.peak_bytes + disk_buffer_bytes(part, config) + tokenizer.nbytes
                peak_bytes += besides.plan.peak_bytes if besides is not None else 0
            else:
                plan = require_plan(found, name)
                if uses is not None and (splits_experts(plan) or plan.expert_slots):
                    kept_uses, counts = uses, used
                    plan = with_used_experts(plan, counts)
                peak_bytes = plan.peak_bytes + extra_bytes + tokenizer.nbytes
            if room is not None and not plan.device:
                let_be(room.name, budget)
            budget.hold(purpose, peak_bytes)
            if room is not None and plan.device:
                budget.on(room.name).hold(purpose, plan.device_bytes, f"{name} on device {room.name}")
            plan = replace(plan, narrow_inputs=narrow_inputs(plan, group, machine))
            transformer = Transformer(part.spec, plan.narrow_inputs)
            kv = KvPool(part.spec, plan.kv, attention_homes(plan, home_of))
            if tight:
                forget_files(checkpoint.files)

            def opened(plan: Plan, part: AnyCheckpoint) -> tuple[BlockStore, float]:
                disk = device.disk_bytes_per_s or DISK_BYTES_PER_S
                return open_store(
                    plan,
                    part,
                    config.quant,
                    packs,
                    progress,
                    bounded=tight,
                    disk_bytes_per_s=disk,
                    known=counts.shares,
                )

            store, speed = opened(plan, part)
            undo.callback(store.close)
            divided = opened(besides.plan, besides.part)[0] if besides is not None else None
            if group is not None:
                group.form(progress)
            if tight:
                forget_files(checkpoint.files)
            collective = group.collective if group is not None and besides is None else Alone()
            rows = None if isinstance(part.shard, str) else cut_rows(checkpoint.spec, part.shard)
            executor = Executor(transformer, plan, store, kv, collective, home_of, rows)
            undo.pop_all()
        keep_freed()
        executor.experts.go_on_from(counts)
        share, share_bytes = None, 0
        if group is not None and besides is not None and divided is not None:
            share, share_bytes = _share(besides, executor, divided, group), besides.plan.peak_bytes
        own = model if part is checkpoint else weighed(part, config.quant)
        expectation = Expectation(
            own,
            plan,
            machine,
            0.0 if device.measured else speed,
            there=accelerator(room, expert_of(model)) if room is not None else None,
            grouped=group is not None,
            together=seated.together if isinstance(seated, Seated) else None,
        )
        return cls(
            checkpoint,
            plan,
            tokenizer,
            executor,
            peak_bytes,
            expectation,
            group,
            seated.why,
            share,
            share_bytes,
            speed,
            device_trouble="; ".join(filter(None, (trouble, executor.trouble))),
            kept_uses=kept_uses,
        )

    @property
    def machines_why(self) -> str:
        """`why`, and what the others get to see besides."""
        if self.executor.vocab is None:
            return self.why
        return f"{self.why}; the vocabulary is divided, too, so the others see token ids"

    @property
    def weights_bytes(self) -> int:
        """Of the model, on all machines, each once."""
        others = self.group.plans if self.group is not None and self.share is None else ()
        return sum(plan.weights_bytes for plan in (self.plan, *others))

    @property
    def rank_bytes(self) -> list[int]:
        """What each rank takes at most, this machine first."""
        others = self.group.plans if self.group is not None else ()
        return [self.plan.peak_bytes + self.share_bytes, *(plan.peak_bytes for plan in others)]

    def keep_uses(self) -> None:
        """Write down how often its experts were used, for the next load."""
        if self.kept_uses is not None:
            self.kept_uses.keep(self.executor.experts.counts)

    def let_go(self) -> None:
        """Give the memory of weights and KV back. It runs no step any more."""
        for executor in (self.executor, self.share):
            if executor is not None:
                executor.let_go()

    def close(self) -> None:
        """End what runs in the background, here and on other machines. Idempotent."""
        self.executor.close()
        if self.group is not None:
            self.group.close()


def narrow_inputs(plan: Plan, group: FormedGroup | None, machine: OwnMachine) -> bool:
    """Whether what some matrices multiply has 8 bits (`Plan.narrow_inputs`). Members of a cluster keep 16, always."""
    return group is None and not plan.device and machine.alone


def _share(share: OwnShare, whole: Executor, divided: BlockStore, group: FormedGroup) -> Executor:
    """Computes this machine's part of what is divided among a group, with the vocabulary and in the pool of the whole
    model."""
    assert isinstance(divided, ResidentStore)
    assert isinstance(whole.store, ResidentStore)
    vocabulary = [block for block in whole.plan.blocks if block.block.kind in ("embed", "head")]
    plan = replace(share.plan, blocks=(*share.plan.blocks, *vocabulary))
    store = divided.with_vocabulary_of(whole.store)
    kv = whole.kv.of_heads(group.kv_heads[0], share.part.spec.heads)
    return Executor(Transformer(share.part.spec), plan, store, kv, group.collective)


def read_tokenizer(name: str, checkpoint: Checkpoint, budget: Budget) -> Tokenizer:
    """The tokenizer of a checkpoint, which takes much more memory while it is read than afterwards. That is before the
    weights come, so that the two peaks do not add up. Raises BudgetExceeded or TokenizerError."""
    purpose = f"reading the tokenizer of {name}"
    budget.hold(purpose, checkpoint.tokenizer_memory().reading)
    try:
        tokenizer = checkpoint.tokenizer()
        checkpoint.forget_tokens()
        return_freed()
    finally:
        budget.release(purpose)
    return tokenizer


def read_draft(
    name: str, main: Runnable, path: Path, config: NodeConfig, budget: Budget, machine: OwnMachine
) -> Runnable:
    """A draft model that guesses for `main`, in the bits of its files. The budget holds it under its own purpose, which
    the caller has to release if this fails. The CPU computes it."""
    config = replace(
        config, context_tokens=main.plan.context_tokens, quant="keep", kv_disk_bytes=0, device=CPU
    )
    purpose = f"draft for {name}"
    small = Runnable.read(
        f"draft model {path.name}", purpose, path, config, budget, no_progress, machine, streaming=False
    )
    check_vocabulary(name, main.tokenizer, path.name, small.tokenizer)
    return small


def check_vocabulary(name: str, tokenizer: Tokenizer, draft: str, theirs: Tokenizer) -> None:
    """Raises DaemonError unless the tokens that both models have mean the same in `draft` as in `name`."""
    for token in range(min(tokenizer.vocab_size, theirs.vocab_size)):
        ours, other = tokenizer.id_to_token(token), theirs.id_to_token(token)
        if ours != other:
            raise DaemonError(
                "unsupported",
                f"draft model {draft} has another vocabulary than {name}: token {token} is {other!r}, not {ours!r}",
                "take a smaller model of the same family",
            )
