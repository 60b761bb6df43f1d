"""A line of a batch as a request of ours: OpenAI's fields, each with what it becomes here or why it is refused.

Knows OpenAI's format. A field is honoured, or the line is refused with its name; none is dropped. Does not know files.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec

from shoal.client.session import checked_request
from shoal.comm.errors import RequestFailed
from shoal.comm.messages import Chat, Generate, Sampling
from shoal.models.json_bounds import CONTAINER_BYTES, check_nesting, decoded_bytes
from shoal.partition.amounts import format_bytes

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
COMPLETION_TOKENS = 16  # of an answer to /v1/completions that says nothing of `max_tokens`: OpenAI's own
ID_CHARACTERS = 512
MODEL_CHARACTERS = 4096  # as much as a path may have, and the daemon takes
DECODED_BYTES = 64 << 20  # of a line's values, beside the characters of texts: a million token ids

_LINE = ("custom_id", "method", "url", "body")
_LABELS = (  # no answer depends on them
    *("user", "metadata", "safety_identifier", "service_tier"),
    *("prompt_cache_key", "prompt_cache_retention"),
)
_SAMPLING = (
    *("temperature", "top_p", "presence_penalty", "frequency_penalty", "seed"),
    *("top_k", "min_p", "repetition_penalty"),  # as other servers extend the format
)
_ONLY: Mapping[str, tuple[Any, ...]] = {  # what Shoal does anyhow, and no more
    "n": (1,),
    "best_of": (1,),
    "stream": (False,),
    "echo": (False,),
    "store": (False,),
    "suffix": ("",),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "tools": ([],),
    "tool_choice": ("none",),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none",),
}
_OF_CHAT = (
    *("messages", "top_logprobs", "max_completion_tokens", "chat_template_kwargs", "modalities"),
    *("tools", "tool_choice", "parallel_tool_calls", "functions", "function_call"),
)
_OF_COMPLETIONS = ("prompt", "best_of", "echo", "suffix")


class BadLine(Exception):
    """A line that cannot be answered. `custom_id`: its own, if it could be read; `param`: the field that is wrong."""

    def __init__(self, message: str, param: str | None = None, code: str = "bad_request") -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code
        self.custom_id: str | None = None


@dataclass(frozen=True)
class BatchRequest:
    """A sound line. `request` names no model yet: `model` is what the line calls it."""

    custom_id: str
    model: str
    request: Generate | Chat

    @property
    def is_chat(self) -> bool:
        return isinstance(self.request, Chat)

    @property
    def top_logprobs(self) -> int | None:
        return self.request.sampling.logprobs


def parse(line: bytes, model: str | None) -> BatchRequest:
    """A line as a request. `model` is taken instead of the one that it names. Raises BadLine."""
    try:
        check_nesting(line)
    except ValueError as error:
        raise BadLine(f"the line {error}") from None
    if len(line) * CONTAINER_BYTES > DECODED_BYTES and (nbytes := decoded_bytes(line)) > DECODED_BYTES:
        taken, most = format_bytes(nbytes), format_bytes(DECODED_BYTES)
        raise BadLine(f"the line has values that take up to {taken} of memory: must be at most {most}")
    try:
        found = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadLine(f"the line is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise BadLine(f'the line is {_kind(found)}: must be an object, {{"custom_id": …, "body": …}}')
    custom_id = found.get("custom_id")
    try:
        return _asked(found, model)
    except BadLine as error:
        if isinstance(custom_id, str) and custom_id:
            error.custom_id = custom_id[:ID_CHARACTERS]
        raise


class _Named(msgspec.Struct):
    custom_id: str


def custom_id_of(line: bytes) -> str:
    """Of a line that is sound; nothing else of it is decoded."""
    return msgspec.json.decode(line, type=_Named).custom_id


def _asked(found: dict[str, Any], model: str | None) -> BatchRequest:
    custom_id = found.get("custom_id")
    if not isinstance(custom_id, str) or not 1 <= len(custom_id) <= ID_CHARACTERS:
        raise _wrong("custom_id", custom_id, f"a text of 1 to {ID_CHARACTERS} characters")
    if others := [name for name in found if name not in _LINE]:
        raise _unknown(others[0])
    if found.get("method") != "POST":
        raise _wrong("method", found.get("method"), "POST")
    url, body = found.get("url"), found.get("body")
    if url not in (CHAT, COMPLETIONS):
        raise _wrong("url", url, f"{CHAT} or {COMPLETIONS}", "unsupported")
    if not isinstance(body, dict):
        raise _wrong("body", body, "an object")
    given = {name: value for name, value in body.items() if value is not None}
    chat = url == CHAT
    for name in given:
        if name in (_OF_COMPLETIONS if chat else _OF_CHAT):
            raise BadLine(f"body.{name} is no field of {url}", name)
        if name not in _KNOWN:
            raise _unknown(name, "body.")
    for name, may in _ONLY.items():
        if name in given and (
            given[name] not in may or isinstance(given[name], bool) != isinstance(may[0], bool)
        ):
            said = " or ".join(msgspec.json.encode(value).decode() for value in may)
            raise _wrong(name, given[name], f"{said} or absent", "unsupported")
    named = model if model is not None else given.get("model")
    if not isinstance(named, str) or not 1 <= len(named) <= MODEL_CHARACTERS:
        raise _wrong("model", named, f"the name of a model, of at most {MODEL_CHARACTERS} characters")
    usual = {} if chat else {"max_tokens": COMPLETION_TOKENS}
    fields = usual | _fields(given) | {"sampling": _sampling(given, chat=chat)}
    fields |= _chat(given) if chat else _completion(given)
    try:
        request = checked_request(Chat, fields) if chat else checked_request(Generate, fields)
    except RequestFailed as error:
        raise _refused(str(error), chat=chat) from None
    return BatchRequest(custom_id, named, request)


def _chat(given: Mapping[str, Any]) -> dict[str, Any]:
    """Its fields of `messages.Chat`."""
    messages = given.get("messages")
    if not isinstance(messages, list) or not messages:
        raise _wrong("messages", messages, "a list of messages")
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            raise _wrong(f"messages[{index}]", message, "an object with role and content")
        if isinstance(message.get("content"), list):
            message["content"] = _joined(message["content"], f"messages[{index}].content")
    return {"messages": messages, "template_args": _template_args(given)}


def _joined(parts: list[Any], where: str) -> str:
    """Content in parts as one text, each part in lines of its own."""
    texts = []
    for index, part in enumerate(parts):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise _wrong(f"{where}[{index}]", part, 'a text: {"type": "text", "text": …}', "unsupported")
        texts.append(part["text"])
    return "\n".join(texts)


def _template_args(given: Mapping[str, Any]) -> dict[str, Any]:
    found = given.get("chat_template_kwargs", {})
    if not isinstance(found, dict):
        raise _wrong("chat_template_kwargs", found, "an object")
    return found


def _completion(given: Mapping[str, Any]) -> dict[str, Any]:
    """Its fields of `messages.Generate`."""
    prompt = given.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        (prompt,) = prompt
    if isinstance(prompt, str):
        return {"prompt": prompt}
    if isinstance(prompt, list) and prompt and all(map(_is_id, prompt)):
        return {"prompt_tokens": prompt}
    raise _wrong("prompt", prompt, "one text, or one list of token ids")


def _is_id(value: object) -> bool:
    return _whole(value) and 0 <= value < 1 << 24  # type: ignore[operator]


# --- fields ------------------------------------------------------------------------------------------------


def _sampling(given: Mapping[str, Any], *, chat: bool) -> Sampling:
    chosen = {name: given[name] for name in _SAMPLING if name in given}
    if "logit_bias" in given:
        chosen["logit_bias"] = _biases(given["logit_bias"])
    if (logprobs := _logprobs(given) if chat else given.get("logprobs")) is not None:
        chosen["logprobs"] = logprobs
    try:
        return Sampling(**chosen)
    except ValueError as error:
        name = str(error).partition("=")[0].partition("[")[0].split()[0]
        raise BadLine(f"body.{error}", name) from None


def _logprobs(given: Mapping[str, Any]) -> int | None:
    """How many likely tokens a chat wants beside each of its own."""
    wanted, top = given.get("logprobs", False), given.get("top_logprobs")
    if not isinstance(wanted, bool):
        raise _wrong("logprobs", wanted, "true or false")
    if top is not None and not wanted:
        raise _wrong("top_logprobs", top, "absent, unless logprobs is true")
    if not wanted:
        return None
    if not _whole(top or 0):
        raise _wrong("top_logprobs", top, "a whole number from 0 to 20")
    return int(top or 0)


def _biases(found: Any) -> dict[int, Any]:
    if not isinstance(found, dict) or not all(key.isdecimal() and len(key) < 10 for key in found):
        raise _wrong("logit_bias", found, "an object of token ids and numbers")
    return {int(key): bias for key, bias in found.items()}


class _Field(NamedTuple):
    name: str  # of ours
    check: Callable[[Any], bool]
    must: str


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _stop(value: Any) -> bool:
    texts = value if isinstance(value, list) else [value]
    return len(texts) <= 64 and all(isinstance(text, str) and 1 <= len(text) <= 1024 for text in texts)


def _stop_ids(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= 256 and all(map(_is_id, value))


_TOKENS = "a whole number from 1 to 67108864"
_FIELDS: Mapping[str, _Field] = {
    "max_tokens": _Field("max_tokens", lambda value: _whole(value) and 1 <= value <= 1 << 26, _TOKENS),
    "max_completion_tokens": _Field(
        "max_tokens", lambda value: _whole(value) and 1 <= value <= 1 << 26, _TOKENS
    ),
    "stop": _Field("stop", _stop, "a text, or a list of at most 64, each of 1 to 1024 characters"),
    "stop_token_ids": _Field("stop_token_ids", _stop_ids, "a list of at most 256 token ids"),
    "ignore_eos": _Field("ignore_eos", lambda value: isinstance(value, bool), "true or false"),
}
_NAMES = {"template_args": "chat_template_kwargs", "prompt_tokens": "prompt"}  # ours → those of a line
_KNOWN = frozenset(
    {"model", "messages", "prompt", "logprobs", "top_logprobs", "logit_bias", "chat_template_kwargs"}
    | {*_SAMPLING, *_LABELS, *_ONLY, *_FIELDS}
)


def _fields(given: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `messages.Generation`."""
    made: dict[str, Any] = {}
    for name, field in _FIELDS.items():
        if name not in given:
            continue
        value = given[name]
        if not field.check(value):
            raise _wrong(name, value, field.must)
        if made.setdefault(field.name, value) != value:
            raise _wrong(name, value, f"equal to {field.name}, if both are given")
    if isinstance(made.get("stop"), str):
        made["stop"] = [made["stop"]]
    return made


# --- refusals ----------------------------------------------------------------------------------------------


def _wrong(name: str, value: object, must: str, code: str = "bad_request") -> BadLine:
    path = name if name in _LINE else f"body.{name}"
    if value is None:
        return BadLine(f"{path} is missing: must be {must}", name, code)
    said = msgspec.json.encode(value).decode()
    return BadLine(f"{path}={said if len(said) <= 60 else said[:57] + '…'}: must be {must}", name, code)


def _refused(said: str, *, chat: bool) -> BadLine:
    """What the request is refused for, with the line's names of its fields."""
    ours = re.match("[a-z_]+", said)
    field = ours[0] if ours else ""
    param = _NAMES.get(field, field)
    if param not in _KNOWN:  # it concerns all of them
        return BadLine(f"body: {said}", "messages" if chat else "prompt")
    return BadLine(f"body.{param}{said.removeprefix(field)}", param)


def _unknown(name: str, where: str = "") -> BadLine:
    said = name if len(name) <= 60 else name[:57] + "…"
    return BadLine(
        f"{where}{said}: this version does not know this field, and drops none", said, "unsupported"
    )


def _kind(value: object) -> str:
    kinds = {list: "a list", str: "a text", bool: "true or false", int: "a number", float: "a number"}
    return kinds.get(type(value), "null")
