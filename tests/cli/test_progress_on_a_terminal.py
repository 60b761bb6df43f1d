"""The progress of a prompt on a real terminal: it is shown while nothing else comes, and nothing of it stays."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

SLOWLY = """
import sys, time
sys.argv[1:] = {arguments!r}
import shoal.daemon.node, shoal.engine.executor
shoal.daemon.node.STAGE_S = 0.02
go_on = shoal.engine.executor.Executor._go_on
shoal.engine.executor.Executor._go_on = lambda self: (time.sleep(0.1), go_on(self))
from shoal.cli.main import main
main()
"""


def run_slowly(tmp_path: Path, *arguments: str, stdout_too: bool) -> tuple[str, str]:
    """A verb in a process of its own whose stderr, and perhaps stdout, is a terminal. → (stdout, what that has got)"""
    screen, child = pty.openpty()
    env = {
        **os.environ,
        "SHOAL_HOME": str(tmp_path / "home"),
        "TERM": "xterm",
        "COLUMNS": "100",
        "LINES": "24",
    }
    process = subprocess.Popen(
        [sys.executable, "-c", SLOWLY.format(arguments=list(arguments))],
        stdin=subprocess.DEVNULL,
        stdout=child if stdout_too else subprocess.PIPE,
        stderr=child,
        env=env,
    )
    os.close(child)
    got = b""
    try:
        while data := os.read(screen, 1 << 16):
            got += data
    except OSError:  # its last writer has closed it
        pass
    os.close(screen)
    out = process.stdout.read().decode() if process.stdout else ""
    assert process.wait(30) == 0, got.decode()
    return out, got.decode()


def left(got: str) -> list[str]:
    """The lines that still stand there at the end."""
    lines = [""]
    for escape, char in re.findall(r"(\x1b\[[\d;?]*[A-Za-z])|([\s\S])", got):
        if char == "\n":
            lines.append("")
        elif char == "\r":
            lines[-1] += "\r"
        elif escape.endswith(("K", "A")):
            lines = lines[:-1] if escape.endswith("A") and len(lines) > 1 else lines
            lines[-1] = ""
        elif char:
            lines[-1] = lines[-1].rpartition("\r")[2] + char
    return [line.strip() for line in lines if line.strip()]


@pytest.mark.parametrize("json_too", [False, True])
def test_a_prompt_shows_how_far_it_is_read(path: Path, tmp_path: Path, json_too: bool) -> None:
    options = ["--raw", "--threads", "1", "--max-tokens", "2", "--temperature", "0"]
    asked = ["run", *options, *(["--json"] if json_too else []), str(path), "the and of to a in " * 5]
    out, got = run_slowly(tmp_path, *asked, stdout_too=not json_too)
    told = [
        (int(done), int(total))
        for done, total in re.findall(r"reading the prompt, (\d+) of (\d+) tokens", got)
    ]
    assert len({done for done, _ in told}) > 1
    assert told == sorted(told)
    assert "reading the prompt" not in "\n".join(left(got))
    if json_too:
        found = json.loads(out)
        assert {total for _, total in told} == {found["prompt_tokens"]}
        assert left(got) == []
    else:
        assert f"{told[0][1]} prompt tokens" in left(got)[-1]
