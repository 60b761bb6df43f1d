"""From how many rows of a text in a step on the device through which weights pass should attend for it, too.

For n rows behind c tokens the host reads K and V of c + n tokens and multiplies by them for each row, while queries, K
and V come to it, and what it found goes back. Or K and V of c tokens go to the device, which multiplies, and those of n
leave. Both have other things to do meanwhile; what takes less is taken. Pure.
"""

from __future__ import annotations

from ..laws import as_it_ran, attention, kv_token_bytes
from ..profile import Accelerator, Device
from ..weights_of import LayerKind, Weighed

LEAST_ROWS = 16  # guesses are no prompts


def attends_from(model: Weighed, host: Device, there: Accelerator, kv_type: str, most: int) -> int:
    """The least power of two of rows, up to `most`, with which it should, whether the text begins with them or has
    `most` tokens before; 0 if there is none."""

    def worth(rows: int, before: int) -> bool:
        gains = (
            layers * _gain_s(model, kind, host, there, kv_type, rows, before)
            for kind, layers in model.layer_kinds.items()
        )
        return sum(gains) > 0

    rows = LEAST_ROWS
    while rows <= most:
        if worth(rows, 0) and worth(rows, most):
            return rows
        rows *= 2
    return 0


def _gain_s(
    model: Weighed, kind: LayerKind, host: Device, there: Accelerator, kv_type: str, rows: int, before: int
) -> float:
    """What the host takes longer for one layer than the device."""
    spec = model.spec
    here_s = as_it_ran(host, attention(host, spec, kv_type, rows, before, kind.window)).seconds
    there_s = attention(there.computing, spec, kv_type, rows, before, kind.window).seconds
    kv_bytes = (before + rows) * kv_token_bytes(spec, kv_type)
    asked_bytes = 4 * rows * 2 * (spec.heads + spec.kv_heads) * spec.head_dim
    stored_s = rows * kv_token_bytes(spec, kv_type) / host.laid_out_bytes_per_s
    return here_s - there_s - (kv_bytes - asked_bytes) / there.host_bytes_per_s - stored_s
