"""Keeping so many requests under way at once, whoever answers them.

Knows when the next request is taken. Does not know how requests begin, or where their events come from.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from typing import TypeVar

from shoal.comm.messages import Chat, Done, Generate, StreamEvent

K = TypeVar("K")
E = TypeVar("E", bound=Exception)

NOTHING_S = 1.0  # how often a request is asked for where there was none


def keep_full(
    requests: Iterator[tuple[K, Generate | Chat] | None],
    at_once: int,
    begin: Callable[[K, Generate | Chat], None],
    events: Iterator[tuple[K, StreamEvent | E] | None],
    refusal: type[E],
) -> Generator[tuple[K, StreamEvent | E], None, None]:
    """The events of many answers as they come, each with the key of its request.

    `requests` are taken as places get free, so that `at_once` are under way; None stands for one that comes later.
    `begin` starts one, or raises a `refusal`, which is that request's last event. `events` are those of all that were
    begun; each has one Done or refusal, its last. None: there was none for NOTHING_S.
    """
    coming, under_way = True, 0
    while coming or under_way:
        refused = False
        while coming and under_way < at_once:
            try:
                taken = next(requests)
            except StopIteration:
                coming = False
                break
            if taken is None:
                break
            try:
                begin(*taken)
                under_way += 1
            except refusal as error:
                refused = True
                yield taken[0], error.with_traceback(None)  # whose frames have the request
            del taken  # the next one is made before it would be replaced
        if not under_way and refused:  # then another request may come, or none any more
            continue
        if (coming or under_way) and (found := next(events)) is not None:
            under_way -= isinstance(found[1], Done | Exception)
            yield found
