"""`shoal batch` as a process of its own, on a tiny model: killed, resumed, and with a broken line among the others."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from fakes import tiny

REQUESTS = 120
WAIT_S = 60.0


def ask(directory: Path, model: Path) -> None:
    """Greedy and seeded requests, some of which begin alike, and one broken line."""
    lines = []
    for number in range(REQUESTS):
        beginning = "the end and the " * (12 if number % 3 else 0)
        body: dict[str, Any] = {"model": str(model), "prompt": f"{beginning}{number}", "max_tokens": 24}
        body |= {"temperature": 0} if number % 2 else {"temperature": 1, "seed": number}
        asked = {"custom_id": f"c{number}", "method": "POST", "url": "/v1/completions", "body": body}
        lines.append(json.dumps(asked))
    lines[50] = '{"custom_id": "c50"'
    (directory / "in.jsonl").write_text("\n".join(lines))


def begin(directory: Path, out: str) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-c",
        "from shoal.cli.main import main; main()",
        "batch",
        "in.jsonl",
        out,
        "--json",
    ]
    env = {**os.environ, "SHOAL_HOME": str(directory / "home")}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=directory, env=env, stdout=pipe, stderr=pipe, text=True)


def answers(path: Path) -> dict[str, Any]:
    """What was said, by custom_id; each has one line."""
    found: dict[str, Any] = {}
    for line in path.read_text().splitlines():
        one = json.loads(line)
        key = one["custom_id"] or one["id"]
        assert key not in found
        found[key] = one["response"]["body"]["choices"] if one["response"] else one["error"]
    return found


def test_a_batch_on_a_real_model(tmp_path: Path) -> None:
    model = tiny.save_gguf(tiny.hf_model("llama"), tmp_path / "m.gguf")
    ask(tmp_path, model)
    with begin(tmp_path, "out.jsonl") as process:
        out, said = process.communicate(timeout=WAIT_S)
    assert (process.returncode, said) == (1, "")
    summary = json.loads(out)
    assert (summary["answered"], summary["failed"], summary["left"]) == (REQUESTS - 1, 1, 0)
    assert summary["cached_tokens"] > 0
    assert len(answers(tmp_path / "out.jsonl")) == REQUESTS


@pytest.mark.cluster
def test_killed_five_times_and_resumed_the_answers_are_those_of_an_unbroken_run(tmp_path: Path) -> None:
    model = tiny.save_gguf(tiny.hf_model("llama"), tmp_path / "m.gguf")
    ask(tmp_path, model)
    with begin(tmp_path, "whole.jsonl") as process:
        process.communicate(timeout=WAIT_S)
    source = random.Random(int(os.environ.get("SEED", "1")))
    torn = tmp_path / "torn.jsonl"
    for kill in range(5):
        wanted = kill * REQUESTS // 6 + source.randrange(REQUESTS // 6)
        with begin(tmp_path, "torn.jsonl") as process:
            until_s = time.monotonic() + WAIT_S
            while not torn.exists() or torn.read_bytes().count(b"\n") < wanted:
                assert process.poll() is None, process.communicate()
                assert time.monotonic() < until_s
                time.sleep(0.002)
            process.send_signal(signal.SIGKILL if kill else signal.SIGINT)
            process.communicate(timeout=WAIT_S)
        assert process.returncode == (-signal.SIGKILL if kill else 130)
    with begin(tmp_path, "torn.jsonl") as process:
        out, _ = process.communicate(timeout=WAIT_S)
    assert process.returncode == 1
    assert json.loads(out)["answered_now"] < REQUESTS
    assert answers(torn) == answers(tmp_path / "whole.jsonl")
