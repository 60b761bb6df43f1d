"""A follower: the thread of a rank other than 0, which carries out orders until its group ends.

Knows its rank and the spoke on which orders come. Does not know models, files or who leads.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from shoal.comm.group.sums.star import Spoke
from shoal.comm.group.sums.star_errors import Departed, GivenUp
from shoal.engine.errors import OrderError, RankLost
from shoal.engine.order import Order
from shoal.engine.order_bytes import order_of
from shoal.engine.rank import Rank

from .pulse import Pulse

log = logging.getLogger(__name__)

FOLLOWER_END_S = 10.0


class Follower:
    """Carries out orders from `spoke`. `ended` is called once, with the reason, when it can follow no longer. Orders
    may name KV on disk in `slots` slots."""

    def __init__(
        self, rank: Rank, spoke: Spoke, pulse: Pulse, ended: Callable[[str], None], slots: int = 0
    ) -> None:
        self._rank = rank
        self._slots = slots
        self._spoke = spoke
        self._pulse = pulse
        self._ended = ended
        self._thread = threading.Thread(target=self._run, name="shoal-rank", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Wait for the thread, whose stream the caller has closed."""
        self._rank.executor.store.close()  # a step that waits for a disk ends
        if self._thread is not threading.current_thread() and self._thread.ident is not None:
            self._thread.join(FOLLOWER_END_S)

    def _run(self) -> None:
        reason = "it ended"
        try:
            while True:
                self._follow_one()
        except Departed as error:
            reason = error.reason
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            log.exception("this rank cannot follow its group any more")
        finally:
            self._pulse.at_work = False
            self._ended(reason)

    def _follow_one(self) -> None:
        """Carry out the next order. Raises Departed when the head is gone, or this rank can be of no use any more."""
        data = self._spoke.next()
        self._pulse.at_work = True
        try:
            self._rank.run(self._order(data), self._pulse.still_wanted)
        except GivenUp:
            pass
        except RankLost as error:
            raise Departed(error.rank, error.reason) from error
        except Exception as error:
            if not isinstance(error, OrderError):
                log.exception("an order failed")
            self._spoke.fail(f"{type(error).__name__}: {error}")
            raise Departed(0, f"this rank failed: {error}") from error
        finally:
            self._pulse.at_work = False
            self._pulse.steps += 1

    def _order(self, data: bytes) -> Order:
        executor = self._rank.executor
        return order_of(data, executor.plan, self._slots, tokens=executor.vocab is not None)
