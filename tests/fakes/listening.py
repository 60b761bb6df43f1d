"""Helper: the events of sequences, put together, and an engine that is stepped in the test's own thread."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from shoal.engine.engine import Engine
from shoal.engine.sequence import Emitted, Ended, Failed, Queued, Sequence, SequenceEvent
from shoal.models.sampling import Sampled


@dataclass(eq=False)
class Heard:
    """The events of one sequence, put together. After `stop_after` tokens it has had enough."""

    stop_after: int | None = None
    begun: bool = False
    sampled: list[Sampled] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)
    error: Exception | None = None

    @property
    def tokens(self) -> list[int]:
        return [one.token_id for one in self.sampled]

    @property
    def enough(self) -> bool:
        return len(self.sampled) == self.stop_after

    def hear(self, event: SequenceEvent) -> bool:
        """True when it has just had enough."""
        match event:
            case Queued():
                self.begun = True
            case Emitted(_, sampled, _) if not self.enough:
                self.sampled += sampled
                if self.stop_after is not None:
                    del self.sampled[self.stop_after :]
                return self.enough
            case Ended(_, reason):
                self.ended.append(reason)
            case Failed(_, error):
                self.ended.append(f"error {error}")
                self.error = error
        return False


class Listener:
    """Takes the events of an engine between its steps."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._heard: dict[Sequence, Heard] = {}

    def submit(self, sequence: Sequence, stop_after: int | None = None) -> Heard:
        heard = self._heard[sequence] = Heard(stop_after)
        self.engine.submit(sequence)
        return heard

    def listen(self) -> None:
        while events := self.engine.events():
            for event in events:
                if self._heard.setdefault(event.sequence, Heard()).hear(event):
                    self.engine.end(event.sequence, "stop")

    def step(self) -> bool:
        try:
            return self.engine.step()
        finally:
            self.listen()

    def run(self, meanwhile: Callable[[], object] = lambda: None) -> int:
        """Step until nothing is left to do, and call `meanwhile` after each step. → how many steps there were"""
        steps = 0
        while self.step():
            steps += 1
            meanwhile()
        return steps
