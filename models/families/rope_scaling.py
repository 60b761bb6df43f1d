"""Rotary scalings as published, reduced to the divisors and magnitude of a `RopeSpec`.

Knows the keys of config.json (both the old `rope_scaling` and the newer `rope_parameters`) and of GGUF metadata.
Sources: Llama 3.1 (wavelength bands), YaRN arXiv 2309.00071, LongRoPE arXiv 2402.13753; defaults as transformers'
modeling_rope_utils and llama.cpp have them.
"""

from __future__ import annotations

import math

from shoal.models.errors import CorruptCheckpoint, UnsupportedCheckpoint
from shoal.partition.spec import MAX_CONTEXT, RopeSpec

from .facts import UNLIKE_LLAMA_CPP, Facts

Divisors = tuple[float, ...]
_YARN_DEFAULTS = {
    "rope.scaling.yarn_attn_factor": 0,
    "rope.scaling.yarn_beta_fast": 32,
    "rope.scaling.yarn_beta_slow": 1,
}


def hf_rope(
    config: Facts, head_dim: int, parameters: Facts, longrope_names: tuple[str, ...] = ()
) -> RopeSpec:
    """The rope of a config.json. `parameters` is its (sub-)dictionary with rope_type, rope_theta and the rest.

    `longrope_names`: other names that the family has for longrope. Parameters that the kind of scaling does not have
    are said to be unused.
    """
    rope = _hf_rope(config, head_dim, parameters, longrope_names)
    for key in parameters.unasked():
        parameters.say(key, "is not used by this kind of rope scaling")
    return rope


def _hf_rope(config: Facts, head_dim: int, parameters: Facts, longrope_names: tuple[str, ...]) -> RopeSpec:
    theta = parameters.number("rope_theta", config.number("rope_theta", 10000.0))
    partial = parameters.number("partial_rotary_factor", config.number("partial_rotary_factor", 1.0))
    if not 0 < partial <= 1:
        raise parameters.wrong("partial_rotary_factor", partial, "above 0 and up to 1")
    dims = _checked(config, int(head_dim * partial), theta)
    context = config.integer("max_position_embeddings")
    kind = parameters.text("rope_type", parameters.text("type", "default"))
    if kind == "default":
        return RopeSpec(dims, theta)
    original = config.integer(
        "original_max_position_embeddings", parameters.integer("original_max_position_embeddings", context)
    )
    if kind in ("su", "longrope", *longrope_names):
        factor = parameters.number("factor", context / max(original, 1))
        magnitude = parameters.number("attention_factor", _longrope_magnitude(factor, original))
        return RopeSpec(
            dims,
            theta,
            divisors=parameters.numbers("short_factor"),
            long_divisors=parameters.numbers("long_factor"),
            long_from_tokens=original,
            magnitude=magnitude,
            long_magnitude=magnitude,
            extends_to=_extended(factor, original),
        )
    match kind:
        case "dynamic":
            factor = _factor(parameters)
            return RopeSpec(
                dims,
                theta,
                dynamic_factor=factor,
                dynamic_from_tokens=context,
                extends_to=_extended(factor, context),
            )
        case "linear":
            factor = _factor(parameters)
            return RopeSpec(
                dims, theta, divisors=(factor,) * (dims // 2), extends_to=_extended(factor, original)
            )
        case "llama3":
            low, high = parameters.number("low_freq_factor"), parameters.number("high_freq_factor")
            if not 0 < low < high:
                raise parameters.wrong("low_freq_factor", low, f"positive and below high_freq_factor={high}")
            factor = _factor(parameters)
            divisors = _llama3(dims, theta, factor, low, high, original)
            return RopeSpec(dims, theta, divisors=divisors, extends_to=_extended(factor, original))
        case "yarn":
            if "factor" not in parameters.values:  # a null is what transformers computes as below
                raise CorruptCheckpoint(f"{config.origin}: factor of rope scaling 'yarn' is missing")
            factor = parameters.number("factor", context / max(original, 1))
            divisors = _yarn(
                config.origin,
                dims,
                theta,
                factor,
                original,
                fast=parameters.number("beta_fast", 32),
                slow=parameters.number("beta_slow", 1),
                truncate=parameters.flag("truncate", True),
            )
            magnitude = parameters.number("attention_factor", _yarn_magnitude(parameters, factor))
            return RopeSpec(
                dims, theta, divisors=divisors, magnitude=magnitude, extends_to=_extended(factor, original)
            )
    raise UnsupportedCheckpoint(
        f"{config.origin}: rope scaling {kind!r} is not supported "
        "(supported: default, linear, dynamic, llama3, yarn, longrope)"
    )


def gguf_rope(
    metadata: Facts, head_dim: int, *, interleaved: bool, freqs: Divisors, short: Divisors, long: Divisors
) -> RopeSpec:
    """The rope of GGUF metadata; freqs, short and long are the tensors rope_freqs, rope_factors_short and _long."""
    theta = metadata.number("rope.freq_base", 10000.0)
    dims = _checked(metadata, metadata.integer("rope.dimension_count", head_dim), theta)
    context = metadata.integer("context_length")
    original = metadata.integer("rope.scaling.original_context_length", context)
    magnitude = metadata.number("rope.scaling.attn_factor", 1.0)
    kind = metadata.text("rope.scaling.type", "linear")
    factor = 1.0
    if kind != "none":
        stretch = "rope.scaling.factor" if metadata.has("rope.scaling.factor") else "rope.scale_linear"
        factor = metadata.number(stretch, 1.0) or 1.0
    if (
        metadata.has("rope.scaling.type")
        and kind != "none"
        and factor == 1.0
        and not (freqs or short or long)
    ):
        metadata.say(
            "rope.scaling.type",
            "changes nothing: there is neither rope.scaling.factor nor a tensor of factors",
        )
    if kind == "yarn":
        for key, default in _YARN_DEFAULTS.items():
            if metadata.number(key, default) != default:
                metadata.say(key, UNLIKE_LLAMA_CPP)
        divisors = _yarn(
            metadata.origin,
            dims,
            theta,
            factor,
            original,
            fast=metadata.number("rope.scaling.yarn_beta_fast", 32),
            slow=metadata.number("rope.scaling.yarn_beta_slow", 1),
            truncate=True,
        )
        magnitude *= metadata.number("rope.scaling.yarn_attn_factor", 0.0) or _mscale(factor)
        return RopeSpec(
            dims,
            theta,
            interleaved,
            divisors=divisors,
            magnitude=magnitude,
            extends_to=_extended(factor, original),
        )
    if kind not in ("none", "linear", "longrope"):
        raise UnsupportedCheckpoint(
            f"{metadata.origin}: rope scaling {kind!r} is not supported (supported: none, linear, yarn, longrope)"
        )
    return RopeSpec(
        dims,
        theta,
        interleaved,
        divisors=_times(freqs or short, factor, dims),
        long_divisors=_times(long, factor, dims) if long and not freqs else (),
        long_from_tokens=original if long and not freqs else 0,
        magnitude=magnitude,
        long_magnitude=magnitude,
        extends_to=_extended(factor, original),
    )


def _extended(factor: float, original: int) -> int:
    """The longest text that a scaling is meant for."""
    return int(min(factor * original, MAX_CONTEXT))


def _checked(facts: Facts, dims: int, theta: float) -> int:
    """Gives `dims` back if it and `theta` are safe to compute with, else raises CorruptCheckpoint."""
    if not 2 <= dims <= 4096 or dims % 2:
        raise facts.wrong("rotated dimensions of a head", dims, "even and from 2 to 4096")
    if theta <= 0:
        raise facts.wrong("rope base", theta, "positive")
    return dims


def _times(divisors: Divisors, factor: float, dims: int) -> Divisors:
    if factor == 1.0:
        return divisors
    return tuple(d * factor for d in divisors or (1.0,) * (dims // 2))


def _factor(parameters: Facts) -> float:
    factor = parameters.number("factor")
    if factor <= 0:
        raise parameters.wrong("factor", factor, "positive")
    return factor


def _llama3(dims: int, theta: float, factor: float, low: float, high: float, original: int) -> Divisors:
    """Long waves are stretched, short ones are kept, those between get a mean weighted by frequency."""
    divisors = []
    for i in range(dims // 2):
        wavelength = 2 * math.pi * theta ** (2 * i / dims)
        if wavelength < original / high:
            divisors.append(1.0)
        elif wavelength > original / low:
            divisors.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return tuple(divisors)


def _yarn(
    origin: str,
    dims: int,
    theta: float,
    factor: float,
    original: int,
    *,
    fast: float,
    slow: float,
    truncate: bool,
) -> Divisors:
    """Within the original context, pairs that turn more than `fast` times are kept; those that turn fewer than `slow`
    times are stretched."""
    if theta <= 1 or factor <= 0 or original < 1 or not 0 < slow < fast:
        raise UnsupportedCheckpoint(
            f"{origin}: rope scaling yarn with base {theta}, factor {factor}, original context {original}, "
            f"beta_slow {slow} and beta_fast {fast}: base must exceed 1, the others be positive, slow below fast"
        )

    def pair_that_turns(times: float) -> float:
        return dims * math.log(original / (times * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair_that_turns(fast), pair_that_turns(slow)
    if truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dims - 1)
    span = last - first if last != first else 0.001
    stretched = [min(max((i - first) / span, 0.0), 1.0) for i in range(dims // 2)]
    return tuple(1 / (part / factor + 1 - part) for part in stretched)


def _mscale(factor: float, scale: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _yarn_magnitude(parameters: Facts, factor: float) -> float:
    scale, everywhere = parameters.number("mscale", 0.0), parameters.number("mscale_all_dim", 0.0)
    if scale and everywhere:
        return _mscale(factor, scale) / _mscale(factor, everywhere)
    return _mscale(factor)


def _longrope_magnitude(factor: float, original: int) -> float:
    return 1.0 if factor <= 1 or original <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
