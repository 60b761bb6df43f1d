"""Plans for several machines: what `partition.group_search` predicts, in the words of this folder. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

from ..group_choice import Choice, NoGroup
from ..group_search import choose
from ..hardware_guesses import LAYER_S, STEP_S
from ..machines import Links, LinkSpeed, Machine, Workload
from ..plan import Wanted
from ..sum_cost import Wire
from .cost import beside_bytes
from .laws import products
from .prediction import Binding, Job, Prediction, uncertainty
from .profile import Device, Profile
from .weights_of import Weighed

_QUICK = 1e3  # times faster: links that cost nothing, to find out what they cost
_MANY_ROWS = 256  # of a long step
_READING_SHARE = 0.9  # of a step's computing that reads memory, where nothing tells


def machines_of(profile: Profile, model: Weighed, kv_type: str) -> list[Machine]:
    """The devices as group_search knows machines: how fast they are with this model's weights."""
    return [
        _machine(device, model, _beside_bytes(model, kv_type, place))
        for place, device in enumerate(profile.devices)
    ]


def _beside_bytes(model: Weighed, kv_type: str, rank: int) -> int:
    """Only the head has a tokenizer."""
    return beside_bytes(model, kv_type) - (model.tokenizer_bytes if rank else 0)


def _machine(device: Device, model: Weighed, more: int) -> Machine:
    return Machine(
        device.name,
        max(0, int(device.memory_bytes) - more),
        *speeds_with(device, model),
        device.disk_bytes_per_s,
        device.threads,
        device.port_bytes_per_s,
    )


def speeds_with(device: Device, model: Weighed) -> tuple[float, float]:
    """(bytes of weights per second for one row, operations per second for many) of a device with the types and sizes of
    a model's layers, by its tables; what it says of itself where it has none."""
    if not device.products:
        return device.memory_bytes_per_s, device.flops
    nbytes = operations = one_s = many_s = 0.0
    for kind, layers in model.layer_kinds.items():
        matrices = (*kind.attention, *kind.dense, *kind.expert)
        nbytes += layers * sum(it.nbytes for it in matrices)
        operations += layers * sum(2.0 * it.rows * it.cols * _MANY_ROWS for it in matrices)
        one_s += layers * products(device, matrices, 1).seconds
        many_s += layers * products(device, matrices, _MANY_ROWS).seconds
    return nbytes / one_s, operations / many_s


def links_of(profile: Profile, times: float = 1.0) -> Links:
    """Links by the places of devices; `times` as fast."""
    found: dict[tuple[int, int], LinkSpeed] = {}
    for one, other in combinations(range(len(profile.devices)), 2):
        link = profile.link(profile.devices[one].name, profile.devices[other].name)
        if link is not None:
            found[one, other] = LinkSpeed(link.latency_s / times, min(1e14, link.bytes_per_s * times))
    return found


def group(
    model: Weighed, wanted: Wanted, profile: Profile, job: Job, ranks: int | None, wires: Sequence[Wire]
) -> Choice | NoGroup:
    """The best group of so many of the machines; None: what a daemon would choose. `wires`: what sums may be rounded to
    on their way."""
    sizes = dict(model.extents)
    if not model.spec.tied:
        embed = next(iter(model.block_bytes))
        sizes[embed] = sizes[embed] or model.block_bytes[embed]
    return choose(
        wanted,
        sizes,
        machines_of(profile, model, wanted.kv_type),
        links_of(profile),
        _workload(job),
        ranks=ranks,
        wires=wires,
    )


def group_cost(
    model: Weighed, wanted: Wanted, profile: Profile, job: Job, choice: Choice, wires: Sequence[Wire]
) -> Prediction:
    """What a group does with a job. Streams of a batch are taken to share a step whose sums are as many times longer;
    what is not known is bounded by the band."""
    more_s = _fixed_s(model, profile.head)
    token_s = choice.figures.token_s + more_s
    ttft_s = _first_token_s(choice, job, more_s)
    free = choose(
        wanted,
        dict(model.extents),
        machines_of(profile, model, wanted.kv_type),
        links_of(profile, _QUICK),
        _workload(job),
        ranks=len(choice.ranks),
        wires=wires,
    )
    alone_s = min(token_s, free.figures.token_s + more_s) if isinstance(free, Choice) else token_s
    devices = {device.name: device for device in profile.devices}
    disk_s = max(
        rank.streamed_bytes / devices[rank.machine].disk_bytes_per_s if rank.streamed_bytes else 0.0
        for rank in choice.ranks
    )
    overheads = profile.head.overheads
    overhead_s = min(alone_s, overheads.step_s + overheads.layer_s * len(model.spec.layers))
    computing_s = max(0.0, alone_s - overhead_s - disk_s) if disk_s < alone_s else 0.0
    parts: dict[Binding, float] = {
        "memory": _READING_SHARE * computing_s,
        "compute": (1 - _READING_SHARE) * computing_s,
        "disk": min(disk_s, alone_s),
        "network": token_s - alone_s,
        "overhead": overhead_s,
    }
    binding = max(parts, key=lambda part: parts[part])
    off = 1 + uncertainty(parts, all(device.measured for device in profile.devices))
    step_s = token_s + (job.batch - 1) * parts["network"]
    speed = job.batch / step_s
    return Prediction(
        ttft_s=ttft_s,
        token_s=step_s,
        tokens_per_s=speed,
        band=(speed / off, speed * off),
        peak_bytes=_peaks(model, wanted, choice),
        stall_share=min(1.0, disk_s / token_s) if binding == "disk" else 0.0,
        binding=binding,
        parts=parts,
        prompt_parts={"compute": ttft_s},  # mostly; what the network has of it is not told apart
        load_s=_load_s(model, choice, profile),
    )


def prompts_cost(
    model: Weighed, wanted: Wanted, profile: Profile, job: Job, choice: Choice, alone: Prediction
) -> Prediction:
    """What a group does that reads prompts, while the head writes answers as it does `alone`. Together they read none
    that it reads sooner by itself."""
    together_s = _first_token_s(choice, job, _fixed_s(model, profile.head))
    if together_s >= alone.ttft_s:
        together_s, parts = alone.ttft_s, alone.prompt_parts
    else:
        parts = {"compute": together_s}
    return replace(
        alone,
        ttft_s=together_s,
        prompt_parts=parts,
        peak_bytes=_peaks(model, wanted, choice),
        load_s=max(alone.load_s, _load_s(model, choice, profile)),
    )


def _first_token_s(choice: Choice, job: Job, more_s: float) -> float:
    """Of all streams. `more_s`: that each step takes longer than the search takes it to."""
    steps = -(-job.prompt_tokens // choice.figures.chunk_tokens)
    return (choice.figures.first_token_s[0] + steps * more_s) * job.batch


def _peaks(model: Weighed, wanted: Wanted, choice: Choice) -> dict[str, int]:
    return {
        rank.machine: int(rank.needed_bytes) + _beside_bytes(model, wanted.kv_type, place)
        for place, rank in enumerate(choice.ranks)
    }


def _fixed_s(model: Weighed, device: Device) -> float:
    """Seconds of a step that the search takes from its guesses, and a device knows better."""
    own, layers = device.overheads, model.spec.layers
    mixed_s = own.mixture_s * sum(layer.moe for layer in layers)
    return own.step_s - STEP_S + len(layers) * (own.layer_s - LAYER_S) + mixed_s


def _load_s(model: Weighed, choice: Choice, profile: Profile) -> float:
    """The head reads its files while it sends every other rank its part, over one port."""
    head = profile.head
    read_s = model.stored_bytes / head.disk_bytes_per_s if head.disk_bytes_per_s else 0.0
    sent_s = 0.0
    for rank in choice.ranks[1:]:
        link = profile.link(head.name, rank.machine)
        assert link is not None
        sent_s += rank.share * model.weights_bytes / link.bytes_per_s
    return max(read_s, sent_s) + model.weights_bytes / len(choice.ranks) / head.laid_out_bytes_per_s


def _workload(job: Job) -> Workload:
    return Workload(job.prompt_tokens, job.new_tokens)
