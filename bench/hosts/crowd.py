"""Many clients of a group at once, which cancel and set deadlines as they like, while workers are lost and come back.

What must hold: no request is silent for long, each ends as it was asked to, the group is whole again at the end, and
no daemon's memory grows.
"""

from __future__ import annotations

import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from hosts.group import TOKENS, Group
from hosts.host import Host, HostFailed

from shoal.client import Client
from shoal.comm.errors import RequestFailed, ShoalError
from shoal.comm.messages import Done, Token

SILENT_S = 60.0  # a client hears something before that: tokens, or that it waits
LATE_S = 15.0  # how long after its deadline a request may end: a loss may lie between
SAMPLE_S = 5.0
SHOWN_S = 1.0  # waits shorter than that are not kept
LOSS_S = 25.0  # from one loss to the next
AWAY_S = 4.0


@dataclass
class Crowd:
    """`run` keeps so many clients busy."""

    group: Group
    clients: int = 32
    seed: int = 0
    most_prompt: int = 300
    most_new: int = 80
    ended: Counter[str] = field(default_factory=Counter)  # how requests have ended
    troubles: list[str] = field(default_factory=list)
    gaps: list[tuple[float, float]] = field(default_factory=list)  # between tokens: until when, how long
    latest_s: float = 0.0  # after a deadline
    memory: list[dict[str, float]] = field(default_factory=list)  # "s", and bytes of each daemon
    losses: list[tuple[float, str]] = field(default_factory=list)  # when, and what
    began_s: float = 0.0

    @property
    def longest_gap_s(self) -> float:
        return max((gap_s for _, gap_s in self.gaps), default=0.0)

    def waits(self) -> list[str]:
        """The longest waits for a token, each with the losses that lie in it or shortly before."""
        shown = []
        for at_s, gap_s in sorted(self.gaps, key=lambda it: -it[1])[:10]:
            near = [f"{what} at {s:.0f} s" for s, what in self.losses if at_s - gap_s - LOSS_S < s < at_s]
            shown.append(f"{gap_s:.1f} s until {at_s:.0f} s, after {', '.join(near) or 'nothing'}")
        return shown

    def run(self, seconds: float) -> None:
        self.began_s = time.monotonic()
        ends_s = self.began_s + seconds
        threads = [threading.Thread(target=self._client, args=(n, ends_s)) for n in range(self.clients)]
        threads += [threading.Thread(target=work, args=(ends_s,)) for work in (self._lose, self._sample)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(seconds + 4 * SILENT_S)
            if thread.is_alive():
                self.troubles.append("a client hangs")

    def _client(self, number: int, ends_s: float) -> None:
        source = random.Random(self.seed * 1000 + number)
        with self.group.head.client(timeout_s=SILENT_S) as client:
            while time.monotonic() < ends_s:
                try:
                    self.ended[self._request(client, source)] += 1
                except RequestFailed as error:
                    self.ended[error.code] += 1
                    if error.code not in ("deadline", "queue_full"):
                        self.troubles.append(f"{error.code}: {error}")
                    time.sleep(0.2)
                except ShoalError as error:
                    self.troubles.append(f"{type(error).__name__}: {error}")
                    time.sleep(1)

    def _request(self, client: Client, source: random.Random) -> str:
        """How it ended."""
        prompt = [source.randrange(TOKENS) for _ in range(source.randrange(4, self.most_prompt))]
        new = source.randrange(1, self.most_new)
        leaves_after = source.randrange(new) if source.random() < 0.3 else None
        deadline_s = 0.5 + source.random() * 20 if source.random() < 0.3 else None
        began_s = time.monotonic()
        last_s, count = 0.0, 0
        stream = client.generate(
            prompt_tokens=prompt, max_tokens=new, ignore_eos=True, temperature=0.8, deadline_s=deadline_s
        )
        try:
            for event in stream:
                now_s = time.monotonic()
                if isinstance(event, Token):
                    if last_s and now_s - last_s >= SHOWN_S:
                        self.gaps.append((now_s - self.began_s, now_s - last_s))
                    last_s, count = now_s, count + len(event.ids)
                    if leaves_after is not None and count > leaves_after:
                        return "left"
                elif isinstance(event, Done):
                    if event.finish_reason == "length" and count != new:
                        self.troubles.append(f"{count} tokens came, {new} were to")
                    return str(event.finish_reason)
            self.troubles.append("a stream ended without an end")
            return "nothing"
        finally:
            stream.close()
            if deadline_s is not None:
                self.latest_s = max(self.latest_s, time.monotonic() - began_s - deadline_s)

    def _lose(self, ends_s: float) -> None:
        source = random.Random(self.seed)
        ways: list[Callable[[Host], None]] = [_killed, _stopped, _unplugged]
        while time.monotonic() < ends_s - LOSS_S - AWAY_S:
            time.sleep(LOSS_S)
            way, worker = source.choice(ways), source.choice(self.group.workers)
            self.losses.append((time.monotonic() - self.began_s, f"{worker.name} {way.__name__.lstrip('_')}"))
            try:
                way(worker)
            except HostFailed as error:
                self.troubles.append(str(error))

    def _sample(self, ends_s: float) -> None:
        while time.monotonic() < ends_s:
            found = {"s": time.monotonic() - self.began_s}
            for host in (self.group.head, *self.group.workers):
                try:
                    found[host.name] = host.resident_bytes()
                except (OSError, StopIteration):
                    continue  # it is being restarted
            self.memory.append(found)
            time.sleep(SAMPLE_S)


def _killed(worker: Host) -> None:
    worker.kill()
    worker.wait_gone()
    time.sleep(AWAY_S)
    worker.serve()


def _stopped(worker: Host) -> None:
    """Frozen for longer than a group waits; then it goes on where it was."""
    worker.kill(signal.SIGSTOP)
    time.sleep(AWAY_S)
    worker.kill(signal.SIGCONT)


def _unplugged(worker: Host) -> None:
    worker.cables[0].unplug()
    time.sleep(AWAY_S)
    worker.cables[0].replug()
