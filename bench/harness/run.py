"""What a scenario gets: the engines of a row, which take turns, and the state of the machine meanwhile.

Knows processes and order. Does not know what a scenario measures (`scenarios`) nor which rows there are (`rows`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engines.engine_process import EngineProcess, kinds
from harness import machine


@dataclass
class Run:
    """The run of one row. `facts`, `dram_gb_per_s` and `load` are filled during the run."""

    model: Path
    threads: int
    rounds: int
    peer_python: str
    text: str = ""  # prose for prompts and for scoring
    facts: dict[str, Any] = field(default_factory=dict)
    dram_gb_per_s: list[float] = field(default_factory=list)
    disk_gb_per_s: list[float] = field(default_factory=list)
    load: list[float] = field(default_factory=list)
    only: frozenset[str] = frozenset()  # measures only these engines; all of them if empty

    @contextmanager
    def engines(
        self, names: tuple[str, ...], *, context: int, streams: int = 1
    ) -> Iterator[list[EngineProcess]]:
        """The engines with the model loaded, and warm."""
        known = kinds(self.peer_python)
        with ExitStack() as stack:
            started = [stack.enter_context(known[name].start()) for name in names]
            for engine in started:
                self.facts[engine.name] = engine.call(
                    "load", model=str(self.model), context=context, streams=streams, threads=self.threads
                )
                engine.call("begin", streams=streams, tokens=32, seed=-1)
                engine.call("advance", tokens=4)
                engine.call("end")
            yield started

    def turns(self, engines: list[EngineProcess]) -> Iterator[tuple[int, EngineProcess]]:
        """(round, engine): every engine once in each round, in alternating order."""
        for number in range(self.rounds):
            self.look()
            for engine in engines if number % 2 == 0 else reversed(engines):
                yield number, engine

    def names_in_turn(self, names: tuple[str, ...]) -> Iterator[tuple[int, str]]:
        """The same for engines that are started anew each time."""
        wanted = [name for name in names if not self.only or name in self.only]
        for number in range(self.rounds):
            for name in wanted if number % 2 == 0 else reversed(wanted):
                yield number, name

    def look(self) -> None:
        """Note how fast memory and how busy the machine is."""
        self.dram_gb_per_s.append(round(machine.dram_read_gb_per_s(self.threads), 2))
        self.load.append(machine.busy())
