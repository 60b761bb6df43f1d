"""Models in fewer bits than their files have: their names and packs, and runs from memory and from disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fakes import tiny
from fakes.packing import small_slices
from fakes.running import planned
from fakes.streaming import Streaming, packed, run, texts

from shoal.comm.home import Home
from shoal.comm.messages import Generate, Load, Sampling, Token
from shoal.daemon.config import NodeConfig
from shoal.daemon.errors import DaemonError
from shoal.daemon.library.kv_files import fingerprint
from shoal.daemon.library.packs import Packs
from shoal.daemon.model_name import Quant, Reference
from shoal.daemon.node import Node
from shoal.models.checkpoint.checkpoint import open_checkpoint

CONFIG = NodeConfig(context_tokens=96, kv_tokens=768, max_sequences=4, kv_type="f32")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_gguf(tiny.hf_model("llama"), tmp_path_factory.mktemp("models") / "tiny.gguf", type="F16")


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with Node(CONFIG, packs=Packs(Home(tmp_path / "home"))) as made:
        yield made


def tokens(node: Node, model: str) -> list[int]:
    request = Generate(
        model=model,
        prompt_tokens=[*range(5, 45)],
        max_tokens=12,
        ignore_eos=True,
        sampling=Sampling(temperature=0.0),
    )
    return [token for event in node.stream(request) if isinstance(event, Token) for token in event.ids]


def test_a_name_says_the_bits() -> None:
    assert Reference.parse("llama:q4") == ("llama", "q4")
    assert Reference.parse("/a:q8/b.gguf") == ("/a:q8/b.gguf", "keep")
    for name in ("llama", "llama:q8", "./x:y.gguf:q4", ":q4", "llama:q5", "llama:keep", ""):
        assert str(Reference.parse(name)) == name


@pytest.mark.parametrize("quant", ["q8", "q4"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3_moe"])  # the second has a tied head
def test_from_memory_as_from_disk(
    family: str, quant: Quant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_slices(monkeypatch)
    path, pack = packed(tmp_path, family, quant=quant, vocab_size=2100)
    assert sum(block.kind == "head" for block in pack.blocks) > 1
    (ids,) = texts(90, [40])
    with (
        Streaming(path, pack, pinned=lambda block: True) as resident,
        Streaming(path, pack) as streamed,
    ):
        assert not resident.plan.streams
        assert resident.store.stage() is None
        assert np.array_equal(run(resident, ids), run(streamed, ids))


def test_in_memory_it_takes_what_its_plan_says(model: Path) -> None:
    with open_checkpoint(model) as checkpoint:
        kept = planned(checkpoint, CONFIG, 1 << 30)
        config = NodeConfig(**{**CONFIG.__dict__, "quant": "q4"})
        fewer = planned(checkpoint, config, 1 << 30)
        assert not fewer.streams
        assert fewer.weights_bytes < kept.weights_bytes
        assert fingerprint(checkpoint, "q4", kept) != fingerprint(checkpoint, "keep", kept)


def test_one_model_in_several_bits_is_several_models(node: Node, model: Path) -> None:
    heard: list[str] = []
    node.load(Load(model=str(model)))
    loaded = node.load(Load(model=f"{model}:q4"), lambda doing, done, total: heard.append(doing)).model
    assert (loaded.name, loaded.quant, loaded.path) == ("tiny.gguf:q4", "q4", str(model))
    assert {"packing", "loading"} <= set(heard)
    assert node.load(Load(model=f"{model}:q4")).seconds == 0.0
    assert [status.name for status in node.status().models] == ["tiny.gguf", "tiny.gguf:q4"]
    answer = tokens(node, "tiny.gguf:q4")
    assert tokens(node, f"{model}:q4") == answer
    assert tokens(node, "tiny.gguf") != answer
    assert tokens(node, f"{model}:q8") != answer
    assert node.load(Load(model=f"{model}:q4", context=64)).model.context_tokens == 64
    assert len(node.status().models) == 3


def test_what_would_not_get_smaller_is_refused(node: Node, tmp_path: Path) -> None:
    path = tiny.save_gguf(tiny.hf_model("llama"), tmp_path / "small.gguf", type="Q4_0")
    with pytest.raises(DaemonError, match="q8 would not make it smaller, as its weights are Q4_0") as refused:
        node.load(Load(model=f"{path}:q8"))
    assert refused.value.code == "bad_request"


def test_without_a_place_for_packs_it_is_refused(model: Path) -> None:
    with Node(CONFIG) as node, pytest.raises(DaemonError, match="no place for a pack"):
        node.load(Load(model=f"{model}:q4"))
