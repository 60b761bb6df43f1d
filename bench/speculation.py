"""What guessing ahead gains: one sequence at a time, in turn with and without it, and the same text both times.

    python bench/speculation.py MODEL [--new-tokens 256] [--rounds 3] [--threads 2]
        [--temperature 0] [--text FILE] [--draft SMALL]

Kinds of text: passages to be copied, lists to be edited, code, and prose that repeats nothing on purpose. Every round
runs every prompt with and without speculation, one after the other, the order alternating; what counts is the ratio
within a pair. Ends with 1 when any text differs. FILE is prose to quote from, by default this repository's README. On
a busy machine --cpu-time counts the seconds that the one computing thread got instead of those that passed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from shoal.comm.messages import ChatMessage
from shoal.daemon.config import NodeConfig
from shoal.daemon.loading.assembly import Assembly
from shoal.daemon.loading.loaded_model import LoadedModel
from shoal.daemon.memory import available_bytes
from shoal.daemon.request import chat_text
from shoal.engine.sequence import Failed, Sequence
from shoal.kernels import set_threads
from shoal.models.sampling import Sampler, SamplingParams
from shoal.offload.budget import Budget

ROOT = Path(__file__).resolve().parent.parent


def prompts(quoted: str) -> dict[str, str]:
    code = (ROOT / "engine" / "guess" / "lookup.py").read_text()[:1800]
    rows = "\n".join(f"- item {k}: name=widget_{k}, price={k * 3}.50, stock={k % 7}" for k in range(1, 20))
    return {
        "copy": f"Repeat the following text word for word:\n\n{quoted}",
        "list": f"Here is a list. Write it again, every line, exactly as it is:\n{rows}",
        "edit": f"Write this Python code again, with a comment on every line:\n```python\n{code}\n```",
        "summary": f"Summarise the following text:\n\n{quoted}",
        "json": "Write a JSON array of 12 users, each with id, name, email, and address with street, city and zip.",
        "code": "Write a Python class for a binary search tree with insert, delete, search and traversal.",
        "story": "Write a short story about a lighthouse keeper who finds a strange bottle on the beach.",
        "explain": "Explain how photosynthesis works, in several paragraphs.",
        "history": "Tell me about the history of the Roman Empire.",
    }


def run(model: LoadedModel, ids: list[int], new_tokens: int, params: SamplingParams) -> Sequence:
    """The sequence after it was answered."""
    stop_ids = model.tokenizer.stop_ids
    sequence = Sequence(list(ids), len(ids) + new_tokens, Sampler(params, ids), stop_ids)
    model.engine.submit(sequence)
    while model.engine.step():
        pass
    for event in model.engine.events():
        if isinstance(event, Failed):
            raise event.error
    return sequence


def main() -> None:
    parser = argparse.ArgumentParser(description="speculation: on against off")
    parser.add_argument("model", type=Path)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--text", type=Path, default=ROOT / "README.md")
    parser.add_argument("--draft", type=Path, help="a draft model that guesses besides")
    parser.add_argument("--cpu-time", action="store_true", help="of one thread; implies --threads 1")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    threads = 1 if options.cpu_time else options.threads
    clock = time.thread_time if options.cpu_time else time.monotonic
    config = NodeConfig(threads=threads, context_tokens=2048, max_sequences=1)
    set_threads(threads)
    models = {
        name: Assembly(Budget(available_bytes()), clock=clock).load(
            name, options.model, settings, draft=draft
        )
        for name, settings, draft in (
            ("off", replace(config, max_guesses=0), None),
            ("on", config, options.draft),
        )
    }
    params = SamplingParams(temperature=options.temperature, top_p=0.95, top_k=40, seed=1)
    results: list[dict[str, Any]] = []
    differing = 0
    for kind, text in prompts(options.text.read_text()[:2000]).items():
        prompt = chat_text(models["on"], [ChatMessage(role="user", content=text)])
        ids = models["on"].tokenizer.encode(prompt, add_special=False)
        speeds: dict[str, list[float]] = {"off": [], "on": []}
        for round_ in range(options.rounds):
            said: dict[str, list[int]] = {}
            last = {}
            for name in ("off", "on") if round_ % 2 else ("on", "off"):
                last[name] = asked = run(models[name], ids, options.new_tokens, params)
                said[name] = asked.tokens[asked.prompt_tokens :]
                decode_s = asked.times.last_token_s - asked.times.first_token_s
                speeds[name].append((len(said[name]) - 1) / decode_s if decode_s else 0.0)
            differing += said["on"] != said["off"]
        ratios = [on / off for on, off in zip(speeds["on"], speeds["off"], strict=True) if off]
        results.append(
            {
                "kind": kind,
                "tokens": len(said["on"]),
                "drafted": last["on"].drafted_tokens,
                "accepted": last["on"].accepted_tokens,
                "off": median(speeds["off"]),
                "on": median(speeds["on"]),
                "ratio": median(ratios or [1.0]),
                "ratio_range": [min(ratios or [1.0]), max(ratios or [1.0])],
                "same": said["on"] == said["off"],
            }
        )
        if not options.json:
            found = results[-1]
            low, high = found["ratio_range"]
            print(
                f"{kind:8s} {found['tokens']:4d} tokens  off {found['off']:6.1f}  on {found['on']:6.1f} tokens/s  "
                f"ratio {found['ratio']:.2f} ({low:.2f}–{high:.2f})  "
                f"accepted {found['accepted']}/{found['drafted']}  {'same' if found['same'] else 'DIFFERENT'}",
                flush=True,
            )
    if options.json:
        print(json.dumps(results))
    sys.exit(1 if differing else 0)


if __name__ == "__main__":
    main()
