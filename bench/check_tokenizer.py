"""Compare the token ids of a GGUF between Shoal and llama.cpp.

    python bench/check_tokenizer.py MODEL.gguf --peer-python PATH [--fuzz 3000] [--seed 0]

PATH is a python that has llama-cpp-python. Every text of the corpus and of the fuzzer is tokenised by both,
once with control tokens recognised and once without. Exits with 1 if any ids differ. Deliberately does not
judge who is right.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from gguf import GGUFReader
from inputs.nasty_corpus import TEXTS, fuzz

from shoal.models.tokenizer.tokenizer import Tokenizer

_PEER = """
import json, sys
import llama_cpp
from llama_cpp import Llama
model = Llama(model_path=sys.argv[1], vocab_only=True, verbose=False)
for line in sys.stdin:
    text, parse = json.loads(line)
    print(json.dumps(model.tokenize(text.encode(), add_bos=True, special=parse)))
"""


def main() -> int:
    parser = argparse.ArgumentParser(description="token ids of a GGUF: Shoal against llama.cpp")
    parser.add_argument("model", type=Path)
    parser.add_argument("--peer-python", required=True)
    parser.add_argument("--fuzz", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", type=int, default=10, help="how many differences to print")
    options = parser.parse_args()

    cases = [(text, parse) for text in [*TEXTS, *fuzz(options.fuzz, options.seed)] for parse in (True, False)]
    theirs = _peer_ids(options.peer_python, options.model, cases)
    fields = GGUFReader(options.model).fields
    metadata = {name: field.contents() for name, field in fields.items() if not name.startswith("GGUF.")}
    started = time.perf_counter()
    tokenizer = Tokenizer.from_gguf(metadata)
    load_s = time.perf_counter() - started
    differing = forged = 0
    for (text, parse), expected in zip(cases, theirs, strict=True):
        ours = tokenizer.encode(text, parse_special=parse)
        if ours == expected:
            continue
        if not parse and sum(map(tokenizer.is_special, expected)) > sum(map(tokenizer.is_special, ours)):
            forged += 1  # the peer lets plain text merge into control tokens, which Shoal never does
        else:
            differing += 1
            if differing <= options.show:
                print(f"parse_special={parse} {text!a}\n  shoal     {ours}\n  llama.cpp {expected}")
    print(
        f"{options.model.name}: {differing} of {len(cases)} texts differ, {forged} more where the peer "
        f"made control tokens of plain text; vocabulary built in {load_s:.3f} s"
    )
    return 1 if differing else 0


def _peer_ids(python: str, model: Path, cases: list[tuple[str, bool]]) -> list[list[int]]:
    lines = "".join(json.dumps(case) + "\n" for case in cases)
    done = subprocess.run(
        [python, "-c", _PEER, str(model)],
        input=lines,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    if done.returncode:
        sys.exit(f"the peer failed: {done.stderr.strip()[-500:]}")
    return [json.loads(line) for line in done.stdout.splitlines()]


if __name__ == "__main__":
    sys.exit(main())
