"""How fast each stored type multiplies: GB/s of weight bytes for one token, GOP/s for many; and decodes attend.

    python bench/kernel_speed.py [--types Q4_0,Q6_K] [--threads 1,2] [--tokens 256] [--repeat 7] [--json]
    python bench/kernel_speed.py --attention bf16,i8 [--threads 1,2] [--context 4096] [--batch 16] [--heads 32,8,128]

One token is limited by memory: its matrices are fresh in turn, `--memory-mb` of them, so that no cache holds them.
Many tokens are limited by arithmetic: one matrix, a multiplication and an addition counted as two operations.
Attention of decodes reads all K and V of a layer once, of layers in turn that no cache holds together: GB/s of these,
in turn with what memory gives to plain reads of pieces and with PyTorch (contiguous K and V of bfloat16, for i8 too, as
it has no such type).
Every figure is a median with the least and the most of the repeats; SHOAL_KERNELS names the home to measure.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time

import numpy as np
from inputs.decode_case import DecodeCase, set_torch_threads
from inputs.random_weights import random_matrix

from shoal import kernels
from shoal.kernels import WEIGHT_TYPES, Linears, Matrix, WeightType
from shoal.kernels.huge_pages import Arena

ROWS, COLS = 2048, 2048


def main() -> None:
    parser = argparse.ArgumentParser(description="speed of a linear, by stored type")
    parser.add_argument("--types", default=",".join(kind.name for kind in WEIGHT_TYPES))
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--memory-mb", type=int, default=600, help="of weights, beyond what caches hold")
    parser.add_argument("--attention", default="", help="types of KV, instead of weights")
    parser.add_argument("--context", type=int, default=4096, help="of attention")
    parser.add_argument("--batch", type=int, default=16, help="of attention")
    parser.add_argument("--heads", default="32,8,128", help="query heads, K/V heads, numbers of a head")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.attention:
        attention(options)
        return

    names = options.types.split(",")
    results = []
    for kind in (kind for kind in WEIGHT_TYPES if kind.name in names):
        matrix = random_matrix(kind, ROWS, COLS)
        memory = Arena()
        copies = max(2, (options.memory_mb << 20) // matrix.nbytes)
        places = [memory.take(matrix.nbytes) for _ in range(copies)]
        for place in places:
            place[:] = matrix.data
        matrices = [Linears((Matrix(kind, place, ROWS, COLS),)) for place in places]
        for threads in map(int, options.threads.split(",")):
            kernels.set_threads(threads)
            results.append(measure(kind, matrices, threads, options))
            if not options.json:
                print(line(results[-1]), flush=True)
    if options.json:
        print(json.dumps({"home": kernels.home(), "rows": ROWS, "cols": COLS, "results": results}))


def measure(
    kind: WeightType, matrices: list[Linears], threads: int, options: argparse.Namespace
) -> dict[str, object]:
    many = np.random.default_rng(0).standard_normal((options.tokens, COLS), np.float32)
    one = many[:1]
    turn = itertools.cycle(matrices)
    home = kernels.home_of("cpu")
    per_repeat = max(1, len(matrices) // options.repeat)
    nbytes = matrices[0].matrices[0].nbytes

    def read() -> float:
        return per_repeat * nbytes / seconds(lambda: home.linears(one, next(turn)), per_repeat) / 1e9

    def multiply() -> float:
        operations = 2 * ROWS * COLS * options.tokens
        return operations / seconds(lambda: home.linears(many, matrices[0]), 1) / 1e9

    read(), multiply()
    return {
        "type": kind.name,
        "threads": threads,
        "one_token_gb_per_s": spread([read() for _ in range(options.repeat)]),
        "many_tokens_gop_per_s": spread([multiply() for _ in range(options.repeat)]),
    }


def attention(options: argparse.Namespace) -> None:
    heads, kv_heads, dim = map(int, options.heads.split(","))
    case = DecodeCase(options.batch, options.context, heads, kv_heads, dim)
    results = []
    for name in options.attention.split(","):
        native, layers = case.native(name), case.layers(name)
        torch, torch_bytes = case.torch()
        for threads in map(int, options.threads.split(",")):
            kernels.set_threads(threads)
            set_torch_threads(threads)
            memory = case.memory(threads)
            found: dict[str, list[float]] = {"gb_per_s": [], "memory_gb_per_s": [], "times_torch": []}
            for _ in range(options.repeat + 1):
                took_s, torch_s = seconds(native, layers) / layers, seconds(torch, 3) / 3
                found["gb_per_s"].append(case.kv_bytes(name) / took_s / 1e9)
                found["memory_gb_per_s"].append(case.cold_bytes / seconds(memory, 1) / 1e9)
                found["times_torch"].append(torch_s / took_s)
            spreads = {key: spread(values[1:]) for key, values in found.items()}
            results.append({"kv": name, "threads": threads, "torch_bytes": torch_bytes, **spreads})
            if not options.json:
                parts = [
                    f"{key} {it['median']:.2f} ({it['min']:.2f} to {it['max']:.2f})"
                    for key, it in spreads.items()
                ]
                print(f"{name:5} threads {threads}  " + "  ".join(parts), flush=True)
    if options.json:
        print(json.dumps({"home": kernels.home(), "results": results}))


def seconds(call: object, times: int) -> float:
    assert callable(call)
    start = time.perf_counter()
    for _ in range(times):
        call()
    return time.perf_counter() - start


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def line(result: dict[str, object]) -> str:
    def figure(key: str) -> str:
        value = result[key]
        assert isinstance(value, dict)
        return f"{value['median']:7.1f} ({value['min']:.1f} to {value['max']:.1f})"

    return (
        f"{result['type']:7} threads {result['threads']}  one token {figure('one_token_gb_per_s'):26} GB/s"
        f"  many {figure('many_tokens_gop_per_s'):26} GOP/s"
    )


if __name__ == "__main__":
    main()
