"""What each rank of a group takes of its machine's memory at most, against its plan."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hosts.group import Group
from hosts.host import Host

PROMPTS = 4


@dataclass(frozen=True)
class Peak:
    """Bytes above what the daemon had before the model."""

    host: str
    planned_bytes: int
    taken_bytes: int

    @property
    def ratio(self) -> float:
        return self.taken_bytes / self.planned_bytes


def peaks(group: Group, model: Path, context: int) -> list[Peak]:
    """From the first load on, in which the workers are sent their weights, to prompts that fill the KV."""
    ranks = len(group.workers) + 1
    hosts = [group.head, *group.workers]
    floors = [_forget(host) for host in hosts]
    status = group.load(model, ranks=ranks, context=context)
    for number in range(PROMPTS):
        answer = group.ask([(number + 7 * place) % 900 for place in range(context - 24)], 16)
        assert not answer.error, answer.error
    names = ["", *status.machines]  # by rank
    planned = dict(zip(names, status.rank_bytes, strict=True))
    return [
        Peak(
            host.name, planned["" if host is group.head else host.name], host.resident_bytes("VmHWM") - floor
        )
        for host, floor in zip(hosts, floors, strict=True)
    ]


def _forget(host: Host) -> int:
    """Let the kernel begin anew with the largest resident set; what it is now."""
    Path(f"/proc/{host.pid}/clear_refs").write_text("5")
    return host.resident_bytes()
