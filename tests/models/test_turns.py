"""Turns: clients are served one after another, each in its own order, whoever asks for more."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from shoal.models.turns import CLIENT, FairLock, RoundRobin, TurnPool, free_for, on_behalf_of

PATIENCE_S = 20.0


def eventually(true: Callable[[], bool]) -> bool:
    ends_s = time.monotonic() + PATIENCE_S
    while not true() and time.monotonic() < ends_s:
        time.sleep(0.005)
    return true()


def test_clients_take_turns_and_each_keeps_its_order() -> None:
    turns, order = RoundRobin[int](), []
    for client, thing in [("a", 1), ("a", 2), ("a", 3), ("b", 4), ("b", 5), ("c", 6)]:
        turns.put(client, thing)
    assert turns.before("a", 3) == 2
    while (turn := turns.next(lambda client, thing: True)) is not None:
        turns.take(*turn)
        order.append(turn[1])
        if turn[1] == 4:
            turns.put("d", 7)
    assert order == [1, 4, 6, 2, 5, 7, 3]
    assert len(turns) == 0


def test_who_may_not_go_on_holds_up_nobody() -> None:
    turns = RoundRobin[int]()
    for client, thing in [("a", 1), ("a", 2), ("b", 3)]:
        turns.put(client, thing)
    assert turns.next(lambda client, thing: thing != 1) == ("a", 2)
    assert turns.next(lambda client, thing: client != "a") == ("b", 3)
    assert turns.next(lambda client, thing: False) is None


@pytest.mark.parametrize(
    ("client", "holders", "slots", "free"),
    [
        ("a", "", 1, True),
        ("a", "a", 2, False),
        ("b", "a", 2, True),
        ("a", "a", 3, True),
        ("a", "aa", 3, False),
        ("b", "aa", 3, True),
        ("b", "aaa", 3, False),
        ("a", "bc", 3, True),
    ],
)
def test_the_last_place_is_for_who_has_none(client: str, holders: str, slots: int, free: bool) -> None:
    assert free_for(client, holders, slots) == free


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_a_pool_serves_a_newcomer_after_one_act_of_others_at_most(threads: int) -> None:
    pool, gate, began = TurnPool(threads, "test"), threading.Semaphore(0), list[str]()

    def act() -> None:
        began.append(CLIENT.get())
        assert gate.acquire(timeout=PATIENCE_S)

    for _ in range(40):
        pool.submit("greedy", act)
    most = max(1, threads - 1)
    assert eventually(lambda: len(began) == most)
    pool.submit("modest", act)
    if threads == 1:
        gate.release()  # the one that has begun
    assert eventually(lambda: began[-1] == "modest")
    assert len(began) == most + 1
    pool.close()
    gate.release(100)
    time.sleep(0.05)
    assert len(began) == most + 1


def test_a_pool_goes_on_when_many_come_at_once_and_its_threads_end() -> None:
    pool, done, lock = TurnPool(4, "shoal-test"), list[int](), threading.Lock()

    def act(number: int) -> None:
        with lock:
            done.append(number)

    for number in range(500):
        pool.submit(str(number % 7), lambda number=number: act(number))  # type: ignore[misc]
    assert eventually(lambda: len(done) == 500)
    assert sorted(done) == [*range(500)]
    pool.close()
    pool.submit("late", lambda: act(501))
    assert eventually(lambda: not any(t.name.startswith("shoal-test") for t in threading.enumerate()))
    assert len(done) == 500


def test_a_fair_lock_is_had_in_turn() -> None:
    lock, order, threads = FairLock(), list[str](), list[threading.Thread]()

    def have(client: str) -> None:
        with on_behalf_of(client), lock.held():
            order.append(CLIENT.get())

    with lock.held():
        for client in "aaaabc":
            threads.append(threading.Thread(target=have, args=(client,)))
            threads[-1].start()
            assert eventually(lambda: len(lock._turns._waiting) == len(threads))
        assert order == []
    for thread in threads:
        thread.join(PATIENCE_S)
    assert "".join(order) == "abcaaa"
    assert CLIENT.get() == ""


def test_waiting_ends_when_a_look_says_so() -> None:
    lock = FairLock()

    def look() -> None:
        raise TimeoutError

    def wait() -> None:
        with pytest.raises(TimeoutError), lock.held(look):
            pass

    with lock.held():
        thread = threading.Thread(target=wait)
        thread.start()
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
        assert len(lock._turns._waiting) == 0
    with lock.held(look):
        pass
