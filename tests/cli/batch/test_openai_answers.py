"""Log probabilities in OpenAI's form, also of tokens that are parts of characters."""

from __future__ import annotations

import json
from typing import Any

from fakes.cli_fakes import TIMINGS

from shoal.cli.batch.openai_answers import Collected
from shoal.cli.batch.openai_requests import parse
from shoal.comm.messages import Done, Token, TokenLogprob, Usage

# A flower in four tokens (the last two likely at the same place), and a word.
TOKENS = [
    TokenLogprob(id=1, text=" \ufffd", logprob=-1.0, top=[(1, " \ufffd", -1.0), (9, "a", -2.0)], token_bytes=b" \xf0",
                 top_bytes=[b" \xf0", None]),
    TokenLogprob(id=2, text="\ufffd", logprob=-1.0, top=[(2, "\ufffd", -1.0), (3, "\ufffd", -2.0)],
                 token_bytes=b"\x9f", top_bytes=[b"\x9f", b"\x8c\xb8"]),
    TokenLogprob(id=3, text="\ufffd", logprob=-1.0, top=[(3, "\ufffd", -1.0)], token_bytes=b"\x8c\xb8",
                 top_bytes=[b"\x8c\xb8"]),
    TokenLogprob(id=4, text=" it", logprob=-1.0, top=[(4, " it", -1.0)]),
]  # fmt: skip


def choice(url: str, **body: Any) -> Any:
    line = {"custom_id": "a", "method": "POST", "url": url, "body": {"model": "m", **body}}
    collected = Collected(parse(json.dumps(line).encode(), None))
    for token in TOKENS:
        collected.take(Token(text="", ids=[token.id], logprobs=[token]))
    collected.take(Token(text=" \U0001f338 it", ids=[]))
    usage = Usage(prompt_tokens=1, completion_tokens=4)
    return collected.body("x", "m", Done(finish_reason="stop", usage=usage, timings=TIMINGS))["choices"][0]


def test_the_bytes_of_a_chat_can_be_joined() -> None:
    found = choice("/v1/chat/completions", messages=[{"role": "user", "content": "x"}], logprobs=True)
    content = found["logprobs"]["content"]
    assert bytes(byte for token in content for byte in token["bytes"]).decode() == found["message"]["content"]
    assert [token["token"] for token in content] == [" \\xf0", "\\x9f", "\\x8c\\xb8", " it"]
    assert [(top["token"], top["bytes"]) for top in content[1]["top_logprobs"]] == [
        ("\\x9f", [0x9F]),
        ("\\x8c\\xb8", [0x8C, 0xB8]),
    ]
    assert [(top["token"], top["bytes"]) for top in content[0]["top_logprobs"]][1] == ("a", [ord("a")])


def test_the_likely_tokens_of_a_completion_keep_apart() -> None:
    found = choice("/v1/completions", prompt="x", logprobs=2)
    logprobs = found["logprobs"]
    assert logprobs["tokens"] == ["bytes: \\xf0", "bytes:\\x9f", "bytes:\\x8c\\xb8", " it"]
    assert logprobs["top_logprobs"][:2] == [
        {"bytes: \\xf0": -1.0, "a": -2.0},
        {"bytes:\\x9f": -1.0, "bytes:\\x8c\\xb8": -2.0},
    ]
    assert logprobs["text_offset"] == [0, 1, 1, 2]
    assert found["text"][2:] == " it"
