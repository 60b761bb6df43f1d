"""A worker that says what it should and reads nothing: nobody else waits for it."""

from __future__ import annotations

import threading
import time
from itertools import pairwise
from pathlib import Path

from fakes.asking import CONFIG
from fakes.group.clusters import Cluster, wait_for

from shoal.comm.group.channel import SEND_S, channel_pair
from shoal.daemon.cluster.control_messages import (
    BEAT_S,
    CONTROL_BYTES,
    PROBE_BYTES,
    Alive,
    Attach,
    Drop,
    FromHead,
    Probe,
)
from shoal.daemon.cluster.member import MOST_UNSENT, Member
from shoal.daemon.cluster.worker import HEAD_SILENT_S, Worker

MORE_THAN_BUFFERS = 40  # messages of `PROBE_BYTES`


def deafen(worker: Worker, over: threading.Event) -> None:
    """Its next message is the last that it reads. It goes on beating."""
    worker._do = lambda message: over.wait(20)  # type: ignore[assignment,method-assign,return-value]


def test_a_worker_that_does_not_read_delays_no_beat_to_another(tmp_path: Path) -> None:
    over, heard = threading.Event(), list[float]()
    with Cluster(tmp_path, CONFIG, workers=2) as cluster:
        deaf, good = (cluster.workers[number]._worker for number in (1, 2))
        assert deaf is not None
        assert good is not None
        do, first = good._do, cluster.roster.members[0]

        def listens(message: FromHead) -> None:
            heard.append(time.monotonic())
            do(message)

        good._do = listens  # type: ignore[method-assign]
        deafen(deaf, over)
        for _ in range(MORE_THAN_BUFFERS):
            first.send(Probe(number=0, data=bytes(PROBE_BYTES)))
        began_s = time.monotonic()
        wait_for(lambda: heard[-1:] > [began_s + 4 * BEAT_S])
        assert max(later - earlier for earlier, later in pairwise(heard)) < HEAD_SILENT_S
        assert good.attached
        assert not first.reason  # it is spoken to still: it may only be busy
        assert first._unsent.qsize() > 0
        over.set()


def member_of(at_head: object) -> Member:
    attach = Attach(name="w", version="1", kernels="k", threads=1, memory_bytes=1)
    return Member(at_head, attach, lambda *_: None, time.monotonic)  # type: ignore[arg-type]


def test_who_speaks_to_a_member_never_waits_and_what_waits_for_it_is_bounded() -> None:
    at_head, at_worker = channel_pair("control")
    with at_worker:
        member = member_of(at_head)
        threading.Thread(target=member.run, daemon=True).start()
        big = Probe(number=0, data=bytes(PROBE_BYTES))
        began_s = time.monotonic()
        for _ in range(MOST_UNSENT):
            member.send(big)
        assert time.monotonic() - began_s < SEND_S / 2
        assert not member.reason
        for _ in range(MORE_THAN_BUFFERS):
            member.send(big)
        assert "has not read" in member.reason


def test_what_is_said_comes_in_order_and_beats_between() -> None:
    at_head, at_worker = channel_pair("control")
    with at_worker:
        member = member_of(at_head)
        thread = threading.Thread(target=member.run, daemon=True)
        thread.start()
        for epoch in range(20):
            member.send(Drop(epoch=epoch))
        said = [at_worker.receive_message(FromHead, 5, CONTROL_BYTES) for _ in range(21)]
        assert said == [*(Drop(epoch=epoch) for epoch in range(20)), Alive()]
        member.leave("it is enough")
        thread.join(5)
        assert not thread.is_alive()
        wait_for(lambda: "shoal-member" not in {it.name for it in threading.enumerate()}, 5)
