"""Errors say whose fault it is: the request's, or that of a file, which they name."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import tiny
from fakes.asking import CONFIG, GREEDY
from safetensors.torch import load_file, save_file

from shoal.comm.messages import Chat, ChatMessage, Generate, Load, Token, Tokenize
from shoal.daemon.errors import DaemonError
from shoal.daemon.model_name import Reference
from shoal.daemon.node import Node

HELLO = [ChatMessage(role="user", content="hello")]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_hf(tiny.hf_model("llama", tie_word_embeddings=False), tmp_path_factory.mktemp("m") / "m")


@pytest.fixture
def path(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "m")


@pytest.fixture
def node() -> Iterator[Node]:
    with Node(CONFIG) as made:
        yield made


def refused(node: Node, request: Generate | Chat) -> DaemonError:
    with pytest.raises(DaemonError) as caught:
        list(node.stream(request))
    assert "bug" not in str(caught.value)
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    ("template", "code", "message"),
    [
        ("{% for m in %}", "corrupt", "is malformed"),
        ("{{ messages[0].content", "corrupt", "is malformed"),
        ("{% unknown %}", "corrupt", "is malformed"),
        ("a" * (1 << 20) + "a", "corrupt", "at most 1048576"),
        ("{{ nothing() }}", "corrupt", "failed"),
        ("{{ messages[0].content.upper.more.more }}", "corrupt", "failed"),
        ("{{ raise_exception('only system') }}", "bad_request", "refuses this conversation: only system"),
        ("{{ messages[5].content.strip() }}", "corrupt", "failed"),
        (
            "{{ 1 / (messages[0].content | length - 7) }}",
            "bad_request",
            "failed",
        ),  # for this conversation alone
    ],
)
def test_chat_templates(path: Path, node: Node, template: str, code: str, message: str) -> None:
    (path / "chat_template.jinja").write_text(template)
    said = refused(
        node, Chat(model=str(path), messages=[ChatMessage(role="user", content="seven..")], max_tokens=1)
    )
    assert (said.code, message in said.message) == (code, True), said
    assert (str(path) in said.message) == (code == "corrupt")
    list(node.stream(Generate(model=str(path), prompt_tokens=[1, 2], max_tokens=1)))  # does without


PLUS = "{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}"
STRIP = "{% for m in messages %}{{ m.role }}{{ m.content.strip() }}{% endfor %}"
CALLS = "{% for m in messages %}{% if m.tool_calls %}CALL{% else %}{{ m.role + m.content }}{% endif %}{% endfor %}"
USER, CALL = {"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [{"function": {}}]}


@pytest.mark.parametrize(
    ("template", "messages", "said"),
    [
        (PLUS, [USER, {"role": "assistant"}, USER], "messages[1] has no `content`"),
        (STRIP, [{"role": "user", "content": None}], "messages[0] has no `content`"),
        (STRIP, [USER, {"role": "assistant", "reasoning_content": "b"}], "messages[1] has no `content`"),
        (PLUS, [USER, CALL], "messages[1] has no `content`"),  # this template knows no tool calls
        (CALLS, [USER, CALL, {"role": "tool", "content": "b"}], None),
        (CALLS, [USER, CALL, {"role": "tool"}], "messages[2] has no `content`"),
        (CALLS, [USER, {"role": "assistant", "tool_calls": []}], "messages[1] has no `content`"),
        (PLUS, [USER, {"role": "user", "content": ""}], None),
        (PLUS, [USER, {"role": "user", "content": [{"type": "text", "text": "b"}]}], None),
        (
            PLUS,
            [USER, {"role": "user", "content": [{"type": "image"}]}],
            "messages[1].content[0] is {'type': ",
        ),
        (
            PLUS,
            [USER, {"role": "user", "content": [{"type": "text"}]}],
            "messages[1].content[0] is {'type': ",
        ),
    ],
)
def test_messages_that_a_template_has_no_use_for(
    path: Path, node: Node, template: str, messages: list[dict[str, Any]], said: str | None
) -> None:
    (path / "chat_template.jinja").write_text(template)
    request = Chat(model=str(path), messages=messages, max_tokens=1)
    if said is None:
        list(node.stream(request))
        return
    error = refused(node, request)
    assert (error.code, said in error.message) == ("bad_request", True), error


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight", "model.layers.1.mlp.up_proj.weight"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_weights_that_are_no_numbers(
    path: Path, node: Node, name: str, value: float, temperature: float
) -> None:
    weights = load_file(path / "model.safetensors")
    weights[name] = torch.full_like(weights[name], value)
    save_file(weights, path / "model.safetensors")
    sampling = GREEDY if temperature == 0 else type(GREEDY)(temperature=temperature, seed=1)
    said = refused(node, Generate(model=str(path), prompt_tokens=[1, 2, 3], max_tokens=2, sampling=sampling))
    assert said.code == "corrupt"
    assert str(path) in said.message
    assert "weights are damaged" in said.message


def test_what_generate_says_tokenize_knows(path: Path, node: Node) -> None:
    """A model may have more rows than its tokenizer has tokens, and may choose one of them."""
    weights = load_file(path / "model.safetensors")
    rows = len(tiny.TOKENS) + 3
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = torch.cat([weights[name], torch.zeros(3, 64)])
    weights["lm_head.weight"][:-1] = 0
    weights["lm_head.weight"][-1] = load_file(path / "model.safetensors")["model.norm.weight"]
    save_file(weights, path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "vocab_size": rows}))
    ids: list[int] = []
    for prompt in ([1, 2, 3], [9, 8], [40, 41, 42]):
        request = Generate(
            model=str(path), prompt_tokens=prompt, max_tokens=4, ignore_eos=True, sampling=GREEDY
        )
        ids += [token for event in node.stream(request) if isinstance(event, Token) for token in event.ids]
    assert rows - 1 in ids
    assert node.tokenize(Tokenize(model=str(path), tokens=ids)).ids == ids
    list(node.stream(Generate(model=str(path), prompt_tokens=[*ids, rows - 1], max_tokens=1)))
    with pytest.raises(DaemonError, match=f"token {rows}: must be below"):
        node.tokenize(Tokenize(model=str(path), tokens=[rows]))


def test_a_tokenizer_that_does_not_belong_to_the_model(path: Path, node: Node) -> None:
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = {"id": len(tiny.TOKENS) + 1, "content": "<|more|>", "special": True, **flags}
    filler = {**added, "id": len(tiny.TOKENS), "content": "<|fill|>"}
    tokenizer["added_tokens"] += [filler, added]
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    loaded = node.load(Load(model=str(path))).model
    (warning,) = loaded.warnings
    assert str(path) in warning
    assert "279 tokens, the embedding 277 rows" in warning
    list(node.stream(Generate(model=str(path), prompt="the", max_tokens=1)))
    said = refused(node, Generate(model=str(path), prompt="the<|more|>", max_tokens=1))
    assert (said.code, str(path) in said.message) == ("corrupt", True)
    assert refused(node, Generate(model=str(path), prompt_tokens=[278], max_tokens=1)).code == "bad_request"


def test_special_ids_outside_the_vocabulary_load_with_a_warning(path: Path, node: Node) -> None:
    config = json.loads((path / "config.json").read_text())
    odd = {"bos_token_id": 9999, "eos_token_id": [9999, -1], "pad_token_id": -1}
    (path / "config.json").write_text(json.dumps({**config, **odd}))
    (path / "generation_config.json").unlink(missing_ok=True)
    warnings = node.load(Load(model=str(path))).model.warnings
    assert len(warnings) == 2
    assert all("outside the vocabulary" in said and str(path) in said for said in warnings)
    list(node.stream(Generate(model=str(path), prompt="the", max_tokens=2)))


def test_a_pipe_blocks_nobody(path: Path, saved: Path, node: Node) -> None:
    (path / "config.json").unlink()
    os.mkfifo(path / "config.json")
    codes: list[str] = []

    def load() -> None:
        try:
            node.load(Load(model=str(path)))
        except DaemonError as error:
            codes.append(error.code)

    thread = threading.Thread(target=load, daemon=True)
    thread.start()
    thread.join(20)
    assert codes == ["corrupt"]
    assert node.load(Load(model=str(saved))).model.family == "llama"


def test_a_load_that_does_not_come_further_blocks_others_for_a_while_only(
    saved: Path, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.daemon.loading.loader.MOTIONLESS_S", 0.5)
    inside, leave = threading.Event(), threading.Event()

    def hang() -> None:
        with node._loader.alone():
            inside.set()
            leave.wait(20)

    threading.Thread(target=hang, daemon=True).start()
    assert inside.wait(20)
    with pytest.raises(DaemonError, match="has not come further") as caught:
        node.load(Load(model=str(saved)))
    assert caught.value.code == "busy"
    leave.set()
    assert node.load(Load(model=str(saved))).model.family == "llama"


def test_a_path_with_a_colon_is_a_path(saved: Path, node: Node, tmp_path: Path) -> None:
    for name in ("m:q4", "a:q8", "b:q5", "c:"):
        path = shutil.copytree(saved, tmp_path / name)
        assert Reference.parse(str(path)) == (str(path), "keep")
        assert node.load(Load(model=str(path))).model.quant == "keep"
        assert node.has(str(path))
    q8 = Reference.parse(f"{tmp_path}/m:q4:q8")
    assert q8 == (f"{tmp_path}/m:q4", "q8")
    assert Reference.parse("smollm2:q4") == ("smollm2", "q4")
    assert Reference.parse(f"{tmp_path}/gone:q4") == (f"{tmp_path}/gone", "q4")
    shutil.copytree(saved, tmp_path / "m")
    with pytest.raises(DaemonError, match="another name") as caught:
        Reference.parse(str(tmp_path / "m:q4"))
    assert caught.value.code == "bad_request"
