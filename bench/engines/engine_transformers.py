"""transformers' worker: the architecture of a GGUF in float32, eager torch on the CPU.

Weights are random, as reading a GGUF's would need yet another package: good for speed alone. bfloat16 was slower
on a processor that does not multiply it (docs/LOG.md).
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
import transformers
from engines import worker
from transformers import AutoConfig, AutoModelForCausalLM


class Transformers:
    """The engine of `worker.Engine`, for one stream."""

    def load(self, model: str, context: int, streams: int, threads: int, memory: int = 0) -> dict[str, Any]:
        torch.set_num_threads(threads)
        path = Path(model)
        config: Any = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        self._model: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, dtype=torch.float32
        ).eval()
        self._vocab = config.vocab_size
        return {
            "version": f"transformers {transformers.__version__}, torch {torch.__version__}",
            "kernels": "float32",
        }

    @torch.inference_mode()
    def begin(self, streams: int, tokens: int, seed: int) -> dict[str, float]:
        started_s = time.perf_counter()
        ids = torch.tensor(worker.prompts(streams, tokens, self._vocab, seed))
        self._step(ids, None)
        return {"seconds": time.perf_counter() - started_s, "tokens": streams * tokens}

    @torch.inference_mode()
    def advance(self, tokens: int) -> dict[str, float]:
        started_s = time.perf_counter()
        for _ in range(tokens):
            self._step(self._last, self._cache)
        return {"seconds": time.perf_counter() - started_s, "tokens": tokens * len(self._last)}

    def end(self) -> None:
        self._cache = None

    def _step(self, ids: torch.Tensor, cache: Any) -> None:
        out = self._model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        self._cache = out.past_key_values
        self._last = out.logits[:, -1].argmax(-1, keepdim=True)


if __name__ == "__main__":
    worker.serve(Transformers())
