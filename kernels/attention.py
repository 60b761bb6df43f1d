"""Grouped-query attention over one sequence's K and V: in torch, and natively for a single new token.

Each sequence is computed by itself, so its arithmetic does not depend on its neighbours in a batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from shoal.kernels import dispatch


def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None = None) -> Tensor:
    """Causal attention of the last T positions of a sequence over all S of them.

    q (T, heads, head_dim) f32; k, v (kv_heads, S, head_dim), any float type, S ≥ T; head h uses K/V head
    h // (heads // kv_heads). With `window`, position p sees (p - window, p]. Returns f32 (T, heads * head_dim).
    """
    tokens, heads, head_dim = q.shape
    kv_heads, length, _ = k.shape
    if window is not None and length > window + tokens - 1:
        k, v = k[:, length - window - tokens + 1 :], v[:, length - window - tokens + 1 :]
        length = window + tokens - 1
    if tokens == 1 and (native := dispatch.native()) is not None:
        out_one = native.attend_one(q[0], k, v, scale)
        if out_one is not None:
            return out_one.view(1, heads * head_dim)
    k, v = k.float(), v.float()
    if tokens == 1:
        grouped = q.view(kv_heads, heads // kv_heads, head_dim)
        weights = torch.softmax(torch.matmul(grouped, k.transpose(1, 2)).mul_(scale), -1)
        return torch.matmul(weights, v).view(1, heads * head_dim)
    mask = torch.ones(tokens, length, dtype=torch.bool).tril_(length - tokens)
    if window is not None:
        mask.triu_(length - tokens - window + 1)
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None], k[None], v[None], attn_mask=mask, scale=scale, enable_gqa=True
    )
    return out[0].transpose(0, 1).reshape(tokens, heads * head_dim)
