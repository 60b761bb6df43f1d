"""Choosing the next token from logits.

Knows the order of the steps: logit bias → repetition penalty → presence and frequency penalties →
temperature → top-k → top-p → min-p → draw. Does not know text, other sequences of the batch, or where logits come
from. A `Sampler` belongs to one sequence and is used by one thread at a time.

Penalties: the repetition penalty (Keskar et al. 2019, as in transformers) looks at prompt and generated
tokens; presence and frequency penalties (OpenAI) look at generated tokens only.
Log-probabilities are OpenAI's: the log-softmax of the model's own logits, before bias, penalties and
temperature.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np

from shoal.kernels.arrays import Floats, Ids

from .errors import LogitsError, SamplingError

# How many of the likeliest tokens top-p looks at first. They nearly always hold the mass, which saves a full sort.
_FIRST_CANDIDATES = 1024
# Lower temperatures leave only the likeliest token, and dividing by them would exceed the range of f32.
_GREEDY_BELOW = 1e-6


@dataclass(frozen=True)
class SamplingParams:
    """How one request wants its tokens chosen. Whoever makes it has checked the values (comm/sampling_limits.py).

    temperature: 0 is greedy. top_k: 0 is off. top_p, min_p: probabilities; top_p 1 and min_p 0 are off.
    repetition_penalty: 1 is off. logit_bias: token id → addend. seed: None for a fresh one. logprobs: how many
    alternatives to report beside the chosen token's log-probability; None for no log-probabilities at all.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=lambda: MappingProxyType({}))
    seed: int | None = None
    logprobs: int | None = None


@dataclass(frozen=True)
class Sampled:
    """A chosen token. logprob: NaN unless asked for. top: the likeliest (id, logprob), best first."""

    token_id: int
    logprob: float = math.nan
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Chooses the tokens of one sequence and remembers them for the penalties.

    Same params, prompt, seed and logits → same tokens, whoever else is in the batch.
    """

    def __init__(self, params: SamplingParams, prompt_ids: Iterable[int] = ()) -> None:
        self._params = params
        self._random = random.Random(params.seed)
        self._seen = set(prompt_ids) if params.repetition_penalty != 1.0 else None
        counted = params.presence_penalty or params.frequency_penalty
        self._generated: Counter[int] | None = Counter() if counted else None
        self._bias = _sparse(params.logit_bias) if params.logit_bias else None

    @np.errstate(over="ignore")  # an overflow makes a token the least likely one, or is refused as not finite
    def sample(self, logits: Floats) -> Sampled:
        """Choose from logits (vocab,); -inf masks a token. Raises LogitsError if none can be chosen from them, and
        SamplingError if none is left by what the request asks for."""
        adjusted = self._adjust(logits)
        greedy = self._params.temperature < _GREEDY_BELOW
        try:
            token_id = self._greedy(adjusted) if greedy else self._draw(adjusted)
        except SamplingError:
            _check_own(logits)
            raise
        self.accept(token_id)
        if self._params.logprobs is None:
            return Sampled(token_id)
        return _with_logprobs(token_id, logits, self._params.logprobs)

    def accept(self, token_id: int) -> None:
        """Count a token as generated, as `sample` does with what it chooses."""
        if self._seen is not None:
            self._seen.add(token_id)
        if self._generated is not None:
            self._generated[token_id] += 1

    def _adjust(self, logits: Floats) -> Floats:
        """Logits after bias and penalties, in a new array; if there are none, the array itself."""
        params = self._params
        if self._bias is None and not self._seen and not self._generated:
            return logits
        logits = logits.copy()
        if self._bias is not None:
            ids, addends = self._bias
            logits[_within(ids, logits)] += addends
        if self._seen:
            ids = _within(_ids(self._seen), logits)
            seen, factor = logits[ids], np.float32(params.repetition_penalty)
            logits[ids] = np.where(seen > 0, seen / factor, seen * factor)
        if self._generated:
            ids, counts = _sparse(self._generated)
            logits[_within(ids, logits)] -= np.float32(params.frequency_penalty) * counts + np.float32(
                params.presence_penalty
            )
        return logits

    def _greedy(self, logits: Floats) -> int:
        token_id = int(logits.argmax())  # the first of equals; a NaN counts as the largest
        _check_maximum(float(logits[token_id]))
        return token_id

    def _draw(self, logits: Floats) -> int:
        params = self._params
        maximum = float(logits.max())
        _check_maximum(maximum)
        ids: Ids | None = None
        if 0 < params.top_k < len(logits):
            ids = _highest(logits, params.top_k)
            logits = logits[ids]
        # Probabilities (vocab,) or (top_k,), scaled so that the likeliest token has 1.
        weights = logits - np.float32(maximum)
        weights /= np.float32(params.temperature)
        np.exp(weights, out=weights)
        kept: Ids | None = None
        if params.top_p < 1:
            kept = _nucleus(weights, params.top_p)
        if params.min_p > 0:
            likely = weights >= params.min_p
            kept = np.flatnonzero(likely) if kept is None else kept[likely[kept]]
        if kept is not None:
            weights = weights[kept]
            ids = kept if ids is None else ids[kept]
        cumulative = weights.cumsum(dtype=np.float64)
        point = self._random.random() * cumulative[-1]
        # Rounding may make the point equal to the sum. Then the last token that has any weight is chosen.
        index = min(cumulative.searchsorted(point, side="right"), cumulative.searchsorted(cumulative[-1]))
        return int(index if ids is None else ids[index])


def _nucleus(weights: Floats, top_p: float) -> Ids:
    """Ids, ascending, of the fewest of the weights (n,) that hold this share of the sum (Holtzman et al. 2019)."""
    mass = top_p * weights.sum(dtype=np.float64)
    ids = _highest(weights, _FIRST_CANDIDATES)
    best = np.sort(weights[ids])[::-1].astype(np.float64)
    after = best.cumsum()
    if after[-1] < mass and len(ids) < len(weights):
        ids = np.arange(len(weights))
        best = np.sort(weights)[::-1].astype(np.float64)
        after = best.cumsum()
    return ids[_highest(weights[ids], max(1, int((after - best < mass).sum())))]


def _highest(values: Floats, count: int) -> Ids:
    """Ids, ascending, of the `count` largest values. Of equal values those with the lowest ids are taken."""
    if count >= len(values):
        return np.arange(len(values))
    ids: Ids | None = None
    if (groups := 8 * count) < len(values) // 2:
        # `count` groups have a maximum of at least `floor`, so at least `count` values do, and only few have to be
        # looked at below.
        maxima = values[: len(values) // groups * groups].reshape(-1, groups).max(axis=0)
        floor = np.partition(maxima, groups - count)[groups - count]
        ids = np.flatnonzero(values >= floor)
        values = values[ids]
    floor = np.partition(values, len(values) - count)[len(values) - count]
    kept = values > floor
    kept[np.flatnonzero(values == floor)[: count - int(kept.sum())]] = True
    return np.flatnonzero(kept) if ids is None else ids[kept]


def _with_logprobs(token_id: int, logits: Floats, count: int) -> Sampled:
    maximum = float(logits.max())
    total = maximum + math.log(np.exp(logits - np.float32(maximum)).sum(dtype=np.float64))
    top: tuple[tuple[int, float], ...] = ()
    if count:
        ids = _highest(logits, count)
        ids = ids[np.argsort(-logits[ids], kind="stable")]
        top = tuple((i, value - total) for i, value in zip(ids.tolist(), logits[ids].tolist(), strict=True))
    return Sampled(token_id, float(logits[token_id]) - total, top)


def _ids(values: Collection[int]) -> Ids:
    return np.fromiter(values, np.int64, len(values))


def _sparse(values: Mapping[int, float]) -> tuple[Ids, Floats]:
    return _ids(values), np.fromiter(values.values(), np.float32, len(values))


def _within(ids: Ids, logits: Floats) -> Ids:
    highest = int(ids.max())
    if highest >= len(logits):
        raise SamplingError(f"token id {highest} is outside the model's vocabulary of {len(logits)} tokens")
    return ids


def _check_own(logits: Floats) -> None:
    """Raises LogitsError if the model's own logits have no finite maximum."""
    maximum = float(logits.max())
    if not math.isfinite(maximum):
        raise LogitsError(
            f"the model's logits hold {maximum}: its weights are damaged, or too large to compute with"
        )


def _check_maximum(maximum: float) -> None:
    """Raises SamplingError unless finite. The maximum is not finite if a logit is NaN or +inf, or if all are masked."""
    if not math.isfinite(maximum):
        raise SamplingError(f"the model's logits hold {maximum}: no token can be chosen from them")
