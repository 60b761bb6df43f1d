"""Attention of one new token: the native kernel equals a plain float64 definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shoal.kernels import KernelError, dispatch, library, set_threads
from shoal.kernels.attention import attention


def homes_here() -> list[str]:
    names = ["reference"]
    for name in ("avx512vnni", "avx512", "avx2", "neon_dot", "neon", "scalar"):
        try:
            names.append(library.Native(name).name)
        except KernelError:
            continue
    return names


HOMES = homes_here()


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plain(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """q (heads, head_dim), k and v (kv_heads, S, head_dim), head by head in float64."""
    group = q.shape[0] // k.shape[0]
    out = []
    for head, query in enumerate(q.double()):
        weights = torch.softmax(k[head // group].double() @ query * scale, -1)
        out.append(weights @ v[head // group].double())
    return torch.cat(out)[None].float()


@settings(deadline=None, max_examples=40)
@given(
    kv_heads=st.integers(1, 4),
    group=st.integers(1, 9),
    head_dim=st.sampled_from([8, 16, 64, 80, 128]),
    length=st.integers(1, 130),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    scale=st.sampled_from([0.125, 3.0]),
)
def test_one_token(
    kv_heads: int, group: int, head_dim: int, length: int, dtype: torch.dtype, scale: float
) -> None:
    pool = randn(2, kv_heads, length + 7, head_dim).to(dtype)
    k, v = pool[0][:, 3 : 3 + length], pool[1][:, 3 : 3 + length]  # views into a longer cache
    q = randn(1, kv_heads * group, head_dim, seed=1)
    truth = plain(q[0], k, v, scale)
    for name in HOMES:
        dispatch.choose(name)
        got = attention(q, k, v, scale=scale)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, truth, rtol=1e-4, atol=2e-5)
    dispatch.choose()


@pytest.mark.parametrize("name", HOMES[1:])
def test_threads_and_windows(name: str) -> None:
    dispatch.choose(name)
    q, k, v = randn(1, 6, 64), randn(3, 400, 64, seed=1), randn(3, 400, 64, seed=2)
    set_threads(1)
    alone = attention(q, k, v, scale=0.1)
    set_threads(2)
    assert torch.equal(attention(q, k, v, scale=0.1), alone)
    windowed = attention(q, k, v, scale=0.1, window=50)
    torch.testing.assert_close(windowed, plain(q[0], k[:, -50:], v[:, -50:], 0.1), rtol=1e-4, atol=1e-5)
    dispatch.choose()


@pytest.mark.parametrize("name", HOMES)
def test_nan_is_not_hidden_and_gaps_are_served(name: str) -> None:
    dispatch.choose(name)
    q, k, v = randn(1, 4, 32), randn(2, 9, 32), randn(2, 9, 32)
    spread = torch.stack([k, k], dim=-1)[..., 0]  # last stride 2
    torch.testing.assert_close(attention(q, spread, v, scale=1.0), attention(q, k, v, scale=1.0))
    k[0, 4] = float("nan")
    got = attention(q, k, v, scale=1.0)
    assert got[0, :64].isnan().all()
    assert got[0, 64:].isfinite().all()
    dispatch.choose()
