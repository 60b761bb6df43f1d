"""Attention over pages: every home computes what a plain definition says, and in native homes the bits of a row depend
on nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import cycle
from typing import Any

import numpy as np
import pytest
import torch
from fakes.homes import HOMES, NATIVE, assert_close, frozen, layouts, ones, randn, zeros
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.kernels import OperandError, UnsupportedTypeError, attention_reference, set_threads
from shoal.kernels.arrays import Floats, Ids
from shoal.kernels.attention_operands import (
    HeadNorms,
    KvPages,
    Rotation,
    Scoring,
    Segments,
    kv_layout,
)
from shoal.kernels.attention_reference import keys_of, scales_of, values_of
from shoal.kernels.homes import choose, cpu
from shoal.partition.memory_layout import KV_FORMATS, PAGE_TOKENS

# What storing rounds by, relative to the greatest number of a head's row.
ROUNDING = {"f32": 0.0, "f16": 2**-11, "bf16": 2**-8, "i8": 0.5 / 127}


@pytest.fixture(autouse=True)
def _best_home_afterwards() -> Iterator[None]:
    set_threads(1)  # torch's own threads, in the reference, are slow on a busy machine
    yield
    choose()
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
        """Every byte is 0xff, which is NaN in every float type: no row may see what was never stored."""
        layout = kv_layout(self.type, self.dim)
        data = np.full((count, self.kv_heads, layout.head_bytes), 255, np.uint8)
        return KvPages(layout, self.kv_heads * self.group, data)


def rotation(shape: Shape, positions: Ids) -> Rotation:
    angles = positions[:, None] / 7.0 ** np.arange(shape.rotated // 2)
    return Rotation(
        shape.rotated, shape.interleaved, np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    )


@dataclass(frozen=True)
class Text:
    """q, k and v of all positions of one sequence, and the pages for its KV."""

    q: Floats
    k: Floats
    v: Floats
    pages: list[int]

    @classmethod
    def random(cls, shape: Shape, length: int, pages: list[int], seed: int) -> Text:
        heads = shape.kv_heads * shape.group * shape.dim
        narrow = shape.kv_heads * shape.dim
        q, k, v = np.split(randn(length, heads + 2 * narrow, seed=seed), [heads, heads + narrow], 1)
        return cls(q, k, v, pages)


def step(
    shape: Shape, kv: KvPages, parts: list[tuple[Text, int, int]], norms: HeadNorms | None = None
) -> list[Floats]:
    """Computes positions [start, end) of each text, all in one step."""
    positions = np.concatenate([np.arange(start, end) for _, start, end in parts])
    q, k, v = (
        np.concatenate([getattr(text, name)[start:end] for text, start, end in parts])
        for name in ("q", "k", "v")
    )
    out = cpu().attention(
        kv,
        Segments.build((end - start, start, text.pages) for text, start, end in parts),
        q,
        k,
        v,
        Scoring(rotation(shape, positions), shape.scale, shape.window, norms),
    )
    return np.split(out, np.cumsum([end - start for _, start, end in parts])[:-1])


def plain(shape: Shape, text: Text, norms: HeadNorms | None = None) -> Floats:
    """The definition, in float64; nothing is rounded."""
    length = len(text.q)
    q, k, v = (x.astype(float).reshape(length, -1, shape.dim) for x in (text.q, text.k, text.v))
    if norms is not None:
        q, k = (
            x / np.sqrt(np.square(x).mean(-1, keepdims=True) + norms.eps) * weight
            for x, weight in ((q, norms.q), (k, norms.k))
        )
    angles = rotation(shape, np.arange(length))
    half = shape.rotated // 2
    for x in (q, k):
        for i in range(half):
            a, b = (2 * i, 2 * i + 1) if shape.interleaved else (i, i + half)
            cos, sin = angles.cos[:, i, None].astype(float), angles.sin[:, i, None].astype(float)
            x[..., a], x[..., b] = x[..., a] * cos - x[..., b] * sin, x[..., b] * cos + x[..., a] * sin
    k, v = (x.repeat(shape.group, 1) for x in (k, v))
    distance = np.arange(length)[:, None] - np.arange(length)
    seen = (distance >= 0) & (distance < (shape.window or length))
    scores = np.where(seen, np.einsum("thd,shd->hts", q, k) * shape.scale, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("hts,shd->thd", weights, v).reshape(length, -1).astype(np.float32)


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    dim = draw(st.sampled_from([4, 8, 24, 32, 40, 64, 80, 96, 128, 256]))
    return Shape(
        kv_heads=draw(st.sampled_from([1, 2, 3, 8])),
        group=draw(st.sampled_from([1, 2, 3, 4, 7, 8, 16])),
        dim=dim,
        type=draw(st.sampled_from(sorted(KV_FORMATS))),
        window=draw(st.sampled_from([None, None, 1, 5, 70])),
        rotated=draw(st.sampled_from([0, dim // 2, dim])),
        interleaved=draw(st.booleans()),
        scale=draw(st.sampled_from([0.125, 0.7])),
    )


def lengths(most: int) -> st.SearchStrategy[int]:
    """Of texts and their parts; often around where a page or a span ends."""
    ends = [end + more for end in (PAGE_TOKENS, 128, 256, 512) for more in (-1, 0, 1) if end + more <= most]
    return st.one_of(st.integers(1, most), st.sampled_from(ends))


@settings(deadline=None, max_examples=25)
@given(shape=shapes(), length=lengths(140), normed=st.booleans(), chunk=lengths(140))
def test_every_home_computes_the_definition(shape: Shape, length: int, normed: bool, chunk: int) -> None:
    text = Text.random(shape, length, [2, 0, 3], seed=length)
    norms = HeadNorms(1 + randn(shape.dim, seed=8) / 4, 1 + randn(shape.dim, seed=9) / 4, 1e-5)
    truth = plain(shape, text, norms if normed else None)
    # A rounded value moves the result as far; a rounded key moves scores by what q and the scale make of it.
    tolerance = 3e-5 + 4 * ROUNDING[shape.type] * (1 + 3 * shape.scale * shape.dim**0.5)
    parts = [part for part in ((0, min(chunk, length)), (min(chunk, length), length)) if part[0] < part[1]]
    for name in HOMES:
        choose(name)
        kv = shape.pages(4)
        got = np.concatenate(
            [step(shape, kv, [(text, *part)], norms if normed else None)[0] for part in parts]
        )
        assert got.dtype == np.float32
        assert_close(got, truth, rtol=tolerance, atol=tolerance)


@settings(deadline=None, max_examples=25)
@given(shape=shapes(), length=lengths(140), start=st.integers(0, 80), scores=st.integers(1, 20_000))
def test_torch_has_only_so_many_scores_at_once(shape: Shape, length: int, start: int, scores: int) -> None:
    """And what a text gets is the same."""
    choose("reference")
    text = Text.random(shape, start + length, [2, 0, 3, 1], seed=length)
    heads, attended = shape.kv_heads * shape.group, torch.nn.functional.scaled_dot_product_attention
    asked: list[int] = []

    def noted(q: torch.Tensor, k: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
        asked.append(q.shape[1] * q.shape[2] * k.shape[2])
        return attended(q, k, *rest, **more)

    found = []
    for most in (1 << 30, scores):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(attention_reference, "SCORES_TOGETHER", most)
            patch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
            kv = shape.pages(4)
            if start:
                step(shape, kv, [(text, 0, start)])
            asked.clear()
            found += step(shape, kv, [(text, start, start + length)])
    assert max(asked) <= max(scores, heads * (start + length))
    assert_close(found[1], found[0], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("type", sorted(KV_FORMATS))
@pytest.mark.parametrize("name", NATIVE)
def test_homes_store_the_same_and_agree_closely(name: str, type: str) -> None:
    shape = Shape(type=type, dim=24)  # nothing is rotated, so that rounding falls the same way
    text = Text.random(shape, 130, [1, 0, 2], seed=3)
    results = []
    for home in ("reference", name):
        choose(home)
        kv = shape.pages(3)
        out = np.concatenate([step(shape, kv, [(text, a, b)])[0] for a, b in ((0, 1), (1, 100), (100, 130))])
        keys, values = keys_of(kv), values_of(kv)
        parts = [keys[[1, 0]], values[[1, 0]], keys[2, ..., :2], values[2, :, :2]]
        if shape.pages(1).layout.kind.scaled:
            parts += [scales_of(kv)[[1, 0]], scales_of(kv)[2, ..., :2]]
        results.append((out, parts))
    (truth, stored), (got, ours) = results
    assert_close(got, truth, rtol=2e-5, atol=2e-5)
    for part, other in zip(stored, ours, strict=True):
        assert torch.equal(part, other)


def schedule(lengths: list[int], sizes: list[int]) -> list[list[tuple[int, int, int]]]:
    """Steps that compute texts of these lengths in parts of these sizes (0: the text is not in this step), the last
    three tokens one by one as in an answer. Each step is a list of its parts, (text, start, end)."""
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
    """Pages for texts of these lengths, taken from `order`."""
    taken = iter(order)
    return [[next(taken) for _ in range(-(-length // PAGE_TOKENS))] for length in lengths]


@pytest.mark.parametrize("name", NATIVE)
@settings(deadline=None, max_examples=25)
@given(
    shape=shapes(),
    lengths=st.lists(lengths(600), min_size=1, max_size=3),
    sizes=st.lists(st.one_of(st.integers(0, 5), lengths(600)), max_size=6),
    seed=st.integers(0, 99),
    threads=st.integers(1, 3),
)
def test_bits_do_not_depend_on_company_cuts_pages_or_threads(
    name: str, shape: Shape, lengths: list[int], sizes: list[int], seed: int, threads: int
) -> None:
    choose(name)
    set_threads(1)
    order = np.random.default_rng(seed).permutation(30).tolist()
    texts = [
        Text.random(shape, length, pages, seed=length)
        for length, pages in zip(lengths, pages_for(lengths, list(range(30))), strict=True)
    ]
    whole = [step(shape, shape.pages(30), [(text, 0, len(text.q))])[0] for text in texts]
    set_threads(threads)
    kv = shape.pages(30)
    moved = [replace(text, pages=pages) for text, pages in zip(texts, pages_for(lengths, order), strict=True)]
    rows: list[list[Floats]] = [[] for _ in texts]
    for parts in schedule(lengths, sizes):
        outs = step(shape, kv, [(moved[text], start, end) for text, start, end in parts])
        for (text, _, _), out in zip(parts, outs, strict=True):
            rows[text].append(out)
    for alone, pieces in zip(whole, rows, strict=True):
        assert np.array_equal(alone, np.concatenate(pieces))


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize("window", [None, 300])
def test_long_texts_of_many_heads_in_spans(name: str, window: int | None) -> None:
    choose(name)
    set_threads(3)
    shape = Shape(kv_heads=1, group=100, dim=16, type="f16", window=window)  # more heads than rows in a tile
    text = Text.random(shape, 1030, list(range(17)), seed=1)
    kv = shape.pages(17)
    one_head = KvPages(kv.layout, 1, kv.data)  # stores the same and has less to compute
    step(replace(shape, group=1), one_head, [(replace(text, q=text.q[:, : shape.dim]), 0, 1000)])
    late = np.concatenate([step(shape, kv, [(text, at, at + 1)])[0] for at in range(1000, 1030)])
    assert np.array_equal(late, step(shape, kv, [(text, 1000, 1030)])[0])
    choose("reference")
    truth = step(shape, kv, [(text, 1000, 1030)])[0]
    assert_close(late, truth, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("type", ["bf16", "i8"])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", NATIVE)
def test_bits_of_a_kv_head_do_not_depend_on_the_others(name: str, threads: int, type: str) -> None:
    choose(name)
    set_threads(threads)
    # More rows than are computed together, of some heads at a time.
    heads, group, dim, length = 30, 5, 16, 300
    shape = Shape(kv_heads=heads, group=group, dim=dim, type=type)
    long, short = (
        Text.random(shape, size, pages, seed=size) for size, pages in ((length, [4, 0, 2, 5, 1]), (40, [3]))
    )
    kv = shape.pages(6)
    step(shape, kv, [(long, 0, length - 2), (short, 0, 38)])
    out = np.concatenate(step(shape, kv, [(long, length - 2, length), (short, 38, 40)]))
    for head in (0, 7, heads - 1):
        own, wide = slice(head * dim, (head + 1) * dim), slice(head * group * dim, (head + 1) * group * dim)
        alone = [
            replace(text, q=text.q[:, wide], k=text.k[:, own], v=text.v[:, own]) for text in (long, short)
        ]
        one, its = replace(shape, kv_heads=1), replace(shape, kv_heads=1).pages(6)
        step(one, its, [(alone[0], 0, length - 2), (alone[1], 0, 38)])
        lone = np.concatenate(step(one, its, [(alone[0], length - 2, length), (alone[1], 38, 40)]))
        assert np.array_equal(out[:, wide], lone)


@pytest.mark.parametrize("type", sorted(KV_FORMATS))
@pytest.mark.parametrize("name", HOMES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_nan_shows_where_it_is_seen_and_nowhere_else(name: str, type: str, bad: float) -> None:
    choose(name)
    shape = Shape(kv_heads=2, group=1, dim=16, type=type)
    for tensor in ("k", "v"):
        text = Text.random(shape, 40, [0], seed=2)
        getattr(text, tensor)[30, 3] = bad  # of the first K/V head
        kv = shape.pages(1)
        both = np.concatenate([step(shape, kv, [(text, at, at + 1)])[0] for at in range(40)])
        first, second = np.split(both, 2, 1)
        assert np.isnan(first[30:]).any(1).all() or bad == float("inf")
        assert not np.isfinite(first[30:]).all()
        assert np.isfinite(first[:30]).all()
        assert np.isfinite(second).all()


@pytest.mark.parametrize("name", NATIVE)
def test_a_later_nan_does_not_reach_earlier_rows_of_its_step(name: str) -> None:
    choose(name)
    shape = Shape(kv_heads=1, group=1, dim=16)
    text = Text.random(shape, 100, [0, 1], seed=2)
    text.v[50] = float("nan")
    out = step(shape, shape.pages(2), [(text, 0, 100)])[0]
    assert np.isfinite(out[:50]).all()
    assert np.isnan(out[50:]).all()


@pytest.mark.parametrize("name", HOMES)
def test_zeros_and_extremes_are_stored_as_bytes(name: str) -> None:
    choose(name)
    shape = Shape(kv_heads=1, group=1, dim=16, type="i8")
    text = Text.random(shape, 3, [0], seed=1)
    text.v[0], text.v[1], text.v[2] = 0.0, 1e-35, np.linspace(-1e38, 1e38, 16)
    text.k[:] = 0.0
    kv = shape.pages(1)
    step(shape, kv, [(text, 0, 3)])
    assert not keys_of(kv)[0, 0, :, :3].any()
    assert scales_of(kv)[0, 0, 1, :2].tolist() == [0.0, 0.0]
    assert values_of(kv)[0, 0, 2, [0, 15]].tolist() == [-127, 127]


@pytest.mark.parametrize("name", HOMES)
def test_operands_need_not_be_contiguous_or_writable(name: str) -> None:
    choose(name)
    shape = Shape(rotated=16)
    text = Text.random(shape, 70, [1, 0], seed=1)
    table = rotation(shape, np.arange(70))
    angles = Rotation(table.dims, table.interleaved, frozen(table.cos), frozen(table.sin))
    weights = randn(32, seed=8), randn(32, seed=9)

    def attend(q: Floats, k: Floats, v: Floats, norms: HeadNorms, angles: Rotation) -> Floats:
        segments = Segments.build([(70, 0, text.pages)])
        return cpu().attention(shape.pages(2), segments, q, k, v, Scoring(angles, 0.2, None, norms))

    truth = attend(*(x.copy() for x in (text.q, text.k, text.v)), HeadNorms(*weights, 1e-5), table)
    same = HeadNorms(frozen(weights[0]), frozen(weights[1]), 1e-5)
    for q, k, v in zip(*map(layouts, (text.q, text.k, text.v)), strict=True):
        tolerance = 1e-5 if name == "reference" else 0
        assert_close(attend(q, k, v, same, angles), truth, tolerance, tolerance)


def test_what_does_not_fit_is_refused() -> None:
    shape = Shape()
    kv, text = shape.pages(2), Text.random(shape, 3, [0], seed=1)
    with pytest.raises(UnsupportedTypeError, match="q4"):
        kv_layout("q4", 64)
    with pytest.raises(OperandError, match="multiple"):
        KvPages(kv.layout, 3, kv.data)
    with pytest.raises(OperandError, match="read-only"):
        KvPages(kv.layout, 6, frozen(kv.data))
    with pytest.raises(OperandError, match="lie together"):
        KvPages(kv.layout, 6, np.zeros((2, 2, 2 * kv.layout.head_bytes), np.uint8)[..., ::2])
    with pytest.raises(OperandError, match="need 2 pages"):
        Segments.build([(3, 62, [0])])
    with pytest.raises(OperandError, match="no page -1"):
        Segments.build([(3, 0, [-1])])
    with pytest.raises(OperandError, match="no page 2"):
        step(shape, kv, [(Text(text.q, text.k, text.v, [2]), 0, 3)])
    with pytest.raises(OperandError, match="K/V heads of 32"):
        step(shape, kv, [(Text(text.q, text.k[:, 1:], text.v, [0]), 0, 3)])
    with pytest.raises(OperandError, match="float32"):
        step(shape, kv, [(Text(text.q.astype(np.float16), text.k, text.v, [0]), 0, 3)])
    with pytest.raises(OperandError, match="window=0"):
        step(Shape(window=0), kv, [(text, 0, 3)])
    fits = ones(shape.dim)
    for q, k in ((fits[1:], fits), (fits, fits[:, None]), (fits, np.ones(shape.dim))):
        with pytest.raises(OperandError, match=r"norms of heads must be float32 of shape \(32,\)"):
            step(shape, kv, [(text, 0, 3)], HeadNorms(q, k, 1e-5))
    good = zeros(3, 4)
    for wrong in (np.zeros((3, 4)), zeros(3, 5), zeros(4, 3).T, zeros(2, 4)):
        with pytest.raises(OperandError, match="must be contiguous float32"):
            Rotation(8, False, good, wrong)
    with pytest.raises(OperandError, match="heads of 32"):
        step(Shape(rotated=34), kv, [(text, 0, 3)])
