"""What a loaded model is predicted to do, and what came of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property

from shoal.engine.sequence import Sequence
from shoal.partition.amounts import counted
from shoal.partition.plan import Plan
from shoal.partition.throughput.alone import usual_job
from shoal.partition.throughput.cost import Took, cost, prompt_cost, step_cost
from shoal.partition.throughput.prediction import Prediction
from shoal.partition.throughput.profile import Device
from shoal.partition.throughput.step_curve import step_curve
from shoal.partition.throughput.weights_of import Weighed

from .own_machine import OwnMachine

TELLING_STEPS = 8  # and tokens of a prompt: fewer say too little of a machine


class Expectation:
    """Of a model on this machine alone. `read_bytes_per_s`: the disk's speed where it is known better than `machine`
    does; or 0."""

    def __init__(self, model: Weighed, plan: Plan, machine: OwnMachine, read_bytes_per_s: float) -> None:
        self._model = replace(model)  # without what planning has worked out
        self._plan = plan
        self._machine = machine
        self._read_bytes_per_s = read_bytes_per_s
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
    def usual(self) -> Prediction:
        """With one stream of usual length."""
        device = self._device
        if self._usual is None or self._usual[0] != device:
            job = usual_job(self._plan.context_tokens)
            self._usual = device, cost(self._model, self._plan, device, job)
        return self._usual[1]

    def step_curve(self) -> Callable[[int], float]:
        """Rows of a step → seconds."""
        return step_curve(self._model, self._plan, self._device)

    def look_back(self, sequence: Sequence) -> str:
        """What was measured of a sequence that has ended beside what is predicted, in words; "" if there is nothing to
        compare. Where it ran alone, the machine's figures are corrected by it."""
        times, device = sequence.times, self._device
        if not times.first_token_s or sequence.restarts:
            return ""
        said = []
        tokens, first_s = sequence.prompt_tokens, times.first_token_s - times.admitted_s
        if times.prompt_rows == tokens and first_s > 0:  # all of it was computed, and nobody was beside it
            took = prompt_cost(self._model, self._plan, device, tokens)
            predicted = _seconds(took.seconds)
            said.append(f"{counted(tokens, 'token')} read in {_seconds(first_s)} (predicted {predicted})")
            if tokens >= TELLING_STEPS:
                self._correct(took, first_s)
        decode_s = times.last_token_s - times.first_token_s
        if times.steps and decode_s > 0:
            before = sequence.prompt_tokens + sequence.generated / 2
            rows = max(1, round(times.rows / times.steps))
            took = step_cost(self._model, self._plan, device, rows, before)
            speed = (sequence.generated - 1) / decode_s
            due = (sequence.generated - 1) / (times.steps * took.seconds)
            said.append(
                f"{counted(sequence.generated, 'token')} written at {speed:.3g}/s (predicted {due:.3g}/s)"
            )
            if times.rows == times.steps >= TELLING_STEPS:
                self._correct(took, decode_s / times.steps)
        return ", ".join(said)

    def _correct(self, took: Took, measured_s: float) -> None:
        self._machine.correct(took.parts, measured_s / took.seconds)

    @property
    def _device(self) -> Device:
        device = self._machine.device
        if not self._read_bytes_per_s:
            return device
        return replace(device, disk_bytes_per_s=self._read_bytes_per_s, reads=None)


def _seconds(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds >= 0.1 else f"{seconds * 1e3:.2g} ms"
