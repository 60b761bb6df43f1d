"""Whether the kernels that serve the CPU compute what the reference computes, on this very machine.

A compiler's fault or an odd processor makes wrong numbers, not errors. In a group one machine's wrong numbers spoil the
answers of all, so each is tested before it takes part. `python -m shoal.kernels.self_test` prints a JSON list of what
disagrees; `examined` runs that in a process of its own, since the reference needs torch (125 MB).
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from shoal.kernels.arrays import Array, Floats, Ids
from shoal.kernels.attention_operands import KvPages, Rotation, Scoring, Segments, kv_layout
from shoal.kernels.compute_home import ComputeHome
from shoal.kernels.errors import KernelError
from shoal.kernels.matrix import (
    NARROW_INPUTS,
    WIDE_INPUTS,
    FeedForward,
    InputBits,
    Linears,
    Matrix,
    Routes,
)
from shoal.kernels.stored_rows import from_stored
from shoal.kernels.types import BF16, F16, F32, WEIGHT_TYPES, WeightType
from shoal.partition.memory_layout import KV_FORMATS, PAGE_TOKENS

ROWS, COLS = 37, 512  # not whole bands; two blocks of the longest types
TOKENS = (1, 4, 19)
PATIENCE_S = 120.0
CLOSE = 1e-4  # of the largest number of a result: rounding makes 1e-6, a fault makes 1e-2 and more
TWICE_CLOSE = 1e-3  # where what was rounded is multiplied again

Case = tuple[str, float, Callable[[ComputeHome], Array]]


def examined(kernels: str) -> list[str]:
    """What disagrees with the reference, in words; none = all is well. `kernels`: their name, as SHOAL_KERNELS has it.
    Takes some seconds. KernelError if it cannot be found out."""
    command = [sys.executable, "-P", "-m", "shoal.kernels.self_test", kernels]
    try:
        run = subprocess.run(
            command, capture_output=True, timeout=PATIENCE_S, stdin=subprocess.DEVNULL, check=False
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise KernelError(f"the kernels could not be tested: {error}") from error
    if run.returncode < 0:
        return [f"they end the process by signal {-run.returncode}"]
    try:
        found = json.loads(run.stdout)
    except ValueError as error:
        last = run.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise KernelError(f"the kernels could not be tested: {last or 'nothing came'}") from error
    return [str(it) for it in found]


def disagreements(home: ComputeHome, truth: ComputeHome, *, bits: bool = True) -> list[str]:
    """What two homes compute differently, in words. `bits`: norms and scores have to have the same bits, as those of
    all that may be in one group; and inputs are rounded. Whoever does not round them is compared with what is rounded
    least, since 8 bits are further from it than any rounding of sums."""
    found = []
    for name, most, compute in _cases([WIDE_INPUTS, NARROW_INPUTS] if bits else [WIDE_INPUTS]):
        most = most if bits else max(most, CLOSE)
        got, true = compute(home), compute(truth)
        scale = float(np.abs(true).max())
        off = float(np.abs(got - true).max()) / scale if np.isfinite(got).all() else float("inf")
        if got.shape != true.shape or not off <= most:
            found.append(f"{name}: {off:.1e} of the largest number away, at most {most:.0e} is rounding")
    return found


def _cases(input_bits: Sequence[InputBits]) -> Iterator[Case]:
    for kind in WEIGHT_TYPES:
        matrix = _matrix(kind, ROWS, COLS)
        for tokens in TOKENS:
            for bits in input_bits if kind.quantised else (WIDE_INPUTS,):
                of_bits = f" of {bits} bits" if kind.quantised else ""
                yield f"{kind.name} by {tokens} rows{of_bits}", CLOSE, _linears(matrix, tokens, bits)
    for kind in WEIGHT_TYPES:
        yield f"experts of {kind.name}", TWICE_CLOSE, _experts(kind)
    for name in KV_FORMATS:
        yield f"attention over {name}", TWICE_CLOSE, _attention(name)
    weight, eps = _numbers(COLS) + 1, 1e-6
    yield (
        "norms",
        0.0,
        lambda home: home.fetch(home.rms_norm(home.place(_numbers(5, COLS)), home.keep_vector(weight), eps)),
    )
    router = _matrix(F32, ROWS, COLS)
    yield (
        "routers",
        0.0,
        lambda home: home.fetch(home.scores(home.place(_numbers(5, COLS)), _kept(home, router))),
    )


def _linears(matrix: Matrix, tokens: int, bits: InputBits) -> Callable[[ComputeHome], Array]:
    def compute(home: ComputeHome) -> Array:
        biases = (home.keep_vector(_numbers(matrix.rows)),)
        all = Linears((home.keep_matrix(matrix),), biases, bits)
        return home.fetch(home.linears(home.place(_numbers(tokens, matrix.cols)), all)[0])

    return compute


def _kept(home: ComputeHome, *matrices: Matrix) -> Linears:
    return Linears([home.keep_matrix(matrix) for matrix in matrices])


def _experts(kind: WeightType) -> Callable[[ComputeHome], Array]:
    made = [
        (
            _matrix(kind, COLS, COLS, 3 * i),
            _matrix(kind, COLS, COLS, 3 * i + 1),
            _matrix(kind, ROWS, COLS, 3 * i + 2),
        )
        for i in range(2)
    ]
    tokens: Ids = np.array([0, 2, 1, 2], np.int64)
    routes = Routes((0, 2, 4), tokens, np.array([0.5, 1.0, 0.25, 0.75], np.float32))

    def compute(home: ComputeHome) -> Array:
        experts = [FeedForward(_kept(home, gate, up), _kept(home, down), "silu") for gate, up, down in made]
        into = home.place(np.zeros((3, ROWS), np.float32))
        home.experts(home.place(_numbers(3, COLS)), experts, routes, into)
        return home.fetch(into)

    return compute


def _attention(kv: str) -> Callable[[ComputeHome], Array]:
    """Two texts, one of two pages, whose rows come in one step; two query heads for each of K and V."""
    kv_heads, heads, dim = 2, 4, 64
    segments = Segments.build([(PAGE_TOKENS + 6, 0, (2, 0)), (9, 0, (1,))])
    angles = np.arange(segments.tokens)[:, None] / 7.0 ** np.arange(dim // 2)
    rotation = Rotation(dim, False, np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32))

    def compute(home: ComputeHome) -> Array:
        layout = kv_layout(kv, dim)
        pages = KvPages(layout, heads, home.layer_of(home.pages((3, 1, kv_heads, layout.head_bytes)), 0))
        q, k, v = (
            home.place(_numbers(segments.tokens, count * dim, seed=seed))
            for seed, count in enumerate((heads, kv_heads, kv_heads))
        )
        return home.fetch(home.attention(pages, segments, q, k, v, Scoring(rotation, dim**-0.5)))

    return compute


def _numbers(*shape: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def _matrix(kind: WeightType, rows: int, cols: int, seed: int = 0) -> Matrix:
    generator = np.random.default_rng(seed)
    numbers = generator.standard_normal((rows, cols), np.float32) * np.float32(0.05)
    if kind is F32:
        stored = numbers.view(np.uint8)
    elif kind is F16:
        stored = numbers.astype(np.float16).view(np.uint8)
    elif kind is BF16:  # the upper half of float32
        stored = np.ascontiguousarray(numbers.view(np.uint8).reshape(rows, cols, 4)[..., 2:]).reshape(
            rows, -1
        )
    else:
        stored = generator.integers(0, 256, (rows, kind.row_bytes(cols)), np.uint8)
        blocks = stored.reshape(-1, kind.block_bytes)
        for at in kind.halves:
            scales = generator.standard_normal((len(blocks), 1), np.float32) * np.float32(0.01)
            blocks[:, at : at + 2] = scales.astype(np.float16).view(np.uint8)
    return from_stored(kind, rows, cols, stored)


def _main() -> None:
    from shoal.kernels.homes import choose
    from shoal.kernels.reference import ReferenceHome

    print(json.dumps(disagreements(choose(sys.argv[1]), ReferenceHome())))


if __name__ == "__main__":
    _main()
