"""Weights from other workers: what the head says the digest of, or nothing; whoever lies, stalls or goes costs time."""

from __future__ import annotations

import json
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes.group.weights import Cut, asked, served
from fakes.packing import assert_holds, build_pack, tiny_checkpoint
from msgspec.structs import replace

from shoal.comm.group.channel import Channel, channel_pair
from shoal.comm.group.errors import ChannelError, GroupError
from shoal.comm.group.streams import SocketStream
from shoal.daemon.cluster.weights import piece_stream, shard_facts
from shoal.daemon.cluster.weights.earlier_shards import EarlierShard
from shoal.daemon.cluster.weights.shard_cache import ShardCache
from shoal.daemon.cluster.weights.shard_facts import ShardFacts, described
from shoal.daemon.cluster.weights.shard_fetch import OtherWorkers, fetch_shard
from shoal.daemon.cluster.weights.shard_lender import ShardLender
from shoal.daemon.cluster.weights.weight_messages import (
    Description,
    HeldRows,
    Holds,
    Lacks,
    PieceLent,
    Refused,
    WantDigest,
    WantPiece,
)
from shoal.daemon.cluster.weights.weight_server import WeightServer, _Serving
from shoal.daemon.errors import DaemonError
from shoal.models.checkpoint.checkpoint import Checkpoint
from shoal.models.checkpoint.shard import CheckpointShard
from shoal.models.checkpoint.weight_source import Piece
from shoal.offload.pack.layout import grains_of
from shoal.offload.pack.pack import Pack, open_pack
from shoal.partition.slicing import Shard, divide
from shoal.partition.spec import BlockId

Serve = Callable[[Channel], None]


def cut(checkpoint: Checkpoint, ranks: int, quant: Any = "keep") -> Sequence[Shard]:
    return divide(checkpoint.spec, ranks, grains_of(checkpoint, quant))


@pytest.fixture
def caches(tmp_path: Path) -> list[ShardCache]:
    return [ShardCache(tmp_path / f"worker{number}") for number in range(4)]


@contextmanager
def reached(serve: Sequence[Serve], server: WeightServer, own: Shard) -> Iterator[OtherWorkers]:
    """Other workers, each of whose doors is answered by one of `serve`, and the head."""
    with ExitStack() as stack:
        threads: list[threading.Thread] = []

        def opened(answer: Serve) -> Channel:
            mine, theirs = channel_pair("weights")
            for end in (mine, theirs):
                stack.callback(end.close)
            threads.append(threading.Thread(target=answer, args=(theirs,), daemon=True))
            threads[-1].start()
            return mine

        yield OtherWorkers(
            [partial(opened, one) for one in serve], partial(opened, lambda it: server.serve(it, own))
        )
        stack.close()
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive()


def fetched(
    checkpoint: Checkpoint,
    cache: ShardCache,
    own: Shard,
    serve: Sequence[Serve] = (),
    quant: Any = "keep",
    **more: Any,
) -> Pack:
    server = WeightServer(checkpoint, quant)
    with (
        served(server, own) as channels,
        reached(serve, server, own) as others,
        fetch_shard(channels, cache, others=others, **more) as weights,
    ):
        assert weights.pack is not None
        return weights.pack


def lender(cache: ShardCache, checkpoint: Checkpoint, rank: int = 1) -> Serve:
    return partial(ShardLender(cache, WeightServer(checkpoint).key).serve, rank)


@pytest.fixture
def slow_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others are asked before anything is sent, and the head takes longer than they do."""
    original = _Serving.answer

    def answer(self: Any, question: Any) -> Any:
        if isinstance(question, WantPiece):
            time.sleep(0.001)
        return original(self, question)

    def ask(self: OtherWorkers, remote: Any) -> None:
        for reach in self.reach:
            self._ask(remote, reach)

    monkeypatch.setattr(_Serving, "answer", answer)
    monkeypatch.setattr(OtherWorkers, "ask", ask)
    monkeypatch.setattr(shard_facts, "PIECE_BYTES", 1 << 10)


def sent(monkeypatch: pytest.MonkeyPatch) -> tuple[list[WantPiece], list[WantDigest]]:
    """What any head is asked for from now on."""
    digests: list[WantDigest] = []
    original = _Serving.answer

    def answer(self: Any, question: Any) -> Any:
        if isinstance(question, WantDigest):
            digests.append(question)
        return original(self, question)

    monkeypatch.setattr(_Serving, "answer", answer)
    return asked(monkeypatch), digests


# --- what is lent ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "kind", "quant", "before"),
    [
        ("qwen2", "F16", "keep", 3),
        ("qwen2", "F16", "q8", 2),
        ("llama", "Q4_0", "keep", 2),
        ("mixtral", "F16", "keep", 3),
    ],
)
def test_a_worker_without_anything_gets_from_the_others_what_they_have(
    family: str,
    kind: Any,
    quant: Any,
    before: int,
    caches: list[ShardCache],
    tmp_path: Path,
    slow_head: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A worker was lost, the others took its part, and it comes back with an empty cache."""
    with tiny_checkpoint(tmp_path, family, kind) as checkpoint:
        others = range(1, before)
        for rank in others:
            fetched(checkpoint, caches[rank], cut(checkpoint, before, quant)[rank], quant=quant)
        own = cut(checkpoint, before + 1, quant)[before]
        pieces, digests = sent(monkeypatch)
        lenders = [lender(caches[rank], checkpoint, rank) for rank in others]
        pack = fetched(checkpoint, caches[3], own, lenders, quant=quant)
        truth = build_pack(CheckpointShard(checkpoint, own), tmp_path / "own", quant)
        assert pack.path.read_bytes() == truth.path.read_bytes()
        assert len(digests) > 5
        assert not {fields(it) for it in digests} & {fields(it) for it in pieces}


def fields(question: WantPiece | WantDigest) -> tuple[object, ...]:
    return question.block, question.role, question.start, question.stop


def test_only_packs_of_the_groups_model_are_lent(
    checkpoint: Checkpoint, caches: list[ShardCache], slow_head: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched(checkpoint, caches[1], cut(checkpoint, 2)[1])
    own = cut(checkpoint, 3)[2]
    _, digests = sent(monkeypatch)
    others = [ShardLender(caches[1], "0" * 32), ShardLender(caches[2], WeightServer(checkpoint).key)]
    fetched(checkpoint, caches[3], own, [partial(it.serve, 1) for it in others])
    assert not digests


def test_a_pack_whose_manifest_is_not_what_its_name_says_is_not_used(
    checkpoint: Checkpoint, caches: list[ShardCache], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same sizes, but the columns of somebody else: no checksum of a block would tell."""
    had = fetched(checkpoint, caches[1], cut(checkpoint, 3)[1])
    own = cut(checkpoint, 2)[1]
    facts = ShardFacts(described_as(checkpoint, own))
    assert EarlierShard(had, facts).held
    manifest = had.path.parent / "manifest.json"
    said = json.loads(manifest.read_text())
    for name, (start, stop) in said["shard"]["ranges"].items():
        if name == "ffn":
            said["shard"]["ranges"][name] = [start + 32, stop + 32]
    manifest.write_text(json.dumps(said))
    with pytest.raises(DaemonError, match="another shard than its name says"):
        EarlierShard(open_pack(had.path.parent), facts)
    assert_holds(fetched(checkpoint, caches[1], own), CheckpointShard(checkpoint, own))


# --- a worker that lends nothing good -----------------------------------------------------------------------------


def described_as(checkpoint: Checkpoint, own: Shard) -> Description:
    part = CheckpointShard(checkpoint, own)
    return described(part, checkpoint.spec, own, "keep", WeightServer(checkpoint).key)


def claiming(answer: Callable[[Channel, Any, WantPiece], bool]) -> Serve:
    """Says that it has everything, and gives `answer` each question. It ends when that returns False."""

    def serve(channel: Channel) -> None:
        with channel, suppress(GroupError):
            facts = ShardFacts(channel.receive_message(Lacks, 5).description)
            all_blocks = [*range(len(facts.blocks))]
            roles = {role for block in facts.blocks for role in facts.matrices(block)}
            channel.send_message(Holds([HeldRows(role, 0, 1 << 40, all_blocks) for role in roles]))
            while answer(channel, facts, channel.receive_message(WantPiece, 5)):
                pass

    return serve


def lies(channel: Channel, facts: Any, asked: WantPiece) -> bool:
    channel.send_message(PieceLent())
    channel.send(
        np.ones(facts.piece_bytes(Piece(asked.block, asked.role, asked.start, asked.stop)), np.uint8)
    )
    return True


def refuses(channel: Channel, facts: Any, asked: WantPiece) -> bool:
    channel.send_message(Refused("not_found", "it is gone"))
    return True


def stalls(channel: Channel, facts: Any, asked: WantPiece) -> bool:
    return True


def dies(channel: Channel, facts: Any, asked: WantPiece) -> bool:
    channel.send_message(PieceLent())
    channel.send(b"xyz")
    return False


def is_long(channel: Channel, facts: Any, asked: WantPiece) -> bool:
    channel.send_message(PieceLent())
    channel.send(bytes(1 << 16))
    return True


def babbles(channel: Channel, facts: Any, asked: WantPiece) -> bool:
    channel.send(b"\xff" * 1000)
    return True


@pytest.mark.parametrize("answer", [lies, refuses, stalls, dies, is_long, babbles])
def test_the_head_sends_what_others_do_not(
    answer: Any,
    checkpoint: Checkpoint,
    caches: list[ShardCache],
    slow_head: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(piece_stream, "LENDER_PATIENCE_S", 0.3)
    monkeypatch.setattr(piece_stream, "LENDER_LOOK_S", 0.05)
    fetched(checkpoint, caches[1], cut(checkpoint, 2)[1])
    own = cut(checkpoint, 3)[2]
    good = lender(caches[1], checkpoint)
    began_s = time.monotonic()
    pack = fetched(checkpoint, caches[3], own, [claiming(answer), good])
    assert time.monotonic() - began_s < 4
    assert_holds(pack, CheckpointShard(checkpoint, own))


LENDER = """
import itertools, socket, sys, time
from pathlib import Path
from shoal.comm.group.channel import Channel
from shoal.comm.group.streams import SocketStream
from shoal.daemon.cluster.weights.earlier_shards import EarlierShard
from shoal.daemon.cluster.weights.shard_cache import ShardCache
from shoal.daemon.cluster.weights.shard_lender import ShardLender
root, key, end = sys.argv[1:]
number, original = itertools.count(), EarlierShard.read
def read(self, piece, into):
    if next(number) == 3:
        time.sleep(60)
    original(self, piece, into)
EarlierShard.read = read
ShardLender(ShardCache(Path(root)), key).serve(1, Channel(SocketStream(socket.socket(fileno=int(end)))))
"""


def test_a_worker_that_is_killed_while_it_lends(
    checkpoint: Checkpoint, caches: list[ShardCache], slow_head: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched(checkpoint, caches[1], cut(checkpoint, 2)[1])
    own, server = cut(checkpoint, 3)[2], WeightServer(checkpoint)
    mine, theirs = socket.socketpair()
    command = [sys.executable, "-c", LENDER, str(caches[1].root), server.key, str(theirs.fileno())]
    process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
    theirs.close()
    _, digests = sent(monkeypatch)

    def kill() -> None:
        """Once what it has sent was read: what is still in a socket is lost with one of its ends."""
        deadline_s = time.monotonic() + 10
        while len(digests) < 3 and time.monotonic() < deadline_s:
            time.sleep(0.001)
        process.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    with (
        served(server, own) as channels,
        reached([], server, own) as others,
        fetch_shard(
            channels, caches[3], others=others._replace(reach=[lambda: Channel(SocketStream(mine))])
        ) as weights,
    ):
        assert weights.pack is not None
        assert_holds(weights.pack, CheckpointShard(checkpoint, own))
    killer.join()
    assert process.wait(10) == -signal.SIGKILL
    assert len(digests) >= 3


def says_nothing(channel: Channel) -> None:
    with channel, suppress(GroupError):
        channel.receive_exactly(1 << 20, 2.0)


def says_nonsense(channel: Channel) -> None:
    with channel, suppress(GroupError):
        channel.receive_message(Lacks, 5)
        channel.send_message(
            Holds([HeldRows("nothing", 5, 1, [1 << 60, -1, 0]), HeldRows("q", 1 << 40, 0, [0, 0, 0])])
        )
        channel.receive_exactly(1 << 20, 2.0)


@pytest.mark.parametrize("serve", [says_nothing, says_nonsense, lambda channel: channel.close()])
def test_nobody_waits_for_another_worker_to_say_what_it_has(
    serve: Any, checkpoint: Checkpoint, caches: list[ShardCache], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = cut(checkpoint, 3)[2]
    began_s = time.monotonic()
    pack = fetched(checkpoint, caches[3], own, [serve])
    assert time.monotonic() - began_s < 3
    assert_holds(pack, CheckpointShard(checkpoint, own))


def removed(path: Path) -> None:
    path.unlink()


def zeroed(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize("harm", [removed, zeroed])
def test_a_pack_that_is_removed_or_damaged_while_it_is_lent(
    harm: Any, checkpoint: Checkpoint, caches: list[ShardCache], slow_head: None
) -> None:
    had = fetched(checkpoint, caches[1], cut(checkpoint, 2)[1])
    own, harmed = cut(checkpoint, 3)[2], []

    def progress(done: int, total: int) -> None:
        if done > 0.3 * total and not harmed:
            harm(had.path)
            harmed.append(done)

    pack = fetched(checkpoint, caches[3], own, [lender(caches[1], checkpoint)], progress=progress)
    assert harmed
    assert_holds(pack, CheckpointShard(checkpoint, own))


@pytest.mark.parametrize("seed", range(2))
def test_after_a_cut_no_block_is_lent_again(
    seed: int,
    checkpoint: Checkpoint,
    caches: list[ShardCache],
    slow_head: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chance = random.Random(seed)
    fetched(checkpoint, caches[1], cut(checkpoint, 2)[1])
    own = cut(checkpoint, 3)[2]
    _, digests = sent(monkeypatch)
    at = chance.uniform(0.2, 0.8)

    def progress(done: int, total: int) -> None:
        if done > at * total:
            raise Cut

    with pytest.raises(Cut):
        fetched(checkpoint, caches[3], own, [lender(caches[1], checkpoint)], progress=progress)
    (left,) = caches[3].list()
    written = {line.split()[0] for line in (left.directory / "journal").read_text().splitlines()}
    assert written
    digests.clear()
    pack = fetched(checkpoint, caches[3], own, [lender(caches[1], checkpoint)])
    assert_holds(pack, CheckpointShard(checkpoint, own))
    assert not written & {str(it.block) for it in digests}


# --- a worker that asks for too much --------------------------------------------------------------------------------


def test_questions_about_what_is_not_there_are_refused(
    checkpoint: Checkpoint, caches: list[ShardCache]
) -> None:
    fetched(checkpoint, caches[1], cut(checkpoint, 2)[1])
    facts = ShardFacts(described_as(checkpoint, cut(checkpoint, 3)[2]))
    block = BlockId("ffn", 0)
    lending = ShardLender(caches[1], WeightServer(checkpoint).key)
    mine, theirs = channel_pair("weights")
    with mine:
        thread = threading.Thread(target=lending.serve, args=(1, theirs))
        thread.start()
        mine.send_message(Lacks(facts.description))
        assert mine.receive_message(Holds | Refused, 5).rows
        again, theirs = channel_pair("weights")
        lending.serve(1, theirs)  # it has one channel already
        with again, pytest.raises(ChannelError):
            again.receive_exactly(1, 5)
        for wrong in (
            WantPiece("x", block, "up", 0, 16),
            WantPiece(facts.content, BlockId("ffn", 99), "up", 0, 16),
            WantPiece(facts.content, block, "norm", 0, 16),
            WantPiece(facts.content, block, "up", 0, 1 << 40),
            WantPiece(facts.content, block, "up", 16, 16),
        ):
            mine.send_message(wrong)
            assert isinstance(mine.receive_message(PieceLent | Refused, 5), Refused), wrong
        mine.send_message(WantPiece(facts.content, block, "up", 0, 16))
        assert isinstance(mine.receive_message(PieceLent | Refused, 5), PieceLent)
    thread.join(5)
    assert not thread.is_alive()


def test_descriptions_of_others_that_cannot_be_are_refused(
    checkpoint: Checkpoint, caches: list[ShardCache]
) -> None:
    right = described_as(checkpoint, cut(checkpoint, 3)[2])
    lending = ShardLender(caches[1], right.key)
    for wrong in (
        replace(right, forms=[]),
        replace(right, form_of=right.form_of[1:]),
        replace(right, shard=Shard(-1, 2, right.shard.ranges)),
        replace(right, key="f" * 32),
    ):
        mine, theirs = channel_pair("weights")
        with mine:
            mine.send_message(Lacks(wrong))
            lending.serve(1, theirs)
            with pytest.raises(ChannelError):
                mine.receive_message(Holds, 5)
