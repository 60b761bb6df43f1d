"""Whether looking for bytes pays: as long as they come, and nobody else wants the processor."""

from __future__ import annotations

import select
import socket
import threading
import time

import pytest

from shoal.comm.group import watching as watching_module
from shoal.comm.group.native_bytes import native_bytes
from shoal.comm.group.watching import CROWDED, LOOK_NS, LOOKED, TRY_AGAIN, Watching

NATIVE = native_bytes()
pytestmark = pytest.mark.skipif(NATIVE is None, reason="the native part is not there")


@pytest.fixture
def watching() -> Watching:
    assert NATIVE is not None
    return Watching(NATIVE)


def test_one_wait_in_some_that_was_disturbed_changes_nothing(watching: Watching) -> None:
    """After each token other threads of a head have work for its processor."""
    for number in range(400):
        assert watching.limit_ns() == LOOK_NS
        watching.note(True, CROWDED if number % 16 == 0 else LOOKED)


@pytest.mark.parametrize(("came", "effort"), [(True, CROWDED), (False, LOOKED), (False, CROWDED)])
def test_what_is_of_no_use_is_seldom_tried(watching: Watching, came: bool, effort: int) -> None:
    tries = 0
    for _ in range(40 * TRY_AGAIN):
        if watching.limit_ns():
            tries += 1
            watching.note(came, effort)
    assert tries <= 50
    for _ in range(20 * TRY_AGAIN):
        if watching.limit_ns():
            watching.note(True, LOOKED)
    assert watching.limit_ns()


def test_what_was_there_at_once_says_nothing(watching: Watching) -> None:
    before = watching.luck
    watching.note(True, 0)
    assert watching.luck == before


def test_it_looks_at_several_at_once(watching: Watching) -> None:
    pairs = [socket.socketpair() for _ in range(3)]
    wanted = [(near.fileno(), select.POLLIN) for near, _ in pairs]
    ends_s = time.monotonic() + 20
    while time.monotonic() < ends_s:  # as long as others want the processor, it looks no further
        watching.luck = 1.0
        began_s = time.monotonic()
        watching.look_at_all(wanted)
        assert watching.luck < 1
        if watching._effort.value == LOOKED:
            assert time.monotonic() - began_s > 0.5e-9 * LOOK_NS
            break
    pairs[2][1].send(b"x")
    before = watching.luck
    watching.look_at_all(wanted)
    assert watching.luck == before
    for pair in pairs:
        for end in pair:
            end.close()


def test_the_interpreter_goes_on_meanwhile(watching: Watching, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one thread looks for, another one sends while it looks."""
    monkeypatch.setattr(watching_module, "LOOK_NS", 20 * 10**9)
    near, far = socket.socketpair()
    looks, found, in_vain = threading.Event(), list[int](), 0

    def look() -> None:
        nonlocal in_vain
        view = memoryview(bytearray(8))
        looks.set()
        while not found:
            watching.luck = 1.0
            found.extend([count] if (count := watching.looked_for(near.fileno(), view)) else [])
            in_vain += not found and watching._effort.value == LOOKED  # else it has given way to others

    thread = threading.Thread(target=look)
    thread.start()
    try:
        assert looks.wait(20)
    finally:
        far.send(b"x")
        thread.join()
        near.close()
        far.close()
    assert (found, in_vain) == ([1], 0)
