"""llama.cpp's worker, run by a python that has llama-cpp-python: its C functions, called with as little between.

All sequences are decoded in one batch, each with its own sequence id; the most likely token is taken. Parameters are
llama.cpp's defaults but for what is asked.
"""

from __future__ import annotations

import ctypes
import time
from typing import Any

import llama_cpp as llama
import numpy as np
import worker

BATCH = 512


class LlamaCpp:
    """The engine of `worker.Engine`, and what llama.cpp says of a text."""

    def __init__(self) -> None:
        self._silent = llama.llama_log_callback(lambda level, text, data: None)
        llama.llama_log_set(self._silent, None)
        llama.llama_backend_init()
        self._last: list[int] = []  # the newest token of each sequence, not yet computed
        self._lengths: list[int] = []

    def load(self, model: str, context: int, streams: int, threads: int) -> dict[str, Any]:
        self._model = llama.llama_model_load_from_file(model.encode(), llama.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {model}")
        params = llama.llama_context_default_params()
        params.n_ctx = streams * (-(-context // 256) * 256)
        params.n_batch = params.n_ubatch = BATCH
        params.n_seq_max = streams
        params.n_threads = params.n_threads_batch = threads
        self._context = llama.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError(f"llama.cpp cannot make a context of {params.n_ctx} tokens")
        self._memory = llama.llama_get_memory(self._context)
        self._vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model))
        self._batch = llama.llama_batch_init(BATCH, 0, 1)
        return {"version": f"llama-cpp-python {llama.__version__}", "kernels": system_info()}

    def begin(self, streams: int, tokens: int, seed: int) -> dict[str, float]:
        started_s = time.perf_counter()
        for index, prompt in enumerate(worker.prompts(streams, tokens, self._vocab, seed)):
            self._last.append(self._prefill(index, prompt))
            self._lengths.append(tokens)
        return {"seconds": time.perf_counter() - started_s, "tokens": streams * tokens}

    def advance(self, tokens: int) -> dict[str, float]:
        started_s = time.perf_counter()
        for _ in range(tokens):
            rows = [(token, self._lengths[i], i, True) for i, token in enumerate(self._last)]
            self._decode(rows)
            self._last = [self._greedy(i) for i in range(len(rows))]
            self._lengths = [length + 1 for length in self._lengths]
        return {"seconds": time.perf_counter() - started_s, "tokens": tokens * len(self._last)}

    def extend(self, tokens: int, seed: int) -> dict[str, float]:
        """Prefill that many more random tokens of the first sequence, up to the next new one."""
        (prompt,) = worker.prompts(1, tokens, self._vocab, seed)
        started_s = time.perf_counter()
        start = self._lengths[0]
        self._last[0] = self._prefill(0, [self._last[0], *prompt], start)
        self._lengths[0] = start + 1 + tokens
        return {"seconds": time.perf_counter() - started_s, "tokens": tokens}

    def end(self) -> None:
        llama.llama_memory_clear(self._memory, False)
        self._last, self._lengths = [], []

    def _prefill(self, index: int, prompt: list[int], position: int = 0) -> int:
        """Computes a prompt as sequence `index`, from `position` on; its next token."""
        last = position + len(prompt) - 1
        for start in range(0, len(prompt), BATCH):
            piece = prompt[start : start + BATCH]
            self._decode([(token, i, index, i == last) for i, token in enumerate(piece, position + start)])
        return self._greedy(len(piece) - 1)

    def _decode(self, rows: list[tuple[int, int, int, bool]]) -> None:
        """One batch of (token, position, sequence, whether its logits are wanted)."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i] = token
            batch.pos[i] = position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = wanted
        if status := llama.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode gives {status}")

    def _greedy(self, row: int) -> int:
        logits = llama.llama_get_logits_ith(self._context, row)
        return int(np.ctypeslib.as_array(logits, (self._vocab,)).argmax())


def system_info() -> str:
    """The instruction sets that the library was built for, as far as they are in use."""
    library = llama.llama_print_system_info()
    return ctypes.c_char_p(library).value.decode() if isinstance(library, int) else library.decode()


if __name__ == "__main__":
    worker.serve(LlamaCpp())
