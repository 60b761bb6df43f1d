"""An answer as OpenAI's batches have it: a line with the response's body, or with an error.

Knows OpenAI's format. Does not know where answers come from.
"""

from __future__ import annotations

import time
from codecs import getincrementaldecoder
from collections.abc import Iterator, Mapping
from itertools import zip_longest
from typing import Any

import msgspec

from shoal.comm.messages import Done, Token, TokenLogprob

from .openai_requests import BadLine, BatchRequest

_ENDS = {"stop": "stop", "length": "length"}


class Collected:
    """The events of one answer."""

    def __init__(self, asked: BatchRequest) -> None:
        self.custom_id = asked.custom_id
        self._is_chat = asked.is_chat
        self._wants_logprobs = asked.top_logprobs is not None
        self._texts: list[str] = []
        self._logprobs: list[TokenLogprob] = []

    def take(self, token: Token) -> None:
        self._texts.append(token.text)
        self._logprobs += token.logprobs

    def body(self, name: str, model: str, done: Done) -> dict[str, Any]:
        """The object that OpenAI's endpoint returns. `name` of the answer, `model` that gave it."""
        text = "".join(self._texts)
        wants = self._wants_logprobs
        choice: dict[str, Any] = {"index": 0}
        if self._is_chat:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
            choice["logprobs"] = (
                {"content": list(map(_chat_logprob, self._logprobs)), "refusal": None} if wants else None
            )
        else:
            choice["text"] = text
            choice["logprobs"] = _completion_logprobs(self._logprobs) if wants else None
        choice["finish_reason"] = _ENDS.get(done.finish_reason, done.finish_reason)
        usage = done.usage
        return {
            "id": f"{'chatcmpl' if self._is_chat else 'cmpl'}-{name}",
            "object": "chat.completion" if self._is_chat else "text_completion",
            "created": int(time.time()),
            "model": model,
            "choices": [choice],
            "usage": {
                "prompt_tokens": usage.prompt_tokens,
                "completion_tokens": usage.completion_tokens,
                "total_tokens": usage.prompt_tokens + usage.completion_tokens,
                "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
            },
        }


def answered(identity: str, custom_id: str, body: Mapping[str, Any]) -> bytes:
    """A line with an answer; `identity` is the line's own."""
    response = {"status_code": 200, "request_id": identity, "body": body}
    return _line(identity, custom_id, response, None)


def failed(identity: str, number: int, error: BadLine) -> bytes:
    """A line that says why line `number` of the requests has no answer."""
    said = {"code": error.code, "message": error.message, "param": error.param, "line": number}
    return _line(identity, error.custom_id, None, said)


def _line(identity: str, custom_id: str | None, response: Any, error: Any) -> bytes:
    return msgspec.json.encode({"id": identity, "custom_id": custom_id, "response": response, "error": error})


def _chat_logprob(token: TokenLogprob) -> dict[str, Any]:
    top = [_one(text, data, logprob) for text, data, logprob in _top(token)]
    return {**_one(token.text, token.token_bytes, token.logprob), "top_logprobs": top}


def _one(text: str, data: bytes | None, logprob: float) -> dict[str, Any]:
    """As OpenAI has it: `token` of a part of a character is spelled `\\xf0\\x9f`."""
    token = text if data is None else _escaped(data)
    return {"token": token, "logprob": logprob, "bytes": list(_bytes(text, data))}


def _completion_logprobs(tokens: list[TokenLogprob]) -> dict[str, Any]:
    offsets, length = [], 0
    characters = getincrementaldecoder("utf-8")("replace")  # of which tokens may have parts
    for token in tokens:
        offsets.append(length)
        length += len(characters.decode(_bytes(token.text, token.token_bytes)))
    return {
        "tokens": [_name(token.text, token.token_bytes) for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [{_name(text, data): logprob for text, data, logprob in _top(it)} for it in tokens],
        "text_offset": offsets,
    }


def _top(token: TokenLogprob) -> Iterator[tuple[str, bytes | None, float]]:
    for (_, text, logprob), data in zip_longest(token.top, token.top_bytes):
        yield text, data, logprob


def _bytes(text: str, data: bytes | None) -> bytes:
    return text.encode(errors="replace") if data is None else data


def _name(text: str, data: bytes | None) -> str:
    """As OpenAI's completions spell a token: `bytes:\\xf0\\x9f` where it is a part of a character."""
    return text if data is None else f"bytes:{_escaped(data)}"


def _escaped(data: bytes) -> str:
    return data.decode(errors="backslashreplace")
