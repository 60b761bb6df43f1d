"""How fast steps are, as the steps themselves teach, and how much the next one may therefore hold.

Pure: durations are handed in.
"""

from __future__ import annotations

from .kv_read_cost import ReadCost, followed
from .pacing import SLOWDOWN, Pacer
from .rival import Rival
from .step_cost import StepCost, StepSeconds
from .token_times import TokenTimes


class Speeds:
    """A step holds at most `chunk_tokens` tokens of prompts, and reads at most `reads` pages of KV from disk beside the
    pages that are free. `expected`: what steps are thought to take before any was measured, as in `StepCost`;
    `slowdown`: as in `Pacer`; `rival`: what is tried against what."""

    def __init__(
        self,
        chunk_tokens: int,
        expected: StepSeconds | None,
        reads: int,
        slowdown: float = SLOWDOWN,
        rival: Rival | None = None,
    ) -> None:
        self.rival = rival
        self.cost = StepCost(expected)
        self.token_times = TokenTimes()
        self._chunk_tokens = chunk_tokens
        self._reads = reads
        self._pacer = Pacer(chunk_tokens, expected, slowdown)
        self._waiting = 1  # prompts that waited when the last budget was asked for
        self._read_cost = ReadCost()
        # To read one token of a prompt in a step without answers; 0 = not measured yet.
        self._prompt_token_s = 0.0

    def note(self, rows: int, decodes: int, prompts: int, seconds: float) -> None:
        """A step of so many rows, for so many answers and prompts, took so long, not counting reads from disk."""
        if not rows:
            return
        if not prompts:
            if self.rival is not None and rows == 1:
                self.rival.note(seconds)
            self.cost.note(rows, seconds)
            self._pacer.rested()
        elif decodes:
            self._pacer.note(rows - decodes, seconds, self._waiting, self.cost.seconds(decodes))
        else:
            self._prompt_token_s = followed(self._prompt_token_s, seconds / rows)

    def note_reads(self, pages: int, seconds: float) -> None:
        """Reading so many pages from disk took so long."""
        if pages:
            self._read_cost.note(pages, seconds)

    def prompt_tokens(self, decodes: int, prompts: int) -> int:
        """Tokens of prompts that may go with so many decodes, if so many prompts wait."""
        if not decodes:
            return self._chunk_tokens
        self._waiting = prompts
        return self._pacer.budget(prompts, self.cost.seconds(decodes)) if self.cost.measured else 0

    def most_reads(self, decodes: int, free_pages: int) -> int:
        """Pages that may be read from disk beside so many decodes."""
        if decodes and not self.cost.measured:
            return 1
        most = free_pages + self._reads
        return min(most, self._read_cost.most_pages(self.cost.seconds(decodes) if decodes else 0.0))

    def reading_pays(self, pages: int, tokens: int) -> bool:
        """Whether it is faster to read so many pages from disk than to compute the tokens in them."""
        return self._read_cost.pays(pages, tokens, self._prompt_token_s)

    def reading_s(self, tokens: int) -> float:
        """How long it takes to read so many tokens of prompts, as far as that is known."""
        whole_step_s = self.cost.seconds(self._chunk_tokens)
        return tokens * (self._prompt_token_s or whole_step_s / self._chunk_tokens)

    def backlog_s(self, prompt_tokens: int, answer_tokens: int, sequences: int) -> float | None:
        """How long it takes to read and to answer so much, `sequences` at a time; None while no step was measured."""
        if not self.cost.measured:
            return None
        answers_s = answer_tokens / sequences * self.cost.seconds(sequences)
        return prompt_tokens * self._prompt_token_s + answers_s
