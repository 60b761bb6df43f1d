"""Perplexity and greedy agreement of a GGUF on a text: Shoal against llama.cpp.

    python bench/check_quality.py MODEL.gguf TEXT --peer-python PATH [--ctx 512] [--windows 8] [--self]

PATH is a python that has llama-cpp-python. The text is cut into windows of ctx tokens as `shoal perplexity` cuts it;
in each, positions from ctx/2 on count. Exits with 1 if perplexities differ by more than 1%, or if the most likely next
token agrees at fewer than 97% of the positions. --self adds how often llama.cpp agrees with itself if it computes token
by token in one case and whole windows in the other. With quantised weights it rounds activations to int8, so the order
of its float sums shows: this is the noise floor of the comparison.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
from engines.engine_process import kinds

from shoal.daemon.config import NodeConfig
from shoal.daemon.loading.assembly import Assembly
from shoal.daemon.loading.loaded_model import LoadedModel
from shoal.kernels import set_threads
from shoal.kernels.arrays import Floats
from shoal.models.step import Segment, Step
from shoal.offload.budget import Budget
from shoal.partition.spec import length_class

PEER_BATCH = 512  # tokens that llama.cpp computes at a time


def main() -> int:
    parser = argparse.ArgumentParser(description="perplexity and greedy agreement: Shoal against llama.cpp")
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--peer-python", required=True)
    parser.add_argument("--ctx", type=int, default=512)
    parser.add_argument("--windows", type=int, default=8, help="at most")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--self", action="store_true", help="also compare llama.cpp with itself")
    options = parser.parse_args()

    set_threads(options.threads)
    config = NodeConfig(context_tokens=options.ctx, threads=options.threads)
    model = Assembly(Budget(1 << 40)).load(options.model.name, options.model, config)
    tokenizer = model.tokenizer
    ids = tokenizer.encode(options.text.read_text(encoding="utf-8"), parse_special=False)
    prefix = [token for token in tokenizer.encode("")[:1] if token == tokenizer.bos_id]
    count = min(options.windows, len(ids) // options.ctx)
    windows = [ids[i * options.ctx : (i + 1) * options.ctx] for i in range(count)]
    windows = [prefix + window[len(prefix) :] for window in windows]
    with kinds(options.peer_python)["llama.cpp"].start() as peer:
        peer.call("load", model=str(options.model), context=options.ctx, streams=1, threads=options.threads)
        theirs = peer.call("score", windows=windows, batch=min(options.ctx, PEER_BATCH))
        again = peer.call("score", windows=windows, batch=1) if options.self else []
    first, last = options.ctx // 2, options.ctx - 1
    ours_loss = theirs_loss = 0.0
    agreed = scored = 0
    for window, reference in zip(windows, theirs, strict=True):
        logits = logits_of(model, window)[first:last]
        ours_loss += sum(
            cross_entropy(row, token) for row, token in zip(logits, window[first + 1 :], strict=True)
        )
        theirs_loss += sum(reference["nll"][first:last])
        agreed += int((logits.argmax(-1) == reference["greedy"][first:last]).sum())
        scored += last - first
    ours, peers = math.exp(ours_loss / scored), math.exp(theirs_loss / scored)
    if options.json:
        figures = {"tokens": scored, "shoal": ours, "llama.cpp": peers, "agreement": agreed / scored}
        print(json.dumps(figures))
        return 0
    print(
        f"{options.model.name}: {scored} tokens scored; perplexity shoal {ours:.4f}, llama.cpp {peers:.4f} "
        f"({100 * (ours / peers - 1):+.2f}%); greedy agreement {100 * agreed / scored:.2f}%"
    )
    if options.self:
        same = sum(
            a == b
            for whole, single in zip(theirs, again, strict=True)
            for a, b in zip(whole["greedy"][first:last], single["greedy"][first:last], strict=True)
        )
        print(
            f"llama.cpp with itself, batch {options.ctx} and 1: greedy agreement {100 * same / scored:.2f}%"
        )
    return 0 if abs(ours / peers - 1) <= 0.01 and agreed / scored >= 0.97 else 1


def logits_of(model: LoadedModel, ids: list[int]) -> Floats:
    """Logits (T, vocab) of all positions."""
    pages = model.executor.kv.table.take(-(-len(ids) // model.executor.kv.page_tokens))
    assert pages is not None
    length = length_class(model.checkpoint.spec.ropes, len(ids))
    step = Step.build([Segment(ids, 0, pages, len(ids), length)])
    logits = model.executor.head(model.executor.forward(step))
    model.executor.kv.table.give_back(pages)
    return logits


def cross_entropy(logits: Floats, token: int) -> float:
    """The cross entropy of one row (vocab,), in nats."""
    shifted = logits.astype(np.float64) - logits.max()
    return float(np.log(np.exp(shifted).sum()) - shifted[token])


if __name__ == "__main__":
    sys.exit(main())
