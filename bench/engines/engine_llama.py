"""llama.cpp's worker, run by a python that has llama-cpp-python: its C functions, called with as little between.

All sequences are computed in one batch, each with its own sequence id; the most likely token is taken. Parameters are
llama.cpp's defaults but for what is asked; --no-flash turns flash attention off, which decodes long contexts faster and
does all else slower (docs/LOG.md). Where memory is bounded the weights stay in the mapped file, which the kernel may
drop, rather than be packed anew into memory of the process, which it may not, and batches are at most the context.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import Any

import llama_cpp as llama
import numpy as np
from engines import worker

BATCH = 512


class LlamaCpp:
    """The engine of `worker.Engine`, and how llama.cpp scores a text."""

    def __init__(self, flash: bool) -> None:
        self._flash = flash
        self._silent = llama.llama_log_callback(lambda level, text, data: None)
        llama.llama_log_set(self._silent, None)
        llama.llama_backend_init()
        self._last: list[int] = []  # the newest token of each sequence, which is not computed yet
        self._lengths: list[int] = []
        self._rows = BATCH  # at most in a batch
        self._answer: Iterator[int] | None = None  # tokens that replace what the model says

    def load(self, model: str, context: int, streams: int, threads: int, memory: int = 0) -> dict[str, Any]:
        how = llama.llama_model_default_params()
        if memory:
            how.use_extra_bufts = False
        self._model = llama.llama_model_load_from_file(model.encode(), how)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {model}")
        params = llama.llama_context_default_params()
        params.n_ctx = streams * (-(-context // 256) * 256)
        params.n_batch = params.n_ubatch = min(BATCH, context) if memory else BATCH
        params.n_seq_max = streams
        params.n_threads = params.n_threads_batch = threads
        if not self._flash:
            params.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._context = llama.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError(f"llama.cpp cannot make a context of {params.n_ctx} tokens")
        self._memory = llama.llama_get_memory(self._context)
        self._vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model))
        self._rows = params.n_batch
        self._batch = llama.llama_batch_init(BATCH, 0, 1)
        return {
            "version": f"llama-cpp-python {llama.__version__}",
            "kernels": llama.llama_print_system_info().decode().strip(" |"),
        }

    def begin(self, streams: int, tokens: int, seed: int) -> dict[str, float]:
        started_s = time.perf_counter()
        self._lengths = [0] * streams
        self._last = self._prefill(worker.prompts(streams, tokens, self._vocab, seed))
        return {"seconds": time.perf_counter() - started_s, "tokens": streams * tokens}

    def dictate(self, prompt: list[int], answer: list[int]) -> dict[str, float]:
        started_s = time.perf_counter()
        self._lengths, self._answer = [0], iter(answer)
        self._last = self._prefill([prompt])
        return {"seconds": time.perf_counter() - started_s, "tokens": len(prompt)}

    def advance(self, tokens: int) -> dict[str, float]:
        started_s = time.perf_counter()
        for _ in range(tokens):
            rows = [(token, self._lengths[i], i, True) for i, token in enumerate(self._last)]
            self._decode(rows)
            self._last = [self._choose(i) for i in range(len(rows))]
            self._lengths = [length + 1 for length in self._lengths]
        return {"seconds": time.perf_counter() - started_s, "tokens": tokens * len(self._last)}

    def extend(self, tokens: int, seed: int) -> dict[str, float]:
        """Prefill that many more random tokens of the only sequence, up to its next new token."""
        (prompt,) = worker.prompts(1, tokens, self._vocab, seed)
        started_s = time.perf_counter()
        self._last = self._prefill([[*self._last, *prompt]])
        return {"seconds": time.perf_counter() - started_s, "tokens": tokens}

    def answer_all(self, prompts: list[list[int]], new: int) -> dict[str, float]:
        """Answers all prompts with `new` tokens each, as many at a time as there are sequences. As one ends, the next
        prompt is read beside the tokens of the others, in batches of at most BATCH. A prompt goes on from what the
        sequence has whose last text began alike, as llama.cpp's server does."""
        started_s = time.perf_counter()
        streams = int(llama.llama_n_seq_max(self._context))
        texts: list[list[int]] = [[] for _ in range(streams)]  # of each sequence, computed or not
        computed, ends = [0] * streams, [0] * streams  # ends: length at which it is complete; 0 = it is free
        waiting = [*reversed(prompts)]
        while waiting or any(ends):
            for i in [i for i, end in enumerate(ends) if not end]:
                if waiting:
                    self._take_up(waiting.pop(), i, new, texts, computed, ends)
            rows: list[tuple[int, int, int, bool]] = []
            # Tokens of answers first.
            for i in sorted(range(streams), key=lambda i: len(texts[i]) - computed[i]):
                part = texts[i][computed[i] :][: BATCH - len(rows)] if ends[i] else []
                rows += [(t, n, i, n + 1 == len(texts[i])) for n, t in enumerate(part, computed[i])]
                computed[i] += len(part)
            self._decode(rows)
            for row, (*_, i, wanted) in enumerate(rows):
                if wanted:
                    texts[i].append(self._choose(row))
                    ends[i] = 0 if len(texts[i]) == ends[i] else ends[i]
        self.end()
        return {"seconds": time.perf_counter() - started_s, "tokens": new * len(prompts)}

    def _take_up(
        self,
        prompt: list[int],
        free: int,
        new: int,
        texts: list[list[int]],
        computed: list[int],
        ends: list[int],
    ) -> None:
        """Begins a prompt in the free sequence whose last text it shares most with."""

        def shared(i: int) -> int:
            pairs = enumerate(zip(texts[i][: computed[i]], prompt[:-1], strict=False))
            return next((n for n, (a, b) in pairs if a != b), min(computed[i], len(prompt) - 1))

        best = max((i for i, end in enumerate(ends) if not end), key=lambda i: (shared(i), i == free))
        computed[best], ends[best] = shared(best), len(prompt) + new
        llama.llama_memory_seq_rm(self._memory, best, computed[best], -1)
        texts[best] = [*prompt]

    def end(self) -> None:
        llama.llama_memory_clear(self._memory, False)
        self._last, self._lengths, self._answer = [], [], None

    def score(self, windows: list[list[int]], batch: int) -> list[dict[str, list[float]]]:
        """For every token of each text but the last: the most likely next token, and the negative log-likelihood of the
        actual one. `batch` tokens are computed at a time, at most BATCH.
        """
        results: list[dict[str, list[float]]] = []
        for ids in windows:
            self.end()
            greedy: list[float] = []
            nll: list[float] = []
            for start in range(0, len(ids) - 1, batch):
                piece = ids[start : start + batch]
                self._decode([(token, i, 0, True) for i, token in enumerate(piece, start)])
                for row, actual in enumerate(ids[start + 1 : start + 1 + batch]):
                    logits = self._logits(row).astype(np.float64)
                    greedy.append(int(logits.argmax()))
                    shifted = logits - logits.max()
                    nll.append(float(np.log(np.exp(shifted).sum()) - shifted[actual]))
            results.append({"greedy": greedy, "nll": nll})
        self.end()
        return results

    def _prefill(self, pieces: list[list[int]]) -> list[int]:
        """Computes the next tokens of each sequence; returns the one that follows, of each."""
        rows = []
        for index, piece in enumerate(pieces):
            start = self._lengths[index]
            self._lengths[index] += len(piece)
            last = self._lengths[index] - 1
            rows += [(token, i, index, i == last) for i, token in enumerate(piece, start)]
        chosen = []
        for start in range(0, len(rows), self._rows):
            batch = rows[start : start + self._rows]
            self._decode(batch)
            chosen += [self._choose(i) for i, (*_, wanted) in enumerate(batch) if wanted]
        return chosen

    def _decode(self, rows: list[tuple[int, int, int, bool]]) -> None:
        """Computes one batch of (token, position, sequence, whether its logits are wanted)."""
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

    def _choose(self, row: int) -> int:
        if self._answer is not None:
            return next(self._answer)
        return int(self._logits(row).argmax())

    def _logits(self, row: int) -> np.ndarray[Any, Any]:
        """The logits of a row of the last batch that wanted them; valid until the next batch."""
        return np.ctypeslib.as_array(llama.llama_get_logits_ith(self._context, row), (self._vocab,))


if __name__ == "__main__":
    worker.serve(LlamaCpp(flash="--no-flash" not in sys.argv))
