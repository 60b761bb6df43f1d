"""Daemons as processes on loopback, each with a home of its own, through the commands that people type."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil

from shoal.client import Client
from shoal.comm.home import Home
from shoal.daemon.cluster.speed import kernels_key

from .clusters import wait_for


def with_tested_kernels(home: Home) -> Home:
    """A home whose worker need not compare its kernels with the reference, which takes seconds."""
    home.cluster.mkdir(parents=True, exist_ok=True)
    (home.cluster / "kernels.tested").write_text(kernels_key())
    return home


class Daemons:
    """Homes below one directory, and the daemons that run with them. The head listens at `port`."""

    def __init__(self, directory: Path, port: int) -> None:
        self._directory = directory
        self.port = port
        self.pids: dict[str, int] = {}

    def __enter__(self) -> Daemons:
        return self

    def __exit__(self, *_: object) -> None:
        for name in self.pids:
            self.kill(name, signal.SIGCONT)
            self.kill(name, signal.SIGKILL)

    def home(self, name: str) -> Home:
        home = Home(self._directory / name)
        return home if home.cluster.exists() else with_tested_kernels(home)

    def shoal(self, name: str, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-P", "-m", "shoal.cli.main", *arguments],
            capture_output=True,
            text=True,
            timeout=180,
            env=os.environ | {"SHOAL_HOME": str(self.home(name).root)},
            check=check,
        )

    def start(self, name: str, *options: str) -> None:
        self._note(name, self.shoal(name, "serve", "--detach", "--threads", "1", *options))

    def invite(self) -> str:
        """A fresh code."""
        made = self.shoal("head", "cluster", "init", "--listen", f"127.0.0.1:{self.port}", "--json").stdout
        return str(json.loads(made)["code"])

    def join(self, name: str, *options: str) -> None:
        given = ("--address", f"127.0.0.1:{self.port}", "--threads", "1", "--detach", *options)
        self._note(name, self.shoal(name, "cluster", "join", self.invite(), *given))

    def kill(self, name: str, number: signal.Signals = signal.SIGKILL) -> None:
        """After SIGKILL it is gone when this returns."""
        with suppress(psutil.NoSuchProcess, psutil.TimeoutExpired):
            process = psutil.Process(self.pids[name])
            process.send_signal(number)
            if number == signal.SIGKILL:
                process.wait(10)

    def client(self, name: str = "head") -> Client:
        return Client(self.home(name).address, timeout_s=60)

    def wait_attached(self, members: int, patience_s: float = 60.0) -> None:
        with self.client() as client:
            wait_for(lambda: sum(node.attached for node in client.nodes().nodes[1:]) == members, patience_s)

    def resident_bytes(self, name: str) -> int:
        return int(psutil.Process(self.pids[name]).memory_info().rss)

    def log(self, name: str) -> str:
        return (self.home(name).logs / "daemon.log").read_text(errors="replace")

    def _note(self, name: str, done: subprocess.CompletedProcess[str]) -> None:
        found = re.search(r"pid (\d+)", done.stderr)
        assert found, done.stderr
        self.pids[name] = int(found[1])
