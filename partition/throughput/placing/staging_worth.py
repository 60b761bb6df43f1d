"""From how many tokens of a step on experts that lie with the CPU should come to a device, or feed-forwards.

For n tokens a layer with N experts, of which each token takes k, uses u of them (`used_experts`) for n·k/u rows
each. The CPU reads and multiplies by these, and hidden states go out and come back. Or they come, and while some are
computed the next come, so that what takes longer counts, and of the other what the first or the last group takes. Where
the CPU does `compute` operations a second and the link carries `link` bytes a second, coming is worth it from about
n = N/k · (bytes per weight / 2) · compute/link on. A dense model's feed-forward is the one expert that all tokens use.
Pure.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from ...hardware_guesses import FAST_FLOPS, FAST_MEMORY_BYTES_PER_S
from ...placement import STAGED_EXPERTS, ExpertTimes
from ..laws import as_it_ran, products, used_experts
from ..profile import Device
from ..weights_of import LayerKind, Product, Weighed

FAST = Device("any machine", 0.0, FAST_MEMORY_BYTES_PER_S, FAST_FLOPS)


def staged_from(model: Weighed, machine: Device, expert: ExpertTimes, most: int) -> int:
    """The least number of tokens, up to `most`, with which they should; 0 if there is none. `expert`: what one of the
    model's takes the device; one of other bytes takes it in proportion. Where a fast machine would lose, they should
    not on one of which nobody has said anything."""
    machine = at_least_fast(machine)

    def worth(tokens: int) -> bool:
        gains = (
            layers * _gain_s(model, kind, machine, expert, tokens)
            for kind, layers in model.layer_kinds.items()
            if coming_of(model, kind)
        )
        return sum(gains) > 0

    # The more rows an expert has, the longer the CPU takes for it, while it comes as fast as ever.
    return bisect_left(range(1, most), True, key=worth) + 1 if worth(most) else 0


def coming_of(model: Weighed, kind: LayerKind) -> Sequence[Product]:
    """The matrices of what comes for such a layer, one at a time: of an expert, or of a dense model's feed-forward."""
    return kind.expert if model.spec.moe else kind.dense


def at_least_fast(machine: Device) -> Device:
    """A machine of which nobody has said anything is taken for a fast one."""
    return FAST if machine.guessed else machine


def _gain_s(model: Weighed, kind: LayerKind, machine: Device, expert: ExpertTimes, tokens: int) -> float:
    """What the CPU takes longer for one layer than they do if they come."""
    moe, matrices = model.spec.moe, coming_of(model, kind)
    used = used_experts(model, tokens) if moe else 1.0
    rows = tokens * (moe.active if moe else 1) / used
    size = sum(it.nbytes for it in matrices) / expert.nbytes
    come_s = size * expert.come_s
    computed_s = size * expert.computed_s * max(1.0, rows / expert.rows)
    # A router is there, so hidden states leave for the CPU's experts; for a feed-forward they come with it.
    carried_s = (1 if moe else -1) * 2 * 4 * tokens * model.spec.hidden * expert.come_s / expert.nbytes
    cpu_s = used * as_it_ran(machine, products(machine, matrices, rows)).seconds + carried_s
    ends_s = min(used, STAGED_EXPERTS) * min(come_s, computed_s)
    return cpu_s - used * max(come_s, computed_s) - ends_s
