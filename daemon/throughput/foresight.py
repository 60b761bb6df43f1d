"""What a model would do on machines that are here or not: every plan, what is predicted of it, which one is best.

Opens headers and reads or measures profiles. `partition.throughput` predicts and chooses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, cast

import msgspec
from msgspec import Struct

from shoal.daemon.config import NodeConfig, beyond_the_model, require_context_for
from shoal.daemon.error_codes import refusing
from shoal.daemon.errors import DaemonError
from shoal.daemon.library.packs import Packs
from shoal.daemon.loading.device_rooms import device_laws
from shoal.daemon.model_name import Quant
from shoal.devices.device_names import CPU
from shoal.models.checkpoint.checkpoint import Checkpoint
from shoal.models.checkpoint.weight_source import Described
from shoal.offload.errors import PackPointless
from shoal.partition.amounts import meets
from shoal.partition.plan import Wanted
from shoal.partition.throughput.explain import changes, reason, worth_a_look
from shoal.partition.throughput.memory_curve import memory_curve
from shoal.partition.throughput.prediction import Binding, Job
from shoal.partition.throughput.profile import Device, Profile
from shoal.partition.throughput.solve import Candidate, Choices, asks, solve
from shoal.partition.throughput.weights_of import Weighed

from .model_sizes import cut_words, described, weighed
from .own_machine import OwnMachine

QUANTS: tuple[Quant, ...] = ("keep", "q8", "q4")  # most bits first


class PlanRow(Struct, frozen=True):
    """One plan. `ttft_s`: until every stream has its first token; `token_s`: between two tokens of a stream;
    `tokens_per_s`: of all, between the two of `band`. `missing`: what the machines lack for it, None if it fits.
    `needs_bytes`: if that is memory, how much of it the first machine would have to have."""

    name: str
    fits: bool
    ttft_s: float
    token_s: float
    tokens_per_s: float
    band: tuple[float, float]
    peak_bytes: dict[str, int]
    binding: Binding
    missing: str | None
    needs_bytes: int | None


class ChangeRow(Struct, frozen=True):
    """What would meet a target, and the speed with it."""

    what: str
    tokens_per_s: float


class CurvePoint(Struct, frozen=True):
    """With so much memory the head alone would give so many tokens a second: about, at least, at most."""

    memory_bytes: float
    tokens_per_s: float
    low: float
    high: float


class Curve(Struct, frozen=True):
    """Speed by memory, from the least that would do, with weights in these bits."""

    quant: str
    points: list[CurvePoint]


class Start(Struct, frozen=True):
    """Seconds until a plan can begin: to read what it holds, and once before that to make its pack (0: it needs none,
    or has it)."""

    load_s: float
    pack_s: float


class Foresight(Struct, frozen=True):
    """All plans for a model; `chosen` names the one to run, None if none fits, and `start` says when it can begin.
    `best`: names of the few that are worth a look, the chosen one first. `changes`: what would meet the target, the
    cheapest first, if one was given and is not met. `curves`: if they were asked for. `trouble`: what is wrong with
    the model's files, or this machine's device or its copies."""

    chosen: str | None
    reason: str
    best: list[str]
    plans: list[PlanRow]
    start: Start | None
    changes: list[ChangeRow] | msgspec.UnsetType = msgspec.UNSET
    curves: list[Curve] | msgspec.UnsetType = msgspec.UNSET
    trouble: str | msgspec.UnsetType = msgspec.UNSET


class Asked(Struct, frozen=True):
    """What somebody wants to know. None leaves a choice open. `target`: tokens a second, of all streams. `guesses`,
    `chance`: see `Job`."""

    prompt_tokens: int = 512
    new_tokens: int = 128
    batch: int = 1
    quant: Quant | None = None
    kv_type: str | None = None
    context_tokens: int | None = None
    memory_bytes: int | None = None
    threads: int | None = None
    ranks: int | None = None
    target: float | None = None
    guesses: int = 0
    chance: float = 0.0
    curves: bool = False

    @property
    def job(self) -> Job:
        return Job(self.prompt_tokens, self.new_tokens, self.batch, self.guesses, self.chance)


def foresee(
    path: Path,
    profile: Profile,
    asked: Asked,
    usual: NodeConfig,
    machine: OwnMachine | None = None,
) -> Foresight:
    """What the model at `path` (a checkpoint, its headers, or config.json alone) would do, with all else as `usual`.
    `machine`: this one, if it is the head of the profile; then its device counts, which is tried. Raises
    DaemonError."""
    models, profile, trouble = prepared(path, profile, asked, usual, machine)
    job = asked.job
    its = job, asked.context_tokens, usual.chunk_tokens, usual.max_sequences, usual.max_guesses
    wanted = asks(*its, narrow_inputs=len(profile.devices) == 1)
    choices = Choices(asked.kv_type, asked.threads, asked.ranks, usual.wires)
    found = solve(models, wanted, profile, job, choices)
    chosen = found.chosen
    met = (
        chosen is not None
        and asked.target is not None
        and meets(chosen.prediction.tokens_per_s, asked.target)
    )
    would: list[ChangeRow] | msgspec.UnsetType = msgspec.UNSET
    if asked.target is not None:
        tried = [] if met else changes(models, wanted, profile, found, choices, asked.target)
        would = [ChangeRow(change.what, change.tokens_per_s) for change in tried]
    start = _start(chosen, path, machine) if chosen else None
    rows = [_row(it) for it in found.candidates]
    curves: list[Curve] | msgspec.UnsetType = msgspec.UNSET
    if asked.curves:
        device, kv_type = profile.head.on(asked.threads), asked.kv_type or usual.kv_type
        curves = [_curve(it, wanted(it, kv_type, device.threads), device, job) for it in models]
    best = [it.name for it in worth_a_look(found)]
    return Foresight(
        chosen.name if chosen else None,
        reason(found),
        best,
        rows,
        start,
        would,
        curves,
        trouble or msgspec.UNSET,
    )


def _start(chosen: Candidate, path: Path, machine: OwnMachine | None) -> Start:
    """A pack that this machine has is not made again."""
    load_s, pack_s = chosen.prediction.load_s, chosen.prediction.pack_s
    if pack_s and chosen.plan is not None and machine is not None and machine.home is not None:
        with described(path) as model:
            packs = Packs(machine.home)
            if (
                isinstance(model, Checkpoint)
                and packs.find(model, cast("Quant", chosen.model.quant)) is not None
            ):
                pack_s = 0.0
    return Start(load_s, pack_s)


class Prepared(NamedTuple):
    """The model in each of the types that it may be kept in, the machines as far as they count, and what is wrong with
    the model's files, or with this one's device."""

    models: list[Weighed]
    profile: Profile
    trouble: str


def prepared(
    path: Path, profile: Profile, asked: Asked, usual: NodeConfig, machine: OwnMachine | None
) -> Prepared:
    """What `foresee` needs. Raises DaemonError."""
    with described(path) as model:
        context = asked.context_tokens or asked.job.context_tokens
        require_context_for(asked.prompt_tokens, asked.new_tokens, asked.context_tokens, model.spec.longest)
        if context > model.spec.longest:
            raise beyond_the_model(context, model.spec.longest, model.spec.context)
        models, cut = _models(model, asked.quant, path.name), cut_words(model)
    cards, trouble = profile.head.accelerators, ""
    if machine is not None:
        cards, trouble = device_laws(usual.device, machine, models[0])
    if usual.device == CPU:
        cards = ()
    if cards != profile.head.accelerators:
        head = replace(profile.head, accelerators=cards)
        profile = replace(profile, devices=(head, *profile.devices[1:]))
    if asked.memory_bytes is not None:
        head = replace(profile.head, memory_bytes=float(asked.memory_bytes))
        profile = replace(profile, devices=(head, *profile.devices[1:]))
    if asked.ranks is not None and not 1 <= asked.ranks <= len(profile.devices):
        there = len(profile.devices)
        least = "1, the only machine" if there == 1 else f"from 1 to {there}, the machines"
        raise DaemonError("bad_request", f"`ranks={asked.ranks}`: must be {least} of the profile")
    return Prepared(models, profile, "; ".join(filter(None, (cut, trouble))))


def _curve(model: Weighed, contexts: Sequence[Wanted], device: Device, job: Job) -> Curve:
    points = memory_curve(model, contexts, device, job)
    return Curve(model.quant, [CurvePoint(*point) for point in points])


def _models(model: Described, quant: Quant | None, name: str) -> list[Weighed]:
    """In the bits asked for, or in all that there are."""
    if quant is not None:
        with refusing(name):
            return [weighed(model, quant)]
    found = []
    for bits in QUANTS:
        try:
            found.append(weighed(model, bits))
        except PackPointless:  # it has no more bits than that
            continue
    return found


def _row(found: Candidate) -> PlanRow:
    prediction = found.prediction
    return PlanRow(
        found.name,
        found.fits,
        prediction.ttft_s,
        prediction.token_s,
        prediction.tokens_per_s,
        prediction.band,
        dict(prediction.peak_bytes),
        prediction.binding,
        found.missing or None,
        found.least_bytes if found.lacks_memory else None,
    )
