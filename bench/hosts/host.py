"""A host: a machine of its own as far as Shoal can tell, with a name, a network, processors, memory and a home.

A command runs in the host's network and mount namespaces and under its name, so what it sees of interfaces is the
host's. Processes of all hosts see one another, and all hosts share the kernel's clock and page cache.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hosts.limits import HostCgroup
from hosts.network import Cable

from shoal.client import Client
from shoal.comm.home import Home

COMMAND_S = 300.0
PORT = 7447
# Into the cgroups, the network, a mount namespace whose /sys shows that network (and the cgroups as before), the name.
ENTER = """
for group in $HOST_CGROUPS; do echo $$ >"$group/cgroup.procs" || exit 125; done
exec nsenter --net=/run/netns/$HOST_NAMESPACE unshare --mount --uts sh -c '
    mkdir -p "$HOST_ROOT/cgroup" && mount --rbind /sys/fs/cgroup "$HOST_ROOT/cgroup" &&
    mount -t sysfs sysfs /sys && mount --rbind "$HOST_ROOT/cgroup" /sys/fs/cgroup &&
    hostname "$HOST_NAME" && exec "$@"' sh "$@"
"""


class HostFailed(Exception):
    """A command on a host failed."""


@dataclass
class Host:
    """`pid` is that of its daemon, 0 if none was started."""

    name: str
    namespace: str
    root: Path
    cgroup: HostCgroup
    threads: int = 1
    memory: str = ""  # what the daemon is told, as `--memory` has it
    cables: list[Cable] = field(default_factory=list)
    pid: int = 0
    join_at: str = ""  # the address at which it finds the head, if not by itself

    @property
    def home(self) -> Home:
        return Home(self.root / "home")

    def command(self, *words: str) -> tuple[list[str], dict[str, str]]:
        """The command that runs these words here, and its environment."""
        environment = os.environ | {
            "HOST_CGROUPS": " ".join(map(str, self.cgroup.paths)),
            "HOST_NAMESPACE": self.namespace,
            "HOST_ROOT": str(self.root),
            "HOST_NAME": self.name,
            "SHOAL_HOME": str(self.home.root),
        }
        return ["sh", "-c", ENTER, "sh", *words], environment

    def run(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Raises HostFailed, unless it need not succeed."""
        command, environment = self.command(*words)
        # Files, as a daemon that goes on in the background keeps pipes open.
        with (self.root / "stdout").open("w+") as out, (self.root / "stderr").open("w+") as err:
            done = subprocess.run(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                timeout=COMMAND_S,
                check=False,
            )
            out.seek(0)
            err.seek(0)
            result = subprocess.CompletedProcess(words, done.returncode, out.read(), err.read())
        if check and result.returncode:
            raise HostFailed(
                f"{self.name}: {' '.join(words)}: {result.stderr.strip() or result.stdout.strip()}"
            )
        return result

    def start(self, *words: str) -> subprocess.Popen[bytes]:
        """A process that goes on; its output is in a file of the host."""
        command, environment = self.command(*words)
        with (self.root / "output").open("ab") as output:
            return subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def shoal(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = self.run(sys.executable, "-P", "-m", "shoal.cli.main", *arguments, check=check)
        if found := re.search(r"\(?pid (\d+)", done.stderr):
            self.pid = int(found[1])
        return done

    def serve(self, *more: str) -> None:
        self.shoal("serve", "--detach", *self._lent, *more)

    def join(self, head: Host) -> None:
        made = json.loads(head.shoal("cluster", "init", "--json").stdout)
        at = ("--address", self.join_at) if self.join_at else ()
        self.shoal("cluster", "join", made["code"], *at, "--detach", *self._lent)

    @property
    def _lent(self) -> list[str]:
        return ["--threads", str(self.threads), *(("--memory", self.memory) if self.memory else ())]

    def kill(self, number: int = signal.SIGKILL) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait_gone(self, limit_s: float = 30.0) -> None:
        """Until its daemon has ended."""
        ends_s = time.monotonic() + limit_s
        while Path(f"/proc/{self.pid}/stat").exists() and _state(self.pid) != "Z":
            if time.monotonic() > ends_s:
                raise HostFailed(f"{self.name}: pid {self.pid} has not ended")
            time.sleep(0.02)

    def client(self, timeout_s: float = 60.0) -> Client:
        return Client(self.home.address, timeout_s=timeout_s)

    def resident_bytes(self, key: str = "VmRSS") -> int:
        """Of its daemon, as /proc/PID/status has it: VmRSS now, VmHWM at most."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))

    def busiest_thread(self, over_s: float = 0.3) -> int:
        """The number of the thread of its daemon that computed most lately."""
        before = self._thread_ticks()
        time.sleep(over_s)
        return max(self._thread_ticks().items(), key=lambda it: it[1] - before.get(it[0], 0))[0]

    def lives_without(self, thread: int, over_s: float = 0.7) -> bool:
        """Whether other threads of its daemon have run lately."""
        before = self._switches(thread)
        time.sleep(over_s)
        return self._switches(thread) != before

    def _switches(self, thread: int) -> dict[str, str]:
        found: dict[str, str] = {}
        for task in Path(f"/proc/{self.pid}/task").iterdir():
            with suppress(OSError):
                if task.name != str(thread):
                    found[task.name] = (task / "schedstat").read_text()
        return found

    def _thread_ticks(self) -> dict[int, int]:
        ticks: dict[int, int] = {}
        for task in Path(f"/proc/{self.pid}/task").iterdir():
            with suppress(OSError):
                ticks[int(task.name)] = sum(map(int, _fields(task / "stat")[11:13]))
        return ticks

    def log(self, lines: int = 20) -> str:
        texts = [path.read_text(errors="replace") for path in sorted(self.home.logs.glob("*.log"))]
        return "\n".join("".join(texts).splitlines()[-lines:])

    def status(self) -> Any:
        with self.client() as client:
            return client.status()


def _fields(path: Path) -> list[str]:
    """Of a `stat`, those after the name."""
    return path.read_text().rpartition(")")[2].split()


def _state(pid: int) -> str:
    with suppress(OSError):
        return _fields(Path(f"/proc/{pid}/stat"))[0]
    return "Z"
