"""The default model's tokenizer gives the ids that llama.cpp gave (smollm2_ids.json, made from the corpus in
bench/inputs/nasty_corpus.py); `bench/check_tokenizer.py` makes the comparison for any GGUF."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from shoal.comm.home import Home
from shoal.daemon.library.library import Library
from shoal.models.chat.template import ChatTemplate
from shoal.models.checkpoint.checkpoint import open_checkpoint
from shoal.models.tokenizer.detokenizer import Detokenizer


@pytest.mark.peer
def test_the_default_model() -> None:
    given = os.environ.get("SHOAL_TEST_MODEL")
    with open_checkpoint(Path(given) if given else Library(Home.from_env()).resolve("smollm2")) as checkpoint:
        tokenizer = checkpoint.tokenizer()
    for text, ids in json.loads((Path(__file__).parent / "smollm2_ids.json").read_text()):
        assert tokenizer.encode(text) == ids
        detokenizer = Detokenizer(tokenizer)
        pieces = "".join(map(detokenizer.push, ids)) + detokenizer.flush()
        assert pieces == tokenizer.decode(ids, skip_special=True)
    assert {tokenizer.id_to_token(i) for i in tokenizer.stop_ids} >= {"<|im_end|>", "<|endoftext|>"}
    prompt = ChatTemplate(tokenizer.chat_template).render([{"role": "user", "content": "Hi"}])
    ids = tokenizer.encode(prompt, add_special=False)
    assert [i for i in ids if tokenizer.is_special(i)] == [1, 2, 1, 2, 1]
    assert tokenizer.decode(ids) == prompt
