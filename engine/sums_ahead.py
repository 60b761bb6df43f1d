"""Sums that travel while their rank computes: made in a thread, one after the other, in the order of their beginning.

Knows neither what is summed nor how. The thread lives as long as the step that needs it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import NamedTuple

from shoal.kernels.arrays import Floats


class _Begun(NamedTuple):
    partial: Floats
    total: Future[Floats]


class SumsAhead:
    """`allreduce` makes a sum of partials (T, n), as a collective does. After one that failed, no other is made, since
    ranks would not be at the same place any more: those have the same error."""

    def __init__(self, allreduce: Callable[[Floats], Floats]) -> None:
        self._allreduce = allreduce
        self._begun: SimpleQueue[_Begun | None] = SimpleQueue()  # as long as the caller lets it get
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="shoal-sums", daemon=True)
        self._thread.start()

    def start(self, partial: Floats) -> Future[Floats]:
        """Begin a sum. The partial must stay as it is until there is a result, or an error of `allreduce`."""
        total: Future[Floats] = Future()
        self._begun.put(_Begun(partial, total))
        return total

    def close(self) -> None:
        """Wait for the sum under way, if there is one. Those behind it are dropped."""
        self._closed = True
        self._begun.put(None)
        self._thread.join()

    def _run(self) -> None:
        failure: BaseException | None = None
        while (begun := self._begun.get()) is not None:
            if self._closed:
                begun.total.cancel()
            elif failure is not None:
                begun.total.set_exception(failure)
            else:
                try:
                    begun.total.set_result(self._allreduce(begun.partial))
                except BaseException as error:
                    failure = error
                    begun.total.set_exception(error)
