"""What a device computes in Triton: linears with quantised weights, and attention of answers. All else, and what it
does not cover, is torch's.

Knows sizes of programs and which matrices go into one launch; `triton_linears` has the kernels, `triton_looks` launches
those of attention. Weights lie on the device as they do on the host, in bands, so nothing is rearranged when they come.
One row of inputs is multiplied as it is, in float32. More rows are rounded to float16, each divided by a scale of its
own, as are weights: products are exact and sums float32, which leaves results within 2e-3 of the largest. What cannot
be compiled or loaded for a card does no harm there: from then on torch computes that, too.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
import triton
from torch import Tensor
from triton.errors import TritonError

from shoal.kernels.arrays import Bytes
from shoal.kernels.attention_operands import KvPages, Scoring, Segments
from shoal.kernels.matrix import FeedForward, Linears, Matrix
from shoal.partition.memory_layout import BAND_ROWS

from ..errors import one_line, says_not_loaded
from ..torch_kernels import InBands, TorchKernels
from . import triton_linears as launched
from .triton_looks import can_look, look
from .triton_weights import GROUP, ONE

log = logging.getLogger(__name__)

COVERED = {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "Q4_K", "Q5_K", "Q6_K"}
MOST_COLS = 1 << 15  # of which a program has a whole row in registers, to norm it
MOST_BYTES = 1 << 32  # places in a matrix are numbers of 32 bits
MOST_INPUTS = 1024  # arranged at once: 64 MiB at most, for which torch's scratch is not used meanwhile
AT_ONCE = 3  # matrices in a launch
TILE_INPUTS = 64  # rows of inputs that a program has at most; with 128 some kernels spill registers
PROGRAMS = 264  # two for each processor of a large card; with fewer, columns are split among more
# Of a card: for older ones Triton's compiler may end the process instead of saying so.
LEAST_CAPABILITY = (7, 0)
THREAD_GROUPS = 8  # groups that the threads of a warp take side by side, four threads each


Takes = Literal["one row", "many", "attention"]
ONE_ROW: Takes = "one row"
MANY: Takes = "many"
ATTENTION: Takes = "attention"
USES = ONE_ROW, MANY, ATTENTION
WITH: Mapping[Takes, str] = {ONE_ROW: "with one row", MANY: "with more rows", ATTENTION: "attention"}


class Arranged(NamedTuple):
    """Rows of inputs as kernels want them. `more`: sums of 16, or the scale of each row."""

    x: Tensor
    more: Tensor


class TritonKernels(TorchKernels):
    """Is an OnDevice. `uses`: what it computes, else torch does. `refused`: why not all that it was to, if something
    could not be compiled or loaded; or ""."""

    def __init__(self, uses: Collection[Takes] = USES) -> None:
        self._use(uses)
        self.refused = ""

    def _use(self, uses: Collection[Takes]) -> None:
        self._used = frozenset(uses)
        self.name = f"triton {triton.__version__} ({', '.join(it for it in USES if it in uses) or 'nothing'})"

    def laid_out(self, w: Matrix) -> Bytes:
        return w.data if covers(w) else super().laid_out(w)

    def put_back(self, laid_out: Bytes, w: Matrix) -> None:
        if covers(w):
            w.data[...] = laid_out
        else:
            super().put_back(laid_out, w)

    def as_they_lie(self, bytes: Tensor, w: Matrix) -> Tensor | InBands:
        return bytes if covers(w) else super().as_they_lie(bytes, w)

    def lying(self, w: Matrix) -> Tensor | InBands:
        data = super().lying(w)
        return InBands(data) if covers(w) else data  # type: ignore[arg-type]  # a tensor then

    def linears(self, x: Tensor, all: Linears, norm: Tensor | None, eps: float) -> list[Tensor]:
        use = ONE_ROW if len(x) == 1 else MANY
        may = use in self._used and len(x)
        own = [place for place, w in enumerate(all.matrices) if may and covers(w)]
        others = [place for place in range(len(all.matrices)) if place not in own]
        made: dict[int, Tensor] = {}
        if own:
            some = _some(all, own)
            theirs = super().linears
            its = self._or(use, lambda: self._own(x, some, norm, eps), lambda: theirs(x, some, norm, eps))
            made |= zip(own, its, strict=True)
        if others:
            made |= zip(others, super().linears(x, _some(all, others), norm, eps), strict=True)
        return [made[place] for place in range(len(all.matrices))]

    def feed_forward(self, x: Tensor, layer: FeedForward, norm: Tensor | None, eps: float) -> Tensor:
        matrices = *layer.enter.matrices, *layer.leave.matrices
        fused = len(x) == 1 and ONE_ROW in self._used and all(map(covers, matrices))
        theirs = super().feed_forward
        if not fused:
            return theirs(x, layer, norm, eps)
        fed: Tensor = self._or(
            ONE_ROW, lambda: self._fed(x, layer, norm, eps), lambda: theirs(x, layer, norm, eps)
        )
        return fed

    def attention(
        self,
        kv: KvPages,
        segments: Segments,
        places: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scoring: Scoring,
    ) -> Tensor:
        alone = segments.table[:, 1] == 1
        theirs = super().attention
        if ATTENTION not in self._used or not alone.any() or not can_look(kv):
            return theirs(kv, segments, places, q, k, v, scoring)

        def ours() -> Tensor:
            others = replace(segments, table=segments.table[~alone])
            out = q.new_empty(q.shape) if alone.all() else theirs(kv, others, places, q, k, v, scoring)
            look(kv, segments, places, q, k, v, scoring, out)
            return out

        made: Tensor = self._or(ATTENTION, ours, lambda: theirs(kv, segments, places, q, k, v, scoring))
        return made

    def _fed(self, x: Tensor, layer: FeedForward, norm: Tensor | None, eps: float) -> Tensor:
        gate, up = layer.enter.matrices
        inputs, ffn, step = _arranged(x, norm, eps, many=False), gate.rows, _step(layer.enter.matrices)
        inner = Arranged(x.new_empty(1, GROUP, ffn // GROUP), x.new_empty(1, 4, ffn // GROUP))
        biases = layer.enter.biases
        launched.gate_and_up[(ffn // BAND_ROWS,)](
            *inputs, ONE, _data(gate), _data(up), *(_or(bias, x) for bias in biases), *inner,
            FFN=ffn, COLS=gate.cols, KIND0=gate.type.name, KIND1=up.type.name, BIASED0=biases[0] is not None,
            BIASED1=biases[1] is not None, STEP=step, ACTIVATION=layer.form.activation,
            num_warps=_warps(step), num_stages=1,
        )  # fmt: skip
        return _one_row(inner, layer.leave)[0]

    def _or(self, use: Takes, ours: Callable[[], Any], theirs: Callable[[], Any]) -> Any:
        """What our kernels make of it, or, from the first time on that they cannot be had, torch's."""
        try:
            return ours()
        except (RuntimeError, TritonError) as error:
            if not (isinstance(error, TritonError) or says_not_loaded(str(error))):
                raise
            self.refused = f"{type(error).__name__}: {one_line(error)}"
            self._use(self._used - {use})
            log.warning(
                "torch computes %s, as a kernel of triton's cannot be had: %s", WITH[use], self.refused
            )
        return theirs()

    def _own(self, x: Tensor, all: Linears, norm: Tensor | None, eps: float) -> list[Tensor]:
        if len(x) == 1:
            inputs = _arranged(x, norm, eps, many=False)
            parts = [
                range(len(all.matrices))[at : at + AT_ONCE] for at in range(0, len(all.matrices), AT_ONCE)
            ]
            return [made for part in parts for made in _one_row(inputs, _some(all, part))]
        made = [x.new_empty(len(x), w.rows) for w in all.matrices]
        for start in range(0, len(x), MOST_INPUTS):
            part = slice(start, start + MOST_INPUTS)
            inputs = _arranged(x[part], norm, eps, many=True)
            for w, bias, out in zip(all.matrices, all.biases, made, strict=True):
                _many_rows(inputs, w, bias, out[part])
        return made


def too_old() -> str:
    """Why nothing should be compiled for this thread's card; "" where that may be tried."""
    has = torch.cuda.get_device_capability() if torch.cuda.is_available() else LEAST_CAPABILITY
    if has >= LEAST_CAPABILITY:
        return ""
    return "triton is for cards of compute capability {}.{} or more, this one has {}.{}".format(
        *LEAST_CAPABILITY, *has
    )


def covers(w: Matrix) -> bool:
    """Whether such a matrix is multiplied here."""
    whole = w.cols % GROUP == 0 and w.cols <= MOST_COLS
    return w.type.name in COVERED and whole and w.rows > 0 and w.nbytes < MOST_BYTES


def step_of(groups: int) -> int:
    """How many of so many groups a program takes at once, for one row."""
    if groups % 64 == 0:
        return 64
    whole: int = triton.next_power_of_2(groups)
    return min(32, max(THREAD_GROUPS, whole))


class Tile(NamedTuple):
    """Of a program that multiplies `rows` of a matrix by many inputs. `registers`: that a thread may have, where
    the assembler would aim at fewer and spill some; or too many, and spill others."""

    rows: int
    warps: int
    registers: int | None


def tile_of(inputs: int) -> Tile:
    return Tile(64, 8, None) if inputs > 32 else Tile(32, 4, 128)


def _some(all: Linears, places: Sequence[int]) -> Linears:
    if len(places) == len(all.matrices):
        return all
    key = "some", tuple(places)
    if key not in all.prepared:
        all.prepared[key] = Linears([all.matrices[i] for i in places], [all.biases[i] for i in places])
    found: Linears = all.prepared[key]
    return found


def _arranged(x: Tensor, norm: Tensor | None, eps: float, *, many: bool) -> Arranged:
    (rows, cols), x = x.shape, x.contiguous()
    groups = cols // GROUP
    step = triton.next_power_of_2(groups) if many or norm is not None else min(16, groups)
    step = triton.next_power_of_2(step)
    kind, sums = (torch.float16, (rows,)) if many else (torch.float32, (rows, 4, groups))
    made = Arranged(x.new_empty(rows, GROUP, groups, dtype=kind), x.new_empty(sums))
    launched.arranged[(rows, triton.cdiv(groups, step))](
        x, _or(norm, x, there=True), made.x, made.more, made.more, eps, COLS=cols, STEP=step,
        NORMED=norm is not None, MANY=many, num_warps=min(16, max(4, step // 8)), num_stages=1,
    )  # fmt: skip
    return made


def _one_row(inputs: Arranged, all: Linears) -> list[Tensor]:
    """At most AT_ONCE matrices in one launch."""
    count, x = len(all.matrices), inputs.x
    bands = sum(triton.cdiv(w.rows, BAND_ROWS) for w in all.matrices)
    step = _step(all.matrices)
    steps = min(triton.cdiv(_groups(w), step) for w in all.matrices)
    split = max(1, min(steps, PROGRAMS // bands))
    made = [x.new_empty(split, w.rows) for w in all.matrices]
    none = [x] * (AT_ONCE - count)
    kinds = [w.type.name for w in all.matrices] + [""] * (AT_ONCE - count)
    biased = [bias is not None for bias in all.biases] + [False] * (AT_ONCE - count)
    launched.one_row[(bands, split)](
        *inputs, ONE, *map(_data, all.matrices), *none, *made, *none, *(_or(bias, x) for bias in all.biases), *none,
        *(w.rows for w in all.matrices), *(0 for _ in none), all.cols, *kinds, *biased, step, split,
        num_warps=_warps(step), num_stages=1,
    )  # fmt: skip
    return made if split == 1 else [it.sum(0, keepdim=True) for it in made]


def _many_rows(inputs: Arranged, w: Matrix, bias: Any, out: Tensor) -> None:
    rows = len(out)
    some = min(TILE_INPUTS, max(16, triton.next_power_of_2(rows)))
    height, warps, registers = tile_of(some)
    programs = triton.cdiv(w.rows, height) * triton.cdiv(rows, some)
    split = max(1, min(triton.cdiv(_groups(w), 16), PROGRAMS // programs))
    made = out[None] if split == 1 else out.new_empty(split, rows, w.rows)
    launched.many_rows[(triton.cdiv(w.rows, height), triton.cdiv(rows, some), split)](
        *inputs, ONE, _data(w), _or(bias, out), made, rows, w.rows, COLS=w.cols, KIND=w.type.name,
        BIASED=bias is not None, STEP=16, INPUTS=some, ROWS=height, SPLIT=split,
        num_warps=warps, num_stages=1, maxnreg=registers,
    )  # fmt: skip
    if split > 1:
        torch.sum(made, 0, out=out)


def _groups(w: Matrix) -> int:
    """That kernels walk through: pairs of 64 columns of Q6_K, whose halves share bytes."""
    return w.cols // (2 * GROUP if w.type.name == "Q6_K" else GROUP)


def _step(matrices: Sequence[Matrix]) -> int:
    """Groups at once, for one row."""
    return step_of(min(map(_groups, matrices)))


def _warps(step: int) -> int:
    return step // THREAD_GROUPS


def _data(w: Matrix) -> Tensor:
    data: Tensor = w.data.inside  # type: ignore[attr-defined]
    return data


def _or(handle: Any, other: Tensor, *, there: bool = False) -> Tensor:
    """What is inside of a handle, or is already outside of one (`there`); `other` stands where nothing is read."""
    if handle is None:
        return other
    found: Tensor = handle if there else handle.inside
    return found
