"""Accelerate's CPU offload on a graphics card: the peer of a mixture that has no room there.

As `device_map="auto"` does with bounded memory: whole layers stay on the card as long as there is room, the others lie
in this machine's memory and come for every forward pass. Weights are random, in bfloat16.
"""

from __future__ import annotations

import time
from typing import Any

import torch
import transformers
from inputs.shapes import Shape

ACTIVATIONS_BYTES = (
    2_000_000_000  # of the card's budget, for the layer that is there for a moment, and its results
)
POOL_NUMBERS = 1 << 24
LAYER = "Qwen3MoeDecoderLayer"


class Offloaded:
    """A mixture of which a card has so many bytes at most; `card` None: all is on the CPU."""

    def __init__(self, shape: Shape, budget_bytes: int, card: int | None) -> None:
        import accelerate

        self.version = f"accelerate {accelerate.__version__}, transformers {transformers.__version__}"
        self._vocab, self._device = shape.vocab, "cpu" if card is None else f"cuda:{card}"
        with accelerate.init_empty_weights(include_buffers=False):
            model = transformers.AutoModelForCausalLM.from_config(_config(shape), dtype=torch.bfloat16)
        pool = torch.randn(POOL_NUMBERS).mul_(0.02).to(torch.bfloat16)
        for name, parameter in [*model.named_parameters()]:
            its = _filled(parameter.shape, pool)
            accelerate.utils.set_module_tensor_to_device(model, name, "cpu", value=its, dtype=torch.bfloat16)
        model.tie_weights()
        if card is not None:
            room: dict[int | str, int] = {card: budget_bytes - ACTIVATIONS_BYTES, "cpu": 1 << 40}
            places = accelerate.infer_auto_device_map(model, room, no_split_module_classes=[LAYER])
            self.layers = sum(place == card for name, place in places.items() if ".layers." in name)
            model = accelerate.dispatch_model(model, places, main_device=card)
        self._model: Any = model.eval()

    @torch.inference_mode()
    def prompt(self, streams: int, tokens: int) -> float:
        """Seconds to read so many prompts."""
        ids = torch.randint(self._vocab, (streams, tokens), device=self._device)
        return self._step(ids, None)

    @torch.inference_mode()
    def token(self) -> float:
        """Seconds of one more token of each."""
        return self._step(self._last, self._cache)

    def _step(self, ids: torch.Tensor, cache: Any) -> float:
        began_s = time.perf_counter()
        out = self._model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        self._cache, self._last = (
            out.past_key_values,
            out.logits[:, -1].argmax(-1, keepdim=True).to(self._device),
        )
        self._last.sum().item()  # until it has been computed
        return time.perf_counter() - began_s


def _filled(shape: torch.Size, pool: torch.Tensor) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    made = torch.empty(shape, dtype=torch.bfloat16)
    flat = made.view(-1)
    for start in range(0, len(flat), len(pool)):
        piece = flat[start : start + len(pool)]
        piece.copy_(pool[: len(piece)])
    return made


def _config(shape: Shape) -> Any:
    return transformers.Qwen3MoeConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.context,
        moe_intermediate_size=shape.ffn,
        num_experts=shape.experts,
        num_experts_per_tok=shape.active,
        norm_topk_prob=True,
        tie_word_embeddings=shape.tied,
    )
