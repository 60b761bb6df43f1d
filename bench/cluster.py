"""What a group gains or costs: one machine alone against a group of processes, in turn, on loopback.

    python bench/cluster.py MODEL.gguf [--ranks 2,3] [--threads 1] [--prompt 512] [--new 32] [--rounds 7]

Each daemon has its own home and so many threads. A head without workers answers first, then the heads of groups of so
many ranks, which were told not to use fewer. All stay up; every round asks each of them once. Nothing crosses a real
network, and all ranks share this machine's memory and processors: pin or limit them for more than the cost of sums.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from statistics import median

from harness.figures import spread

from shoal.client import Client
from shoal.comm.home import Home
from shoal.comm.messages import Done, Token
from shoal.daemon.throughput.kept_profile import Kept, profile_key, write_kept
from shoal.daemon.throughput.own_machine import profile_file
from shoal.partition.throughput.profile import Profile

PORT = 27447
CLOSING_S = 30.0


class Machine:
    """A home with a daemon."""

    def __init__(self, root: Path, threads: int, pin: str) -> None:
        self.home = Home(root)
        self._threads = str(threads)
        self._pin = ["taskset", "-c", pin] if pin else []
        self.pid = 0

    def shoal(self, *arguments: str) -> str:
        command = [*self._pin, sys.executable, "-P", "-m", "shoal.cli.main", *arguments]
        environment = os.environ | {"SHOAL_HOME": str(self.home.root)}
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        if done.returncode:
            raise SystemExit(f"{' '.join(arguments)}: {done.stderr}")
        if found := re.search(r"pid (\d+)", done.stderr):
            self.pid = int(found[1])
            _schedule_as_us(self.pid)
        return done.stdout

    def serve(self, more: Sequence[str]) -> None:
        self.shoal("serve", "--detach", "--threads", self._threads, *more)

    def join(self, head: Machine, port: int) -> None:
        made = json.loads(head.shoal("cluster", "init", "--listen", f"127.0.0.1:{port}", "--json"))
        lent = ("--threads", self._threads, "--detach")
        self.shoal("cluster", "join", made["code"], "--address", made["address"], *lent)

    def close(self) -> None:
        """Ends the daemon, and waits until it has: while it writes K and V down and gives memory back, nothing else can
        be measured."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGTERM)
            ends_s = time.monotonic() + CLOSING_S
            while time.monotonic() < ends_s:
                time.sleep(0.05)
                os.kill(self.pid, 0)


def _schedule_as_us(pid: int) -> None:
    """A daemon that detaches has a session, and on Linux with it a scheduling group of usual priority: beside others it
    would take twice as long as what it is compared with."""
    with suppress(OSError):
        nice = Path("/proc/self/autogroup").read_text().split()[-1]
        Path(f"/proc/{pid}/autogroup").write_text(nice)


@contextmanager
def attached(
    ranks: int,
    threads: int,
    port: int,
    pins: list[str],
    serving: Sequence[str] = (),
    profile: Profile | None = None,
) -> Iterator[Client]:
    """A client of a head to which all but one of so many machines are attached. `serving`: more options of `shoal
    serve`. `profile`: what each of them has measured of itself."""
    with tempfile.TemporaryDirectory(prefix="shoal-cluster-") as root, ExitStack() as stack:
        head, *workers = (Machine(Path(root) / str(rank), threads, pins[rank]) for rank in range(ranks))
        for machine in (head, *workers) if profile is not None else ():
            key = profile_key(threads, machine.home.streamed)
            write_kept(profile_file(machine.home, threads), key, Kept(profile, looked_s=time.time()))
        head.serve(serving)
        stack.callback(head.close)
        for worker in workers:
            worker.join(head, port)
            stack.callback(worker.close)
        client = stack.enter_context(Client(head.home.address, timeout_s=300))
        ends_s = time.monotonic() + 30
        while ranks > 1 and sum(node.attached for node in client.nodes().nodes[1:]) < ranks - 1:
            if time.monotonic() > ends_s:
                raise SystemExit("the workers have not attached")
            time.sleep(0.1)
        yield client


@contextmanager
def group(
    model: Path,
    ranks: int,
    threads: int,
    port: int,
    pins: list[str],
    serving: Sequence[str] = (),
    profile: Profile | None = None,
) -> Iterator[Client]:
    """A client of a head that computes `model` with so many ranks (see `attached`)."""
    with attached(ranks, threads, port, pins, serving, profile) as client:
        loaded = client.load(str(model), ranks=ranks).model
        if loaded.ranks != ranks:
            raise SystemExit(f"{loaded.ranks} ranks compute it")
        yield client


def ask(client: Client, prompt: list[int], new: int) -> tuple[float, float]:
    """(seconds to the first token, seconds for each later one)."""
    first_s = last_s = 0.0
    began_s = time.perf_counter()
    count = 0
    for event in client.generate(prompt_tokens=prompt, max_tokens=new, ignore_eos=True, temperature=0.0):
        if isinstance(event, Token):
            last_s = time.perf_counter()
            first_s = first_s or last_s
        elif isinstance(event, Done):
            count = event.usage.completion_tokens
    return first_s - began_s, (last_s - first_s) / max(1, count - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description="a group of processes against one")
    parser.add_argument("model", type=Path)
    parser.add_argument("--ranks", default="2")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--pin", action="store_true", help="each rank on a processor of its own")
    options = parser.parse_args()
    sizes = [1, *map(int, options.ranks.split(","))]
    source = random.Random(0)
    with ExitStack() as stack:
        clients = []
        for place, ranks in enumerate(sizes):
            cpus = os.cpu_count() or 1
            pins = [str(rank % cpus) if options.pin else "" for rank in range(ranks)]
            made = group(options.model.resolve(), ranks, options.threads, PORT + place, pins)
            clients.append(stack.enter_context(made))
        found: list[list[tuple[float, float]]] = [[] for _ in sizes]
        for number in range(options.rounds + 1):
            prompt = [source.randrange(1000) for _ in range(options.prompt)]
            for figures, client in zip(found, clients, strict=True):
                figures.append(ask(client, prompt, options.new))
            if not number:  # a warm-up
                for figures in found:
                    figures.clear()
        status = [client.status().models[0] for client in clients]
    print(f"{'ranks':>6} {'first token, s':>28} {'ms per token':>28} {'token, group ÷ alone':>28}")
    for ranks, figures, model in zip(sizes, found, status, strict=True):
        first, token = zip(*figures, strict=True)
        ratios = [one[1] / alone[1] for one, alone in zip(figures, found[0], strict=True)]
        print(
            f"{ranks:6} {spread(list(first)):>28} {spread([1000 * s for s in token]):>28} "
            f"{median(ratios):>12.3f} ({min(ratios):.3f}–{max(ratios):.3f})   {model.machines_why}"
        )


if __name__ == "__main__":
    main()
