"""What a loaded model is predicted to do, and what came of it: on this machine, with a device, or with others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

from shoal.engine.sequence import Sequence
from shoal.partition.amounts import counted
from shoal.partition.group_cuts import GroupSteps
from shoal.partition.memory_layout import PAGE_TOKENS
from shoal.partition.plan import Plan
from shoal.partition.throughput.alone import usual_job
from shoal.partition.throughput.cost import Took, cost, prompt_cost, step_cost
from shoal.partition.throughput.prediction import Prediction, uncertainty
from shoal.partition.throughput.profile import Accelerator, Device
from shoal.partition.throughput.step_curve import step_curve
from shoal.partition.throughput.weights_of import Weighed

from .own_machine import OwnMachine

TELLING_STEPS = 8  # and tokens of a prompt: fewer say too little of a machine


class Together(NamedTuple):
    """What is predicted of a group of machines. `prompts_only`: answers are decoded by the head alone."""

    usual: Prediction
    steps: GroupSteps
    prompts_only: bool


class Expectation:
    """`there`: what the plan's device can do, None if it has none, or nobody has tried. `grouped`: other machines take
    part; `together`: what is predicted of them and this one, None if nothing is. `read_bytes_per_s`: the disk's speed
    where it is known better than `machine` does; or 0."""

    def __init__(
        self,
        model: Weighed,
        plan: Plan,
        machine: OwnMachine,
        read_bytes_per_s: float = 0.0,
        *,
        there: Accelerator | None = None,
        grouped: bool = False,
        together: Together | None = None,
    ) -> None:
        self._model = replace(model)  # without what planning has worked out
        self._plan = plan
        self._machine = machine
        self._read_bytes_per_s = read_bytes_per_s
        self._there = there if plan.device else None
        self._together = together
        self._answers = together if together is not None and not together.prompts_only else None
        self._known = together is not None if grouped else there is not None or not plan.device
        self._usual: tuple[Device, Prediction] | None = None

    @cached_property
    def kinds(self) -> list[str]:
        """Its stored types, those with most bytes first."""
        sizes: dict[str, int] = {}
        for products in self._model.products.values():
            for it in products:
                sizes[it.kind] = sizes.get(it.kind, 0) + it.nbytes
        return sorted(sizes, key=lambda kind: -sizes[kind])

    @property
    def usual(self) -> Prediction | None:
        """With one stream of usual length; None if nothing is known of who computes it."""
        if not self._known:
            return None
        if self._answers is not None:
            return self._answers.usual
        device = self._device
        if self._usual is None or self._usual[0] != device:
            job = usual_job(self._plan.context_tokens)
            self._usual = device, cost(self._model, self._plan, device, job)
        return self._usual[1]

    def step_curve(self) -> Callable[[int], float] | None:
        """Rows of a step → seconds; None as above."""
        if not self._known:
            return None
        return step_curve(self._plan, lambda rows, before: self._step(rows, before).seconds)

    def look_back(self, sequence: Sequence) -> str:
        """What was measured of a sequence that has ended beside what is predicted, in words; "" if there is nothing to
        compare. Where it ran alone, the machine's figures are corrected by it."""
        times = sequence.times
        if not self._known or not times.first_token_s or sequence.restarts:
            return ""
        said = []
        tokens, first_s = sequence.prompt_tokens, times.first_token_s - times.admitted_s
        if times.prompt_rows == tokens and first_s > 0:  # all of it was computed, and nobody was beside it
            took = self._prompt(tokens)
            predicted = _seconds(took.seconds)
            said.append(f"{counted(tokens, 'token')} read in {_seconds(first_s)} (predicted {predicted})")
            if tokens >= TELLING_STEPS:
                self._correct(took, first_s)
        decode_s = times.last_token_s - times.first_token_s
        if times.steps and decode_s > 0:
            before = sequence.prompt_tokens + sequence.generated / 2
            rows = max(1, round(times.rows / times.steps))
            took = self._step(rows, before)
            speed = (sequence.generated - 1) / decode_s
            due = (sequence.generated - 1) / (times.steps * took.seconds)
            said.append(
                f"{counted(sequence.generated, 'token')} written at {speed:.3g}/s (predicted {due:.3g}/s)"
            )
            if times.rows == times.steps >= TELLING_STEPS:
                self._correct(took, decode_s / times.steps)
        return ", ".join(said)

    def _step(self, rows: int, before: float) -> Took:
        """Of one stream: so many rows behind so many tokens."""
        if self._answers is not None:
            return Took(self._answers.steps.answer_s(rows, before), {})
        return step_cost(self._model, self._plan, self._device, rows, before)

    def _prompt(self, tokens: int) -> Took:
        """All of it, of one stream."""
        rows, pages = min(tokens, self._plan.chunk_tokens), -(-tokens // PAGE_TOKENS)
        if self._together is not None and (self._answers or self._plan.worth_a_group(rows, pages)):
            return Took(self._together.steps.prompt_s(tokens), {})
        return prompt_cost(self._model, self._plan, self._device, tokens)

    def _correct(self, took: Took, measured_s: float) -> None:
        """By what this machine itself takes of it. What a device takes may differ as far as its laws may be off; that
        teaches nothing."""
        own, away_s = took.own, sum(took.away.values())
        if not took.parts:
            return  # other machines' times are `MeasuredGroups`'s
        free = 1.0
        if self._there is not None:
            off = uncertainty(took.away, self._there.measured, {})
            free += off * away_s / max(sum(took.parts.values()), 1e-12)
        times = measured_s / took.seconds
        self._machine.correct(own, times / min(max(times, 1 / free), free), away_s)

    @property
    def _device(self) -> Device:
        device = self._machine.device
        if self._there is not None:
            device = replace(device, accelerators=(self._there,))
        if not self._read_bytes_per_s:
            return device
        return replace(device, disk_bytes_per_s=self._read_bytes_per_s, reads=None)


def _seconds(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds >= 0.1 else f"{seconds * 1e3:.2g} ms"
