"""Profiles in files: JSON as `Profile` has it, or a few figures that somebody wrote down. What is read is checked.

Knows files and JSON. `partition.throughput.profile_checks` knows the limits of figures.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import msgspec

from shoal.daemon.errors import DaemonError
from shoal.models.json_bounds import check_nesting, utf_8
from shoal.models.regular_files import read_regular
from shoal.partition.errors import ProfileError
from shoal.partition.throughput.profile import Corrections, Profile
from shoal.partition.throughput.profile_checks import check_profile

PROFILE_BYTES = 8 << 20
_SAID = 60  # characters of a value
_FORMER = {(Corrections, "network")}  # fields that files have which were written when there were such
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
        check_nesting(text)
        found = json.loads(utf_8(text), object_pairs_hook=_once)
        if problem := next(_problems(found, Profile, ""), ""):
            raise ProfileError(problem)
        return check_profile(msgspec.convert(found, Profile))
    except ProfileError as error:
        raise DaemonError("bad_request", f"{origin}: {error}", _HINT) from error
    except msgspec.ValidationError as error:
        raise DaemonError("bad_request", f"{origin}: {_said(str(error))}", _HINT) from error
    except ValueError as error:
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


def _problems(value: Any, kind: Any, where: str) -> Iterator[str]:
    """What is no field of its object, or lacks one that must be there, since nobody should think that it counts; and
    what is of another kind than it must be. `kind`: of a field of a profile, as it is declared."""
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    if value is None and NoneType in kinds:
        return
    kind = kinds[0]
    if not _is_one(value, kind):
        said = json.dumps(value)
        said = said if len(said) <= _SAID else f"{said[:_SAID]}… ({len(said):,} characters)"
        yield (
            f"{where}={said}: must be {_said_kind(kind)}"
            if where
            else f"must be {_said_kind(kind)}, is {said}"
        )
    elif is_dataclass(kind):
        hints, known = get_type_hints(kind), {field.name: field for field in fields(kind)}
        prefix = f"{where}." if where else ""
        for name in value:
            if name not in known and (kind, name) not in _FORMER:
                yield f"{prefix}{str(name)[:80]}: there is no such field; there are {', '.join(known)}"
        for name, field in known.items():
            if name in value:
                yield from _problems(value[name], hints[name], prefix + name)
            elif field.default is MISSING and field.default_factory is MISSING:
                yield f"{prefix}{name} is missing: it must be there"
    elif isinstance(value, list):
        inner, *_ = get_args(kind)
        for place, item in enumerate(value):
            yield from _problems(item, inner, f"{where}[{place}]")


def _is_one(value: Any, kind: Any) -> bool:
    if kind is float and isinstance(value, float):
        return True
    if kind is float:  # whole numbers have no end in Python
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < sys.float_info.max
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 63
    if get_origin(kind) is tuple:
        return isinstance(value, list)
    return isinstance(value, dict if is_dataclass(kind) else kind)


def _said_kind(kind: Any) -> str:
    names = {float: "a number", int: "a whole number", str: "a text", bool: "true or false"}
    return names.get(kind, "an object" if is_dataclass(kind) else "a list")
