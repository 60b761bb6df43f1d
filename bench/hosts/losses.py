"""Ways in which a worker is lost in the middle of an answer, and what becomes of the answer.

Three hosts: a head, a worker at the same switch, and one behind a relay. Each way ends with all three computing
again.
"""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from harness import machine
from hosts.group import NEW, TOKENS, Answer, Group, asked
from hosts.host import Host
from hosts.lab import Lab
from hosts.limits import UNLIMITED, Limits

SLOW_S = 10.0  # a longer pause is a hang
STREAMS = 2
PARDON_AFTER = 4  # losses
PAUSES_S = (0.3, 1.0, 3.0)  # of what flaps
NEAREST_S, FARTHEST_S = 0.0004, 0.054  # there and back, over the relay


@dataclass
class Trial:
    """One loss. `back_s` is how long after the answers it took until all ranks computed again."""

    way: str
    worker: str
    same: bool
    pause_s: float  # the longest that a stream waited for a token
    back_s: float
    busy: dict[
        str, float
    ]  # the share of the time in which somebody on this machine waited for a processor, the disk
    note: str = ""
    error: str = ""


class Losses:
    """The hosts, with a model loaded. `model` is a real one, so that texts mean something."""

    def __init__(self, lab: Lab, model: Path, seed: int = 0, limits: Limits = UNLIMITED) -> None:
        self._source = random.Random(seed)
        head, near = lab.host("head", limits), lab.host("near", limits)
        far, self.relay = lab.relayed("far", head, limits)
        self.group = Group(head, [near, far])
        self._model = model
        self._lost = 0
        self._load()
        self.prompts = [[self._source.randrange(TOKENS) for _ in range(24)] for _ in range(STREAMS)]
        self.wanted = [answer.ids for answer in self._streams(lambda: None)]

    def _load(self) -> None:
        loaded = self.group.load(self._model, ranks=3)
        assert loaded.ranks == 3, loaded.plan

    def pardon(self) -> None:
        """A head passes over who is lost again and again, for longer each time; one that starts anew forgets that."""
        self.restart(self.group.head)
        self.group.attached(2)
        self._load()

    def _streams(self, when: Callable[[], None]) -> list[Answer]:
        """All streams at once; `when` is called in the middle of the first."""
        answers = [Answer() for _ in self.prompts]

        def one(number: int) -> None:
            with self.group.head.client(timeout_s=60) as client:
                act = (lambda: None) if number else when
                answers[number] = asked(client, self.prompts[number], NEW, act)

        threads = [threading.Thread(target=one, args=(number,)) for number in range(STREAMS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return answers

    def trial(self, way: str) -> Trial:
        self._lost += 1
        if self._lost % PARDON_AFTER == 0:
            self.pardon()
        worker = self._source.choice(self.group.workers)
        began_s, before = time.monotonic(), _waits()
        pause_s = self._source.random() * 0.3
        begin, end = WAYS[way]
        notes: list[str] = []

        def lose() -> None:
            time.sleep(pause_s)
            notes.append(begin(self, worker) or "")

        thread = threading.Thread(target=lose)
        answers = self._streams(thread.start)
        thread.join()
        end(self, worker)
        errors = [answer.error for answer in answers if answer.error]
        gaps = [answer.longest_gap_s for answer in answers if answer.times_s]
        same = [answer.ids for answer in answers] == self.wanted
        back_s = self.group.attached(2) + self.group.computing(3)
        took_s = time.monotonic() - began_s
        busy = {kind: round((after - before[kind]) / took_s, 2) for kind, after in _waits().items()}
        return Trial(way, worker.name, same, max(gaps), back_s, busy, " ".join(notes), "; ".join(errors))

    def share(self) -> float:
        """Of a pause, so that no two are alike."""
        return 0.5 + self._source.random() / 2

    def restart(self, worker: Host) -> None:
        """As its user would: once it has ended, `shoal serve`."""
        worker.cgroup.thaw()
        worker.kill()
        worker.wait_gone()
        worker.serve()


def _waits() -> dict[str, float]:
    return {kind: machine.waited_s(kind) for kind in ("cpu", "io")}


def freeze_compute_thread(losses: Losses, worker: Host) -> str:
    """A thread that holds the interpreter's lock takes all others with it; the note says which it was."""
    thread = worker.busiest_thread()
    worker.cgroup.freeze_thread(thread)
    return "its sockets live" if worker.lives_without(thread) else "it held the interpreter's lock"


def flap(losses: Losses, worker: Host) -> None:
    for pause_s in PAUSES_S:
        worker.kill(signal.SIGSTOP)
        time.sleep(pause_s * losses.share())
        worker.kill(signal.SIGCONT)
        time.sleep(0.2)


def flap_link(losses: Losses, worker: Host) -> None:
    for pause_s in PAUSES_S:
        worker.cables[0].unplug()
        time.sleep(pause_s * losses.share())
        worker.cables[0].replug()
        time.sleep(0.2)


def jitter(losses: Losses, worker: Host) -> None:
    losses.relay.set(delay_s=NEAREST_S / 2, jitter_s=(FARTHEST_S - NEAREST_S) / 2)


def nothing(losses: Losses, worker: Host) -> None:
    """It comes back by itself."""


Act = Callable[[Losses, Host], "str | None"]
WAYS: dict[str, tuple[Act, Act]] = {
    "killed": (lambda losses, worker: worker.kill(), Losses.restart),
    "stopped": (lambda losses, worker: worker.kill(signal.SIGSTOP), Losses.restart),
    "compute thread frozen": (freeze_compute_thread, Losses.restart),
    "unplugged": (
        lambda losses, worker: worker.cables[0].unplug(),
        lambda losses, worker: worker.cables[0].replug(),
    ),
    "flapping": (flap, nothing),
    "link flapping": (flap_link, nothing),
    "jitter": (jitter, lambda losses, worker: losses.relay.set(delay_s=0.0, jitter_s=0.0)),
}


@contextmanager
def three_hosts(model: Path, seed: int = 0, limits: Limits = UNLIMITED) -> Iterator[Losses]:
    with Lab() as lab:
        yield Losses(lab, model, seed, limits)


def head_killed(group: Group, prompt: list[int]) -> tuple[Answer, float, float, Answer]:
    """What the client of a killed head gets; seconds until that, and until the workers are back; a later answer."""
    asked_s: list[float] = []

    def kill() -> None:
        asked_s.append(time.monotonic())
        group.head.kill()

    cut = group.ask(prompt, NEW, kill)
    told_s = time.monotonic() - asked_s[0]
    group.head.wait_gone()
    group.head.serve(*group.serve_options)
    back_s = group.attached(len(group.workers))
    return cut, told_s, back_s, group.ask(prompt, NEW)
