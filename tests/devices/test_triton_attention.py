"""What Triton's kernels find for texts with one row is what torch finds, over any pages, and what they store is what
torch stores: here by Triton's interpreter, on a graphics card where there is one. Pages hold what is no number where
nothing was stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from fakes.torch_on_host import home_with
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="triton is not installed (Linux on x86-64 only)")

from shoal.devices.in_triton import triton_kernels, triton_looks
from shoal.devices.in_triton.triton_kernels import ATTENTION, TritonKernels
from shoal.devices.torch_kernels import TorchKernels
from shoal.kernels.arrays import Floats
from shoal.kernels.attention_operands import (
    HeadNorms,
    KvPages,
    Rotation,
    Scoring,
    Segments,
    kv_layout,
)
from shoal.partition.memory_layout import KV_FORMATS, PAGE_TOKENS

CLOSE = {"f32": 2e-5, "f16": 2e-3, "bf16": 1e-2, "i8": 1e-2}  # what is stored may be rounded the other way
POOL = 12


@dataclass(frozen=True)
class Case:
    kv_heads: int = 2
    group: int = 3
    dim: int = 32
    kind: str = "f16"
    window: int | None = None
    rotated: int = 32
    interleaved: bool = False
    normed: bool = False


Steps = Sequence[Sequence[tuple[int, int, Sequence[int]]]]
"""For each text of each step its rows, the position of the first, and its pages."""


def found(kernels: TorchKernels, case: Case, steps: Steps, seed: int = 1) -> tuple[list[Floats], Any]:
    """What each step finds, and the pages in the end."""
    home, layout, source = home_with(kernels), kv_layout(case.kind, case.dim), np.random.default_rng(seed)
    heads = case.kv_heads * case.group
    pages = home.pages((POOL, 3, case.kv_heads, layout.head_bytes))
    dirty = np.full((3, case.kv_heads, layout.head_bytes), 0xFF, np.uint8)
    for number in range(POOL):
        home.page_in(pages, number, dirty)
    kv = KvPages(layout, heads, home.layer_of(pages, 1))
    made = []
    for texts in steps:
        segments = Segments.build(texts)
        rows = segments.tokens
        sizes = (heads, case.kv_heads, case.kv_heads)
        q, k, v = (home.place(source.standard_normal((rows, size * case.dim), np.float32)) for size in sizes)
        angles = source.uniform(-3, 3, (rows, case.rotated // 2)).astype(np.float32)
        turning = Rotation(case.rotated, case.interleaved, np.cos(angles), np.sin(angles))
        norms = None
        if case.normed:
            both = (source.uniform(0.5, 2, case.dim).astype(np.float32) for _ in range(2))
            norms = HeadNorms(*(home.place(it) for it in both), 1e-6)
        scoring = Scoring(turning, case.dim**-0.5, case.window, norms)
        made.append(home.fetch(home.attention(kv, segments, q, k, v, scoring)))
    return made, np.stack([home.page_out(pages, number) for number in range(POOL)])


def agrees(case: Case, steps: Steps, seed: int = 1) -> None:
    kernels = TritonKernels({ATTENTION})
    ours, stored = found(kernels, case, steps, seed)
    assert not kernels.refused
    true, as_stored = found(TorchKernels(), case, steps, seed)
    for mine, theirs in zip(ours, true, strict=True):
        assert mine.shape == theirs.shape
        assert np.abs(mine - theirs).max() <= CLOSE[case.kind] * np.abs(theirs).max()
    layout = kv_layout(case.kind, case.dim)
    bytes_, as_bytes = (it[..., : layout.scales_at] for it in (stored, as_stored))
    if case.kind == "i8":  # one more or less; what nobody stored is -1
        assert np.abs(bytes_.view(np.int8).astype(int) - as_bytes.view(np.int8)).max() <= 1
    else:
        assert np.mean(bytes_ != as_bytes) < 0.05
    assert (stored[:, 0] == 0xFF).all()
    assert (stored[:, 2] == 0xFF).all()


LONG = [[(130, 0, [3, 1, 4]), (5, 0, [2])], [(1, 130, [3, 1, 4]), (1, 5, [2])]]


@pytest.mark.parametrize("kind", sorted(KV_FORMATS))
@pytest.mark.parametrize("parts", [1, 4])
def test_answers_of_every_type(kind: str, parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two texts, in parts of so many pages, of which two are joined at once, and one text is looked at after the
    other."""
    monkeypatch.setattr(triton_looks, "LOOKED_PAGES", parts)
    monkeypatch.setattr(triton_looks, "JOINED", 2)
    monkeypatch.setattr(triton_looks, "LOOKED_TOGETHER", 1)
    agrees(Case(kind=kind), LONG)


@pytest.mark.parametrize("window", [None, 1, 70])
def test_answers_beside_prompts(window: int | None) -> None:
    """A text that begins, one that goes on, and answers among them; a page is full and another begins."""
    steps = [
        [(63, 0, [0]), (200, 0, [5, 6, 7, 8])],
        [(1, 63, [0]), (7, 0, [9]), (1, 200, [5, 6, 7, 8]), (30, 201, [5, 6, 7, 8])][:3],
        [(1, 64, [0, 10]), (1, 7, [9]), (3, 201, [5, 6, 7, 8])],
    ]
    agrees(Case(window=window), steps)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from([1, 2, 3]),
    st.sampled_from([1, 3, 4, 8]),
    st.sampled_from([4, 24, 80]),
    st.sampled_from(sorted(KV_FORMATS)),
    st.sampled_from([None, 3, 64]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([0, 1, 2]),
    st.integers(0, 130),
    st.integers(0, 1 << 30),
)
def test_any_heads(
    kv_heads: int,
    group: int,
    dim: int,
    kind: str,
    window: int | None,
    interleaved: bool,
    normed: bool,
    turned: int,
    before: int,
    seed: int,
) -> None:
    case = Case(kv_heads, group, dim, kind, window, turned * dim // 2 // 2 * 2, interleaved, normed)
    pages = [4, 2, 7][: before // PAGE_TOKENS + 1]
    first: Steps = [[(before, 0, pages)]] if before else []
    agrees(case, [*first, [(1, before, pages), (1, 0, [9])]], seed)


def test_numbers_that_are_none_stay_with_their_text() -> None:
    """In its own results, and its own scale."""
    home = home_with(TritonKernels({ATTENTION}))
    for kind in ("i8", "f16"):
        layout = kv_layout(kind, 16)
        kv = KvPages(layout, 2, home.layer_of(home.pages((2, 1, 1, layout.head_bytes)), 0))
        k = np.ones((2, 16), np.float32)
        k[0, 3] = np.inf
        q, k, v = (home.place(it) for it in (np.ones((2, 32), np.float32), k, np.ones((2, 16), np.float32)))
        angles = np.zeros((2, 0), np.float32)
        scoring = Scoring(Rotation(0, False, angles, angles), 1.0)
        its = home.fetch(home.attention(kv, Segments.build([(1, 0, [0]), (1, 0, [1])]), q, k, v, scoring))
        assert np.isnan(its[0]).any()
        np.testing.assert_allclose(its[1], 1, rtol=1e-2)


def test_heads_without_room_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(triton_kernels, "look", lambda *_: asked.append(1))
    found(TritonKernels({ATTENTION}), Case(kv_heads=1, group=64, dim=128), [[(1, 0, [0])]])
    assert not asked
    found(TritonKernels({ATTENTION}), Case(), [[(2, 0, [0])]])  # and so are prompts
    assert not asked


def test_a_kernel_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch finds the same, then and from then on."""
    kernels = TritonKernels()
    monkeypatch.setattr(triton_kernels, "look", _fails)
    ours, _ = found(kernels, Case(), LONG)
    true, _ = found(TorchKernels(), Case(), LONG)
    for mine, theirs in zip(ours, true, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert "image is invalid" in kernels.refused
    assert kernels.name.endswith("(one row, many)")


def _fails(*_: Any) -> None:
    raise RuntimeError("Triton Error [CUDA]: device kernel image is invalid")
