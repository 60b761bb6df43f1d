"""A daemon for one measurement: `shoal serve` with an empty home, both gone afterwards.

Knows the command and its socket. Does not know what is asked of it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from shoal.client import Client
from shoal.comm.errors import CommError
from shoal.comm.home import Home

START_S = 120.0
STOP_S = 30.0


@dataclass(frozen=True)
class Daemon:
    pid: int
    address: str


@contextmanager
def serving(model: Path, context: int, threads: int) -> Iterator[Daemon]:
    """A daemon with `model` loaded. RuntimeError with its log if it does not start."""
    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as root:
        command = [sys.executable, "-m", "shoal.cli.main", "serve", "--model", str(model)]
        command += ["--ctx", str(context), "--threads", str(threads)]
        log = Path(root) / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, env={**os.environ, "SHOAL_HOME": root}, stdout=output, stderr=output
            )
        try:
            address = Home(Path(root)).address
            _wait_for_model(address, process, log)
            yield Daemon(process.pid, address)
        finally:
            process.terminate()
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_for_model(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline_s = time.monotonic() + START_S
    while time.monotonic() < deadline_s and process.poll() is None:
        try:
            with Client(address) as client:
                if client.status().models:
                    return
        except CommError:
            pass
        time.sleep(0.1)
    raise RuntimeError(f"the daemon has not come up: {log.read_text(errors='replace')[-500:]}")
