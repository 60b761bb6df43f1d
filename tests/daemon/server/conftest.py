"""A running server with a scripted backend, and a client without manners."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fakes.api_fakes import RawClient, RunningServer, running


@pytest.fixture
def daemon() -> Iterator[RunningServer]:
    with running() as it:
        yield it


@pytest.fixture
def raw(daemon) -> Iterator[RawClient]:
    with RawClient(daemon.address) as it:
        yield it
