"""OpenAI's fields: what each becomes, and that none is dropped."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fakes.throughput.peak import peak_bytes_of

from shoal.cli.batch.openai_requests import BadLine, custom_id_of, parse
from shoal.comm.messages import Chat, Generate

HI = [{"role": "user", "content": "Hi"}]


def line(body: Any, url: str = "/v1/chat/completions", **changed: Any) -> bytes:
    fields = {"custom_id": "a", "method": "POST", "url": url, "body": body}
    fields = {name: value for name, value in (fields | changed).items() if value is not ...}
    return json.dumps(fields).encode()


def chat(**body: Any) -> bytes:
    return line({"model": "m", "messages": HI} | body)


def completion(**body: Any) -> bytes:
    return line({"model": "m", "prompt": "Hi"} | body, "/v1/completions")


def test_all_that_is_known_reaches_the_request() -> None:
    asked = parse(
        chat(
            max_completion_tokens=9, temperature=0.5, top_p=0.9, seed=3, stop="x", n=1, stream=False, logprobs=True,
            top_logprobs=2, presence_penalty=1, frequency_penalty=-1, logit_bias={"5": -100}, user="me",
            metadata={"a": "b"}, response_format={"type": "text"}, tools=None, top_k=4, min_p=0.1,
            repetition_penalty=1.1, ignore_eos=True, stop_token_ids=[7], chat_template_kwargs={"thinking": False},
        ),
        None,
    )  # fmt: skip
    request = asked.request
    assert isinstance(request, Chat)
    assert (asked.custom_id, asked.model, asked.is_chat, asked.top_logprobs) == ("a", "m", True, 2)
    assert (request.max_tokens, request.stop, request.ignore_eos, request.stop_token_ids) == (
        9,
        ["x"],
        True,
        [7],
    )
    assert request.template_args == {"thinking": False}
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.seed, sampling.logprobs) == (0.5, 0.9, 3, 2)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.logit_bias) == (1, -1, {5: -100})
    assert (sampling.top_k, sampling.min_p, sampling.repetition_penalty) == (4, 0.1, 1.1)


def test_what_no_answer_depends_on_may_be_there() -> None:
    plain = parse(chat(), None)
    for more in (
        {"service_tier": "flex"}, {"prompt_cache_retention": "24h"}, {"safety_identifier": "x"},
        {"modalities": ["text"]},
        {"parallel_tool_calls": True}, {"parallel_tool_calls": False}, {"functions": []}, {"function_call": "none"},
    ):  # fmt: skip
        assert parse(chat(**more), None) == plain


def test_completions_take_a_text_or_tokens() -> None:
    for prompt in ("Hi", ["Hi"]):
        request = parse(completion(prompt=prompt, logprobs=3), None).request
        assert isinstance(request, Generate)
        assert (request.prompt, request.max_tokens, request.sampling.logprobs) == ("Hi", 16, 3)
    for prompt in ([1, 2], [[1, 2]]):
        request = parse(completion(prompt=prompt, max_tokens=5), None).request
        assert isinstance(request, Generate)
        assert (request.prompt_tokens, request.max_tokens) == ([1, 2], 5)


def test_parts_of_text_become_one() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request = parse(chat(messages=[{"role": "user", "content": parts}]), None).request
    assert isinstance(request, Chat)
    assert request.messages[0]["content"] == "a\nb"


def test_a_model_that_is_given_is_taken_instead() -> None:
    assert parse(chat(), "mine").model == "mine"
    assert parse(chat(model=None), "mine").model == "mine"


@pytest.mark.parametrize(
    ("sent", "said", "param"),
    [
        (b"{", "the line is not JSON: ", None),
        (b'{"custom_id": "a\0"}', "the line is not JSON: ", None),
        (b'{"custom_id": "\xff"}', "the line is not JSON: ", None),
        (b'"\\ud800"', "the line is not JSON: ", None),
        (b"[" * 100_000 + b"]" * 100_000, "nested too deep", None),
        (chat(metadata=json.loads("[" * 63 + "]" * 63)), "the line is nested too deep: must be at most 64", None),
        (completion(prompt=[7] * 1_100_000), "the line has values that take up to 70.4 MB of memory: must be", None),
        (chat(messages=[{}] * 300_000), "the line has values that take up to 96 MB of memory: must be", None),
        (b"[1]", "the line is a list: must be an object", None),
        (b"null", "the line is null", None),
        (line({}, custom_id=...), "custom_id is missing: must be a text of 1 to 512 characters", "custom_id"),
        (line({}, custom_id=5), "custom_id=5: must be", "custom_id"),
        (line({}, custom_id=""), 'custom_id="": must be', "custom_id"),
        (line({}, method="GET"), 'method="GET": must be POST', "method"),
        (line({}, "/v1/embeddings"), 'url="/v1/embeddings": must be /v1/chat/completions or', "url"),
        (line({}, url=["x"]), 'url=["x"]: must be', "url"),
        (line({}, extra=1), "extra: this version does not know this field", "extra"),
        (line("x"), 'body="x": must be an object', "body"),
        (chat(model=None), "body.model is missing", "model"),
        (chat(model=5), "body.model=5: must be the name", "model"),
        (chat(reasoning_effort="low"), "body.reasoning_effort: this version does not know", "reasoning_effort"),
        (chat(prompt="x"), "body.prompt is no field of /v1/chat/completions", "prompt"),
        (completion(messages=HI), "body.messages is no field of /v1/completions", "messages"),
        (chat(n=2), "body.n=2: must be 1 or absent", "n"),
        (chat(n=True), "body.n=true: must be 1", "n"),
        (chat(stream=True), "body.stream=true: must be false", "stream"),
        (chat(stream=0), "body.stream=0: must be false", "stream"),
        (chat(tools=[{"type": "function"}]), "body.tools=", "tools"),
        (chat(response_format={"type": "json_object"}), "body.response_format=", "response_format"),
        (chat(parallel_tool_calls=1), "body.parallel_tool_calls=1: must be true or false or", "parallel_tool_calls"),
        (chat(modalities=["audio"]), "body.modalities=", "modalities"),
        (chat(functions=[{"name": "f"}]), "body.functions=", "functions"),
        (completion(modalities=["text"]), "body.modalities is no field of /v1/completions", "modalities"),
        (completion(echo=True), "body.echo=true: must be false", "echo"),
        (chat(temperature="hot"), "body.temperature=\"hot\": must be a number from 0 to 100", "temperature"),
        (chat(temperature=True), "body.temperature=true: must be", "temperature"),
        (chat(logit_bias={"3": None}), "body.logit_bias[3]=null: must be", "logit_bias"),
        (chat(messages=[{"role": True}]), "body.messages[0].role=true: must be str", "messages"),
        (chat(model="x" * 5000), 'body.model="xxxx', "model"),
        (chat(temperature=-1), "body.temperature=-1: must be", "temperature"),
        (chat(temperature=1 << 2000), "body.temperature=", "temperature"),
        (chat(seed=-1), "body.seed=-1: must be", "seed"),
        (chat(seed=1 << 70), "body.seed=", "seed"),
        (chat(logit_bias={"x": 1}), "body.logit_bias=", "logit_bias"),
        (chat(logit_bias={"3": "x"}), "body.logit_bias[3]=\"x\": must be", "logit_bias"),
        (chat(max_tokens=0), "body.max_tokens=0: must be a whole number from 1", "max_tokens"),
        (chat(max_tokens=1 << 70), "body.max_tokens=", "max_tokens"),
        (chat(max_tokens=1.5), "body.max_tokens=1.5: must be", "max_tokens"),
        (chat(max_tokens=5, max_completion_tokens=6), "if both are given", "max_completion_tokens"),
        (chat(stop=["x", ""]), "body.stop=", "stop"),
        (chat(stop=["x"] * 65), "body.stop=", "stop"),
        (chat(stop_token_ids=[-1]), "body.stop_token_ids=", "stop_token_ids"),
        (chat(ignore_eos=1), "body.ignore_eos=1: must be true or false", "ignore_eos"),
        (chat(logprobs=3), "body.logprobs=3: must be true or false", "logprobs"),
        (chat(top_logprobs=3), "body.top_logprobs=3: must be absent, unless logprobs", "top_logprobs"),
        (chat(logprobs=True, top_logprobs=21), "logprobs=21: must be", "logprobs"),
        (chat(messages=[]), "body.messages=[]: must be a list of messages", "messages"),
        (chat(messages="Hi"), 'body.messages="Hi": must be', "messages"),
        (chat(messages=["Hi"]), 'body.messages[0]="Hi": must be an object', "messages[0]"),
        (chat(messages=[{"content": "x"}]), "body.messages[0]", "messages"),
        (chat(messages=[{"role": "user", "content": 5}]), "body.messages[0].content", "messages"),
        (
            chat(messages=[{"role": "user", "content": [{"type": "image_url"}]}]),
            "body.messages[0].content[0]=",
            "messages[0].content[0]",
        ),
        (chat(chat_template_kwargs=5), "body.chat_template_kwargs=5: must be an object", "chat_template_kwargs"),
        (
            chat(chat_template_kwargs={"a": {"b": 10**30}}),
            f"body.chat_template_kwargs.'a'.'b'={10**30}: must be from -2**63 to 2**64 - 1",
            "chat_template_kwargs",
        ),
        (chat(chat_template_kwargs={"a": -(10**300)}), "body.chat_template_kwargs.'a': must", "chat_template_kwargs"),
        (chat(chat_template_kwargs={"a": [0] * (1 << 17)}), "body.chat_template_kwargs: must", "chat_template_kwargs"),
        (chat(chat_template_kwargs={"a": "x" * (1 << 20)}), "free-form values of ", "messages"),
        (chat(messages=HI * 10_001), "body.messages: must be array of length <= 10000", "messages"),
        (
            chat(messages=[{"role": "user", "content": "Hi", "a": 1 << 64}]),
            f"body.messages[0].a={1 << 64}: must be from -2**63 to 2**64 - 1",
            "messages",
        ),
        (completion(prompt=[1] * ((1 << 22) + 1)), "the line has values that take up to", None),
        (completion(prompt=None), "body.prompt is missing", "prompt"),
        (completion(prompt=["a", "b"]), 'body.prompt=["a","b"]: must be one text', "prompt"),
        (completion(prompt=[-1]), "body.prompt=[-1]: must be one text", "prompt"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused_by_name(sent: bytes, said: str, param: str | None) -> None:
    with pytest.raises(BadLine) as refused:
        parse(sent, None)
    assert said in refused.value.message
    assert refused.value.param == param
    assert len(refused.value.message) < 300
    assert "\n" not in refused.value.message


def test_texts_may_have_what_looks_like_nesting() -> None:
    text = '\\"[{' * 5000
    request = parse(chat(messages=[{"role": "user", "content": text}], user="[" * 3000), None).request
    assert isinstance(request, Chat)
    assert request.messages[0]["content"] == text


def test_whose_a_line_is_can_be_seen_without_the_rest_of_it() -> None:
    sent = chat(messages=[{"role": "user", "content": "\U0001f41f" + "x" * (1 << 20)}])
    found: list[str] = []
    assert peak_bytes_of(lambda: found.append(custom_id_of(sent))) < len(sent) / 10
    assert found == [parse(sent, None).custom_id]
