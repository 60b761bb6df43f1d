"""A head and workers on hosts of a lab, joined as people join them, and what is asked of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hosts.host import Host, HostFailed

from shoal.client import Client
from shoal.comm.errors import ShoalError
from shoal.comm.messages import Done, ModelStatus, Token

ATTACH_S = 60.0
NEW = 40
TOKENS = 256  # that any model has


@dataclass
class Answer:
    """What came, and when: seconds since it was asked for."""

    ids: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)  # of each token
    error: str = ""

    @property
    def first_s(self) -> float:
        return self.times_s[0]

    @property
    def token_s(self) -> float:
        """Seconds for each token after the first."""
        return (self.times_s[-1] - self.times_s[0]) / (len(self.times_s) - 1)

    @property
    def longest_gap_s(self) -> float:
        """The longest wait for a token, the first included."""
        return max(after - before for before, after in zip([0.0, *self.times_s], self.times_s, strict=False))


class Group:
    """`close` stops nothing: the lab does."""

    def __init__(self, head: Host, workers: Sequence[Host], serve_options: Sequence[str] = ()) -> None:
        self.head = head
        self.workers = list(workers)
        self.serve_options = serve_options
        self.model = ""  # what is asked for, once it was loaded
        head.serve(*serve_options)
        for worker in workers:
            worker.join(head)
        self.client = head.client(timeout_s=120)
        self.attached(len(self.workers))

    def attached(self, count: int, limit_s: float = ATTACH_S) -> float:
        """Wait until so many workers are; seconds that it took."""
        return waited(
            lambda: sum(node.attached for node in self.client.nodes().nodes[1:]) >= count,
            limit_s,
            f"{count} workers have not attached",
        )

    def computing(self, ranks: int, limit_s: float = ATTACH_S) -> float:
        """Wait until so many ranks compute the model; seconds that it took."""
        return waited(
            lambda: [model.ranks for model in self.client.status().models] == [ranks],
            limit_s,
            f"{ranks} ranks do not compute the model",
        )

    def load(self, model: Path | str, ranks: int | None = None, **more: int) -> ModelStatus:
        self.model = str(model)
        return self.client.load(self.model, ranks=ranks, **more).model

    def ask(
        self, prompt: list[int], new: int = NEW, when: Callable[[], None] = lambda: None, after: int = 8
    ) -> Answer:
        """`when` is called after so many tokens."""
        return asked(self.client, prompt, new, when, after, self.model)


def asked(
    client: Client,
    prompt: list[int],
    new: int,
    when: Callable[[], None] = lambda: None,
    after: int = 8,
    model: str = "",
) -> Answer:
    answer = Answer()
    began_s = time.monotonic()
    called = False
    try:
        for event in client.generate(
            model=model, prompt_tokens=prompt, max_tokens=new, ignore_eos=True, temperature=0.0
        ):
            if isinstance(event, Token):
                now_s = time.monotonic() - began_s
                answer.ids += event.ids
                answer.times_s += [now_s] * len(event.ids)
                if len(answer.ids) >= after and not called:
                    called = True
                    when()
            elif isinstance(event, Done):
                break
    except ShoalError as error:
        answer.error = f"{type(error).__name__}: {error}"
    return answer


def waited(true: Callable[[], bool], limit_s: float, otherwise: str) -> float:
    """Raises HostFailed."""
    began_s = time.monotonic()
    while not true():
        if time.monotonic() - began_s > limit_s:
            raise HostFailed(f"{otherwise} after {limit_s:.0f} s")
        time.sleep(0.05)
    return time.monotonic() - began_s
