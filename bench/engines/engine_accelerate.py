"""Accelerate's worker: transformers in bfloat16. Every forward pass reads the layers that do not fit from disk.

What Accelerate offers for a model larger than memory, run by a python that has it: `device_map="auto"` fills the memory
it is allowed with whole modules in the order of the model and leaves the others in the safetensors file they came
from. What stays is copied out of that file: as the mapped pages that transformers leaves it in, the kernel drops it and
everything is read for every token. Half of the bytes that float32 would take; run eagerly, as offloading does.
"""

from __future__ import annotations

import tempfile
from typing import Any

import accelerate
import torch
import transformers
from engines import worker
from engines.engine_transformers import Transformers
from transformers import AutoModelForCausalLM

# torch, transformers, the module that is being read, and the page cache that it is read through
OWN_BYTES = 1_200_000_000


class Accelerate(Transformers):
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


if __name__ == "__main__":
    worker.serve(Accelerate())
