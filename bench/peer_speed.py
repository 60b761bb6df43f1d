"""Run by a python that has llama-cpp-python: one round of prefill and decode speed.

    python peer_speed.py MODEL.gguf PROMPT_TOKENS NEW_TOKENS THREADS

Prints {"prefill_tokens_per_s": …, "decode_tokens_per_s": …} after one warm-up, timed as `shoal bench` does.
"""

import json
import random
import sys
import time

from llama_cpp import Llama

path, prompt_tokens, new_tokens, threads = sys.argv[1], *map(int, sys.argv[2:5])
model = Llama(
    model_path=path,
    n_ctx=prompt_tokens + new_tokens,
    n_batch=512,
    n_threads=threads,
    n_threads_batch=threads,
    verbose=False,
)
for seed in (0, 1):
    source = random.Random(seed)
    model.reset()
    began_s = time.monotonic()
    model.eval([source.randrange(model.n_vocab()) for _ in range(prompt_tokens)])
    token = model.sample(temp=0.0)
    first_s = time.monotonic()
    for _ in range(new_tokens - 1):
        model.eval([token])
        token = model.sample(temp=0.0)
    last_s = time.monotonic()
rates = {
    "prefill_tokens_per_s": prompt_tokens / (first_s - began_s),
    "decode_tokens_per_s": (new_tokens - 1) / (last_s - first_s),
}
print(json.dumps(rates))
