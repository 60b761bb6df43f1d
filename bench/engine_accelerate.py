"""Accelerate's worker: transformers in bfloat16 with the layers that do not fit read from disk for every forward pass.

What Accelerate offers for a model larger than memory, run by a python that has it: `device_map="auto"` fills the memory
it is allowed with whole modules in the order of the model and leaves the others in the safetensors file they came
from. What stays is copied out of that file: as the mapped pages that transformers leaves it in, the kernel drops it and
everything is read for every token. Half of the bytes that float32 would take; run eagerly, as offloading does.
"""

from __future__ import annotations

import tempfile
import time
from typing import Any

import accelerate
import torch
import transformers
import worker
from transformers import AutoModelForCausalLM

OWN_BYTES = (
    1_200_000_000  # torch, transformers, the module in flight and the page cache that it is read through
)


class Accelerate:
    """The engine of `worker.Engine`, for one stream."""

    def load(self, model: str, context: int, streams: int, threads: int, memory: int = 0) -> dict[str, Any]:
        torch.set_num_threads(threads)
        self._folder = tempfile.TemporaryDirectory(prefix="accelerate-")
        self._model: Any = AutoModelForCausalLM.from_pretrained(
            model,
            dtype=torch.bfloat16,
            device_map="auto",
            max_memory={"cpu": max(0, memory - OWN_BYTES)},
            offload_folder=self._folder.name,
        ).eval()
        for weights in self._model.parameters():
            if weights.device.type == "cpu":
                weights.data = weights.data.clone()
        self._vocab = self._model.config.vocab_size
        places = list(self._model.hf_device_map.values())
        return {
            "version": f"accelerate {accelerate.__version__}, transformers {transformers.__version__}, "
            f"torch {torch.__version__}",
            "kernels": "bfloat16",
            "modules": {place: places.count(place) for place in sorted(set(places), key=str)},
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
    worker.serve(Accelerate())
