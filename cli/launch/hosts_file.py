"""hosts.toml: the machines on which `shoal cluster launch` starts workers.

    [[host]]
    address = "pi3.local"            what is typed after ssh; it may be a Host of ~/.ssh/config
    name = "pi3"                     for people; by default the address
    user = "me"                      by default what ssh takes
    shoal = "~/shoal/bin/shoal"      the command there; by default "shoal"
    memory = "6GB"                   what it lends, at most
    threads = 4
    home = "~/shoal-home"            SHOAL_HOME there

Knows what may stand in the file, and says field, value and limit of what may not. Does not know ssh.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.daemon.errors import DaemonError
from shoal.daemon.sizes import parse_bytes

MAX_HOSTS = 63  # workers that a head may have, less one
MAX_FILE_BYTES = 1 << 20
MAX_TEXT = 1024
MAX_HOST_THREADS = 4096
MAX_MEMORY_BYTES = 1 << 50


@dataclass(frozen=True)
class Host:
    """One machine. `shoal` and `home` are for its shell."""

    address: str
    name: str
    user: str | None = None
    shoal: str = "shoal"
    memory: int | None = None  # bytes
    threads: int | None = None
    home: str | None = None

    @property
    def destination(self) -> str:
        """As it is typed after ssh."""
        return f"{self.user}@{self.address}" if self.user else self.address


def read_hosts(path: Path) -> list[Host]:
    """All hosts, in the file's order. Raises DaemonError."""
    hosts: list[Host] = []
    for number, entry in enumerate(_entries(path), 1):
        host = _host(entry, f"{path}: host {number}")
        for other, before in enumerate(hosts, 1):
            if host.name == before.name:
                raise _bad(f"{path}: host {number}: name={host.name!r}: host {other} has it, too")
            if (host.destination, host.home) == (before.destination, before.home):
                where = f"address={host.address!r}" + (f", home={host.home!r}" if host.home else "")
                raise _bad(f"{path}: host {number}: {where}: host {other} is the same machine")
        hosts.append(host)
    return hosts


def _entries(path: Path) -> list[Any]:
    try:
        if path.exists() and not path.is_file():
            raise _bad(f"{path}: must be a file")
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise _bad(f"{path}: must have at most {MAX_FILE_BYTES} bytes")
        found = tomllib.loads(data.decode())
    except FileNotFoundError as error:
        raise DaemonError("not_found", f"no such file: {path}") from error
    except OSError as error:
        raise _bad(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise _bad(f"{path}: is no text in UTF-8") from error
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise _bad(f"{path}: is no TOML: {str(error)[:200]}") from error
    for key in found:
        if key != "host":
            raise _bad(f"{path}: {key[:40]!r} is not known: machines are written as [[host]]")
    entries = found.get("host", [])
    if not isinstance(entries, list):
        raise _bad(f"{path}: [host] must be written [[host]], once for each machine")
    if not entries:
        raise _bad(f"{path}: has no [[host]]")
    if len(entries) > MAX_HOSTS:
        raise _bad(f"{path}: has {len(entries)} hosts: must be at most {MAX_HOSTS}")
    return entries


def _host(entry: Any, where: str) -> Host:
    if not isinstance(entry, dict):
        raise _bad(f"{where}: must be a table with at least an address")
    for key, value in entry.items():
        if key not in _CHECKS:
            near = difflib.get_close_matches(key, _CHECKS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(_CHECKS)}"
            raise _bad(f"{where}: {key[:40]!r} is not known", hint)
        if wrong := _CHECKS[key](value):
            raise _bad(f"{where}: {key}={_shown(value)}: {wrong}")
    fields: Mapping[str, Any] = entry
    if not (address := fields.get("address", fields.get("name"))):
        raise _bad(f"{where}: address: is required")
    if wrong := _address(address):
        raise _bad(f"{where}: name={_shown(address)}: {wrong}", "or give the host an address")
    memory = fields.get("memory", "auto")
    return Host(
        address=address,
        name=fields.get("name", address),
        user=fields.get("user"),
        shoal=fields.get("shoal", "shoal"),
        memory=None if memory.lower() == "auto" else parse_bytes(memory),
        threads=fields.get("threads"),
        home=fields.get("home"),
    )


def _text(value: Any) -> str:
    if not isinstance(value, str):
        return "must be a text"
    if not value.strip() or len(value) > MAX_TEXT:
        return f"must have from 1 to {MAX_TEXT} characters"
    return "" if value.isprintable() else "must be in one line, without control characters"


def _word(value: Any) -> str:
    """A text that ssh cannot take for an option, nor for several words."""
    if wrong := _text(value):
        return wrong
    if value.startswith("-"):
        return 'must not begin with "-"'
    return "must have no spaces" if any(it.isspace() for it in value) else ""


def _address(value: Any) -> str:
    if wrong := _word(value):
        return wrong
    return "must not have the user: that is a field of its own" if "@" in value else ""


def _user(value: Any) -> str:
    if wrong := _word(value):
        return wrong
    return 'must not have "@" or ":"' if set("@:") & set(value) else ""


def _home(value: Any) -> str:
    if wrong := _text(value):
        return wrong
    others = value.startswith("~") and value != "~" and not value.startswith("~/")
    return "must be a path, and ~ stands for the own home only" if others else ""


def _memory(value: Any) -> str:
    must = 'must be a text such as "6GB", or "auto"'
    if not isinstance(value, str):
        return must
    if value.lower() == "auto":
        return ""
    try:
        nbytes = parse_bytes(value[:MAX_TEXT])
    except DaemonError:
        return must
    return "" if 1 <= nbytes <= MAX_MEMORY_BYTES else "must be from 1 B to 1 PiB"


def _threads(value: Any) -> str:
    known = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_HOST_THREADS
    return "" if known else f"must be a whole number from 1 to {MAX_HOST_THREADS}"


_CHECKS: dict[str, Callable[[Any], str]] = {
    "address": _address,
    "name": _text,
    "user": _user,
    "shoal": _text,
    "memory": _memory,
    "threads": _threads,
    "home": _home,
}
"""What is wrong with a field's value; "" = nothing."""


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:59] + "…"


def _bad(message: str, hint: str = "") -> DaemonError:
    return DaemonError("bad_request", message, hint)
