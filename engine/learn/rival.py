"""Whether a token of one stream is quicker with fewer threads: both are tried for some steps, and the better is kept.

Steps of few rows wait for memory, which half of the threads may use as well as all; predictions cannot always tell
(`partition.throughput.alone`). Which threads compute a step changes no bit of it. Tried is only while one text is
answered and nobody waits. Pure: durations are handed in.
"""

from __future__ import annotations

from statistics import median

from shoal.partition.amounts import counted, format_delay

# Of a step that memory bounds as it does one of a single row; three take a thread 1.7 times as long.
FEW_ROWS = 2
_FIRST = 16  # steps of one row, before anything is tried
_TURN = 8  # steps at a time …
_SETTLING = 2  # … of which the first are not counted: threads come and go
_TURNS = 6  # of both together
_ENOUGH = 3  # steps that tell whether it is hopeless
_HOPELESS = 1.5  # times as long
_WORTH = 0.97  # of the time: what is less simple has to be worth it
_MOST_BROKEN = 8  # pairs of turns that a text did not last for, before that is left be
_AGAIN = 4096  # steps of one row, after which it is tried again: neighbours come and go
_SETTLED = 4  # steps of few rows behind one another, before the threads change for them


class Rival:
    """The threads of a plan, and `other` threads that may do as well for few rows; 0: none."""

    def __init__(self, usual: int, other: int = 0) -> None:
        self.said = ""  # what came of the last trial
        self._usual, self._other = usual, other
        self._kept = usual
        self._took: dict[int, list[float]] = {usual: [], other: []}
        self._pair: dict[int, list[float]] = {usual: [], other: []}  # of the two turns under way
        self._broken = 0  # pairs of this trial
        self._until = _FIRST
        self._tried = 0  # steps of this trial
        self._trying = False  # in the step under way
        self._few = 0  # steps of few rows, behind one another

    def threads(self, rows: int, *, prompts: bool, waiting: bool) -> int:
        """For the next step, which has so many rows."""
        if prompts:
            self._break_off()
        few = rows <= FEW_ROWS and not prompts
        self._few = self._few + 1 if few else 0
        self._trying = self._other > 0 and rows == 1 and few and not waiting
        if self._trying and not self._until:
            return self._turn
        return self._kept if self._few > _SETTLED else self._usual

    @property
    def _turn(self) -> int:
        return (self._usual, self._other)[self._tried // _TURN % 2]

    def note(self, seconds: float) -> None:
        """The step took so long."""
        if not self._trying:
            return
        if self._until:
            self._until -= 1
            return
        if self._tried % _TURN >= _SETTLING:
            self._pair[self._turn].append(seconds)
        self._tried += 1
        usual, other = self._pair[self._usual], self._pair[self._other]
        hopeless = len(other) >= _ENOUGH and median(other) > _HOPELESS * median(usual)
        if hopeless or not self._tried % (2 * _TURN):
            for threads, took in self._pair.items():
                self._took[threads] += took
            self._pair = {self._usual: [], self._other: []}
        if hopeless or self._tried == _TURN * _TURNS:
            self._decide(median(self._took[self._usual]), median(self._took[self._other]))

    def _break_off(self) -> None:
        """Another text comes. Its steps take longer or less long, so both turns of a pair have to be of one text."""
        if begun := self._tried % (2 * _TURN):
            self._tried -= begun
            self._pair = {self._usual: [], self._other: []}
            self._broken += 1
            if self._broken == _MOST_BROKEN:
                self._rest(self._kept)

    def _decide(self, usual_s: float, other_s: float) -> None:
        self._rest(self._other if other_s < _WORTH * usual_s else self._usual)
        tried = f"{counted(self._other, 'thread')} took {format_delay(other_s)} for a token of one stream"
        self.said = f"{tried}, {self._usual} took {format_delay(usual_s)}: {self._kept} compute it"

    def _rest(self, kept: int) -> None:
        """These are kept until it is tried again."""
        self._kept, self._until = kept, _AGAIN
        self._tried = self._broken = 0
        self._took = {self._usual: [], self._other: []}
