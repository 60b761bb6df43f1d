"""What a request says in a conversation reaches the model's template, as it does in transformers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fakes import tiny
from fakes.asking import CONFIG
from msgspec import msgpack
from transformers import AutoTokenizer

from shoal.client.session import chat_request, tokenize_request
from shoal.comm import wire
from shoal.comm.errors import ProtocolError, RequestFailed
from shoal.comm.messages import REQUESTS, Chat, ChatMessage, Load, Tokenize
from shoal.daemon.errors import DaemonError
from shoal.daemon.loading.loaded_model import LoadedModel
from shoal.daemon.node import Node
from shoal.daemon.request import chat_text
from shoal.models.errors import TemplateError

ASK = [{"role": "user", "content": "hi"}]
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
PLAIN = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
USING = "{{ tools | tojson }}" + PLAIN
ALL = "{% for m in messages %}{{ m | tojson }}{% endfor %}"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_hf(tiny.hf_model("llama"), tmp_path_factory.mktemp("hf") / "m")


@pytest.fixture
def loaded(saved: Path) -> Callable[..., Any]:
    @contextmanager
    def load(template: Any, files: dict[str, str] | None = None, **config: Any) -> Iterator[LoadedModel]:
        stated = saved / "tokenizer_config.json"
        before = json.loads(stated.read_text()) if stated.is_file() else {}
        changed = {**before, "chat_template": template, **config}
        stated.write_text(json.dumps({key: value for key, value in changed.items() if value is not None}))
        for name, text in (files or {}).items():
            (saved / name).parent.mkdir(exist_ok=True)
            (saved / name).write_text(text)
        try:
            with Node(CONFIG) as node:
                node.load(Load(model=str(saved)))
                yield next(iter(node._models))
        finally:
            stated.write_text(json.dumps(before))
            for name in files or {}:
                (saved / name).unlink()

    return load


def rendered(model: LoadedModel, messages: Any = ASK, tools: Any = None, **args: Any) -> str:
    return chat_text(model, messages, tools, args)


NAMED = [{"name": "default", "template": PLAIN}, {"name": "tool_use", "template": USING}]


@pytest.mark.parametrize(
    ("template", "files"),
    [
        (NAMED, {}),
        (USING, {}),
        (None, {"chat_template.jinja": PLAIN, "additional_chat_templates/tool_use.jinja": USING}),
        (PLAIN, {"additional_chat_templates/tool_use.jinja": USING}),
        ("wrong", {"chat_template.jinja": USING}),
    ],
)
def test_the_template_for_tools_is_taken_when_there_are_tools(
    loaded: Callable[..., Any], template: Any, files: dict[str, str]
) -> None:
    with loaded(template, files) as model:
        assert rendered(model, tools=TOOLS) == json.dumps(TOOLS) + "user:hi;"
        assert rendered(model, tools=[]).endswith("user:hi;")
        assert "look" not in rendered(model, tools=[])


@pytest.mark.parametrize(
    "template", [PLAIN, "{# tools #}" + PLAIN, "{% if tools and 0 %}x{% endif %}" + PLAIN, None]
)
def test_tools_that_a_template_does_not_read_are_refused(
    loaded: Callable[..., Any], template: str | None
) -> None:
    with loaded(template) as model:
        with pytest.raises(DaemonError, match="the chat template of m does not read `tools`") as refused:
            rendered(model, tools=TOOLS)
        assert refused.value.code == "unsupported"
        assert "hi" in rendered(model)


@pytest.mark.parametrize(
    "template",
    [
        "{% for tool in tools %}{{ tool.function.name }}{% endfor %}",
        "{{ tools[0].function.name }}",
        "{% macro told(tool) %}{{ tool.function.name }}{% endmacro %}{{ told(tools | first) }}",
        "{% if not tools %}{{ raise_exception('no tools') }}{% endif %}{{ tools[-1].function.name }}",
    ],
)
def test_a_template_may_need_tools(loaded: Callable[..., Any], template: str) -> None:
    """Templates named `tool_use` go through the tools without asking whether there are any."""
    with loaded(
        [{"name": "default", "template": PLAIN}, {"name": "tool_use", "template": template}]
    ) as model:
        assert rendered(model, tools=TOOLS) == "look"
        assert rendered(model) == rendered(model, tools=[])


@pytest.mark.parametrize("key", ["extra_special_tokens", "model_specific_special_tokens"])
def test_templates_read_tokens_that_only_this_model_names(loaded: Callable[..., Any], key: str) -> None:
    tokens = {"boi_token": "<|im_start|>", "eoi_token": {"content": "<|im_end|>"}}
    with loaded("{{ boi_token }}{{ eoi_token }}", **{key: tokens}) as model:
        assert rendered(model) == "<|im_start|><|im_end|>"


def test_an_older_tokenizer_config_gives_way_to_the_special_tokens_map(loaded: Callable[..., Any]) -> None:
    files = {"special_tokens_map.json": json.dumps({"bos_token": "<|im_start|>"})}
    with loaded("{{ bos_token }}", files) as model:
        assert rendered(model) == "<|im_start|>"
    with loaded("{{ bos_token }}", files, added_tokens_decoder={}) as model:
        assert rendered(model) == "<|endoftext|>"


@pytest.mark.parametrize("key", ["content", "tool_calls", "name"])
def test_keys_with_null_do_not_reach_the_template(loaded: Callable[..., Any], key: str) -> None:
    template = f"{{% for m in messages %}}{{{{ m.{key} }}}}{{{{ '{key}' in m }}}}{{% endfor %}}"
    with loaded(template) as model:
        assert rendered(model, [{"role": "assistant", key: None}]) == "False"


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": "a"},
        {"role": "user", "content": [{"type": "text", "text": "a"}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "1", "function": {"arguments": {"a": 1}}}],
        },
        {"role": "tool", "content": "4", "tool_call_id": "1", "name": "look"},
        {"role": "assistant", "content": "a", "weight": 0.5, "unknown": {"deep": [None, True]}},
        {"role": "assistant", "content": "a", "reasoning_content": "b", "thinking": "c"},
    ],
)
def test_every_field_of_a_message_passes_wire_and_client(
    loaded: Callable[..., Any], message: dict[str, Any]
) -> None:
    request = chat_request([message], {})
    sent = wire.decode(wire.split(wire.encode(request, b"1")), REQUESTS)
    asked = wire.decode(wire.split(wire.encode(tokenize_request(None, None, [message], {}), b"1")), REQUESTS)
    assert isinstance(sent, Chat)
    assert isinstance(asked, Tokenize)
    assert sent.messages == asked.messages == [message]
    with loaded(ALL) as model:
        # This template shows it, but does not read its texts.
        if not isinstance(message.get("content"), list):
            told = {key: value for key, value in message.items() if value is not None}  # as in transformers
            assert json.loads(rendered(model, sent.messages)) == told


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_has_the_names_that_templates_read_it_by(loaded: Callable[..., Any], name: str) -> None:
    messages = [*ASK, {"role": "assistant", "content": "a", name: "because"}]
    template = "{% for m in messages %}{{ m.reasoning_content }}|{{ m.thinking }};{% endfor %}"
    with loaded(template) as model:
        assert rendered(model, messages) == "|;because|because;"


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        ({"content": "x"}, "messages[0].role: is required"),
        ({"role": ""}, 'messages[0].role="": must be str of length >= 1'),
        ({"role": "u", "content": 7}, "messages[0].content=7: must be str | array | null, not int"),
        ({"role": "u", "name": []}, "messages[0].name=[]: must be str | null, not array"),
        (
            {"role": "u", "x": b"y"},
            "messages[0].x: must be null, bool, number, str, array or map, not bytes",
        ),
        ({"role": "u", "x": [[]] * 100_001}, "messages[0].x: must hold at most 100000 values"),
    ],
)
def test_what_is_wrong_with_a_message_is_said(message: dict[str, Any], complaint: str) -> None:
    body = msgpack.encode({"messages": [message]})
    with pytest.raises(ProtocolError) as failed:
        wire.decode(wire.Envelope("chat", b"1", body), REQUESTS)
    assert complaint in str(failed.value)
    with pytest.raises(RequestFailed) as refused:
        chat_request([message], {})
    assert refused.value.code == "bad_request"
    assert complaint in str(refused.value)


def test_further_fields_that_would_swell_are_refused_before_they_are_read() -> None:
    body = msgpack.encode({"messages": [{"role": "u", "more": [[]] * (2 << 20)}]})
    with pytest.raises(ProtocolError, match=r"free-form values of \d+ bytes: must be at most 1048576"):
        wire.decode(wire.Envelope("chat", b"1", body), REQUESTS)


def test_templates_get_the_names_of_tokens_as_in_transformers(
    saved: Path, loaded: Callable[..., Any]
) -> None:
    names = ["bos", "eos", "unk", "sep", "pad", "cls", "mask", "image"]
    template = "".join(
        f"{name}={{{{ {name}_token if {name}_token is defined else 'none' }}}};" for name in names
    )
    template += "{{ documents is none }}{{ tools is none }}{{ strftime_now('x') }}"
    config = {
        "pad_token": "[PAD]",
        "unk_token": {"content": "the", "lstrip": True, "__type": "AddedToken"},
        "image_token": "ing",
    }
    with loaded(template, **config) as model:
        theirs = AutoTokenizer.from_pretrained(saved).apply_chat_template(ASK, tokenize=False)
        ours = rendered(model)
    assert "pad=[PAD];" in ours
    assert "unk=the;" in ours
    assert "image=ing;" in ours
    # where a model names no token, ours is an empty text for the two that most templates read
    assert [pair for pair in theirs.split(";") if not pair.endswith("=none")] == [
        pair for pair in ours.split(";") if not pair.endswith(("=none", "bos=", "eos="))
    ]


@pytest.mark.parametrize(
    ("template", "message", "field"),
    [
        (PLAIN, {"role": "assistant", "content": "It is "}, True),
        (
            "{% for m in messages %}<{{ m.content | trim }}>{% endfor %}",
            {"role": "a", "content": "It is "},
            True,
        ),
        (
            PLAIN + "{{ messages[-1].reasoning_content }}.",
            {"role": "a", "content": "", "reasoning_content": "So"},
            "reasoning_content",
        ),
    ],
)
def test_the_last_message_is_continued_as_in_transformers(
    saved: Path, loaded: Callable[..., Any], template: str, message: dict[str, Any], field: Any
) -> None:
    template += "{% if add_generation_prompt %}assistant:{% endif %}"
    with loaded(template) as model:
        ours = rendered(model, [*ASK, message], continue_final_message=field)
        theirs = AutoTokenizer.from_pretrained(saved).apply_chat_template(
            [*ASK, message], tokenize=False, continue_final_message=field
        )
        assert ours == theirs
        with pytest.raises(TemplateError, match="the last message has no text in its 'content'"):
            rendered(model, [{"role": "assistant"}], continue_final_message=True)
    with (
        loaded("{{ messages[0].content }}") as model,
        pytest.raises(TemplateError, match="leaves out the end"),
    ):
        rendered(model, [*ASK, {"role": "assistant", "content": "x"}], continue_final_message=True)


def test_a_message_is_a_map_with_its_fields_as_attributes() -> None:
    message = ChatMessage(role="user", content="x", more=1)
    assert (message.role, message.content, message["more"]) == ("user", "x", 1)
    assert ChatMessage(role="user").content is None
