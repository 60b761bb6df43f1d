"""The caller's side of the workers: starts an engine's process, calls it, and ends it.

Knows which python and script serves which engine. Does not know what is measured (`scenarios`).
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

CALL_S = 1800.0  # the longest a call may take
CLOSE_S = 30.0
BENCH = Path(__file__).parent.parent


class EngineFailed(Exception):
    """An engine could not be started, did not answer, or answered with an error."""


@dataclass(frozen=True)
class EngineKind:
    """An engine that can be measured: its name in tables, and the command that runs it."""

    name: str
    script: str
    python: str
    arguments: tuple[str, ...] = ()

    def start(self, enter: Callable[[], None] | None = None) -> EngineProcess:
        """Starts the engine; the new process first calls `enter`."""
        return EngineProcess(self, enter)


def kinds(peer_python: str) -> dict[str, EngineKind]:
    """All engines by name. `peer_python` has llama-cpp-python and Accelerate, this Python Shoal and transformers."""
    return {
        kind.name: kind
        for kind in (
            EngineKind("shoal", "engine_shoal.py", sys.executable),
            EngineKind("llama.cpp", "engine_llama.py", peer_python),
            EngineKind("llama.cpp without flash attention", "engine_llama.py", peer_python, ("--no-flash",)),
            EngineKind("transformers", "engine_transformers.py", sys.executable),
            EngineKind("accelerate", "engine_accelerate.py", peer_python),
        )
    }


class EngineProcess:
    """A running worker. One thread may `call` it as often as it likes."""

    def __init__(self, kind: EngineKind, enter: Callable[[], None] | None = None) -> None:
        self.name = kind.name
        script = Path(__file__).parent / kind.script
        found = [str(BENCH), *filter(None, [os.environ.get("PYTHONPATH")])]
        try:
            self._process = subprocess.Popen(
                [kind.python, str(script), *kind.arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                encoding="utf-8",
                preexec_fn=enter,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(found)},
            )
        except OSError as error:
            raise EngineFailed(f"{kind.python} for {self.name}: {error.strerror}") from error

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def call(self, name: str, **arguments: Any) -> Any:
        """The result of one call. Raises EngineFailed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"call": name, "with": arguments}) + "\n")
            self._process.stdin.flush()
        except OSError as error:
            raise EngineFailed(f"{self.name} has ended: {error.strerror}") from error
        if not select.select([self._process.stdout], [], [], CALL_S)[0]:
            raise EngineFailed(f"{self.name} has not answered {name} within {CALL_S:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise EngineFailed(f"{self.name} ended while it was asked to {name} (its output is not kept)")
        answer = json.loads(line)
        if "error" in answer:
            raise EngineFailed(f"{self.name} failed to {name}: {answer['error']}")
        return answer["result"]

    def close(self) -> None:
        """End the process. Idempotent."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(CLOSE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
