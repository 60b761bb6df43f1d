"""Working off a batch: its lines become requests, its answers lines.

Knows the files, the order and who answers. Prints nothing; `Tally` says how far it is.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass

from msgspec.structs import replace

from shoal.cli.answers import Answers, NoAnswer
from shoal.cli.wording import worded
from shoal.comm.errors import RequestFailed
from shoal.comm.messages import Chat, Done, Generate, ModelStatus, Token, Usage
from shoal.daemon.errors import DaemonError

from .answer_file import AnswerFile, line_id
from .batch_order import BatchOrder, refetched
from .openai_answers import Collected, answered, failed
from .openai_requests import BadLine, custom_id_of, parse
from .request_lines import REQUEST_BYTES, RequestLine, RequestLines, too_long

PRIORITY = -1  # below that of whoever waits for an answer
BUSY_S = 1.0  # after so long a refused request is sent again, at least

IN_A_ROW = 32  # requests that may fail so that it might be the fault of none

# These concern one request. All others end the batch, which can be resumed.
_PERHAPS_OF_ALL = frozenset({"corrupt", "resources", "internal"})
_OF_ONE = _PERHAPS_OF_ALL | {"bad_request", "context_overflow", "unsupported"}


@dataclass
class Tally:
    """What became of the lines. `failed` and `left` count those of earlier runs, too; tokens and seconds are of this
    one."""

    lines: int
    left: int
    failed: int = 0
    now: int = 0  # lines that were answered in this run
    under_way: int = 0
    written_tokens: int = 0  # of answers, also of those under way
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0  # spent answering, not loading

    def note(self, usage: Usage) -> None:
        """A line got its answer."""
        self.left -= 1
        self.now += 1
        self.prompt_tokens += usage.prompt_tokens
        self.cached_tokens += usage.cached_tokens
        self.completion_tokens += usage.completion_tokens


class WorkingOff:
    """A batch that is worked off. `model` answers all lines, if it is given. `context`: tokens that a request and its
    answer may have together; None = as many as the model has."""

    def __init__(
        self,
        requests: RequestLines,
        out: AnswerFile,
        order: BatchOrder,
        model: str | None,
        context: int | None = None,
    ) -> None:
        self._requests = requests
        self._out = out
        self._order = order
        self._model = model
        self._context = context
        self.tally = Tally(order.lines, order.left, sum(had.failed for had in out.had.values()))
        self._under_way: dict[int, tuple[RequestLine, Collected]] = {}  # by number of the line
        self._again: deque[tuple[float, RequestLine]] = deque()  # when a refused one is sent again
        self._failed_in_a_row = 0

    def refuse(self) -> None:
        """Say of every line that cannot be answered why."""
        for line, twin in self._order.faulty():
            self._fail(line, self._fault(line, twin))

    def refuse_all(self, number: int, error: NoAnswer) -> None:
        """The model with that number cannot be had."""
        for line in self._order.of_model(number):
            self._fail(line, _said(custom_id_of(refetched(self._requests, line)), error))

    def answer(self, answers: Answers, number: int, status: ModelStatus, shown: Callable[[], None]) -> None:
        """Have all lines answered that ask the model with that number. `shown` is called whenever something has
        happened. Raises DaemonError or CommError for what is not the fault of a line."""
        began_s = time.monotonic() - self.tally.seconds
        with closing(answers.many(self._coming(number, status.name), answers.places())) as events:
            for key, event in events:
                self.tally.seconds = time.monotonic() - began_s
                match event:
                    case Token():
                        self._under_way[key][1].take(event)
                        self.tally.written_tokens += len(event.ids)
                    case Done():
                        self._failed_in_a_row = 0
                        line, collected = self._under_way.pop(key)
                        identity = line_id(line.number, line.digest)
                        body = collected.body(identity.removeprefix("batch_req_"), status.name, event)
                        self._out.add(answered(identity, collected.custom_id, body))
                        self.tally.note(event.usage)
                    case DaemonError() | RequestFailed():
                        line, collected = self._under_way.pop(key)
                        self._refused(line, collected.custom_id, event)
                self.tally.under_way = len(self._under_way)
                self._out.settle()
                shown()

    def _coming(self, number: int, model: str) -> Iterator[tuple[int, Generate | Chat] | None]:
        """The requests, and those that are sent again, as long as there may be any. None: none just now."""
        lines = self._order.of_model(number)
        coming = next(lines, None)
        while coming or self._again or self._under_way:
            if self._again and self._again[0][0] <= time.monotonic():
                line = self._again.popleft()[1]
            elif coming:
                line, coming = coming, next(lines, None)
            else:
                yield None
                continue
            yield line.number, self._asked(line, model)

    def _asked(self, line: RequestLine, model: str) -> Generate | Chat:
        """The line's request, of which only the caller has the texts: they may be long."""
        asked = parse(refetched(self._requests, line), self._model)
        self._under_way[line.number] = line, Collected(asked)
        return replace(asked.request, context_tokens=self._context, model=model, priority=PRIORITY)

    def _refused(self, line: RequestLine, custom_id: str, error: NoAnswer) -> None:
        """Send it again later, or say why it failed. Raises what is not its own fault."""
        if error.code == "busy":
            self._again.append((time.monotonic() + max(error.retry_after_s, BUSY_S), line))
            return
        if error.code not in _OF_ONE:
            raise error
        self._failed_in_a_row = self._failed_in_a_row + 1 if error.code in _PERHAPS_OF_ALL else 0
        if self._failed_in_a_row > IN_A_ROW:
            raise DaemonError(
                "internal",
                f"{IN_A_ROW} requests in a row have failed, the last one so: {error}",
                "when that is mended, --retry-failed answers them again",
            )
        self._fail(line, _said(custom_id, error))

    def _fail(self, line: RequestLine, error: BadLine) -> None:
        self._out.add(failed(line_id(line.number, line.digest), line.number, error))
        self.tally.left -= 1
        self.tally.failed += 1

    def _fault(self, line: RequestLine, twin: int) -> BadLine:
        """Why a line cannot be answered, as it is."""
        if line.nbytes > REQUEST_BYTES:
            return BadLine(too_long(line))
        try:
            asked = parse(refetched(self._requests, line), self._model)
        except BadLine as fault:
            return fault
        error = BadLine(f"custom_id={asked.custom_id:.60} is that of line {twin} already", "custom_id")
        error.custom_id = asked.custom_id
        return error


def _said(custom_id: str, refusal: NoAnswer) -> BadLine:
    """A refusal of a sound line."""
    error = BadLine(worded(str(refusal)), code=refusal.code)
    error.custom_id = custom_id
    return error
