"""The machines that a group may be made of, as they were measured, and what they are wanted for.

Figures come from other machines, so they are checked here before anybody computes with them. A machine that says what
cannot be true is left out; it does not keep others from being used.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

from .errors import MachineError
from .hardware_guesses import LAYER_S, MIXTURE_S, STEP_S


class StepRows(NamedTuple):
    """What a step computes: `streams` texts, each with `rows` tokens that attend to `context` others on average.
    `logits`: of how many of all rows logits are wanted: one of a prompt, all of answers and their guesses."""

    rows: int
    context: float
    streams: int = 1
    logits: int = 1

    @property
    def all_rows(self) -> int:
        return self.streams * self.rows

    @property
    def answers(self) -> bool:
        """Whether all rows give logits."""
        return self.logits == self.all_rows

    @property
    def half(self) -> StepRows:
        """What a kernel gets of it where it is computed in halves."""
        logits = -(-self.logits // 2)
        if self.streams == 1:
            return self._replace(rows=-(-self.rows // 2), logits=logits)
        streams = -(-self.streams // 2)
        return self._replace(streams=streams, logits=streams * self.rows if self.answers else logits)


class FixedCosts(NamedTuple):
    """Seconds that a step takes besides its blocks: by itself, for each layer, for one with experts besides; and for
    each token in all layers, as what blocks give is added to its hidden state. For each way of a sum of ranks, besides
    the link and its messages, and for each token in it: what was computed before has taken the sender's caches. For
    each further text of the step, and each further row of logits."""

    step_s: float = STEP_S
    layer_s: float = LAYER_S
    mixture_s: float = MIXTURE_S
    token_s: float = 0.0
    way_s: float = 0.0
    way_token_s: float = 0.0
    stream_s: float = 0.0
    logits_s: float = 0.0


class BlockTimes(NamedTuple):
    """Seconds that a machine computes for its part of a step: in all layers, and for what it has of the head of the
    vocabulary. Of all these, `memory_s` are what reading takes anyhow, `calls_s` calls of further experts."""

    attn_s: float
    ffn_s: float
    head_s: float = 0.0
    memory_s: float = 0.0
    calls_s: float = 0.0

    @property
    def seconds(self) -> float:
        return self.attn_s + self.ffn_s + self.head_s


class DiskTimes(NamedTuple):
    """What a disk does to a step of a rank that streams: no step takes less than `least_s`; all that is computed takes
    `slower` times as long, and what follows attention waits `stall_s` for experts besides."""

    least_s: float
    slower: float = 1.0
    stall_s: float = 0.0


class StepWork(NamedTuple):
    """Seconds that a step takes without what goes over the network."""

    attn_s: float  # of the slowest rank, in all layers
    ffn_s: float
    head_s: float
    disk_s: float  # of the slowest disk
    reading: float  # of all that is computed, the share that reads memory, and …
    calling: float  # … that is calls of further experts

    @property
    def chain_s(self) -> float:
        return self.attn_s + self.ffn_s + self.head_s


class StepTook(NamedTuple):
    """Seconds of a step of a group, or of several, and the parts that they are put together of: of its blocks what
    reads memory and what computes, what nothing but the disk takes, all that goes between machines, and calls."""

    seconds: float = 0.0
    memory_s: float = 0.0
    compute_s: float = 0.0
    disk_s: float = 0.0
    network_s: float = 0.0
    overhead_s: float = 0.0

    @classmethod
    def of(cls, seconds: float, work: StepWork, network_s: float, overhead_s: float) -> StepTook:
        """All else goes on while a disk reads, so what that takes is seen first."""
        disk_s = min(work.disk_s, seconds)
        network_s = min(network_s, seconds - disk_s)
        overhead_s = min(overhead_s, seconds - disk_s - network_s)
        computing_s = seconds - network_s - disk_s - overhead_s
        memory_s, calls_s = work.reading * computing_s, work.calling * computing_s
        compute_s = max(0.0, computing_s - memory_s - calls_s)
        return cls(seconds, memory_s, compute_s, disk_s, network_s, overhead_s + calls_s)

    def times(self, factor: float) -> StepTook:
        """If all takes so many times as long."""
        return StepTook.together([(factor, self)])

    @classmethod
    def together(cls, steps: Iterable[tuple[float, StepTook]]) -> StepTook:
        """So many of each."""
        counted = [[count * its for its in took] for count, took in steps]
        return cls(*map(sum, zip(*counted, strict=True)))


class RankHolds(Protocol):
    """What a rank streams: see `rank_sizes.Held`."""

    @property
    def streamed_bytes(self) -> int: ...
    @property
    def missing_experts(self) -> float: ...
    @property
    def window_bytes(self) -> int: ...
    @property
    def block_bytes(self) -> int: ...
    @property
    def expert_slots(self) -> int: ...


class RankShares(Protocol):
    """A rank's shares of what is cut: see `rank_sizes.Portion`."""

    @property
    def heads(self) -> float: ...
    @property
    def kv_heads(self) -> float: ...
    @property
    def ffn(self) -> float: ...
    @property
    def shared_ffn(self) -> float: ...
    @property
    def experts(self) -> float: ...
    @property
    def whole_experts(self) -> bool: ...
    @property
    def vocab(self) -> float: ...
    @property
    def first(self) -> bool: ...


class PartLaws(Protocol):
    """How fast a machine is with parts of one model, where more is known of it than two speeds."""

    def fixed(self, share: float) -> FixedCosts:
        """Of a rank that has such a share of every layer."""
        ...

    def times(self, portion: RankShares, step: StepRows, crowd: float) -> BlockTimes:
        """`crowd`: times its share of the experts that are chosen, which the busiest rank has of whole ones."""
        ...

    def head_s(self, share: float, rows: int) -> float:
        """Of so much of the head of the vocabulary, for so many rows of logits."""
        ...

    def used(self, rows: int) -> float:
        """How many of a layer's experts so many rows choose; 0 where there are none."""
        ...

    def disk(
        self, portion: RankShares, held: RankHolds, rows: int, crowd: float, own: BlockTimes
    ) -> DiskTimes:
        """Of a rank that streams. `own`: what it computes, as in `times`."""
        ...


class Machine(NamedTuple):
    """One machine. The head, which is always the first, has embedding and head of the vocabulary besides its part."""

    name: str
    memory_bytes: int  # for the model: weights, KV, scratch
    memory_bytes_per_s: float  # at which weights are read when one token is computed
    flops: float  # of steps with many tokens; a multiplication and an addition count as two
    disk_bytes_per_s: float = 0.0  # at which weights are streamed; 0 = it has no place for them
    threads: int = 1
    port_bytes_per_s: float = 0.0  # of all its links together, as many send to it; 0 = as its fastest link
    laws: PartLaws | None = None  # None = as its two speeds say


class LinkSpeed(NamedTuple):
    """Between two machines. `latency_s`: of a small message, one way. `kind`: 'Wi-Fi', 'cable', if it is known."""

    latency_s: float
    bytes_per_s: float
    kind: str = ""


Links = Mapping[tuple[int, int], LinkSpeed]  # by the places of two machines, in either order


class Workload(NamedTuple):
    """What is asked usually: prompts that are read, and answers that are decoded, so many `streams` at a time. Each of
    these guesses so many tokens ahead in a step, and gets `step_tokens` from it, on average."""

    prompt_tokens: int = 512
    answer_tokens: int = 256
    streams: int = 1
    guesses: int = 0
    step_tokens: float = 1.0

    @property
    def context_tokens(self) -> int:
        """What a token of the answer attends to, on average."""
        return self.prompt_tokens + self.answer_tokens // 2

    def decoding(self, most_tokens: int) -> StepRows:
        """A step in the middle of the answers, in a context of so many tokens at most."""
        rows = 1 + self.guesses
        context = min(self.context_tokens, most_tokens) + self.guesses / 2
        return StepRows(rows, context, self.streams, self.streams * rows)

    def prompts(self, tokens: int, chunk: int) -> list[tuple[int, StepRows]]:
        """(how many, step) of those that read a prompt of so many tokens for each stream. Short ones share a step."""
        if tokens <= chunk:
            together = min(self.streams, max(1, chunk // tokens))
            whole, rest = divmod(self.streams, together)
            alike = (whole, together), (1 if rest else 0, rest)
            return [(count, StepRows(tokens, tokens / 2, texts, texts)) for count, texts in alike if count]
        whole, rest = divmod(tokens, chunk)
        steps = [(self.streams * whole, StepRows(chunk, whole * chunk / 2))]
        return [*steps, (self.streams, StepRows(rest, whole * chunk + rest / 2))] if rest else steps


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


def check_machines(machines: Sequence[Machine]) -> Mapping[int, str]:
    """Which machines, by their place, say of themselves what cannot be true, and what: these are not to be used. Raises
    MachineError if it is the head, or if there are too many."""
    if not 1 <= len(machines) <= MAX_MACHINES:
        raise MachineError(f"{len(machines)} machines: must be from 1 to {MAX_MACHINES}")
    wrong = {place: fault for place, it in enumerate(machines) if (fault := _fault(it._asdict()))}
    if 0 in wrong:
        raise MachineError(f"{machines[0].name}: {wrong[0]}")
    return wrong


def link_between(links: Links, one: int, other: int) -> LinkSpeed | None:
    """None if they were not measured, or wrongly, or cannot reach each other."""
    link = links.get((one, other)) or links.get((other, one))
    return None if link is None or _fault(link._asdict()) else link


def nearest(field: str, value: float) -> float:
    """The figure that can be true which is nearest to a value."""
    low, high = _LIMITS[field]
    return min(high, max(low, value))


def _fault(figures: Mapping[str, object]) -> str:
    """The first figure that cannot be true, and its limits; "" if there is none."""
    for field, (low, high) in _LIMITS.items():
        value = figures.get(field, low)
        if not (isinstance(value, int | float) and low <= value <= high):
            return f"{field}={value}: must be from {low:g} to {high:g}"
    return ""
