"""What requests may ask of sampling: lowest and highest value of every field, in one table.

Everyone uses this table: `messages.Sampling` checks its fields by it, wherever one is made; the command line makes its
options from it; docs/api.md is tested against it; and a value that a model's makers recommend is checked by it.
Knows numbers. Does not know what the fields do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from msgspec import Meta

from .complaints import shorten


@dataclass(frozen=True)
class Limit:
    """The numbers from `low` to `high`, both included; with `above`, not `low` itself; with `whole`, only integers."""

    low: float
    high: float
    above: bool = False
    whole: bool = False

    def allows(self, value: object) -> bool:
        """Whether `value` is such a number. No bool is, and no NaN."""
        kinds = int if self.whole else (int, float)
        if not isinstance(value, kinds) or isinstance(value, bool):
            return False
        return self.low <= value <= self.high and not (self.above and value == self.low)

    @property
    def meta(self) -> Meta:
        """The same limit for msgspec's decoder."""
        return Meta(gt=self.low, le=self.high) if self.above else Meta(ge=self.low, le=self.high)

    def __str__(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        return f"{kind} {'above' if self.above else 'from'} {self.low} to {self.high}"


TOKEN_IDS = Limit(0, 1 << 24, whole=True)
MAX_BIASES = 4096  # entries of logit_bias

SAMPLING_LIMITS: Mapping[str, Limit] = MappingProxyType(
    {
        "temperature": Limit(0, 100),
        "top_k": Limit(0, 1 << 24, whole=True),
        "top_p": Limit(0, 1, above=True),
        "min_p": Limit(0, 1),
        "repetition_penalty": Limit(0, 10, above=True),
        "presence_penalty": Limit(-10, 10),
        "frequency_penalty": Limit(-10, 10),
        "logit_bias": Limit(-10_000, 10_000),  # of each addend
        "seed": Limit(0, (1 << 63) - 1, whole=True),
        "logprobs": Limit(0, 20, whole=True),
    }
)


def check_sampling(name: str, value: object) -> None:
    """ValueError, naming field, value and limit, unless the field `name` may have the value `value`."""
    if name == "logit_bias":
        _check_biases(value)
    elif not SAMPLING_LIMITS[name].allows(value):
        raise ValueError(_refusal(name, value, SAMPLING_LIMITS[name]))


def _check_biases(biases: object) -> None:
    if not isinstance(biases, Mapping):
        raise ValueError(f"logit_bias={shorten(biases)}: must be a map of token id to number")
    if len(biases) > MAX_BIASES:
        raise ValueError(f"logit_bias has {len(biases)} entries: must be at most {MAX_BIASES}")
    for token_id, bias in biases.items():
        if not TOKEN_IDS.allows(token_id):
            raise ValueError(_refusal("logit_bias token id", token_id, TOKEN_IDS))
        if not SAMPLING_LIMITS["logit_bias"].allows(bias):
            raise ValueError(_refusal(f"logit_bias[{token_id}]", bias, SAMPLING_LIMITS["logit_bias"]))


def _refusal(name: str, value: object, limit: Limit) -> str:
    return f"{name}={shorten(value)}: must be {limit}"
