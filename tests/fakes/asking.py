"""Helpers: a small node's configuration, requests to it, and what it answers."""

from __future__ import annotations

from shoal.comm.messages import Chat, Done, Generate, Sampling, Token
from shoal.daemon.config import NodeConfig
from shoal.daemon.node import Node

GREEDY = Sampling(temperature=0.0)
CONFIG = NodeConfig(
    context_tokens=96, kv_tokens=768, max_sequences=4, max_queue=16, chunk_tokens=16, memory_bytes=3 << 30
)


def text_of(node: Node, request: Generate | Chat) -> tuple[str, list[int], Done]:
    text, ids = "", []
    for event in node.stream(request):
        if isinstance(event, Token):
            text += event.text
            ids += event.ids
    assert isinstance(event, Done)
    return text, ids, event


def prompt(index: int, tokens: int = 40, new: int = 24, **fields: object) -> Generate:
    ids = [(7 * index + 13 * i) % 250 for i in range(tokens - 3 * index)]
    return Generate(prompt_tokens=ids, sampling=GREEDY, max_tokens=new, ignore_eos=True, **fields)  # type: ignore[arg-type]
