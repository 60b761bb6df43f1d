"""Plans for several machines: what `partition.group_search` predicts, in the words of this folder. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from itertools import combinations

from ..group_choice import Choice, NoGroup
from ..group_search import choose
from ..machines import Links, LinkSpeed, Machine, StepTook, Workload, nearest
from ..plan import Wanted
from ..sum_cost import Wire
from .laws import DISTINCT_SHARE, fresh_pages, products
from .peak import beside_bytes
from .prediction import Binding, Job, Prediction, uncertainty
from .profile import Device, Profile, Repeats
from .rank_laws import RankLaws
from .step_time import and_overhead
from .weights_of import Weighed

_MANY_ROWS = 256  # of a long step


def machines_of(
    profile: Profile, model: Weighed, kv_type: str, distinct: float | None = None
) -> list[Machine]:
    """The devices as group_search knows machines: how fast they are with parts of this model, of which caches keep as
    much as of even ones."""
    part_bytes = model.weights_bytes / len(profile.devices)
    return [
        Machine(
            device.name,
            max(0, int(device.memory_bytes) - _beside_bytes(model, kv_type, place)),
            *speeds_with(device.going_round(part_bytes), model),
            nearest("disk_bytes_per_s", device.disk_bytes_per_s),  # one that was thought of may be too quick
            device.threads,
            device.port_bytes_per_s,
            RankLaws(device, model, kv_type, distinct),
        )
        for place, device in enumerate(profile.devices)
    ]


def _beside_bytes(model: Weighed, kv_type: str, rank: int) -> int:
    """Only the head has a tokenizer."""
    return beside_bytes(model, kv_type) - (model.tokenizer_bytes if rank else 0)


def speeds_with(device: Device, model: Weighed) -> tuple[float, float]:
    """(bytes of weights per second for one row, operations per second for many) of a device with the types and sizes of
    a model's layers, by its tables; what it says of itself where it has none. From these shares are made, and what no
    group can exceed."""
    if not device.products:
        return device.memory_bytes_per_s, device.flops
    nbytes = operations = one_s = many_s = 0.0
    active = model.spec.moe.active if model.spec.moe else 0
    for kind, layers in model.layer_kinds.items():
        matrices = (*kind.attention, *kind.dense, *active * kind.expert)
        nbytes += layers * sum(it.nbytes for it in matrices)
        operations += layers * sum(2.0 * it.rows * it.cols * _MANY_ROWS for it in matrices)
        one_s += layers * products(device, matrices, 1).seconds
        many_s += layers * products(device, matrices, _MANY_ROWS).seconds
    return nearest("memory_bytes_per_s", nbytes / one_s), nearest("flops", operations / many_s)


def links_of(profile: Profile) -> Links:
    """Links by the places of devices."""
    found: dict[tuple[int, int], LinkSpeed] = {}
    for one, other in combinations(range(len(profile.devices)), 2):
        link = profile.link(profile.devices[one].name, profile.devices[other].name)
        if link is not None:
            found[one, other] = LinkSpeed(link.latency_s, link.bytes_per_s)
    return found


class Groups:
    """All groups of a profile's devices for one model and job. `wires`: what sums may be rounded to on their way.
    Remembers what machines take."""

    def __init__(
        self, model: Weighed, wanted: Wanted, profile: Profile, job: Job, wires: Sequence[Wire]
    ) -> None:
        self.model, self.wanted, self.profile, self.job, self.wires = model, wanted, profile, job, wires
        self._machines = machines_of(profile, model, wanted.kv_type, job.distinct)
        self._links = links_of(profile)
        self._sizes = dict(model.extents)
        if not model.spec.tied:
            embed = next(iter(model.block_bytes))
            self._sizes[embed] = self._sizes[embed] or model.block_bytes[embed]

    def of(self, ranks: int | None) -> Choice | NoGroup:
        """The best group of so many of the machines; None: what a daemon would choose."""
        job = self.job
        workload = Workload(job.prompt_tokens, job.new_tokens, job.batch, job.guesses, job.step_tokens)
        return choose(
            self.wanted,
            self._sizes,
            self._machines,
            self._links,
            workload,
            ranks=ranks,
            wires=self.wires,
            compared=False,
        )

    def cost(self, choice: Choice) -> Prediction:
        """What a group does with the job. How many experts several tokens wake is not always known: the band has both
        ends."""
        figures, job = choice.figures, self.job
        largest = max(rank.share for rank in choice.ranks)
        touch = fresh_pages(self.profile.head, self.model.spec, self.wanted.kv_type, job, largest)
        step, prompts = figures.step, figures.prompts
        parts = and_overhead(_parts(step), touch.token_s)
        binding = max(parts, key=lambda part: parts[part])
        repeats = reduce(Repeats.or_more, (device.repeats for device in self.profile.devices))
        measured = all(device.measured for device in self.profile.devices)
        off = 1 + uncertainty(parts, measured, repeats.by_part)
        step_s, tokens = step.seconds + touch.token_s, job.batch * job.step_tokens
        others = [it.figures.step.seconds + touch.token_s for it in self._with_other_experts(choice)]
        peaks = {
            rank.machine: int(rank.needed_bytes) + _beside_bytes(self.model, self.wanted.kv_type, place)
            for place, rank in enumerate(choice.ranks)
        }
        return Prediction(
            ttft_s=prompts.seconds + touch.ttft_s,
            token_s=step_s / job.step_tokens,
            tokens_per_s=tokens / step_s,
            band=(tokens / (max(step_s, *others) * off), tokens / min(step_s, *others) * off),
            peak_bytes=peaks,
            stall_share=step.disk_s / step.seconds if binding == "disk" else 0.0,
            binding=binding,
            parts=parts,
            prompt_parts=and_overhead(_parts(prompts), touch.ttft_s),
            load_s=_load_s(self.model, choice, self.profile),
        )

    def _with_other_experts(self, choice: Choice) -> list[Choice]:
        """The group of so many machines if several tokens woke fewer experts, or more; and the group itself."""
        found = [choice]
        several = self.job.batch * (1 + self.job.guesses) > 1
        if self.model.spec.moe and self.job.distinct is None and several:
            for share in (DISTINCT_SHARE, 1.0):
                job = self.job._replace(distinct=share)
                other = Groups(self.model, self.wanted, self.profile, job, self.wires)
                its = other.of(None if choice.split == "prompts" else len(choice.ranks))
                found += [its] if isinstance(its, Choice) and its.split == choice.split else []
        return found


def _parts(took: StepTook) -> dict[Binding, float]:
    return {
        "memory": took.memory_s,
        "compute": took.compute_s,
        "disk": took.disk_s,
        "network": took.network_s,
        "overhead": took.overhead_s,
    }


def _load_s(model: Weighed, choice: Choice, profile: Profile) -> float:
    """The head reads its files while it sends every other rank its part, over one port."""
    head = profile.head
    read_s = model.stored_bytes / head.disk_bytes_per_s if head.disk_bytes_per_s else 0.0
    sending_s = 0.0
    for rank in choice.ranks[1:]:
        link = profile.link(head.name, rank.machine)
        assert link is not None
        sending_s += rank.share * model.weights_bytes / link.bytes_per_s
    return max(read_s, sending_s) + model.weights_bytes / len(choice.ranks) / head.laid_out_bytes_per_s
