"""`Plan`: pure data that says where every block lives and is computed, and how much a step may hold.

Knows blocks, tiers, devices and sizes. Does not read, allocate or compute; `offload` and the executor carry a plan out.
Plans that have everything in RAM are made here, those that stream from a disk in `streamed_plan`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, NamedTuple

from .amounts import counted, format_bytes
from .hardware_guesses import OVERLAP_ROWS
from .memory_layout import (
    INPUT_GROUP,
    KERNEL_BYTES,
    PACKED_BYTES,
    PAGE_TOKENS,
    SPAN_TOKENS,
    SPANS_BYTES,
    THREAD_BYTES,
    arena_slack,
    kv_page_bytes,
    staged_slot_bytes,
)
from .spec import BlockId, ModelSpec

Tier = Literal["gpu", "ram", "disk"]


@dataclass(frozen=True)
class BlockPlan:
    """Where one block lives and is computed. K and V of a layer lie where its attention's weights do."""

    block: BlockId
    nbytes: int
    tier: Tier = "ram"
    device: str = "cpu"

    @property
    def passes(self) -> bool:
        """Whether it comes to the device that computes it, in every step."""
        return self.tier != "gpu" and self.device != "cpu"

    @property
    def slotted(self) -> bool:
        """Whether it is an expert on disk that is read when it is asked for, into one of the slots."""
        return self.tier == "disk" and self.block.kind == "expert" and not self.passes


@dataclass(frozen=True)
class KvPlan:
    """The pool of KV pages. One page holds `page_tokens` positions of every layer."""

    pages: int
    page_tokens: int
    dtype: str  # a key of KV_FORMATS
    nbytes: int

    @property
    def tokens(self) -> int:
        return self.pages * self.page_tokens


@dataclass(frozen=True)
class Plan:
    """How one rank runs one model."""

    blocks: tuple[BlockPlan, ...]  # in the order of a step
    kv: KvPlan
    context_tokens: int  # of the longest sequence
    chunk_tokens: int  # of prompts in one step, at most
    sequences: int  # that decode together, at most
    guesses: int  # tokens of all sequences that a step guesses ahead, at most
    threads: int
    scratch_bytes: int  # that a step needs besides weights and KV
    part_tokens: int = 1 << 30  # rows of a step that pass a block together: bounds the scratch of long steps
    window_bytes: int = 0  # the ring that streamed blocks pass through; 0 = none is streamed
    expert_slots: int = 0  # how many experts, of any layers, are in memory together if experts are on disk
    streamed_bytes: int = 0  # that one token alone reads from disk, if all experts are equally likely
    rival_threads: int = 0  # with which a token of one stream may be as quick, by predictions; 0: none
    ranks: int = 1
    narrow_inputs: bool = False  # of o and of a dense model's down, 8 bits: this CPU computes it alone
    overlap_rows: int = OVERLAP_ROWS  # in a group, steps of so many rows or more are computed in halves
    # Where rank 0 can compute alone, others take part in steps of so many rows, and of so many more for a page of KV.
    group_rows: int = 1
    page_rows: int = 0
    device_scratch_bytes: int = 0  # that a step needs on the device besides weights and KV
    staged_tokens: int = 0  # in steps of so many, experts or dense layers come to the device; 0 = never
    staged_experts: int = 0  # so many at once
    attending_rows: int = 0  # where weights pass: texts with so many rows in a step attend there; 0 = none
    why: str = ""  # a device takes part, or none does, where that was a choice

    @property
    def streams(self) -> bool:
        """Whether any block comes from disk."""
        return any(block.tier == "disk" for block in self.blocks)

    @property
    def device(self) -> str:
        """The device that computes blocks besides the CPU; "" if none does."""
        return next((block.device for block in self.blocks if block.device != "cpu"), "")

    @property
    def device_layers(self) -> tuple[int, int]:
        """(how many layers it computes, how many there are)."""
        layers = [it for it in self.blocks if it.block.kind == "attn"]
        return sum(it.tier == "gpu" for it in layers), len(layers)

    @property
    def device_experts(self) -> tuple[int, int]:
        """(how many experts it computes, how many all layers have)."""
        tiers = [it.tier for it in self.blocks if it.block.kind == "expert"]
        return tiers.count("gpu"), len(tiers)

    @property
    def device_whole(self) -> bool:
        """Whether it computes all layers with all experts."""
        return all(mine == whole for mine, whole in (self.device_layers, self.device_experts))

    @property
    def device_weights_bytes(self) -> int:
        return sum(block.nbytes for block in self.blocks if block.tier == "gpu")

    @property
    def device_kv_bytes(self) -> int:
        """Of the KV pool: K and V lie where their attention is computed."""
        mine, whole = self.device_layers
        return self.kv.nbytes * mine // whole if mine else 0

    @property
    def device_bytes(self) -> int:
        """Of the device's memory."""
        held = self.device_weights_bytes + self.device_kv_bytes + self.staging_bytes + self.passing_bytes
        return held + self.device_scratch_bytes

    @cached_property  # every step asks, and a mixture has thousands of blocks
    def passes(self) -> bool:
        """Whether blocks come to the device in every step, while the CPU attends."""
        return any(block.passes for block in self.blocks)

    @cached_property
    def coming(self) -> tuple[BlockPlan, ...]:
        """Blocks that have room on the device in turns: in every step, or, of dense layers, in long ones."""
        kinds = ("attn", "ffn") if self.staged_tokens and not self.staged_experts else ()
        return tuple(it for it in self.blocks if it.passes or (it.tier == "ram" and it.block.kind in kinds))

    @property
    def passing_rooms(self) -> dict[tuple[str, int], int]:
        """Bytes of the device in which this block of any layer has room (`BlockId.place`)."""
        largest: dict[tuple[str, int], int] = {}
        for block, nbytes in ((it.block, it.nbytes) for it in self.coming):
            largest[block.place] = max(largest.get(block.place, 0), nbytes)
        return {place: staged_slot_bytes(nbytes) for place, nbytes in largest.items()}

    @property
    def passing_bytes(self) -> int:
        """Of the device's memory: each room is there twice."""
        return 2 * sum(self.passing_rooms.values())

    @property
    def staged_slot_bytes(self) -> int:
        """In which any of the experts that lie with the CPU has room."""
        sizes = (it.nbytes for it in self.blocks if it.tier == "ram" and it.block.kind == "expert")
        return staged_slot_bytes(max(sizes, default=0))

    @property
    def staging_bytes(self) -> int:
        """Of the device's memory: while some experts are computed in one half of it, others come to the other half."""
        return 2 * self.staged_experts * self.staged_slot_bytes if self.staged_experts else 0

    @property
    def weights_bytes(self) -> int:
        return sum(block.nbytes for block in self.blocks)

    @property
    def pinned_bytes(self) -> int:
        """Bytes of the blocks that stay in memory."""
        return sum(block.nbytes for block in self.blocks if block.tier == "ram")

    @property
    def cyclic_bytes(self) -> int:
        """Bytes of the blocks that pass through the window in every step."""
        on_disk = (it for it in self.blocks if it.tier == "disk" and it.block.kind != "embed")
        return sum(it.nbytes for it in on_disk if not it.slotted)  # rows of the embedding are gathered

    @property
    def expert_bytes(self) -> int:
        """Bytes of the slots for experts, which are all as large as the largest expert on disk."""
        sizes = (it.nbytes for it in self.blocks if it.slotted)
        return self.expert_slots * max(sizes, default=0)

    def rows_together(self, rows: int) -> int:
        """How many of a step's `rows` pass a block together. In a group, long steps are computed in two halves at
        least: the sum of one travels while the other is computed. So they are where the CPU attends for one half while
        a device computes the other."""
        halved = self.passes or (self.ranks > 1 and rows >= self.overlap_rows)
        return min(self.part_tokens, -(-rows // 2)) if halved else self.part_tokens

    def worth_a_group(self, rows: int, pages: int) -> bool:
        """Whether a step of so many rows is for the group, if so many pages of K and V have to pass between ranks."""
        return rows >= self.group_rows + pages * self.page_rows

    @property
    def step_rows(self) -> int:
        """Rows of a step, at most."""
        return self.chunk_tokens + self.logit_rows

    @property
    def logit_rows(self) -> int:
        """Rows of a step whose logits are wanted, at most."""
        return self.sequences + self.guesses

    @property
    def peak_bytes(self) -> int:
        """Of this machine's memory, without that of a device."""
        held = self.pinned_bytes + self.window_bytes + self.expert_bytes
        return held + self.kv.nbytes - self.device_kv_bytes + self.scratch_bytes

    def step_s(self, read_bytes_per_s: float) -> float:
        """Seconds that the disk takes for one token alone; 0 if nothing is streamed or the speed is not known (0)."""
        return self.streamed_bytes / read_bytes_per_s if read_bytes_per_s > 0 else 0.0

    def describe(self, read_bytes_per_s: float = 0.0) -> str:
        """One line for people. If the speed of the disk is known, it says how long a token takes."""
        kv = f"KV {self.kv.tokens:,} tokens in {self.kv.dtype} ({format_bytes(self.kv.nbytes)})"
        by = f"{counted(self.ranks, 'rank')}, {counted(self.threads, 'thread')}"
        if self.device:
            return f"{by}, {self.placed}, {kv}"
        if not self.streams:
            return f"{by}, {format_bytes(self.weights_bytes)} of weights in ram, {kv}"
        whole = format_bytes(self.weights_bytes)
        said = (
            f"{format_bytes(self.pinned_bytes + self.expert_bytes)} of {whole} stay in memory{self._others}"
        )
        if step_s := self.step_s(read_bytes_per_s):
            said += f", about {step_s:.2g} s per token at {format_bytes(read_bytes_per_s)}/s"
        return f"{by}, {said}, {kv}"

    @property
    def _others(self) -> str:
        """How the CPU gets at what is on disk, in words; "" if nothing is."""
        slots, window = counted(self.expert_slots, "expert"), format_bytes(self.window_bytes)
        said = f", {slots} among them, whichever are asked for" if self.expert_slots else ""
        passing = f", {format_bytes(self.cyclic_bytes)} pass through a window of {window} each step"
        return said + (passing if self.window_bytes else "")

    @property
    def placed(self) -> str:
        """What lies where, in words; "" if there is no device."""
        if not self.device:
            return ""
        weights, pages = format_bytes(self.device_weights_bytes), format_bytes(self.device_kv_bytes)
        if self.passes:
            passing = format_bytes(sum(it.nbytes for it in self.blocks if it.passes))
            disk = f", {format_bytes(self.cyclic_bytes)} of them from disk" if self.cyclic_bytes else ""
            there = f"{weights} of weights on {self.device}, {passing} pass through it in every step"
            rows = f" (but for texts of {self.attending_rows} tokens or more in a step)"
            return f"{there}{disk} while the cpu attends" + rows * (self.attending_rows > 0)
        there = f"{self.there} on {self.device} with {weights} of weights and {pages} of KV"
        if self.staged_tokens:
            there += f" (others come for steps of {counted(self.staged_tokens, 'token')} or more)"
        here = format_bytes(self.pinned_bytes + self.expert_bytes)
        return f"{there}, {here} of weights in ram{self._others}"

    @property
    def there(self) -> str:
        """What the device computes, in words."""
        (mine, whole), (experts, among) = self.device_layers, self.device_experts
        layers = f"{mine} of {whole} layers" if mine < whole else f"all {whole} layers"
        notes = ["the last"] if mine < whole else []
        if experts < among:
            notes.append(f"{experts:,} of {among:,} experts" if experts else "without experts")
        layers += f" ({', '.join(notes)})" if notes else ""
        has_head = any(it.block.kind == "head" and it.tier == "gpu" for it in self.blocks)
        return f"{layers} and the head" if has_head else layers


class Misfit(NamedTuple):
    """No plan fits into the memory that there is. With `least_bytes` of memory it would be `plan`."""

    least_bytes: int
    plan: Plan


class Wanted(NamedTuple):
    """What a plan is asked for, whatever memory there is. `kv_tokens` None: as many as memory allows."""

    spec: ModelSpec
    context_tokens: int
    kv_tokens: int | None
    kv_type: str
    chunk_tokens: int  # of prompts in one step; a plan that streams may have more
    sequences: int
    guesses: int
    threads: int
    native: bool = True  # native kernels, not the reference
    # Of a vocabulary that is cut: how many rows there are whose logits this rank gathers; 0 if another rank does. None:
    # it is not cut.
    vocab: int | None = None
    narrow_inputs: bool = False

    @property
    def whole_vocab(self) -> int:
        return self.spec.vocab if self.vocab is None else self.vocab


def wanted_by(plan: Plan, spec: ModelSpec) -> Wanted:
    """What the plan was asked for, with as much KV as memory allows."""
    its = plan.chunk_tokens, plan.sequences, plan.guesses, plan.threads
    return Wanted(spec, plan.context_tokens, None, plan.kv.dtype, *its)


def scratch_bytes(wanted: Wanted, part_tokens: int | None = None) -> int:
    """The most that one step of `chunk_tokens`, a decode of every sequence and `guesses` holds besides weights and KV.
    `part_tokens` of the step's rows are in a block together; None: all of them."""
    return KERNEL_BYTES + wanted.threads * THREAD_BYTES + 4 * step_numbers(wanted, part_tokens)


def step_numbers(wanted: Wanted, part_tokens: int | None = None) -> int:
    """How many numbers (f32) such a step holds at most: hidden states, what is between them, and logits. The reference
    kernels copy K and V of a layer and make a mask."""
    spec, moe = wanted.spec, wanted.spec.moe
    ffn = max(spec.ffn, moe.ffn, moe.shared_ffn) if moe else spec.ffn
    heads = (3 * spec.heads + 2 * spec.kv_heads) * spec.head_dim  # q, q rotated, attention's result; k and v
    rows = wanted.chunk_tokens + (decoded := wanted.sequences + wanted.guesses)
    part = rows if part_tokens is None else min(rows, part_tokens)
    # The input of a block and its sum; with experts also inputs and outputs of all, packed when the rest is gone.
    whole = (5 if moe else 3) * rows * spec.hidden
    packed = PACKED_BYTES * (spec.hidden + moe.active * moe.ffn) // (2 * INPUT_GROUP) if moe else 0
    inside = part * (spec.hidden + max(3 * ffn + heads, packed))
    gathered = wanted.whole_vocab > spec.vocab  # those of all ranks are there, and their whole
    logits = decoded * (2 * wanted.whole_vocab if gathered else spec.vocab)
    if wanted.native:
        spans = -(-wanted.context_tokens // SPAN_TOKENS) * spec.heads * spec.head_dim
        attention = min(part * spans, SPANS_BYTES // 4)
    else:
        seen = 2 * spec.kv_heads * spec.head_dim + min(part, wanted.chunk_tokens)  # and a mask
        attention = wanted.context_tokens * seen
    return whole + inside + attention + logits


def kv_plan(wanted: Wanted, pages: int) -> KvPlan:
    return KvPlan(pages, PAGE_TOKENS, wanted.kv_type, pages * kv_page_bytes(wanted.spec, wanted.kv_type))


def plan_of(wanted: Wanted, blocks: Iterable[BlockPlan], kv_pages: int, scratch_bytes: int) -> Plan:
    """A plan of one rank, as wanted."""
    return Plan(
        blocks=tuple(blocks),
        kv=kv_plan(wanted, kv_pages),
        context_tokens=wanted.context_tokens,
        chunk_tokens=wanted.chunk_tokens,
        sequences=wanted.sequences,
        guesses=wanted.guesses,
        threads=wanted.threads,
        scratch_bytes=scratch_bytes,
        narrow_inputs=wanted.narrow_inputs,
    )


def least_kv_pages(wanted: Wanted) -> int:
    """Pages for the tokens that were asked for, or for one full context."""
    tokens = wanted.context_tokens if wanted.kv_tokens is None else wanted.kv_tokens
    return -(-tokens // PAGE_TOKENS)


def least_in_ram(wanted: Wanted, block_bytes: Mapping[BlockId, int]) -> Plan:
    """The plan "one rank, everything in RAM" that takes the least memory. block_bytes: in the order of a step."""
    blocks = [BlockPlan(block, nbytes) for block, nbytes in block_bytes.items()]
    scratch = arena_slack(sum(block_bytes.values())) + scratch_bytes(wanted)
    return plan_of(wanted, blocks, least_kv_pages(wanted), scratch)


def plan_in_ram(wanted: Wanted, block_bytes: Mapping[BlockId, int], *, memory_bytes: int) -> Plan | Misfit:
    """The plan "one rank, everything in RAM" within `memory_bytes`.

    With `kv_tokens` None every sequence gets a full context, but together they get at most half of the memory that is
    left, so that another model fits beside this one.
    """
    least = least_in_ram(wanted, block_bytes)
    if least.peak_bytes > memory_bytes:
        return Misfit(least.peak_bytes, least)
    if wanted.kv_tokens is not None:
        return least
    half = (memory_bytes - least.peak_bytes + least.kv.nbytes) // 2
    pages = min(least.kv.pages * wanted.sequences, half // kv_page_bytes(wanted.spec, wanted.kv_type))
    return replace(least, kv=kv_plan(wanted, max(least.kv.pages, pages)))


def first_fit(tried: Iterable[Plan | Misfit]) -> Plan | Misfit:
    """The first plan, or else the misfit that needs the least memory. Nothing is tried after a plan."""
    misfits = []
    for made in tried:
        if isinstance(made, Plan):
            return made
        misfits.append(made)
    return min(misfits, key=lambda misfit: misfit.least_bytes)
