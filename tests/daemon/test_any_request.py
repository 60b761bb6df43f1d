"""Whatever a request holds, of the right types or not: the answer is never that Shoal has a bug."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from fakes import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal.comm import wire
from shoal.comm.errors import ProtocolError
from shoal.comm.home import Home
from shoal.comm.messages import REQUESTS, Chat, Generate, Load, Status, Tokenize, Unload
from shoal.daemon.config import NodeConfig
from shoal.daemon.errors import DaemonError
from shoal.daemon.library.library import Library
from shoal.daemon.node import Node


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    place = tmp_path_factory.mktemp("any")
    path = tiny.save_gguf(tiny.hf_model("llama", seed=3), place / "tiny.gguf")
    config = NodeConfig(threads=1, context_tokens=96, kv_tokens=512, memory_bytes=2 << 30)
    with Node(config, Library(Home(place)).resolve) as it:
        it.load(Load(model=str(path)))
        yield it


RESERVED = [
    "self", "messages", "tools", "add_generation_prompt", "bos_token", "eos_token", "variables", "loop", "range",
    "cycler", "namespace", "lipsum", "dict", "joiner", "raise_exception", "strftime_now", "caller", "varargs", "kwargs",
    "super", "__class__", "None", "true", "", "a b", "context", "environment", "template", "source", "documents", "x",
]  # fmt: skip
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.sampled_from([0, 1, -1, 2**31, 2**32 - 1, 1 << 26, 258, 259, 260]),
    st.floats(),
    st.text(max_size=8),
    st.binary(max_size=4),
    st.sampled_from(
        ["\0", "\ud7ff", "<s>", "</s>", "{{ x }}", "user", "tiny.gguf", "../..", "/dev/null", "text"]
    ),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.one_of(st.sampled_from(RESERVED), st.text(max_size=5)), inner, max_size=4),
        st.dictionaries(
            st.sampled_from(["role", "content", "type", "text", "name", "tool_calls"]), inner, max_size=4
        ),
    ),
    max_leaves=8,
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "system", "tool"])},
    optional={"content": st.one_of(st.text(max_size=9), VALUES), "name": VALUES, "tool_calls": VALUES},
)
PLAUSIBLE = {
    "messages": st.lists(MESSAGE, min_size=1, max_size=3),
    "prompt": st.text(max_size=20),
    "prompt_tokens": st.lists(st.integers(0, 300), max_size=5),
    "text": st.text(max_size=20),
    "tokens": st.lists(st.integers(0, 300), max_size=5),
    "template_args": st.dictionaries(st.sampled_from(RESERVED), VALUES, max_size=3),
    "tools": st.lists(st.dictionaries(st.text(max_size=5), VALUES, max_size=3), max_size=2),
    "stop": st.lists(st.text(max_size=4), max_size=3),
    "model": st.sampled_from(
        ["", "tiny.gguf", "nope", "/dev/null", ".", "a\0b", "~nobody/x", "x" * 5000, "\n"]
    ),
    "deadline_s": st.sampled_from([1e-9, 0.01, 1e6]),
}
NEEDED = {
    "chat": {"messages"},
    "generate": {"prompt"},
    "tokenize": {"text"},
    "load": {"model"},
    "cancel": {"target"},
}


@st.composite
def bodies(draw: st.DrawFn) -> tuple[str, bytes]:
    """A request that is right but for a few fields."""
    kind = draw(st.sampled_from(sorted(REQUESTS)))
    names = REQUESTS[kind].__struct_fields__
    chosen = NEEDED.get(kind, set()) | set(draw(st.lists(st.sampled_from([*names, "other"]), max_size=3)))
    if draw(st.integers(0, 4)) == 0:
        chosen = set(draw(st.lists(st.sampled_from([*names, "other"]), max_size=4)))
    body = {
        name: draw(PLAUSIBLE[name] if name in PLAUSIBLE and draw(st.integers(0, 3)) else VALUES)
        for name in chosen
    }
    if "max_tokens" in names and draw(st.integers(0, 5)):
        body["max_tokens"] = 3
    return kind, msgspec.msgpack.encode(body)


def answer(node: Node, kind: str, body: bytes) -> str:
    """The code of the error that answers a request, "" if there is none."""
    try:
        request = wire.decode(wire.Envelope(kind, b"1", body), REQUESTS)
    except ProtocolError as error:
        return error.code
    try:
        match request:
            case Generate() | Chat():
                list(node.stream(request))
            case Tokenize():
                node.tokenize(request)
            case Load():
                node.load(request)
            case Unload() if request.model not in ("", "tiny.gguf"):
                node.unload(request)
            case Status():
                node.status()
    except DaemonError as error:
        return f"{error.code}: {error.message}" if error.code == "internal" else error.code
    return ""


@settings(
    deadline=None,
    max_examples=200,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(bodies())
def test_no_request_is_answered_with_internal(node: Node, request: tuple[str, bytes]) -> None:
    assert not answer(node, *request).startswith("internal")


@pytest.mark.parametrize("name", RESERVED)
@pytest.mark.parametrize("value", [None, 1, "x", [], {"a": [1]}])
def test_no_name_in_template_args_is_a_bug(node: Node, name: str, value: Any) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], "template_args": {name: value}, "max_tokens": 1}
    assert answer(node, "chat", msgspec.msgpack.encode(body)) in ("", "bad_request")
