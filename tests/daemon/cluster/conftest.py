"""A tiny model, and what one machine makes of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from fakes import tiny
from fakes.asking import CONFIG, prompt, text_of

from shoal.comm.messages import Load
from shoal.daemon.node import Node


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_gguf(tiny.hf_model("llama"), tmp_path_factory.mktemp("model") / "tiny.gguf")


@pytest.fixture(scope="module")
def alone(path: Path) -> list[list[int]]:
    """What one machine answers to some prompts."""
    with Node(CONFIG) as node:
        node.load(Load(model=str(path)))
        return [text_of(node, prompt(i))[1] for i in range(6)]
