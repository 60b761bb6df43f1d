"""What a model's makers advise for sampling, in the terms of requests.

Knows the keys of generation_config.json and of GGUF metadata, and the values that mean "off" in other programs. Advice
comes from a file, so it is never refused: what cannot be used is left out, and a warning names the file. Does not know
requests.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from shoal.comm.sampling_limits import MAX_BIASES, SAMPLING_LIMITS, TOKEN_IDS
from shoal.daemon.library.registry import recommended_sampling
from shoal.models.checkpoint.checkpoint import Checkpoint


class _Field(NamedTuple):
    """A field of requests. `off` has its value when it does nothing; `is_off` says which others mean that."""

    name: str
    off: float
    is_off: Callable[[float], bool] = lambda value: False


_TEMPERATURE = _Field("temperature", 1.0)
_PENALTY = _Field("repetition_penalty", 1.0, lambda value: value == 0)
_FIELDS = {
    "temperature": _TEMPERATURE,
    "temp": _TEMPERATURE,  # as GGUF calls it
    "top_k": _Field("top_k", 0, lambda value: value <= 0 or value > SAMPLING_LIMITS["top_k"].high),
    "top_p": _Field("top_p", 1.0, lambda value: value == 0 or value >= 1),
    "min_p": _Field("min_p", 0.0, lambda value: value <= 0),
    "repetition_penalty": _PENALTY,
    "penalty_repeat": _PENALTY,
    "presence_penalty": _Field("presence_penalty", 0.0),
    "frequency_penalty": _Field("frequency_penalty", 0.0),
}
# What Shoal lacks, and the values with which it does nothing. Null does nothing everywhere, and so does what is empty.
_LACKING: Mapping[str, tuple[float, ...]] = {
    "typical_p": (0, 1),
    "top_h": (),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "top_n_sigma": (-1, 0),
    "smoothing_factor": (0,),
    "penalty_alpha": (0,),
    "guidance_scale": (1,),
    "no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "encoder_no_repeat_ngram_size": (0,),
    "exponential_decay_length_penalty": (),
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "diversity_penalty": (0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "bad_words_ids": (),
    "sequence_bias": (),
    "begin_suppress_tokens": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "stop_strings": (),
    "watermarking_config": (),
    "xtc_probability": (0,),
    "mirostat": (0,),
    "dry_multiplier": (0,),
    "dynatemp_range": (0,),
}


@dataclass(frozen=True)
class Advice:
    """values: by field of requests, all within `sampling_limits`. warnings: what could not be used, one line each."""

    values: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def advice_of(checkpoint: Checkpoint) -> Advice:
    """What the checkpoint's files advise, or else what is known of its makers' advice."""
    stated = checkpoint.advice
    values: dict[str, Any] = dict(recommended_sampling(checkpoint.path))
    warnings: list[str] = []

    def warn(key: str, value: object, problem: str) -> None:
        warnings.append(f"{stated.origin}: {stated.prefix}{key}={value!r:.60} {problem}")

    for key, value in stated.values.items():
        if known := _FIELDS.get(key):
            if (usable := _usable(known, value)) is not None:
                values[known.name] = usable
            else:
                warn(key, value, f"is not used: must be {SAMPLING_LIMITS[known.name]}")
        elif key == "suppress_tokens" and value:
            if isinstance(value, list) and len(value) <= MAX_BIASES and all(map(TOKEN_IDS.allows, value)):
                values["logit_bias"] = dict.fromkeys(value, SAMPLING_LIMITS["logit_bias"].low)
            else:
                warn(key, value, f"is not used: must be a list of at most {MAX_BIASES} token ids")
        elif key in _LACKING and value and (isinstance(value, bool) or value not in _LACKING[key]):
            warn(key, value, "is not used: Shoal does not have it")
    match stated.values.get("do_sample"):
        case False:
            values["temperature"] = 0.0
        case None | True:
            pass
        case value:
            warn("do_sample", value, "is not used: must be true or false")
    if stated.values.get("penalty_last_n") == 0:  # how far back GGUF's penalty looks
        values.pop("repetition_penalty", None)
    return Advice(values, tuple(warnings))


def _usable(known: _Field, value: object) -> float | int | None:
    """The value in the terms of requests; None if it has none."""
    if value is None:
        return known.off
    if isinstance(value, bool) or not isinstance(value, int | float) or not _finite(value):
        return None
    if known.is_off(value):
        return known.off
    limit = SAMPLING_LIMITS[known.name]
    if limit.whole and value == int(value):
        value = int(value)
    return value if limit.allows(value) else None


def _finite(value: float) -> bool:
    return isinstance(value, int) or math.isfinite(value)
