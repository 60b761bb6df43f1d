"""Keeping requests under way: whose they are, and how long they live."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import pytest

from shoal.client.keep_full import keep_full


class Long:
    """A request with a long text."""


class Refused(Exception):
    pass


@pytest.mark.parametrize("refuses", [True, False])
def test_a_request_has_gone_when_the_next_one_is_made(refuses: bool) -> None:
    made: list[weakref.ref[Long]] = []
    begun: list[int] = []

    def new() -> Any:
        assert all(one() is None for one in made)
        request = Long()
        made.append(weakref.ref(request))
        return request

    def requests() -> Iterator[Any]:
        for key in range(3):
            yield key, new()

    def begin(key: int, request: object) -> None:
        begun.append(key)
        if refuses:
            raise Refused

    events: Any = iter([(0, Refused()), (1, Refused()), (2, Refused())])
    assert [key for key, _ in keep_full(requests(), 3, begin, events, Refused)] == begun == [0, 1, 2]
