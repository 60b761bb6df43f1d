"""Decodes that attend to long texts: the same sizes for the native kernel over pages, and for PyTorch."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from threading import Thread
from typing import Any

import numpy as np

from shoal import kernels
from shoal.kernels.attention_operands import KvPages, Rotation, Scoring, Segments, kv_layout
from shoal.kernels.huge_pages import mapped
from shoal.partition.memory_layout import KV_FORMATS, PAGE_TOKENS, SCALE_BYTES

Call = Callable[[], object]
Numbers = np.ndarray[Any, np.dtype[np.int64]]
COLD_BYTES = 1 << 30  # of all layers: more than any cache holds
PIECE_BYTES = 2 << 20


@dataclass(frozen=True)
class DecodeCase:
    """One token each of `batch` sequences, which have `context` tokens. Calls take layer after layer, so that none
    finds its K and V in a cache."""

    batch: int
    context: int
    heads: int
    kv_heads: int
    dim: int
    cold_bytes: int = COLD_BYTES

    def kv_bytes(self, name: str) -> int:
        """Bytes of a layer's K and V."""
        kind = KV_FORMATS[name]
        token = 2 * self.kv_heads * (self.dim * kind.itemsize + (SCALE_BYTES if kind.scaled else 0))
        return self.batch * self.context * token

    def layers(self, name: str) -> int:
        return -(-self.cold_bytes // self.kv_bytes(name))

    def native(self, name: str) -> Call:
        """Over pages of that type in random order, each with all layers, as a pool has them."""
        layout, source = kv_layout(name, self.dim), np.random.default_rng(0)
        each = -(-self.context // PAGE_TOKENS)
        data = np.empty((self.batch * each, self.layers(name), self.kv_heads, layout.head_bytes), np.uint8)
        page = self._page(name, layout.head_bytes, layout.scales_at)
        for number in range(len(data)):
            data[number] = page
        order = source.permutation(len(data)).reshape(self.batch, each)
        segments = Segments.build([(1, self.context - 1, pages.tolist()) for pages in order])
        angles = source.standard_normal((2, self.batch, self.dim // 2), np.float32)
        scoring = Scoring(Rotation(self.dim, False, np.cos(angles[0]), np.sin(angles[1])), self.dim**-0.5)
        q = source.standard_normal((self.batch, self.heads * self.dim), np.float32)
        k, v = source.standard_normal((2, self.batch, self.kv_heads * self.dim), np.float32)
        home = kernels.home_of("cpu")
        turn = itertools.cycle([KvPages(layout, self.heads, data[:, i]) for i in range(data.shape[1])])
        return lambda: home.attention(next(turn), segments, q, k, v, scoring)

    def torch(self) -> tuple[Call, int]:
        """Over contiguous K and V in bfloat16, and the bytes of a layer."""
        import torch

        size = (self.batch, self.kv_heads, self.context, self.dim)
        k, v = torch.randn(size, dtype=torch.bfloat16), torch.randn(size, dtype=torch.bfloat16)
        turn = itertools.cycle([(k.clone(), v.clone()) for _ in range(self.layers("bf16"))])
        q = torch.randn((self.batch, self.heads, 1, self.dim), dtype=torch.bfloat16)
        attend = torch.nn.functional.scaled_dot_product_attention
        return lambda: attend(q, *next(turn), enable_gqa=True), 2 * k.numel() * k.element_size()

    def memory(self, threads: int) -> Call:
        """Plain reads of `cold_bytes`, in pieces of 2 MiB in random order, by so many threads."""
        pages = mapped(self.cold_bytes).view(np.float32)
        pages[:] = 1
        pieces = pages.reshape(-1, min(PIECE_BYTES, self.cold_bytes) // pages.itemsize)
        order = np.random.default_rng(0).permutation(len(pieces))

        def read(numbers: Numbers) -> None:
            for number in numbers:
                pieces[number].max()

        def all_read() -> None:
            parts = [Thread(target=read, args=(order[first::threads],)) for first in range(threads)]
            for part in parts:
                part.start()
            for part in parts:
                part.join()

        return all_read

    def _page(
        self, name: str, head_bytes: int, scales_at: int
    ) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        """(kv_heads, head_bytes) of small numbers."""
        numbers = np.random.default_rng(1).standard_normal((self.kv_heads, head_bytes), np.float32)
        match name:
            case "i8":
                made = (20 * numbers).astype(np.int8).view(np.uint8)
                made[:, scales_at:].view(np.float32)[:] = 0.02
                return made
            case "bf16":
                return (numbers.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)[:, :head_bytes]
            case _:
                kind = np.float16 if name == "f16" else np.float32
                return numbers.astype(kind).view(np.uint8)[:, :head_bytes]


def set_torch_threads(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
