"""Attention over pages: every home computes a plain definition; natively the bits of a row depend on nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import cycle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shoal.kernels import KernelError, OperandError, UnsupportedTypeError, dispatch, library, set_threads
from shoal.kernels.attention import (
    KV_TYPES,
    PAGE_TOKENS,
    HeadNorms,
    KvLayout,
    KvPages,
    Rotation,
    Segments,
    attention,
)


def homes_here() -> list[str]:
    names = ["reference"]
    for name in ("avx512vnni", "avx512", "avx2", "neon_dot", "neon", "scalar"):
        try:
            names.append(library.Native(name).name)
        except KernelError:
            continue
    return names


HOMES = homes_here()
NATIVE = HOMES[1:]
# What storing rounds by, relative to the greatest number of a head's row.
ROUNDING = {"f32": 0.0, "f16": 2**-11, "bf16": 2**-8, "i8": 0.5 / 127}


@pytest.fixture(autouse=True)
def _best_home_afterwards() -> Iterator[None]:
    set_threads(1)  # torch's own threads are slow on a busy machine
    yield
    dispatch.choose()
    set_threads(2)


@dataclass(frozen=True)
class Shape:
    kv_heads: int = 2
    group: int = 3
    dim: int = 32
    type: str = "f32"
    window: int | None = None
    rotated: int = 0
    interleaved: bool = False
    scale: float = 0.2

    def pages(self, count: int) -> KvPages:
        """Every byte 0xff, which is NaN in every float type: what was never stored must not be seen."""
        layout = KvLayout.of(self.type, self.dim)
        data = torch.full((count, self.kv_heads, layout.head_bytes), 255, dtype=torch.uint8)
        return KvPages(layout, self.kv_heads * self.group, data)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rotation(shape: Shape, positions: Tensor) -> Rotation:
    angles = positions[:, None].double() / 7 ** torch.arange(shape.rotated // 2)
    return Rotation(shape.rotated, shape.interleaved, angles.cos().float(), angles.sin().float())


@dataclass(frozen=True)
class Text:
    """q, k and v of all positions of one sequence, and where its KV is to be."""

    q: Tensor
    k: Tensor
    v: Tensor
    pages: list[int]

    @classmethod
    def random(cls, shape: Shape, length: int, pages: list[int], seed: int) -> Text:
        heads = shape.kv_heads * shape.group * shape.dim
        q, k, v = randn(length, heads + 2 * shape.kv_heads * shape.dim, seed=seed).split(
            [heads, shape.kv_heads * shape.dim, shape.kv_heads * shape.dim], 1
        )
        return cls(q, k, v, pages)


def step(
    shape: Shape, kv: KvPages, parts: list[tuple[Text, int, int]], norms: HeadNorms | None = None
) -> list[Tensor]:
    """Positions [start, end) of each text, all in one step."""
    positions = torch.cat([torch.arange(start, end) for _, start, end in parts])
    q, k, v = (
        torch.cat([getattr(text, name)[start:end] for text, start, end in parts]) for name in ("q", "k", "v")
    )
    out = attention(
        kv,
        Segments.build((end - start, start, text.pages) for text, start, end in parts),
        q,
        k,
        v,
        rotation=rotation(shape, positions),
        scale=shape.scale,
        window=shape.window,
        norms=norms,
    )
    return list(out.split([end - start for _, start, end in parts]))


def plain(shape: Shape, text: Text, norms: HeadNorms | None = None) -> Tensor:
    """The definition, in float64; nothing is rounded."""
    length = len(text.q)
    q, k, v = (x.double().view(length, -1, shape.dim) for x in (text.q, text.k, text.v))
    if norms is not None:
        q, k = (
            x / (x.square().mean(-1, keepdim=True) + norms.eps).sqrt() * weight
            for x, weight in ((q, norms.q), (k, norms.k))
        )
    angles = rotation(shape, torch.arange(length))
    half = shape.rotated // 2
    for x in (q, k):
        for i in range(half):
            a, b = (2 * i, 2 * i + 1) if shape.interleaved else (i, i + half)
            cos, sin = angles.cos[:, i, None].double(), angles.sin[:, i, None].double()
            x[..., a], x[..., b] = x[..., a] * cos - x[..., b] * sin, x[..., b] * cos + x[..., a] * sin
    k, v = (x.repeat_interleave(shape.group, 1) for x in (k, v))
    distance = torch.arange(length)[:, None] - torch.arange(length)
    seen = (distance >= 0) & (distance < (shape.window or length))
    scores = torch.einsum("thd,shd->hts", q, k) * shape.scale
    weights = torch.softmax(scores.masked_fill(~seen, -torch.inf), -1)
    return torch.einsum("hts,shd->thd", weights, v).reshape(length, -1).float()


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    dim = draw(st.sampled_from([4, 8, 24, 32, 40, 64, 80, 128]))
    return Shape(
        kv_heads=draw(st.integers(1, 3)),
        group=draw(st.sampled_from([1, 2, 3, 4, 7, 8])),
        dim=dim,
        type=draw(st.sampled_from(sorted(KV_TYPES))),
        window=draw(st.sampled_from([None, None, 1, 5, 70])),
        rotated=draw(st.sampled_from([0, dim // 2, dim])),
        interleaved=draw(st.booleans()),
        scale=draw(st.sampled_from([0.125, 0.7])),
    )


@settings(deadline=None, max_examples=25)
@given(shape=shapes(), length=st.integers(1, 140), normed=st.booleans(), chunk=st.integers(1, 140))
def test_every_home_computes_the_definition(shape: Shape, length: int, normed: bool, chunk: int) -> None:
    text = Text.random(shape, length, [2, 0, 3], seed=length)
    norms = HeadNorms(1 + randn(shape.dim, seed=8) / 4, 1 + randn(shape.dim, seed=9) / 4, 1e-5)
    truth = plain(shape, text, norms if normed else None)
    # A rounded value moves the result as far; a rounded key moves scores by what q and the scale make of it.
    tolerance = 3e-5 + 4 * ROUNDING[shape.type] * (1 + 3 * shape.scale * shape.dim**0.5)
    parts = [part for part in ((0, min(chunk, length)), (min(chunk, length), length)) if part[0] < part[1]]
    for name in HOMES:
        dispatch.choose(name)
        kv = shape.pages(4)
        got = torch.cat([step(shape, kv, [(text, *part)], norms if normed else None)[0] for part in parts])
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, truth, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("type", sorted(KV_TYPES))
@pytest.mark.parametrize("name", NATIVE)
def test_homes_store_the_same_and_agree_closely(name: str, type: str) -> None:
    shape = Shape(type=type, dim=24)  # nothing is rotated, so that rounding falls the same way
    text = Text.random(shape, 130, [1, 0, 2], seed=3)
    results = []
    for home in ("reference", name):
        dispatch.choose(home)
        kv = shape.pages(3)
        out = torch.cat([step(shape, kv, [(text, a, b)])[0] for a, b in ((0, 1), (1, 100), (100, 130))])
        parts = [kv.keys()[[1, 0]], kv.values()[[1, 0]], kv.keys()[2, ..., :2], kv.values()[2, :, :2]]
        if shape.pages(1).layout.kind.scaled:
            parts += [kv.scales()[[1, 0]], kv.scales()[2, ..., :2]]
        results.append((out, parts))
    (truth, stored), (got, ours) = results
    torch.testing.assert_close(got, truth, rtol=2e-5, atol=2e-5)
    for part, other in zip(stored, ours, strict=True):
        assert torch.equal(part, other)


def schedule(lengths: list[int], sizes: list[int]) -> list[list[tuple[int, int, int]]]:
    """Steps that compute texts of these lengths, in parts of these sizes (0: not in this step), the last three tokens
    one by one as texts are written: (text, start, end) for each part of a step."""
    done, steps, size = [0] * len(lengths), [], cycle([*sizes, 1])
    while done != lengths:
        parts = []
        for text, length in enumerate(lengths):
            rest = length - done[text]
            if rest and (count := min(next(size), max(1, rest - 3))):
                parts.append((text, done[text], done[text] + count))
                done[text] += count
        if parts:
            steps.append(parts)
    return steps


def pages_for(lengths: list[int], order: list[int]) -> list[list[int]]:
    """Pages for texts of these lengths, out of `order`."""
    taken = iter(order)
    return [[next(taken) for _ in range(-(-length // PAGE_TOKENS))] for length in lengths]


@pytest.mark.parametrize("name", NATIVE)
@settings(deadline=None, max_examples=25)
@given(
    shape=shapes(),
    lengths=st.lists(st.integers(1, 600), min_size=1, max_size=3),
    sizes=st.lists(st.one_of(st.integers(0, 5), st.integers(0, 600)), max_size=6),
    seed=st.integers(0, 99),
    threads=st.integers(1, 3),
)
def test_bits_do_not_depend_on_company_cuts_pages_or_threads(
    name: str, shape: Shape, lengths: list[int], sizes: list[int], seed: int, threads: int
) -> None:
    dispatch.choose(name)
    set_threads(1)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(seed)).tolist()
    texts = [
        Text.random(shape, length, pages, seed=length)
        for length, pages in zip(lengths, pages_for(lengths, list(range(30))), strict=True)
    ]
    whole = [step(shape, shape.pages(30), [(text, 0, len(text.q))])[0] for text in texts]
    set_threads(threads)
    kv = shape.pages(30)
    moved = [replace(text, pages=pages) for text, pages in zip(texts, pages_for(lengths, order), strict=True)]
    rows: list[list[Tensor]] = [[] for _ in texts]
    for parts in schedule(lengths, sizes):
        outs = step(shape, kv, [(moved[text], start, end) for text, start, end in parts])
        for (text, _, _), out in zip(parts, outs, strict=True):
            rows[text].append(out)
    for alone, pieces in zip(whole, rows, strict=True):
        assert torch.equal(alone, torch.cat(pieces))


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize("window", [None, 300])
def test_long_texts_of_many_heads_in_spans(name: str, window: int | None) -> None:
    dispatch.choose(name)
    set_threads(3)
    shape = Shape(kv_heads=1, group=100, dim=16, type="f16", window=window)  # more heads than rows in a tile
    text = Text.random(shape, 1030, list(range(17)), seed=1)
    kv = shape.pages(17)
    one_head = KvPages(kv.layout, 1, kv.data)  # stores the same and has less to compute
    step(replace(shape, group=1), one_head, [(replace(text, q=text.q[:, : shape.dim]), 0, 1000)])
    late = torch.cat([step(shape, kv, [(text, at, at + 1)])[0] for at in range(1000, 1030)])
    assert torch.equal(late, step(shape, kv, [(text, 1000, 1030)])[0])
    dispatch.choose("reference")
    truth = step(shape, kv, [(text, 1000, 1030)])[0]
    torch.testing.assert_close(late, truth, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("type", sorted(KV_TYPES))
@pytest.mark.parametrize("name", HOMES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_nan_shows_where_it_is_seen_and_nowhere_else(name: str, type: str, bad: float) -> None:
    dispatch.choose(name)
    shape = Shape(kv_heads=2, group=1, dim=16, type=type)
    for tensor in ("k", "v"):
        text = Text.random(shape, 40, [0], seed=2)
        getattr(text, tensor)[30, 3] = bad  # of the first K/V head
        kv = shape.pages(1)
        first, second = torch.cat([step(shape, kv, [(text, at, at + 1)])[0] for at in range(40)]).split(16, 1)
        assert first[30:].isnan().any(1).all() or bad == float("inf")
        assert not first[30:].isfinite().all()
        assert first[:30].isfinite().all()
        assert second.isfinite().all()


@pytest.mark.parametrize("name", NATIVE)
def test_a_later_nan_does_not_reach_earlier_rows_of_its_step(name: str) -> None:
    dispatch.choose(name)
    shape = Shape(kv_heads=1, group=1, dim=16)
    text = Text.random(shape, 100, [0, 1], seed=2)
    text.v[50] = float("nan")
    out = step(shape, shape.pages(2), [(text, 0, 100)])[0]
    assert out[:50].isfinite().all()
    assert out[50:].isnan().all()


@pytest.mark.parametrize("name", HOMES)
def test_zeros_and_extremes_are_stored_as_bytes(name: str) -> None:
    dispatch.choose(name)
    shape = Shape(kv_heads=1, group=1, dim=16, type="i8")
    text = Text.random(shape, 3, [0], seed=1)
    text.v[0], text.v[1], text.v[2] = 0.0, 1e-35, torch.linspace(-1e38, 1e38, 16)
    text.k[:] = 0.0
    kv = shape.pages(1)
    step(shape, kv, [(text, 0, 3)])
    assert kv.keys()[0, 0, :, :3].eq(0).all()
    assert kv.scales()[0, 0, 1, :2].tolist() == [0.0, 0.0]
    assert kv.values()[0, 0, 2, [0, 15]].tolist() == [-127, 127]


def test_what_does_not_fit_is_refused() -> None:
    shape = Shape()
    kv, text = shape.pages(2), Text.random(shape, 3, [0], seed=1)
    with pytest.raises(UnsupportedTypeError, match="q4"):
        KvLayout.of("q4", 64)
    with pytest.raises(OperandError, match="multiple"):
        KvPages(kv.layout, 3, kv.data)
    with pytest.raises(OperandError, match="lie together"):
        KvPages(kv.layout, 6, torch.zeros(2, 2, 2 * kv.layout.head_bytes, dtype=torch.uint8)[..., ::2])
    with pytest.raises(OperandError, match="need 2 pages"):
        Segments.build([(3, 62, [0])])
    with pytest.raises(OperandError, match="no page -1"):
        Segments.build([(3, 0, [-1])])
    with pytest.raises(OperandError, match="no page 2"):
        step(shape, kv, [(Text(text.q, text.k, text.v, [2]), 0, 3)])
    with pytest.raises(OperandError, match="K/V heads of 32"):
        step(shape, kv, [(Text(text.q, text.k[:, 1:], text.v, [0]), 0, 3)])
    with pytest.raises(OperandError, match="float32"):
        step(shape, kv, [(Text(text.q.half(), text.k, text.v, [0]), 0, 3)])
    with pytest.raises(OperandError, match="window=0"):
        step(Shape(window=0), kv, [(text, 0, 3)])
    with pytest.raises(OperandError, match="heads of 32"):
        step(Shape(rotated=34), kv, [(text, 0, 3)])
