"""Run by a python that has llama-cpp-python: negative log-likelihoods and greedy choices along a text.

    python peer_logits.py MODEL.gguf CTX THREADS BATCH < ids.json > result.json

Reads windows of token ids, each at most CTX long; writes for each the most likely next token and the negative
log-likelihood of the actual next token at every position but the last. BATCH tokens are computed at a time.
"""

import json
import sys

import numpy as np
from llama_cpp import Llama

model = Llama(
    model_path=sys.argv[1],
    n_ctx=int(sys.argv[2]),
    n_batch=int(sys.argv[4]),
    n_threads=int(sys.argv[3]),
    logits_all=True,
    verbose=False,
)
results = []
for ids in json.load(sys.stdin):
    model.reset()
    model.eval(ids)
    logits = np.array(model.scores[: len(ids) - 1], dtype=np.float64)
    logits -= logits.max(-1, keepdims=True)
    log_sum = np.log(np.exp(logits).sum(-1))
    nll = log_sum - logits[np.arange(len(ids) - 1), ids[1:]]
    results.append({"greedy": logits.argmax(-1).tolist(), "nll": nll.tolist()})
json.dump(results, sys.stdout)
