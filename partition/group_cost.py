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

from .machines import DiskTimes, FixedCosts, Machine, PartLaws, Workload
from .memory_layout import PAGE_TOKENS, kv_page_bytes
from .plan import Wanted
from .rank_sizes import Held, Operations, Portion, Sizes, TwoSpeeds, crowding
from .sum_cost import Means, Network, sent_s

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
    """What a group is predicted to do. `first_token_s`: for the prompts of `Cost.prompts`, in their order.
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
    network_s: float = 0.0  # of a token: all that goes between machines, and …
    disk_s: float = 0.0  # … what the slowest disk reads

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
        return self._replace(token_s=token_s, total_s=self.total_s + answer_tokens * (token_s - self.token_s))

    @property
    def times(self) -> tuple[float, ...]:
        return self.token_s, *self.first_token_s


class StepWork(NamedTuple):
    """Seconds that a step takes without what goes over the network."""

    attn_s: float  # of the slowest rank, in all layers
    ffn_s: float
    head_s: float
    disk_s: float  # of the slowest disk

    @property
    def chain_s(self) -> float:
        return self.attn_s + self.ffn_s + self.head_s


class _Steps(NamedTuple):
    """`step_s(rows, context)`: seconds of a step of so many tokens that attend to so many before them."""

    step_s: Callable[[int, float], float]
    decode: Means | None
    prompt: Means | None
    overlap_rows: int
    network_s: float  # of a step with one token
    disk_s: float


def first_token_s(
    tokens: int, chunk: int, step_s: Callable[[int, float], float], next_s: Callable[[int, float], float]
) -> float:
    """Of a prompt of so many tokens, read by `chunk`. `next_s`: what a step takes that follows another one of its
    prompt."""
    whole, rest = divmod(tokens, chunk)
    steps = [(chunk, whole, whole * chunk / 2), (rest, 1 if rest else 0, whole * chunk + rest / 2)]
    (rows, count, context), *others = [step for step in steps if step[1]]
    seconds = step_s(rows, context)
    if count > 1:
        seconds += (count - 1) * next_s(rows, context)
    return seconds + sum(count * next_s(rows, context) for rows, count, context in others)


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
        """These ranks read prompts together, and the head decodes `answers` as it does `alone`. K and V of a prompt
        pass to the head once. Together they take `error` times as long as predicted. None if the longest step is no
        faster together, or the head streams."""
        if any(part.held.streams for part in alone):
            return None
        chunk = self.chunk(parts)
        together, by_itself = self.together(parts, network, means), self.together(alone, network, ())

        def gain_s(rows: int) -> float:
            return by_itself.step_s(rows, 0.0) - error * together.step_s(rows, 0.0)

        lengths = sorted({chunk, *(rows for rows in ASSISTED if rows < chunk)}, reverse=True)
        worth = list(takewhile(lambda rows: gain_s(rows) > 0, lengths))
        if not worth:
            return None
        least = worth[-1]
        row_s = (gain_s(chunk) - gain_s(least)) / (chunk - least) if least < chunk else gain_s(chunk) / chunk
        page_s = self._page_s(parts, network)
        figures = self._divided(chunk, together)
        first = [
            error * seconds + -(-tokens // PAGE_TOKENS) * page_s
            for seconds, tokens in zip(figures.first_token_s, self.prompts, strict=True)
        ]
        return figures._replace(
            token_s=answers.token_s,
            first_token_s=tuple(first),
            total_s=first[0] + self._workload.answer_tokens * answers.token_s,
            decode=None,
            network_s=answers.network_s,
            disk_s=0.0,
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
        part = Placement(
            together, Portion.even(self._wanted.spec, 1.0), Held(0, streamed, 0.0, max(self.prompts))
        )
        last = None if cut_vocabulary else machines[0]
        steps = self._steps(
            network,
            () if layered else means,
            max(self.prompts),
            lambda rows, context: self._compute_s([part], rows, context, last),
            self._laws_of(machines[0]).fixed(0.0),
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

        def stages(rows: int, context: float) -> tuple[list[float], float]:
            """(seconds of each rank's part and of sending what it gives; of the slowest disk)"""
            chains, disk = [], 0.0
            for part, pair in zip(parts, ring, strict=True):
                work = self._compute_s([part], rows, context)
                hop_s = network.hop_s(*pair, width * rows) or 0.0
                calls_s = self._calls_s(fixed, rows) * part.portion.heads  # it has that share of the layers
                chains.append(work.chain_s + calls_s + hop_s)
                disk = max(disk, work.disk_s)
            return chains, disk

        def step_s(rows: int, context: float) -> float:
            chains, disk = stages(rows, context)
            return max(sum(chains), disk) + fixed.step_s

        def next_s(rows: int, context: float) -> float:
            chains, disk = stages(rows, context)
            return max(*chains, disk)

        hops_s = sum(network.hop_s(*pair, width) or 0.0 for pair in ring)
        return self._figures(self.chunk(parts), step_s, next_s)._replace(network_s=hops_s)

    def together(self, parts: Sequence[Placement], network: Network, means: Sequence[Means]) -> _Steps:
        """What steps take that these ranks compute together."""
        return self._steps(
            network,
            means,
            self.chunk(parts),
            lambda rows, context: self._compute_s(parts, rows, context),
            self._laws_of(parts[0].machine).fixed(parts[0].portion.heads),
            max((it.portion.vocab for it in parts[1:]), default=0.0),
        )

    def _steps(
        self,
        network: Network,
        means: Sequence[Means],
        chunk: int,
        compute: Callable[[int, float], StepWork],
        fixed: FixedCosts,
        gathered: float = 0.0,
    ) -> _Steps:
        """`gathered`: the largest share of the vocabulary that is not rank 0's."""
        decode, prompt = (self._best(network, means, rows) for rows in (1, min(chunk, max(self.prompts))))

        def whole_s(rows: int, context: float) -> float:
            work = compute(rows, context)
            how = decode if rows == 1 else prompt
            sums_s = self._sums_s(network, how, rows, gathered) + sent_s(self._wanted.spec, fixed, how, rows)
            return max(work.chain_s + sums_s + self._calls_s(fixed, rows), work.disk_s) + fixed.step_s

        def halved_s(rows: int, context: float) -> float:
            half = compute(-(-rows // 2), context)  # what a kernel takes for half of the rows, twice
            work = half._replace(
                attn_s=2 * half.attn_s, ffn_s=2 * half.ffn_s, disk_s=compute(rows, context).disk_s
            )
            chain_s = self._overlapped_s(network, prompt, rows, work, gathered) if prompt else work.chain_s
            calls_s = 2 * (
                self._calls_s(fixed, rows / 2) + sent_s(self._wanted.spec, fixed, prompt, rows / 2)
            )
            return max(chain_s + calls_s, work.disk_s) + fixed.step_s

        worth = (rows for rows in OVERLAPS if prompt and halved_s(rows, 0.0) < whole_s(rows, 0.0))
        overlap_rows = next(worth, NEVER)

        def step_s(rows: int, context: float) -> float:
            return (halved_s if rows >= overlap_rows else whole_s)(rows, context)

        network_s = self._sums_s(network, decode, 1, gathered)
        return _Steps(step_s, decode, prompt, overlap_rows, network_s, compute(1, 0.0).disk_s)

    def _divided(self, chunk: int, steps: _Steps) -> Figures:
        figures = self._figures(chunk, steps.step_s, steps.step_s, steps.decode, steps.prompt)
        return figures._replace(
            overlap_rows=steps.overlap_rows, network_s=steps.network_s, disk_s=steps.disk_s
        )

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

    def _figures(
        self,
        chunk: int,
        step_s: Callable[[int, float], float],
        next_s: Callable[[int, float], float],
        decode: Means | None = None,
        prompt: Means | None = None,
    ) -> Figures:
        """`next_s`: see `first_token_s`."""
        workload = self._workload
        token_s = step_s(1, min(workload.context_tokens, self._wanted.context_tokens))
        usual, *others = (first_token_s(tokens, chunk, step_s, next_s) for tokens in self.prompts)
        total_s = usual + workload.answer_tokens * token_s
        return Figures(token_s, (usual, *others), total_s, decode, prompt, chunk)

    def _compute_s(
        self, parts: Sequence[Placement], rows: int, context: float, head: Machine | None = None
    ) -> StepWork:
        """Of `rows` tokens that attend to `context` others."""
        moe, crowd = self._wanted.spec.moe, 1.0
        if moe and parts[0].portion.whole_experts and rows == 1:
            crowd = crowding(moe.experts, moe.active, min(len(parts), moe.experts))
        attn_s = ffn_s = disk_s = head_s = 0.0
        for machine, portion, held in parts:
            laws = self._laws_of(machine)
            own = laws.times(portion, rows, context, crowd)
            disk = laws.disk(portion, held, rows, crowd, own) if held.streams else NO_DISK
            attn_s = max(attn_s, disk.slower * own.attn_s)
            ffn_s = max(ffn_s, disk.slower * own.ffn_s + disk.stall_s)
            disk_s = max(disk_s, disk.least_s)
            head_s = max(head_s, own.head_s)
        if head is not None:
            head_s = self._laws_of(head).head_s(1.0)
        return StepWork(attn_s, ffn_s, head_s, disk_s)

    def _laws_of(self, machine: Machine) -> PartLaws:
        return machine.laws or TwoSpeeds(
            machine, self._sizes, self._work, self._windows, self._wanted.spec.moe
        )

    def _overlapped_s(
        self, network: Network, means: Means, rows: int, work: StepWork, gathered: float
    ) -> float:
        """Seconds of a step's blocks and sums if it is computed in halves: of every block, the sums of both halves or
        computing both, with the work that sums make, whatever takes longer; then the last sum."""
        spec = self._wanted.spec
        layers, half = len(spec.layers), -(-rows // 2)
        sums_s = 2 * layers * network.sum_s(means, half, spec.hidden)
        busy_s = 2 * layers * network.busy_s(means, half, spec.hidden)
        attn_s = max(work.attn_s + busy_s, sums_s)
        if spec.qk_norm == "full":  # the squares of q and k wait for the sum before them
            squares_s = 2 * layers * network.sum_s(means._replace(wire="f32"), half, 2)
            attn_s = work.attn_s + sums_s + squares_s
        ffn_s = max(work.ffn_s + busy_s, sums_s)
        last_s = network.sum_s(means, half, spec.hidden)
        return attn_s + ffn_s + last_s + work.head_s + self._ends_s(network, means, rows, gathered)

    def _ends_s(self, network: Network, means: Means, rows: int, gathered: float) -> float:
        """Seconds until all ranks have the rows of a step, and rank 0 the logits of one: rank 0 sends its rows, or all
        add theirs and send their logits."""
        spec = self._wanted.spec
        if not gathered:
            return network.broadcast_s(rows, spec.hidden)
        return network.sum_s(means, rows, spec.hidden) + network.gathered_s(4 * spec.vocab * gathered)

    def _sums_s(self, network: Network, means: Means | None, rows: int, gathered: float) -> float:
        """Seconds of all that goes over the network in a step, with the work it makes."""
        if means is None:
            return 0.0
        spec = self._wanted.spec
        layers = len(spec.layers)
        seconds = 2 * layers * network.sum_s(means, rows, spec.hidden)
        seconds += self._ends_s(network, means, rows, gathered)
        if spec.qk_norm == "full":  # the squares of q and of k
            seconds += layers * network.sum_s(means._replace(wire="f32"), rows, 2)
        return seconds

    def _best(self, network: Network, means: Sequence[Means], rows: int) -> Means | None:
        """The fastest means for steps of so many tokens; of equal ones the first."""
        return None if network.ranks == 1 else network.best(means, rows, self._wanted.spec.hidden)
