"""Why a plan is the one, what would make it faster, and what the smallest machine is that could run a model at all.

Sentences for people, without settings' names: `quant=q4` is said as "4 bits". Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

from ..amounts import format_bytes, meets, rounded_up
from .alone import AS_QUICK, best
from .laws import used_experts
from .prediction import Binding, Job
from .profile import ANY, Device, Profile, ProfileLink
from .solve import Asks, Candidate, Choices, Solved, solve
from .weights_of import Weighed

BITS = {"q8": "8 bits", "q4": "4 bits"}
_WORTH = 1.1  # times as fast is worth a word
_HALVINGS = 12
_TRIES, _FURTHER = 8, 1.01
_MOST_MEMORY = 1 << 44
_MOST_TIMES = 64.0  # as fast a disk
_MOST_MACHINES = 8
_KINDS = 5  # of plans with the same texts that are worth a look
CABLE = ProfileLink((ANY, ANY), 0.15e-3, 117e6)  # a gigabit cable, for a machine that is not there

_BOUND: dict[Binding, str] = {
    "memory": "memory-bound: its speed decides, as",
    "compute": "compute-bound: the processor decides",
    "disk": "disk-bound: each token waits for",
    "link": "link-bound: bringing weights to the device decides",
    "network": "network-bound: what machines send each other decides",
    "overhead": "bound by fixed costs of each step",
}


class Change(NamedTuple):
    """What would meet a target, in words, and with it how many tokens a second."""

    what: str
    tokens_per_s: float


def reason(found: Solved) -> str:
    """One sentence on the plan that was chosen, or on why there is none."""
    if found.chosen is None:
        return nothing_fits(found)
    chosen = found.chosen
    prediction, bound = chosen.prediction, _BOUND[chosen.prediction.binding]
    if prediction.binding == "disk":
        read = prediction.parts["disk"]
        bound += f" {_seconds(read)} of reading"
    elif prediction.binding == "memory":
        reading = "a step reads" if found.job.batch > 1 else "a token reads"
        together = ", its machines together" if chosen.plan is None else ""
        bound += f" {reading} {format_bytes(_read_bytes(chosen, found.job))} of weights{together}"
    said = [bound]
    if chosen.plan is not None and chosen.plan.passes and not chosen.plan.streams:
        said.append("shoal batch has weights pass through the device, a daemon that serves does not")
    if gains := _gains(found, chosen):
        said.append(" and ".join(gains))
    if (second := runner_up(found)) is not None:
        said.append(_compared(second, chosen, found))
    return "; ".join(said)


def runner_up(found: Solved) -> Candidate | None:
    """The quickest of the plans that give the same texts and were not chosen; None if no other fits."""
    chosen = found.chosen
    if chosen is None:
        return None
    others = [it for it in found.candidates if it.fits and it is not chosen and _same_texts(it, chosen)]
    return min(others, key=lambda it: it.prediction.total_s(found.job), default=None)


def worth_a_look(found: Solved) -> list[Candidate]:
    """The plan that was chosen, the next one, the best of each other kind that gives the same texts, and the best with
    each other number of bits. If none fits, what needs least memory as it was asked for, and with these bits."""
    chosen, second = found.chosen, runner_up(found)
    if chosen is None:
        small = _each(
            [it for it in found.candidates if it.least_bytes], lambda it: (it.model.quant, it.asked)
        )
        return [min(its, key=lambda it: it.least_bytes) for its in small]
    alike = [it for it in found.candidates if it.fits and _same_texts(it, chosen)]
    kinds = [_best(its, found.job) for its in _each(alike, _kind) if chosen not in its]
    kinds.sort(key=lambda it: it.prediction.total_s(found.job))
    seconds = [] if second is None or second in kinds else [second]
    bits = [_best(its, found.job) for its in _each(_in_other_bits(found, chosen), lambda it: it.model.quant)]
    return [chosen, *[*seconds, *kinds][: _KINDS - 1], *bits]


def _each(pool: Iterable[Candidate], kind: Callable[[Candidate], object]) -> list[list[Candidate]]:
    """Those of each kind."""
    found: dict[object, list[Candidate]] = {}
    for it in pool:
        found.setdefault(kind(it), []).append(it)
    return list(found.values())


def _best(pool: Sequence[Candidate], job: Job) -> Candidate:
    """The one that would be chosen of these."""
    return best(pool, lambda it: it.order, lambda it: it.prediction.total_s(job))


def _in_other_bits(found: Solved, chosen: Candidate) -> list[Candidate]:
    """Of plans that fit, those with other weights and the same K and V; the most bits come first."""
    return [
        it
        for it in found.candidates
        if it.fits and it.kv_type == chosen.kv_type and it.model.quant != chosen.model.quant
    ]


def _kind(found: Candidate) -> object:
    plan = found.plan
    return (plan.device, plan.passes, plan.streams) if plan is not None else found.name.split()[0]


def _compared(other: Candidate, chosen: Candidate, found: Solved) -> str:
    times = other.prediction.total_s(found.job) / chosen.prediction.total_s(found.job)
    mine, theirs = (it.prediction.band[1] / it.prediction.tokens_per_s for it in (chosen, other))
    unsure = ", less than predictions can tell apart" if 1 / times <= mine * theirs >= times else ""
    if f"{abs(times - 1):.0%}" == "0%":
        return f"{other.name} would take as long"
    if times < 1:
        return f"{other.name} would take {1 - times:.0%} less time and is less simple{unsure}"
    return f"{other.name} would take {times - 1:.0%} more time{unsure}"


def _gains(found: Solved, chosen: Candidate) -> list[str]:
    def speed(it: Candidate) -> float:
        """Of what is asked for: tokens, or a first one alone."""
        return it.prediction.tokens_per_s if found.job.new_tokens > 1 else 1 / it.prediction.ttft_s

    gains = []
    lacking = [it for it in found.candidates if _same_texts(it, chosen) and it.lacks_memory]
    if lacking and chosen.plan is not None:  # what a group would do with more of it is not among them
        most = max(map(speed, lacking))
        if most > _WORTH * speed(chosen):
            cheapest = min(
                (it for it in lacking if AS_QUICK * speed(it) >= most), key=lambda it: it.least_bytes
            )
            gain = _times(speed(cheapest) / speed(chosen))
            gains.append(f"{cheapest.missing.replace(' of ', ' more ')} would give {gain}")
    fewer = [_best(its, found.job) for its in _each(_in_other_bits(found, chosen), lambda it: it.model.quant)]
    if fewer and speed(quickest := max(fewer, key=speed)) > _WORTH * speed(chosen):
        gain = _times(speed(quickest) / speed(chosen))
        gains.append(f"weights in {BITS.get(quickest.model.quant, quickest.model.quant)} would give {gain}")
    return gains


def _same_texts(one: Candidate, other: Candidate) -> bool:
    return (one.model.quant, one.kv_type) == (other.model.quant, other.kv_type)


def _read_bytes(chosen: Candidate, job: Job) -> float:
    """Of weights, for a step in which each stream gets a token."""
    model = chosen.model
    moe = model.spec.moe
    others = "embed", "expert", "head"
    whole = sum(nbytes for block, nbytes in model.block_bytes.items() if block.kind not in others)
    whole += sum(it.nbytes for it in model.head)
    if moe:
        experts = sum(nbytes for block, nbytes in model.block_bytes.items() if block.kind == "expert")
        used = used_experts(model, job.batch * (1 + job.guesses), job.distinct)
        whole += int(experts * used / moe.experts)
    return float(whole)


def nothing_fits(found: Solved) -> str:
    """Why nothing runs, and the smallest machine that would do."""
    least = [it for it in found.candidates if it.least_bytes]
    if not least:
        return found.no_group or "no group of these machines can run it"
    smallest = min(least, key=lambda it: it.least_bytes)
    as_stored = min((it for it in least if it.asked), key=lambda it: it.least_bytes, default=smallest)
    ways = [f"{format_bytes(rounded_up(smallest.least_bytes))} of memory{_with(smallest)}"]
    if as_stored is not smallest:
        fewer = as_stored.model.quant != smallest.model.quant
        kept = "the weights as they are stored" if fewer else f"K and V in {as_stored.kv_type}"
        ways.append(f"{format_bytes(rounded_up(as_stored.least_bytes))}{_with(as_stored)} with {kept}")
    lacks = f"no plan fits: {smallest.missing} is missing"
    less = "; shoal run keeps none there, and so needs less" if smallest.model.buffers else ""
    return f"{lacks}; the smallest machine that could run it has {', or '.join(ways)}{less}"


def _with(found: Candidate) -> str:
    """What else such a machine needs, and what it makes of the model."""
    parts = ["a disk"] if found.plan is not None and found.plan.streams else []
    parts += [f"weights in {BITS[found.model.quant]}"] if found.model.quant in BITS else []
    parts += [f"K and V in {found.kv_type}"] if not found.asked else []
    if on_their_way := found.model.buffers.get(found.kv_type, 0):
        parts.append(f"{format_bytes(on_their_way)} of it for K and V on their way to disk")
    return f" ({', '.join(parts)})" if parts else ""


def changes(
    models: Sequence[Weighed],
    wanted: Asks,
    profile: Profile,
    found: Solved,
    choices: Choices,
    target: float,
) -> list[Change]:
    """What would give `target` tokens a second, the cheapest first: another plan costs first tokens, fewer bits cost
    texts, the rest costs money."""
    free = (_another_plan(found, target), _fewer_bits(found, target))
    tried = (*free, *_bought(models, wanted, profile, found, choices, target))
    reached = [change for change in tried if change is not None]
    both = _fewer_bits_and_memory(found, target) if not reached else None
    return [both] if both is not None else reached


def _another_plan(found: Solved, target: float) -> Change | None:
    """One that fits and was not chosen, as all of the job takes longer with it."""
    chosen = found.chosen
    its = [
        it for it in _reaching(found, target) if chosen is not None and it.fits and _same_texts(it, chosen)
    ]
    if not its:
        return None
    first = _best(its, found.job)
    after = _seconds(first.prediction.ttft_s)
    return Change(
        f"{first.name}, with which the first token comes after {after}", first.prediction.tokens_per_s
    )


def _reaching(found: Solved, target: float) -> list[Candidate]:
    return [it for it in found.candidates if meets(it.prediction.tokens_per_s, target)]


def _fewer_bits_and_memory(found: Solved, target: float) -> Change | None:
    its = [it for it in _reaching(found, target) if it.lacks_memory and it.model.quant in BITS]
    if not its:
        return None
    cheapest = min(its, key=lambda it: it.least_bytes)
    memory = cheapest.missing.replace(" of ", " more ")
    return Change(f"weights in {BITS[cheapest.model.quant]} and {memory}", cheapest.prediction.tokens_per_s)


def _fewer_bits(found: Solved, target: float) -> Change | None:
    its = [it for it in _reaching(found, target) if it.fits and not it.asked]
    if not its:
        return None
    most_bits = [it for it in its if _same_texts(it, its[0])]  # they come first
    first = _best(most_bits, found.job)
    parts = [BITS[first.model.quant]] if first.model.quant in BITS else []
    kept = found.candidates[0].kv_type
    parts += [f"K and V in {first.kv_type}"] if first.kv_type != kept else []
    return Change(
        " and ".join(["weights in " + parts[0], *parts[1:]] if first.model.quant in BITS else parts),
        first.prediction.tokens_per_s,
    )


def _bought(
    models: Sequence[Weighed],
    wanted: Asks,
    profile: Profile,
    found: Solved,
    choices: Choices,
    target: float,
) -> list[Change | None]:
    job, only = found.job, models[:1]
    fixed = choices._replace(kv_type=choices.kv_type or "f16")

    def speed(changed: Profile, ranks: int | None = choices.ranks) -> float:
        chosen = solve(only, wanted, changed, job, fixed._replace(ranks=ranks)).chosen
        return chosen.prediction.tokens_per_s if chosen is not None else 0.0

    def with_memory(nbytes: float) -> Profile:
        return replace(profile, devices=(replace(profile.head, memory_bytes=nbytes), *profile.devices[1:]))

    def with_disk(times: float) -> Profile:
        changed = with_faster_disk(profile.head, times)
        return replace(profile, devices=(changed, *profile.devices[1:]))

    now, disk = profile.head.memory_bytes, profile.head.disk_bytes_per_s
    bought: list[Change | None] = []
    most = 1.5 * max((it.least_bytes for it in found.candidates), default=_MOST_MEMORY)
    larger = _least(lambda it: speed(with_memory(now + it)), 0.0, min(_MOST_MEMORY, most), target)
    if larger is not None:
        bought.append(Change(f"{format_bytes(larger.amount)} more memory", larger.tokens_per_s))
    if disk:
        faster = _least(lambda it: speed(with_disk(it / disk)), disk, _MOST_TIMES * disk, target)
        if faster is not None:
            bought.append(Change(f"a disk of {format_bytes(faster.amount)}/s", faster.tokens_per_s))
    for count in range(len(profile.devices) + 1, _MOST_MACHINES + 1) if choices.ranks != 1 else ():
        more = tuple(replace(profile.head, name=f"{profile.head.name} #{i}") for i in range(2, count + 2))
        grown = Profile((*profile.devices, *more[: count - len(profile.devices)]), (*profile.links, CABLE))
        if meets(reached := speed(grown, count), target):
            machines = count - len(profile.devices)
            said = "another machine" if machines == 1 else f"{machines} more machines"
            bought.append(Change(f"{said} like the first, by a gigabit cable", reached))
            break
    return bought


class _Enough(NamedTuple):
    amount: float
    tokens_per_s: float


def _least(speed: Callable[[float], float], low: float, high: float, target: float) -> _Enough | None:
    """The least amount between two with which a target is met, in the three digits that are said of it. More of it may
    bring a plan that reads prompts faster and gives tokens more slowly, so some amounts above it are tried, too."""
    if not meets(speed(high), target):
        return None
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if meets(speed(middle), target) else (middle, high)
    for _ in range(_TRIES):
        high = rounded_up(high)
        if meets(reached := speed(high), target):
            return _Enough(high, reached)
        high *= _FURTHER
    return None


def with_faster_disk(device: Device, times: float) -> Device:
    """The device if its disk were so many times as fast."""

    def of(speeds: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(times * it for it in speeds)

    reads = device.reads
    if reads is not None:
        rings = reads.rings and replace(reads.rings, bytes_per_s=of(reads.rings.bytes_per_s))
        reads = replace(reads, bytes_per_s=of(reads.bytes_per_s), rings=rings)
    return replace(device, disk_bytes_per_s=times * device.disk_bytes_per_s, reads=reads)


def _times(factor: float) -> str:
    return f"{factor:.1f} times" if factor < 9.95 else f"{factor:.0f} times"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 99.5 else f"{seconds:.0f} s"
