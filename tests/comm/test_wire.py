"""Frames and bodies: valid ones pass unchanged; for others there is a ProtocolError that says why."""

from __future__ import annotations

import math
import re

import msgspec
import pytest
from fakes.throughput.peak import peak_bytes_of
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.comm import wire
from shoal.comm.errors import ProtocolError
from shoal.comm.messages import (
    REPLIES,
    REQUESTS,
    STREAMING,
    TYPE_NAMES,
    Chat,
    ChatMessage,
    Error,
    Generate,
    Ping,
    Sampling,
    Token,
    Tokenize,
    TokenLogprob,
)
from shoal.comm.outline import check_free_bytes

FUZZ = settings(deadline=None, max_examples=150, derandomize=True)


def body_error(kind: str, body: object) -> str:
    data = body if isinstance(body, bytes) else msgspec.msgpack.encode(body)
    with pytest.raises(ProtocolError) as failed:
        wire.decode(wire.Envelope(kind, b"1", data), REQUESTS)
    assert failed.value.request_id == b"1"
    assert "\n" not in str(failed.value)
    return str(failed.value)


def plain() -> st.SearchStrategy[object]:
    leaves = st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats() | st.text() | st.binary()
    return st.recursive(
        leaves, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8
    )


@pytest.mark.parametrize(
    "message",
    [
        Ping(),
        Generate(prompt="æ\n", sampling=Sampling(temperature=0.0, logit_bias={3: -1.0}), stop=["x"]),
        Generate(prompt_tokens=[0, 1 << 24]),
        Chat(messages=[ChatMessage(role="user", content=[{"type": "text", "text": "x"}])], tools=[{"a": 1}]),
        Tokenize(text=""),
    ],
)
def test_requests_come_back_unchanged(message):
    frames = wire.encode(message, b"id")
    assert frames[:3] == [b"shoal/1", TYPE_NAMES[type(message)].encode(), b"id"]
    assert wire.decode(wire.split(frames), REQUESTS) == message


def test_replies_come_back_unchanged():
    token = Token(
        text="a", ids=[1], logprobs=[TokenLogprob(id=1, text="a", logprob=-0.5, top=[(2, "b", -1.0)])]
    )
    for message in (token, Error(code="busy", message="m", retry_after_s=0.5)):
        assert wire.decode(wire.split(wire.encode(message, b"1")), REPLIES) == message


def test_a_reply_says_what_has_no_utf8_form_and_a_request_is_not_altered():
    for message in (
        Error(code="corrupt", message="a\ud800b", hint="\udcff"),
        Token(
            text="\ud800",
            ids=[1],
            logprobs=[TokenLogprob(id=1, text="a", logprob=-0.5, top=[(2, "\udfff", -1.0)])],
        ),
    ):
        said = wire.decode(wire.split(wire.encode(message, b"1")), REPLIES)
        assert "\ufffd" in repr(said) or "\ufffd" in str(msgspec.to_builtins(said))
    said = wire.decode(wire.split(wire.encode(Error(code="corrupt", message="😀\ud83d\n"), b"1")), REPLIES)
    assert said == Error(code="corrupt", message="😀\ufffd\n")
    with pytest.raises(ProtocolError, match="cannot encode"):
        wire.encode(Generate(prompt="\ud800"), b"1")


def test_every_type_has_one_name_and_terminals_are_the_rest():
    assert len(TYPE_NAMES) == len(REQUESTS) + len(REPLIES)
    assert set(REPLIES) >= STREAMING
    assert all(wire._TYPE.fullmatch(name.encode()) for name in TYPE_NAMES.values())


def test_unknown_fields_are_ignored_and_missing_ones_take_their_default():
    body = msgspec.msgpack.encode({"prompt": "x", "from_the_future": {"deep": [1, 2]}})
    assert wire.decode(wire.Envelope("generate", b"1", body), REQUESTS) == Generate(prompt="x")


@pytest.mark.parametrize(
    ("kind", "body", "complaint"),
    [
        ("generate", {"prompt": "x", "max_tokens": 0}, "max_tokens=0: must be int >= 1"),
        ("generate", {"prompt": "x", "max_tokens": "5"}, "max_tokens=\"5\": must be int | null, not str"),
        (
            "generate",
            {"prompt": "x", "sampling": {"temperature": -1}},
            "sampling.temperature=-1: must be float >= 0.0",
        ),
        ("generate", {"prompt": "x", "sampling": {"top_p": math.nan}}, "sampling.top_p=NaN: must be float > 0"),
        ("generate", {"sampling": {"logit_bias": {"a": 1}}}, "sampling.logit_bias: its keys must be int, not str"),
        ("generate", {"prompt": "x", "stop": ["a", ""]}, "stop[1]=\"\": must be str of length >= 1"),
        ("generate", {}, "prompt: exactly one of prompt, prompt_tokens must be given, not none"),
        ("tokenize", {"text": "x", "tokens": []}, "text: exactly one of text, tokens, messages must be given"),
        ("chat", {}, "messages: is required"),
        ("chat", {"messages": []}, "messages=[]: must be array of length >= 1"),
        ("chat", {"messages": [{"content": "x"}]}, "messages[0].role: is required"),
        ("chat", {"messages": [{"role": "u", "content": [{"a": b"x"}]}]}, "messages[0].content[0].'a': must be null"),
        ("chat", {"messages": [{"role": "u"}], "tools": [{"a": {1: 2}}]}, "tools[0].'a': keys must be str, not int"),
        ("chat", [], "body: must be object, not array"),
        ("chat", b"", "body: not msgpack: Input data was truncated"),
        ("chat", b"\xc1", "body: not msgpack"),
        ("generate", b"\x81\xa6prompt\xa2\xff\xfe", "body: holds text that is not UTF-8"),
        ("chat", b"\x81\xa1a" + b"\x91" * 100_000, "body: nested too deep"),
        ("generate", b"\x81\xadprompt_tokens\xdd\xff\xff\xff\xff", "must be array of length <= 4194304"),
        ("sing", {}, "type=\"sing\": must be one of hello, generate"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_field_value_and_limit(kind, body, complaint):
    assert complaint in body_error(kind, body)


def test_free_form_values_are_bounded_in_depth():
    deep: object = 1
    for _ in range(40):
        deep = [deep]
    body = {"messages": [{"role": "u"}], "template_args": {"x": deep}}
    assert "must be nested at most 32 deep" in body_error("chat", body)


def test_free_form_values_are_bounded_in_number():
    body = {"messages": [{"role": "u"}], "tools": [{"a": [[]] * 200_000}]}
    assert "tools: must hold at most 100000 values" in body_error("chat", body)


@pytest.mark.parametrize("field", ["tools", "template_args", "content", "tool_calls", "logit_bias"])
def test_values_that_would_swell_are_refused_before_they_are_read(field):
    swelling = {"a": [[]] * (1 << 20)}
    message = {"role": "u", "content": "x"}
    body: dict[str, object] = {"messages": [message]}
    match field:
        case "content" | "tool_calls":
            message[field] = [swelling]
        case "tools":
            body[field] = [swelling]
        case "logit_bias":
            body["sampling"] = {"logit_bias": dict.fromkeys(range(1 << 19), 0.0)}
        case _:
            body[field] = swelling
    assert re.search(r"free-form values of \d+ bytes: must be at most 1048576", body_error("chat", body))


def test_long_texts_are_welcome():
    text = "x" * (4 << 20)
    message = ChatMessage(role="user", content=[{"type": "text", "text": text}])
    for request in (Chat(messages=[message]), Generate(prompt=text), Tokenize(messages=[message])):
        assert wire.decode(wire.split(wire.encode(request, b"1")), REQUESTS) == request


def test_long_values_are_shortened():
    assert len(body_error("generate", {"prompt": "x", "max_tokens": "9" * 10_000})) < 120
    assert len(body_error("x" * 32, {})) < 200


@pytest.mark.parametrize(
    ("frames", "code", "request_id"),
    [
        ([], "bad_request", b""),
        ([b"shoal/1", b"ping"], "bad_request", b""),
        ([b"shoal/1", b"ping", b"7"], "bad_request", b"7"),
        ([b"shoal/1", b"ping", b"7", *[b"\x80"] * 20], "bad_request", b"7"),
        ([b"shoal/2", b"ping", b"7", b"\x80"], "version", b"7"),
        ([b"GET / HTTP/1.1", b"ping", b"7", b"\x80"], "bad_request", b"7"),
        ([b"shoal/1", b"ping", b"", b"\x80"], "bad_request", b""),
        ([b"shoal/1", b"ping", b"7" * 65, b"\x80"], "bad_request", b""),
        ([b"shoal/1", b"p" * 33, b"7", b"\x80"], "bad_request", b"7"),
        ([b"shoal/1", b"\xff\n", b"7", b"\x80"], "bad_request", b"7"),
        ([b"shoal/1", b"ping", b"7", b"\0" * (wire.MAX_REQUEST_BYTES + 1)], "bad_request", b"7"),
    ],
)
def test_unsound_frames_are_refused(frames, code, request_id):
    with pytest.raises(ProtocolError) as failed:
        wire.split(frames)
    assert (failed.value.code, failed.value.request_id) == (code, request_id)


@pytest.mark.parametrize("request_id", [b"", b"x" * 65])
def test_sending_keeps_to_the_limits_too(request_id):
    with pytest.raises(ProtocolError, match="request id"):
        wire.encode(Ping(), request_id)
    with pytest.raises(ProtocolError, match="must be at most 100"):
        wire.encode(Generate(prompt="x" * 100), b"1", limit_bytes=100)
    with pytest.raises(ProtocolError, match="cannot encode"):
        wire.encode(Generate(prompt="\ud800"), b"1")


# --- anything at all ------------------------------------------------------------------------------------


def read(frames: list[bytes]) -> None:
    """Decode as a request and as a reply. No error but ProtocolError may be raised."""
    for types in (REQUESTS, REPLIES):
        try:
            wire.decode(wire.split(frames), types)
        except ProtocolError as error:
            complaint = str(error)
        else:
            continue
        assert complaint
        assert "\n" not in complaint


@FUZZ
@given(st.lists(st.binary(max_size=80), max_size=20))
def test_random_frames(frames):
    read(frames)


@FUZZ
@given(st.sampled_from([*REQUESTS, *REPLIES]), st.binary(max_size=300))
def test_random_bodies(kind, body):
    read([b"shoal/1", kind.encode(), b"1", body])


@FUZZ
@given(st.sampled_from([*REQUESTS, *REPLIES]), plain())
def test_random_values_as_bodies(kind, value):
    read([b"shoal/1", kind.encode(), b"1", msgspec.msgpack.encode(value)])


SEEDS = [
    wire.encode(message, b"1")
    for message in (
        Generate(prompt="hello", sampling=Sampling(temperature=1.0, logit_bias={5: 2.0}, seed=3), stop=["a"]),
        Chat(
            messages=[ChatMessage(role="user", content=[{"a": [1, {"b": None}]}])],
            tools=[{"t": 1}],
            template_args={"x": "y"},
        ),
        Tokenize(tokens=[1, 2, 3]),
        Token(text="a", ids=[1], logprobs=[TokenLogprob(id=1, text="a", logprob=-0.5, top=[(2, "b", -1.0)])]),
    )
]


@FUZZ
@given(
    st.sampled_from(SEEDS),
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=6
    ),
    st.integers(0, 200),
)
def test_mutated_messages(frames, edits, cut):
    mutated = [bytearray(frame) for frame in frames]
    for frame, position, value in edits:
        if mutated[frame]:
            mutated[frame][position % len(mutated[frame])] = value
    if cut < len(mutated[3]):
        del mutated[3][cut:]
    read([bytes(frame) for frame in mutated])


@pytest.mark.parametrize("length", [1, 37, 38, 39, 40, 41, 500])
def test_shortening_keeps_what_fits_and_not_a_character_more(length):
    """The quotes count: 38 letters fill the 40 characters."""
    text = wire.shorten("x" * length)
    assert text == (f'"{"x" * length}"' if length <= 38 else '"' + "x" * 38 + "…")
    assert len(wire.shorten(10 ** (length - 1))) == min(length, 40)


def test_values_are_shortened_as_json_has_them():
    assert wire.shorten({"a": [None, True, 0.5, "é\n\u202e"], "b": {}}) == (
        '{"a":[null,true,0.5,"\\u00e9\\n\\u202e"],"…'
    )
    assert wire.shorten(b"\xff") == "b'\\xff'"
    assert wire.shorten(("é", {1: 2})) == '["é",{1:2}]'


def test_however_deep_a_value_is_it_can_be_shortened():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    assert wire.shorten(deep) == "[" * 39 + "…"
    table = {}
    for _ in range(100_000):
        table = {"a": table}
    assert wire.shorten(table) == '{"a":' * 7 + '{"a"' + "…"


def test_a_message_of_any_depth_is_refused_by_the_protocol():
    for depth in range(940, 1000):
        content = b"\x91" * depth + b"\x90"
        body = b"\x81\xa8messages\x91\x82\xa4role\xa4user\xa4name" + content
        with pytest.raises(ProtocolError):
            wire.decode(wire.split([b"shoal/1", b"chat", b"1", body]), wire.REQUESTS)


def test_a_first_look_at_a_body_decodes_no_text() -> None:
    """With one character of four bytes, all of a text's would take as much."""
    message = ChatMessage(role="user", content="\U0001f41f" + "x" * (4 << 20))
    body = msgspec.msgpack.encode(Chat(messages=[message]))
    assert peak_bytes_of(lambda: check_free_bytes(body)) < len(body) / 100
