"""Helpers: a small node's configuration, requests to it, and what it answers."""

from __future__ import annotations

from pathlib import Path

from shoal.comm.messages import Chat, Done, Generate, Load, Sampling, Token
from shoal.daemon.config import NodeConfig
from shoal.daemon.node import Node

GREEDY = Sampling(temperature=0.0)
CONFIG = NodeConfig(
    context_tokens=96, kv_tokens=768, max_sequences=4, max_queue=16, chunk_tokens=16, memory_bytes=3 << 30
)
NEW = 12  # tokens of an answer, if a test asks for no other number


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
    return greedy(ids, new, **fields)


def greedy(ids: list[int], new: int = NEW, **fields: object) -> Generate:
    """`new` tokens after these."""
    return Generate(prompt_tokens=ids, sampling=GREEDY, max_tokens=new, ignore_eos=True, **fields)  # type: ignore[arg-type]


def said(node: Node, ids: list[int], new: int = NEW, **fields: object) -> tuple[list[int], int]:
    """The greedy answer, and how many tokens of the prompt were known before."""
    _, answer, done = text_of(node, greedy(ids, new, **fields))
    return answer, done.usage.cached_tokens


def two_turns(path: Path, config: NodeConfig, first: list[int], second: list[int]) -> list[list[int]]:
    """What one machine answers to the first text, and to what was said up to then and the second one."""
    with Node(config) as node:
        node.load(Load(model=str(path)))
        answer, _ = said(node, first)
        return [answer, said(node, [*first, *answer, *second])[0]]
