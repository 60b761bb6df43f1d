"""A batch of requests, answered as fast as can be: `shoal batch`, the same one request at a time, and the peer.

Knows what is asked and what is timed: from the first request to the last answer, without loading. All get the same
prompts in the same order of beginnings. How many requests an engine gets differs, because slow ones would take hours.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from harness.figures import Figure
from harness.run import Run
from harness.scenarios import Sizes
from inputs import batches

ONE_BY_ONE = "one by one"
_SHARE = {ONE_BY_ONE: 12}  # it gets 1/n of the requests
_PEER_SHARE = 5
_LIMIT_S = 3600


def offline(run: Run, sizes: Sizes) -> list[Figure]:
    """Requests a second of a whole batch. `sizes.streams` is the peer's batch."""
    what = f"requests of {sizes.prompt} + {sizes.new} tokens"
    against_peer = Figure(f"{what}, against the peer's best batch", "requests/s")
    against_alone = Figure(f"{what}, against {ONE_BY_ONE}", "requests/s")
    for number, name in run.names_in_turn(("shoal", ONE_BY_ONE, sizes.peer)):
        run.look()
        share = _SHARE.get(name, 1 if name == "shoal" else _PEER_SHARE)
        prompts = batches.prompts(sizes.requests // share, number)
        if name == sizes.peer:
            against_peer.note(name, _peer(run, sizes, prompts))
            continue
        speed = _batch(run, sizes, prompts, alone=name == ONE_BY_ONE)
        against_alone.note(name, speed)
        if name == "shoal":
            against_peer.note(name, speed)
    return [against_peer, against_alone]


def _batch(run: Run, sizes: Sizes, prompts: list[list[int]], *, alone: bool) -> float:
    with tempfile.TemporaryDirectory() as directory:
        asked, out = Path(directory) / "in.jsonl", Path(directory) / "out.jsonl"
        batches.write(asked, prompts, str(run.model), sizes.new)
        command = [sys.executable, "-P", "-m", "shoal.cli.main", "batch", str(asked), str(out), "--json"]
        command += ["--local", "--threads", str(run.threads), *(["--sequences", "1"] if alone else [])]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT_S, check=False)
    if done.returncode:
        raise RuntimeError(f"shoal batch: {done.stderr.strip()[-300:]}")
    found = json.loads(done.stdout)
    name = ONE_BY_ONE if alone else "shoal"
    run.facts[name] = {key: found[key] for key in ("prompt_tokens", "cached_tokens", "completion_tokens")}
    return float(found["requests_per_s"])


def _peer(run: Run, sizes: Sizes, prompts: list[list[int]]) -> float:
    context = max(map(len, prompts)) + sizes.new
    with run.engines((sizes.peer,), context=context, streams=sizes.streams) as (engine,):
        done = engine.call("answer_all", prompts=sorted(prompts), new=sizes.new)
    return len(prompts) / float(done["seconds"])
