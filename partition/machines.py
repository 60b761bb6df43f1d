"""The machines that a group may be made of, as they were measured, and what they are wanted for.

Figures come from other machines, so they are checked here before anybody computes with them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from .errors import MachineError


class Machine(NamedTuple):
    """One machine. The head, which is always the first, has embedding and head of the vocabulary besides its part."""

    name: str
    memory_bytes: int  # for the model: weights, KV, scratch
    memory_bytes_per_s: float  # at which weights are read when one token is computed
    flops: float  # of steps with many tokens; a multiplication and an addition count as two
    disk_bytes_per_s: float = 0.0  # at which weights are streamed; 0 = it has no place for them
    threads: int = 1
    port_bytes_per_s: float = 0.0  # of all its links together, as many send to it; 0 = as its fastest link


class LinkSpeed(NamedTuple):
    """Between two machines. `latency_s`: of a small message, one way. `kind`: 'Wi-Fi', 'cable', if it is known."""

    latency_s: float
    bytes_per_s: float
    kind: str = ""


Links = Mapping[tuple[int, int], LinkSpeed]  # by the places of two machines, in either order


class Workload(NamedTuple):
    """What is asked usually: prompts that are read, and answers that are decoded one at a time."""

    prompt_tokens: int = 512
    answer_tokens: int = 256

    @property
    def context_tokens(self) -> int:
        """What a token of the answer attends to, on average."""
        return self.prompt_tokens + self.answer_tokens // 2


_LIMITS: Mapping[str, tuple[float, float]] = {
    "memory_bytes": (0, 1 << 60),
    "memory_bytes_per_s": (1e3, 1e16),
    "flops": (1e3, 1e20),
    "disk_bytes_per_s": (0, 1e14),
    "threads": (1, 1 << 16),
    "port_bytes_per_s": (0, 1e14),
    "latency_s": (0, 3600),
    "bytes_per_s": (1, 1e14),
}
MAX_MACHINES = 64


def check_machines(machines: Sequence[Machine], links: Links) -> None:
    """Raises MachineError, with the figure and its limits, if one cannot be true."""
    if not 1 <= len(machines) <= MAX_MACHINES:
        raise MachineError(f"{len(machines)} machines: must be from 1 to {MAX_MACHINES}")
    for machine in machines:
        _check(machine.name, machine._asdict())
    for (one, other), link in links.items():
        if one == other or not (0 <= one < len(machines) and 0 <= other < len(machines)):
            raise MachineError(f"a link between machines {one} and {other}: there are {len(machines)}")
        _check(f"{machines[one].name} – {machines[other].name}", link._asdict())


def link_between(links: Links, one: int, other: int) -> LinkSpeed | None:
    """None if they were not measured, or cannot reach each other."""
    return links.get((one, other)) or links.get((other, one))


def _check(name: str, figures: Mapping[str, object]) -> None:
    for field, value in figures.items():
        if field not in _LIMITS:
            continue
        low, high = _LIMITS[field]
        if not (isinstance(value, int | float) and low <= value <= high):
            raise MachineError(f"{name}: {field}={value}: must be from {low:g} to {high:g}")
