"""README says what there is: its commands are accepted, its make targets exist, its Python runs."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
from fakes.api_fakes import running

from shoal.cli.verbs import cli
from shoal.comm.home import Home

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
LINES = [
    line.split("  #")[0].strip()
    for block in re.findall(r"^```sh\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
    if line.strip()
]


def shoal_calls() -> list[list[str]]:
    calls = [part.strip() for line in LINES for part in line.split("|") if part.strip().startswith("shoal ")]
    assert len(calls) > 15
    return [shlex.split(call)[1:] for call in calls]


@pytest.mark.parametrize("arguments", shoal_calls(), ids=" ".join)
def test_commands_are_accepted(arguments: list[str]) -> None:
    command = cli.get_command(click.Context(cli), arguments[0])
    if isinstance(command, click.Group):
        group, arguments = command, arguments[1:]
        command = group.get_command(click.Context(group), arguments[0])
    assert command is not None
    # resilient: values such as files need not exist, but options must be known
    with command.make_context(arguments[0], arguments[1:], resilient_parsing=True):
        pass
    known = {option for parameter in command.params for option in parameter.opts}
    assert {a.split("=")[0] for a in arguments[1:] if a.startswith("-")} <= known


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = {line.split()[1] for line in LINES if line.startswith("make ")}
    assert {"run", "test"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_the_python_runs(tmp_path: Path) -> None:
    code = re.search(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    assert code
    with running(Home(tmp_path).address):
        result = subprocess.run(
            [sys.executable, "-c", code[1]],
            env={**os.environ, "SHOAL_HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    assert result.stderr == ""
    assert result.stdout.strip()
