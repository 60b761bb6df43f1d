"""Predicts how fast a group would be: seconds for a token of an answer, and until the first token of a prompt.

A step of one token reads all of a rank's weights; one of many tokens computes. Whatever takes longer counts, unless a
machine has laws of its own (`PartLaws`); block by block for the slowest rank, because all wait for the sum after every
block. Then come the sums themselves, what each step costs anyhow, and the head of the vocabulary, which rank 0 has
alone, or whose parts are gathered. A disk reads ahead all the time, so a step takes as long as the slower of the disk
and everything else.

Ranks divide every layer (tensor parallel), or the layers among them (a pipeline). Pure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import takewhile
from math import ceil
from typing import NamedTuple

from .machines import (
    DiskTimes,
    FixedCosts,
    Machine,
    PartLaws,
    StepRows,
    StepTook,
    StepWork,
    Workload,
)
from .memory_layout import PAGE_TOKENS, kv_page_bytes
from .plan import Wanted
from .rank_sizes import Held, Operations, Portion, Sizes, TwoSpeeds, crowding
from .sum_cost import Means, Network, ends_s, overlapped_s, sent_s, sums_s

NO_DISK = DiskTimes(0.0)
NEVER = 1 << 30  # rows: more than any step has
OVERLAPS = (32, 64, 128, 256, 512)  # rows from which on it may be worth to compute steps in halves
# Rows from which on a group may help a head that could do without it: not answers, which have few even with guesses.
ASSISTED = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
PROMPTS = (512, 4000)  # tokens of prompts whose first token nobody should wait longer for


class Placement(NamedTuple):
    """One rank: its machine, its portion of the model, and how it holds it."""

    machine: Machine
    portion: Portion
    held: Held


class Figures(NamedTuple):
    """What a group is predicted to do. `token_s`: between two tokens of a stream. `first_token_s`: until all streams
    have theirs, for the prompts of `Cost.prompts`, in their order.
    `overlap_rows`: steps of so many rows or more are computed in halves whose sums overlap. `group_rows`, `page_rows`:
    as in `Plan`."""

    token_s: float
    first_token_s: tuple[float, ...]
    total_s: float  # of a usual request
    decode: Means | None  # how sums are made when answers are decoded, and …
    prompt: Means | None  # … when prompts are read; None where there are none
    chunk_tokens: int  # of a prompt, in one step
    overlap_rows: int = NEVER
    group_rows: int = 1
    page_rows: int = 0
    step: StepTook = StepTook()  # that decodes, and …
    prompts: StepTook = StepTook()  # … all that read the usual prompts

    def within(self, other: Figures, factor: float) -> bool:
        """Whether nothing takes longer than `factor` times what it takes there."""
        return all(mine <= factor * theirs for mine, theirs in zip(self.times, other.times, strict=True))

    def best_of(self, other: Figures) -> Figures:
        """The shorter of every time."""
        token_s, *first = map(min, self.times, other.times)
        return self._replace(token_s=token_s, first_token_s=tuple(first))

    def slower(self, factor: float, answer_tokens: int) -> Figures:
        """If a token takes `factor` times as long, and an answer has so many."""
        return self.answered(factor * self.token_s, answer_tokens)

    def answered(self, token_s: float, answer_tokens: int) -> Figures:
        """If a token takes so long, and an answer has so many."""
        total_s = self.total_s + answer_tokens * (token_s - self.token_s)
        step = self.step.times(token_s / self.token_s)
        return self._replace(token_s=token_s, total_s=total_s, step=step)

    @property
    def times(self) -> tuple[float, ...]:
        return self.token_s, *self.first_token_s


class _Steps(NamedTuple):
    """`took`: what a step takes."""

    took: Callable[[StepRows], StepTook]
    decode: Means | None
    prompt: Means | None
    overlap_rows: int


class Cost:
    """Predicts for one model and what it is wanted for."""

    def __init__(self, wanted: Wanted, sizes: Sizes, workload: Workload) -> None:
        spec = wanted.spec
        self._wanted, self._sizes, self._workload = wanted, sizes, workload
        self._work = Operations.of(spec, wanted.kv_type)
        self._windows = Counter(layer.window for layer in spec.layers)
        longest = max(1, wanted.context_tokens - 1)
        prompts = (min(tokens, longest) for tokens in (workload.prompt_tokens, *PROMPTS))
        self.prompts = tuple(dict.fromkeys(prompts))
        self._decoding = workload.decoding(wanted.context_tokens)

    def tensor(self, parts: Sequence[Placement], network: Network, means: Sequence[Means]) -> Figures:
        """Every layer is divided among these ranks. `means`: how several ranks can make sums."""
        return self._divided(self.chunk(parts), self.together(parts, network, means))

    def assisted(
        self,
        alone: Sequence[Placement],
        answers: Figures,
        parts: Sequence[Placement],
        network: Network,
        means: Sequence[Means],
        error: float = 1.0,
    ) -> Figures | None:
        """These ranks read prompts together, and the head decodes `answers` as it does `alone`, unless these have as
        many rows in a step as are worth a group. K and V of a prompt pass to the head once. Together they take `error`
        times as long as predicted. None if the longest step is no faster together, or the head streams."""
        if any(part.held.streams for part in alone):
            return None
        chunk = self.chunk(parts)
        together, by_itself = self.together(parts, network, means), self.together(alone, network, ())

        def gain_s(rows: int) -> float:
            step = StepRows(rows, 0.0)
            return by_itself.took(step).seconds - error * together.took(step).seconds

        lengths = sorted({chunk, *(rows for rows in ASSISTED if rows < chunk)}, reverse=True)
        worth = list(takewhile(lambda rows: gain_s(rows) > 0, lengths))
        if not worth:
            return None
        least = worth[-1]
        row_s = (gain_s(chunk) - gain_s(least)) / (chunk - least) if least < chunk else gain_s(chunk) / chunk
        page_s = self._page_s(parts, network)
        figures = self._divided(chunk, together)
        if self._decoding.all_rows >= least:
            answers = figures.answered(error * figures.token_s, self._workload.answer_tokens)
        pages_s = [self._workload.streams * -(-tokens // PAGE_TOKENS) * page_s for tokens in self.prompts]
        first = [error * its + more for its, more in zip(figures.first_token_s, pages_s, strict=True)]
        return figures._replace(
            token_s=answers.token_s,
            first_token_s=tuple(first),
            total_s=first[0] + self._workload.answer_tokens * answers.token_s,
            decode=answers.decode,
            step=answers.step,
            prompts=StepTook.together([(error, figures.prompts), (pages_s[0], StepTook(1.0, network_s=1.0))]),
            group_rows=least,
            page_rows=min(NEVER, ceil(page_s / row_s)) if row_s > 0 else NEVER,
        )

    def _page_s(self, parts: Sequence[Placement], network: Network) -> float:
        """Seconds in which a page of K and V passes between the head and the others, each with its heads."""
        share = max(part.portion.kv_heads for part in parts[1:])
        return network.dealt_s(share * kv_page_bytes(self._wanted.spec, self._wanted.kv_type))

    def bound(
        self,
        machines: Sequence[Machine],
        network: Network,
        means: Sequence[Means],
        *,
        layered: bool = False,
        cut_vocabulary: bool = False,
    ) -> Figures:
        """No group of exactly these machines takes less, whatever their shares: as if their memory, processors and
        disks were one machine's, and prompts were read in one step. Only the head computes the last of it, unless they
        may `cut_vocabulary`. `layered`: the layers are divided among them, so that nothing is added, but a token has to
        wait for one after the other."""
        memory = sum(machine.memory_bytes for machine in machines)
        paces = [machine.memory_bytes_per_s for machine in machines]
        together = Machine(
            "all of them",
            memory,
            max(paces) if layered else sum(paces),
            sum(machine.flops for machine in machines),
            sum(machine.disk_bytes_per_s for machine in machines),
        )
        beyond = max(0, self._sizes.cut + self._sizes.head - memory)
        streamed = max(0, beyond - self._sizes.experts)
        head = self._laws_of(machines[0])
        together = together._replace(laws=self._two_speeds(together)._replace(chosen=head.used))
        part = Placement(
            together, Portion.even(self._wanted.spec, 1.0), Held(0, streamed, 0.0, max(self.prompts))
        )
        last = None if cut_vocabulary else machines[0]
        steps = self._steps(
            network,
            () if layered else means,
            max(self.prompts),
            lambda step: self._compute_s([part], step, last),
            head.fixed(0.0),
        )
        return self._divided(max(self.prompts), steps)

    def pipeline(self, parts: Sequence[Placement], network: Network) -> Figures | None:
        """The layers are divided among these ranks, one after the other; None if they cannot reach each other. The
        chunks of a prompt follow each other through the ranks."""
        ranks, width = len(parts), 4 * self._wanted.spec.hidden
        ring = [(rank, (rank + 1) % ranks) for rank in range(ranks)]
        if any(network.hop_s(*pair, 0) is None for pair in ring):
            return None

        fixed = self._laws_of(parts[0].machine).fixed(1.0)

        def stages(step: StepRows) -> list[tuple[StepWork, float, float]]:
            """(each rank's part; seconds of sending what it gives, and of its calls)"""
            found = []
            for part, pair in zip(parts, ring, strict=True):
                hop_s = network.hop_s(*pair, width * step.all_rows) or 0.0
                layers = part.portion.heads  # the share of them that it has
                calls_s = layers * self._calls_s(fixed, step.all_rows)
                found.append((self._compute_s([part], step), hop_s, calls_s))
            return found

        def took(step: StepRows) -> StepTook:
            works, hops_s, calls_s = zip(*stages(step), strict=True)
            chain_s = sum(work.chain_s for work in works)
            attn_s, ffn_s, head_s, disks_s, *shares = zip(*works, strict=True)
            reading, calling = (
                sum(share * work.chain_s for share, work in zip(each, works, strict=True)) / chain_s
                for each in shares
            )
            work = StepWork(sum(attn_s), sum(ffn_s), sum(head_s), max(disks_s), reading, calling)
            return self._took(fixed, step, work, chain_s + sum(hops_s), sum(hops_s), sum(calls_s))

        def following(step: StepRows) -> StepTook:
            each = (
                StepTook.of(max(work.chain_s + hop_s + calls_s, work.disk_s), work, hop_s, calls_s)
                for work, hop_s, calls_s in stages(step)
            )
            return max(each)

        return self._figures(self.chunk(parts), took, following)

    def together(self, parts: Sequence[Placement], network: Network, means: Sequence[Means]) -> _Steps:
        """What steps take that these ranks compute together."""
        return self._steps(
            network,
            means,
            self.chunk(parts),
            lambda step: self._compute_s(parts, step),
            self._laws_of(parts[0].machine).fixed(parts[0].portion.heads),
            max((it.portion.vocab for it in parts[1:]), default=0.0),
        )

    def _steps(
        self,
        network: Network,
        means: Sequence[Means],
        chunk: int,
        compute: Callable[[StepRows], StepWork],
        fixed: FixedCosts,
        gathered: float = 0.0,
    ) -> _Steps:
        """`gathered`: the largest share of the vocabulary that is not rank 0's."""
        few, prompt = (self._best(network, means, rows) for rows in (1, min(chunk, max(self.prompts))))
        both = [it for it in (few, prompt) if it is not None]
        decode = self._best(network, both, self._decoding.all_rows)
        spec = self._wanted.spec

        def whole(step: StepRows) -> StepTook:
            work, how = compute(step), decode if step.answers else prompt
            sums = sums_s(network, spec, how, step, gathered)
            calls_s = sent_s(spec, fixed, how, step.all_rows) + self._calls_s(fixed, step.all_rows)
            return self._took(fixed, step, work, work.chain_s + sums, sums, calls_s)

        def halved(step: StepRows) -> StepTook:
            half = compute(step.half)  # kernels take that twice
            work = compute(step)._replace(
                attn_s=2 * half.attn_s, ffn_s=2 * half.ffn_s, reading=half.reading, calling=half.calling
            )
            rows, chain_s = step.all_rows, work.chain_s
            if prompt:
                chain_s = overlapped_s(network, spec, prompt, rows, work.attn_s, work.ffn_s) + work.head_s
                chain_s += ends_s(network, spec, prompt, step, gathered)
            calls_s = 2 * (self._calls_s(fixed, rows / 2) + sent_s(spec, fixed, prompt, rows / 2))
            return self._took(fixed, step, work, chain_s, chain_s - work.chain_s, calls_s)

        prompts = (StepRows(rows, 0.0) for rows in OVERLAPS if prompt)
        worth = (step.rows for step in prompts if halved(step).seconds < whole(step).seconds)
        overlap_rows = next(worth, NEVER)

        def took(step: StepRows) -> StepTook:
            return (halved if step.all_rows >= overlap_rows else whole)(step)

        return _Steps(took, decode, prompt, overlap_rows)

    def _divided(self, chunk: int, steps: _Steps) -> Figures:
        figures = self._figures(chunk, steps.took, steps.took, steps.decode, steps.prompt)
        return figures._replace(overlap_rows=steps.overlap_rows)

    def _took(
        self,
        fixed: FixedCosts,
        step: StepRows,
        work: StepWork,
        chain_s: float,
        network_s: float,
        calls_s: float,
    ) -> StepTook:
        """A step whose blocks take `chain_s` with what goes between them, of which `network_s` is all that does."""
        besides_s = fixed.step_s + (step.streams - 1) * fixed.stream_s + (step.logits - 1) * fixed.logits_s
        seconds = max(chain_s + calls_s, work.disk_s) + besides_s
        return StepTook.of(seconds, work, network_s, calls_s + besides_s)

    def _calls_s(self, fixed: FixedCosts, rows: float) -> float:
        """What all layers cost besides their blocks."""
        layers = self._wanted.spec.layers
        calls_s = fixed.layer_s * len(layers) + fixed.mixture_s * sum(layer.moe for layer in layers)
        return calls_s + rows * fixed.token_s

    def chunk(self, parts: Sequence[Placement]) -> int:
        """Tokens of a prompt in one step. Steps get longer where weights stream, as far as everybody's memory goes."""
        if not any(part.held.streams for part in parts):
            return self._wanted.chunk_tokens
        return min(part.held.chunk_tokens for part in parts)

    def reading(
        self,
        tokens: int,
        chunk: int,
        took: Callable[[StepRows], StepTook],
        following: Callable[[StepRows], StepTook],
    ) -> StepTook:
        """All steps that read prompts of so many tokens by `chunk`. `following`: what a step takes that follows another
        one of its prompt."""
        (count, step), *others = self._workload.prompts(tokens, chunk)
        further = ((many, following(it)) for many, it in ((count - 1, step), *others) if many)
        return StepTook.together([(1, took(step)), *further])

    def _figures(
        self,
        chunk: int,
        took: Callable[[StepRows], StepTook],
        following: Callable[[StepRows], StepTook],
        decode: Means | None = None,
        prompt: Means | None = None,
    ) -> Figures:
        """`following`: see `reading`."""
        workload, step = self._workload, took(self._decoding)
        token_s = step.seconds / workload.step_tokens
        prompts = [self.reading(tokens, chunk, took, following) for tokens in self.prompts]
        first_s = tuple(it.seconds for it in prompts)
        total_s = first_s[0] + workload.answer_tokens * token_s
        return Figures(token_s, first_s, total_s, decode, prompt, chunk, step=step, prompts=prompts[0])

    def _compute_s(self, parts: Sequence[Placement], step: StepRows, head: Machine | None = None) -> StepWork:
        moe, rows, crowd = self._wanted.spec.moe, step.all_rows, 1.0
        crowded = parts[0].portion.whole_experts and step.answers  # prompts use nearly all experts
        attn_s = ffn_s = disk_s = head_s = computed_s = reading = calling = 0.0
        for machine, portion, held in parts:
            laws = self._laws_of(machine)
            if moe and crowded:
                crowd = _crowd(moe.experts, laws.used(rows), min(len(parts), moe.experts))
            own = laws.times(portion, step, crowd)
            disk = laws.disk(portion, held, rows, crowd, own) if held.streams else NO_DISK
            if own.seconds > computed_s:  # the slowest is the one whose parts are told
                computed_s = own.seconds
                reading, calling = own.memory_s / computed_s, own.calls_s / computed_s
            attn_s = max(attn_s, disk.slower * own.attn_s)
            ffn_s = max(ffn_s, disk.slower * own.ffn_s + disk.stall_s)
            disk_s = max(disk_s, disk.least_s)
            head_s = max(head_s, own.head_s)
        if head is not None:
            head_s = self._laws_of(head).head_s(1.0, step.logits)
        return StepWork(attn_s, ffn_s, head_s, disk_s, reading, calling)

    def _laws_of(self, machine: Machine) -> PartLaws:
        return machine.laws or self._two_speeds(machine)

    def _two_speeds(self, machine: Machine) -> TwoSpeeds:
        return TwoSpeeds(machine, self._sizes, self._work, self._windows, self._wanted.spec.moe)

    def _best(self, network: Network, means: Sequence[Means], rows: int) -> Means | None:
        """The fastest means for steps of so many tokens; of equal ones the first."""
        return None if network.ranks == 1 else network.best(means, rows, self._wanted.spec.hidden)


def _crowd(experts: int, used: float, ranks: int) -> float:
    """`crowding` of so many that are used; between whole numbers on a line."""
    few = max(1, int(used))  # with one of each token's, rounding leaves a little less
    more = min(few + 1, experts)
    busiest, busier = (count * crowding(experts, count, ranks) for count in (few, more))
    return (busiest + (used - few) * (busier - busiest)) / used
