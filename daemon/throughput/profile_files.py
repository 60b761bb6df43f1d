"""Profiles in files: JSON as `Profile` has it, or a few figures that somebody wrote down. What is read is checked.

Knows files and JSON. `partition.throughput.profile_checks` knows the limits of figures.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import msgspec

from shoal.daemon.errors import DaemonError
from shoal.models.regular_files import read_regular
from shoal.partition.errors import ProfileError
from shoal.partition.throughput.profile import Profile
from shoal.partition.throughput.profile_checks import check_profile

PROFILE_BYTES = 8 << 20
_HINT = "see docs/throughput-model.md for what a profile has"


def read_profile(path: Path) -> Profile:
    """The profile in a file. Raises DaemonError `bad_request` with one line: which field, which value, which limit."""
    try:
        text = read_regular(path, PROFILE_BYTES)
    except OSError as error:
        raise DaemonError("bad_request", f"cannot read {path}: {error.strerror or error}") from error
    return parse_profile(text, str(path))


def parse_profile(text: bytes, origin: str) -> Profile:
    """The profile in a text. Raises DaemonError."""
    try:
        found = json.loads(text, object_pairs_hook=_once)
        if problem := next(_unknown(found, Profile, ""), ""):
            raise ProfileError(problem)
        return check_profile(msgspec.convert(found, Profile))
    except ProfileError as error:
        raise DaemonError("bad_request", f"{origin}: {error}", _HINT) from error
    except msgspec.ValidationError as error:
        raise DaemonError("bad_request", f"{origin}: {_said(str(error))}", _HINT) from error
    except (ValueError, RecursionError) as error:
        raise DaemonError("bad_request", f"{origin}: is no JSON: {str(error)[:200]}", _HINT) from error


def profile_text(profile: Profile) -> bytes:
    """A profile as JSON."""
    return msgspec.json.format(msgspec.json.encode(profile))


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ProfileError if it has a field twice, of which one would count and nobody knows which."""
    made = dict(pairs)
    if len(made) < len(pairs):
        twice = next(
            name for place, (name, _) in enumerate(pairs) if any(name == it[0] for it in pairs[:place])
        )
        raise ProfileError(f"{twice[:80]} stands twice in one object")
    return made


def _said(error: str) -> str:
    """msgspec's sentence with the field first: `devices[0].flops: expected a number, got a text`."""
    what, _, where = error.partition(" - at `")
    return (
        f"{where.rstrip('`').removeprefix('$').removeprefix('.')}: {what[:1].lower()}{what[1:]}"
        if where
        else error
    )


def _unknown(value: Any, kind: Any, where: str) -> Iterator[str]:
    """What is no field of its object, or lacks one that must be there: nobody should think that it counts."""
    if is_dataclass(kind) and isinstance(value, dict):
        hints, known = get_type_hints(kind), {field.name: field for field in fields(kind)}
        prefix = f"{where}." if where else ""
        for name in value:
            if name not in known:
                yield f"{prefix}{str(name)[:80]}: there is no such field; there are {', '.join(known)}"
        for name, field in known.items():
            if name not in value and field.default is MISSING and field.default_factory is MISSING:
                yield f"{prefix}{name} is missing: it must be there"
            if name in value:
                yield from _unknown(value[name], hints[name], prefix + name)
    elif isinstance(value, list):
        inner = [argument for argument in get_args(kind) if is_dataclass(argument)]
        for place, item in enumerate(value if inner else ()):
            yield from _unknown(item, inner[0], f"{where}[{place}]")
    elif isinstance(value, dict):
        for argument in get_args(kind):
            if is_dataclass(argument):
                yield from _unknown(value, argument, where)
