"""What a plan takes on one machine: time to the first token, time of each further one, memory, and what binds.

Which steps there are is said here; `step_time` has what one takes, `placing.passing_step` one in which weights come to
an accelerator. Pure. docs/throughput-model.md has the formulas with their units, sources and limits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from ..plan import Plan
from .laws import DISTINCT_SHARE, Rows, fresh_pages, kv_token_bytes
from .peak import host_kv_share, peak_bytes
from .placing.passing_step import passing_step
from .prediction import Binding, Job, Prediction, uncertainty
from .profile import Device
from .step_time import StepTime, and_overhead, staying_step
from .weights_of import Weighed

_CACHES = 0.6, 1.6  # times as much is kept by a cache that others share, within minutes
_SAMPLES = 4  # chunks of a long prompt that are worked out; the others lie between


class Took(NamedTuple):
    """Seconds, and of what they are put together; `away`: what of that an accelerator takes."""

    seconds: float
    parts: Mapping[Binding, float]
    away: Mapping[Binding, float] = {}

    @property
    def own(self) -> dict[Binding, float]:
        """What the machine itself takes: its processor, its disk, its link."""
        return {part: max(0.0, its - self.away.get(part, 0.0)) for part, its in self.parts.items()}


def cost(model: Weighed, plan: Plan, device: Device, job: Job) -> Prediction:
    """What `plan` does with `job` on a device, whose laws are for the plan's threads."""
    device = device.on(plan.threads)
    decode = _decode(model, plan, device, job, job.distinct)
    slow = fast = decode.seconds
    if model.spec.moe and job.distinct is None:  # what is not known is how many experts several tokens wake
        slow = max(slow, _decode(model, plan, device, job, 1.0).seconds)
        fast = min(fast, _decode(model, plan, device, job, DISTINCT_SHARE).seconds)
    for other in _with_other_caches(device, round_bytes(model, plan, job.batch * job.prompt_tokens)):
        other_s = _decode(model, plan, other, job, job.distinct).seconds
        slow, fast = max(slow, other_s), min(fast, other_s)
    prompt = list(_prompt(model, plan, device, job))
    touch = fresh_pages(device, model.spec, plan.kv.dtype, job, host_kv_share(plan))
    decode, slow, fast = decode.after(touch.token_s), slow + touch.token_s, fast + touch.token_s
    ttft_s = sum(count * step.seconds for count, step in prompt) + touch.ttft_s
    shown = decode if job.new_tokens > 1 else prompt[-1][1]
    off = 1 + uncertainty(shown.parts, device.measured, device.repeats.by_part)
    tokens = job.batch * job.step_tokens
    load_s, pack_s = _start_s(model, plan, device)
    return Prediction(
        ttft_s=ttft_s,
        token_s=decode.seconds / job.step_tokens,
        tokens_per_s=tokens / decode.seconds,
        band=(tokens / (slow * off), tokens / fast * off),
        peak_bytes=_peaks(model, plan, device, job),
        stall_share=decode.stall_s / decode.seconds,
        binding=_binding(shown),
        parts=shown.parts,
        prompt_parts=and_overhead(_parts_of(prompt), touch.ttft_s),
        load_s=load_s,
        pack_s=pack_s,
    )


def _peaks(model: Weighed, plan: Plan, device: Device, job: Job) -> dict[str, int]:
    """Of this machine, and of a device that computes with it."""
    there = {plan.device: plan.device_bytes} if plan.device else {}
    return {device.name: peak_bytes(model, plan, job), **there}


def step_cost(model: Weighed, plan: Plan, device: Device, rows: int, before: float) -> Took:
    """A step in which one stream has `rows` rows behind `before` tokens, all of which want logits: as a decode, or a
    token with guesses behind it."""
    found = step_of(model, plan, device.on(plan.threads), [Rows(1, rows, before)], rows)
    return Took(found.seconds, found.parts, found.away)


def prompt_cost(model: Weighed, plan: Plan, device: Device, tokens: int) -> Took:
    """All steps that read a prompt of one stream."""
    steps = list(_prompt(model, plan, device.on(plan.threads), Job(tokens, 1)))
    away = _together((count, step.away) for count, step in steps)
    return Took(sum(count * step.seconds for count, step in steps), _parts_of(steps), away)


class SteadyBatch(NamedTuple):
    """Of endlessly many requests so many are answered at once, and each gets a token in each step."""

    streams: int
    step_s: float

    @property
    def tokens_per_s(self) -> float:
        """Of answers."""
        return self.streams / self.step_s


def steady_batch(model: Weighed, plan: Plan, device: Device, job: Job) -> SteadyBatch:
    """Requests like those of `job`: as many at once as the plan has place for, each with its prompt in one step and an
    answer in the others, all beside each other."""
    prompt, new = job.prompt_tokens, job.new_tokens
    # In the middle of their time they hold half of an answer, in whole pages.
    pages = sum(-(-(prompt + place) // plan.kv.page_tokens) for place in range(1, new + 1)) / new
    streams = max(1, int(min(plan.sequences, plan.kv.pages / pages, plan.chunk_tokens * new / prompt)))
    read = max(1, round(streams / new * prompt))  # tokens of prompts in a step
    begins = -(-read // prompt)
    part = read // begins
    segments = [Rows(streams, 1, prompt + new / 2), Rows(begins, part, (prompt - part) / 2)]
    step = step_of(model, plan, device.on(plan.threads), segments, streams + begins, job.distinct)
    return SteadyBatch(streams, step.seconds)


def _parts_of(steps: Sequence[tuple[float, StepTime]]) -> dict[Binding, float]:
    """The parts of so many of each step."""
    return _together((count, step.parts) for count, step in steps)


def _together(each: Iterable[tuple[float, Mapping[Binding, float]]]) -> dict[Binding, float]:
    found: dict[Binding, float] = {}
    for count, parts in each:
        for part, seconds in parts.items():
            found[part] = found.get(part, 0.0) + count * seconds
    return found


def _binding(step: StepTime) -> Binding:
    """The disk if it alone takes longer than everything else; else what takes most of that."""
    others = {part: seconds for part, seconds in step.parts.items() if part != "disk"}
    if step.parts["disk"] > sum(others.values()):
        return "disk"
    return max(others, key=lambda part: others[part])


def _decode(model: Weighed, plan: Plan, device: Device, job: Job, share: float | None = None) -> StepTime:
    """A step in which each stream gets a token, in the middle of the answers, with guesses to be verified behind it:
    each of these has a row of its own, wakes experts of its own and wants its logits."""
    before, rows = job.prompt_tokens + job.new_tokens / 2, 1 + job.guesses
    return step_of(model, plan, device, [Rows(job.batch, rows, before)], job.batch * rows, share)


def _prompt(model: Weighed, plan: Plan, device: Device, job: Job) -> Iterator[tuple[float, StepTime]]:
    """(how many, step) of the steps that read all prompts. Short prompts share a step."""
    chunk, tokens, share = plan.chunk_tokens, job.prompt_tokens, job.distinct
    if tokens <= chunk:
        together = min(job.batch, max(1, chunk // tokens))
        whole, rest = divmod(job.batch, together)
        for count, steps in ((together, whole), (rest, 1 if rest else 0)):
            if steps:
                yield steps, step_of(model, plan, device, [Rows(count, tokens, 0)], count, share)
        return
    whole, rest = divmod(tokens - 1, chunk)  # the last step has one token at least
    sampled = (
        range(whole)
        if whole <= _SAMPLES
        else [round(i * (whole - 1) / (_SAMPLES - 1)) for i in range(_SAMPLES)]
    )
    for place in sampled:
        step = step_of(model, plan, device, [Rows(1, chunk, place * chunk)], 0, share)
        yield job.batch * whole / len(sampled), step
    yield job.batch, step_of(model, plan, device, [Rows(1, rest + 1, whole * chunk)], 1, share)


def step_of(
    model: Weighed,
    plan: Plan,
    device: Device,
    segments: Sequence[Rows],
    wanted: int,
    share: float | None = None,
) -> StepTime:
    """A step of these segments that gives logits for `wanted` rows. `share`: see `distinct_experts`."""
    tokens = sum(segment.alike * (segment.before + segment.rows) for segment in segments)
    device = device.going_round(round_bytes(model, plan, tokens))
    there = next((it for it in device.accelerators if it.name == plan.device), None)
    if plan.passes and there is not None:
        return passing_step(model, plan, device, there, segments, wanted, share)
    return staying_step(model, plan, device, there, segments, wanted, share)


def round_bytes(model: Weighed, plan: Plan, tokens: float) -> float:
    """Memory that a step goes through with so many tokens of all streams: weights, and K and V. Of an embedding few
    rows are used, unless it is the head's, too."""
    used = (it for it in plan.blocks if model.spec.tied or it.block.kind != "embed")
    held = sum(it.nbytes for it in used if it.tier == "ram")
    kv_bytes = tokens * len(model.spec.layers) * kv_token_bytes(model.spec, plan.kv.dtype)
    return held + plan.window_bytes + plan.expert_bytes + kv_bytes


def _with_other_caches(device: Device, nbytes: float) -> Iterator[Device]:
    """The device if its caches kept less or more, where that changes what they keep of so many bytes."""
    caches = device.caches
    for its in (caches.larger(times) for times in _CACHES) if caches else ():
        if caches and its.share(nbytes) != caches.share(nbytes):
            yield replace(device, caches=its)


def _start_s(model: Weighed, plan: Plan, device: Device) -> tuple[float, float]:
    """Seconds until the model can answer, and those to make its pack first where it needs one. What was never read lies
    on the disk; where its speed is not known, reading counts for nothing."""
    disk = device.disk_bytes_per_s
    held = plan.pinned_bytes + plan.expert_bytes
    touch_s = held / device.first_touch_bytes_per_s
    if not plan.streams and model.quant == "keep":
        laid_s = model.stored_bytes / device.laid_out_bytes_per_s
        return (model.stored_bytes / disk if disk else 0.0) + touch_s + laid_s, 0.0
    read_s = held / disk if disk else 0.0
    whole = sum(model.extents.values())
    pack_s = model.stored_bytes / device.laid_out_bytes_per_s
    if disk:
        pack_s += model.stored_bytes / disk + whole / max(1.0, device.pack_write_bytes_per_s)
    return read_s + touch_s, pack_s
