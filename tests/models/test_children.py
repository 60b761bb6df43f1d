"""Child processes: limits hold, one that fails hurts nobody else, none is left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal.models import children
from shoal.models.child_main import JOB
from shoal.models.children import ChildKind, Confined, JobFailed, LimitPassed, Limits
from shoal.models.errors import Overloaded
from shoal.models.turns import on_behalf_of

SCRIPT = """
import os, time
def begin(first):
    if first == b"bad":
        raise ValueError("no\\nsuch thing")
    if first == b"long":
        time.sleep(60)
    def work(job):
        return str(eval(job, {"os": os, "time": time, "first": first})).encode()
    return work
"""
LIMITS = Limits(64 << 20, 5.0, answer_bytes=1 << 20)


@pytest.fixture
def kind(tmp_path: Path) -> Iterator[ChildKind]:
    script = tmp_path / "some_jobs.py"
    script.write_text(SCRIPT)
    made = ChildKind(script, ())
    yield made
    assert made._working == []
    for child in made._idle:
        child.end()


def confined(kind: ChildKind, first: bytes = b"x") -> Confined:
    return Confined(kind, first, LIMITS)


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_child_stays_for_the_next_job(kind: ChildKind) -> None:
    work = confined(kind)
    assert work.do(b"first + b'y'", LIMITS) == b"b'xy'"
    assert work.do(b"os.getpid()", LIMITS) == work.do(b"os.getpid()", LIMITS) != str(os.getpid()).encode()


@pytest.mark.parametrize(
    ("job", "limits", "message"),
    [
        (b"len(b'x' * (1 << 30))", LIMITS, "64 MB of memory"),
        (b"7 ** (10 ** 8)", Limits(64 << 20, 0.3), r"did not end in time \(0.3 s\)"),
        (b"'x' * (2 << 20)", LIMITS, "made more than 1 MB"),
        (b"os._exit(3)", LIMITS, "exit code 3"),
        (b"os.kill(os.getpid(), 11)", LIMITS, "signal 11"),
        (b"os.abort()", LIMITS, "memory"),
    ],
)
def test_limits_hold_and_the_next_job_gets_another_child(
    kind: ChildKind, job: bytes, limits: Limits, message: str
) -> None:
    work = confined(kind)
    before = work.do(b"os.getpid()", LIMITS)
    with pytest.raises(LimitPassed, match=message):
        work.do(job, limits)
    assert not running(int(before))
    assert work.do(b"os.getpid()", LIMITS) != before


def test_an_error_of_the_script_is_told_and_the_child_stays(kind: ChildKind) -> None:
    work = confined(kind)
    before = work.do(b"os.getpid()", LIMITS)
    with pytest.raises(JobFailed, match="division by zero") as caught:
        work.do(b"1 / 0", LIMITS)
    assert caught.value.kind == "ZeroDivisionError"
    assert work.do(b"os.getpid()", LIMITS) == before
    with pytest.raises(JobFailed, match="no such thing"):
        confined(kind, b"bad")


def test_who_was_killed_while_idle_is_replaced(kind: ChildKind) -> None:
    work = confined(kind)
    pid = int(work.do(b"os.getpid()", LIMITS))
    os.kill(pid, signal.SIGKILL)
    assert work.do(b"1 + 1", LIMITS) == b"2"


def test_who_is_killed_from_outside_is_no_job_s_fault(kind: ChildKind) -> None:
    work = confined(kind)
    with pytest.raises(Overloaded, match="short of memory"):
        work.do(b"os.kill(os.getpid(), 9)", LIMITS)
    assert work.do(b"1 + 1", LIMITS) == b"2"


def test_children_end_with_their_owner_and_after_large_jobs(
    kind: ChildKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(children, "LARGE_JOB_BYTES", 1000)
    work = confined(kind)
    pid = int(work.do(b"os.getpid()", LIMITS))
    assert work.do(b"'x' * 2000", LIMITS) == b"x" * 2000
    assert not running(pid)
    pid = int(work.do(b"os.getpid()", LIMITS))
    del work
    assert not running(pid)


def test_what_lasts_long_without_taking_processor_time_is_nobody_s_fault(kind: ChildKind) -> None:
    """A machine that is busy with other things, a child that is stopped: whatever keeps it from working."""
    work = confined(kind)
    before = int(work.do(b"os.getpid()", LIMITS))
    assert work.do(b"time.sleep(0.4)", Limits(64 << 20, 0.1)) == b"None"
    for job in (b"time.sleep(9)", b"os.kill(os.getpid(), 19)"):
        with pytest.raises(Overloaded, match="the machine is too busy"):
            work.do(job, Limits(64 << 20, 0.1, slack_s=0.3))
        assert not running(before)
        before = int(work.do(b"os.getpid()", LIMITS))
    os.kill(before, signal.SIGSTOP)  # it does not even read
    with pytest.raises(Overloaded, match="the machine is too busy"):
        work.do(b"1" + b" " * (8 << 20), Limits(64 << 20, 0.1, slack_s=0.3))
    assert work.do(b"1 + 1", LIMITS) == b"2"


def test_processor_time_is_counted_for_each_job(kind: ChildKind) -> None:
    work = confined(kind)
    pid = work.do(b"os.getpid()", LIMITS)
    for _ in range(4):
        work.do(b"sum(range(5_000_000))", Limits(64 << 20, 1.0))
    assert work.do(b"os.getpid()", LIMITS) == pid


def test_there_are_few_children_and_a_slow_owner_holds_up_nobody(kind: ChildKind) -> None:
    slow, others = confined(kind), [confined(kind, bytes([i])) for i in range(9)]

    def wait(client: str) -> None:
        with contextlib.suppress(Overloaded), on_behalf_of(client):
            slow.do(b"time.sleep(500)", Limits(64 << 20, 500.0))

    threads = [threading.Thread(target=wait, args=(client,)) for client in "abaabbbaa"]
    for thread in threads:
        thread.start()
    for other in others:
        assert other.do(b"1", LIMITS) == b"1"
    refused = len(threads) - children.MOST_OF_ONE - 2 * 2  # two of each client may wait
    deadline = time.monotonic() + 60
    while (
        sum(thread.is_alive() for thread in threads) > len(threads) - refused and time.monotonic() < deadline
    ):
        time.sleep(0.01)
    assert sum(thread.is_alive() for thread in threads) == len(threads) - refused
    assert len(kind._working) + len(kind._idle) <= children.MOST_CHILDREN
    slow.close()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)


def test_a_client_with_many_costly_jobs_leaves_room_for_others(kind: ChildKind) -> None:
    work = confined(kind)

    def flood() -> None:
        with contextlib.suppress(Overloaded), on_behalf_of("greedy"):
            work.do(b"time.sleep(500)", Limits(64 << 20, 500.0))

    threads = [threading.Thread(target=flood) for _ in range(8)]
    for thread in threads:
        thread.start()
    time.sleep(0.2)
    with on_behalf_of("modest"):
        for _ in range(5):
            started = time.monotonic()
            assert work.do(b"1 + 1", LIMITS) == b"2"
            assert time.monotonic() - started < 100
    work.close()
    for thread in threads:
        thread.join(60)


def test_closing_ends_what_is_under_way(kind: ChildKind) -> None:
    work, failures = confined(kind), list[Exception]()

    def wait() -> None:
        try:
            work.do(b"time.sleep(60)", Limits(64 << 20, 60.0))
        except Overloaded as error:
            failures.append(error)

    threads = [threading.Thread(target=wait) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    started = time.monotonic()
    work.close()
    for thread in threads:
        thread.join()
    assert time.monotonic() - started < 30
    assert len(failures) == 4
    with pytest.raises(Overloaded, match="unloaded"):
        work.do(b"1", LIMITS)


def test_a_parent_that_ends_leaves_no_child(kind: ChildKind, monkeypatch: pytest.MonkeyPatch) -> None:
    """Idle, at work, or stopped, so that it would hear of nothing."""
    monkeypatch.setattr(children, "_ENDING", threading.Event())
    idle, busy, failures = confined(kind, b"a"), confined(kind, b"b"), list[str]()
    pids = [int(work.do(b"os.getpid()", LIMITS)) for work in (idle, busy)]

    def wait(client: str, job: bytes) -> None:
        with on_behalf_of(client):
            try:
                busy.do(job, Limits(64 << 20, 60.0))
            except Overloaded as error:
                failures.append(str(error))

    jobs = [(str(number), b"time.sleep(60)") for number in range(4)]
    threads = [threading.Thread(target=wait, args=job) for job in jobs]
    for thread in threads:
        thread.start()
    while len(kind._working) < children.MOST_OF_ONE:
        time.sleep(0.01)
    pids += [child._process.pid for child in kind._working]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    children.end_children()
    for thread in threads:
        thread.join(10)
    assert len(failures) == 4
    assert "stopping" in failures[-1]
    assert not any(map(running, pids))
    with pytest.raises(Overloaded, match="stopping"):
        idle.do(b"1", LIMITS)


@pytest.mark.skipif(sys.platform != "linux", reason="SIGIO")
def test_a_child_ends_whose_parent_hung_up_before_it_began(kind: ChildKind) -> None:
    parent, theirs = socket.socketpair()
    process = subprocess.Popen(kind._command, stdin=theirs.fileno())
    theirs.close()
    parent.sendall(JOB.pack(4, 1 << 30, 60.0) + b"long")
    parent.close()
    try:
        process.wait(20)
    finally:
        process.kill()


def test_idle_children_end(kind: ChildKind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children, "IDLE_CHILD_S", 0.2)
    work = confined(kind)
    pid = int(work.do(b"os.getpid()", LIMITS))
    for _ in range(100):
        if not running(pid):
            break
        time.sleep(0.05)
    assert not running(pid)
    assert work.do(b"1", LIMITS) == b"1"


@pytest.mark.parametrize("job", ["7 ** (10 ** 8)", "time.sleep(60)", None])
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_children_die_with_a_parent_that_is_killed(tmp_path: Path, job: str | None) -> None:
    (tmp_path / "some_jobs.py").write_text(SCRIPT)
    code = f"""
from pathlib import Path
from shoal.models.children import ChildKind, Confined, Limits
work = Confined(ChildKind(Path({str(tmp_path / "some_jobs.py")!r}), ()), b"", Limits(64 << 20, 60.0))
print(work.do(b"os.getpid()", Limits(64 << 20, 5.0)).decode(), flush=True)
if {job!r} is None:
    input()
work.do({job!r}.encode(), Limits(64 << 20, 60.0))
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    time.sleep(0.3)
    assert running(pid)
    parent.kill()
    parent.communicate()
    for _ in range(500):
        if not running(pid):
            return
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("the child went on without its parent")
