"""A head that lies, and a worker that asks for what it must not have: nothing is believed, nothing hangs or grows."""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pytest
from fakes.group.weights import served
from fakes.packing import tiny_checkpoint
from msgspec.structs import replace

from shoal.comm.group.channel import Channel, channel_pair
from shoal.comm.group.errors import ChannelError, GroupError
from shoal.daemon.cluster.weights import piece_sources, remote_shard, shard_facts, weight_server
from shoal.daemon.cluster.weights.remote_shard import RemoteShard
from shoal.daemon.cluster.weights.shard_cache import ShardCache
from shoal.daemon.cluster.weights.shard_facts import described
from shoal.daemon.cluster.weights.shard_fetch import fetch_shard
from shoal.daemon.cluster.weights.weight_messages import (
    BlockForm,
    Describe,
    Description,
    PieceFollows,
    Refused,
    WantChecksum,
    WantPiece,
)
from shoal.daemon.cluster.weights.weight_server import WeightServer
from shoal.daemon.errors import DaemonError
from shoal.models.checkpoint.checkpoint import Checkpoint
from shoal.models.checkpoint.shard import CheckpointShard
from shoal.offload.pack.layout import grains_of
from shoal.offload.pack.manifest import KERNEL_LAYOUT, PACK_FORMAT
from shoal.partition.slicing import Range, Shard, divide
from shoal.partition.spec import BlockId

ATTN = BlockId("attn", 0)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Iterator[Checkpoint]:
    with tiny_checkpoint(tmp_path, "qwen2", "Q8_0") as checkpoint:
        yield checkpoint


@pytest.fixture
def shard(checkpoint: Checkpoint) -> Shard:
    return divide(checkpoint.spec, 2, grains_of(checkpoint, "keep"))[1]


# --- a head that lies -------------------------------------------------------------------------------------------


Lie = Callable[[Channel, Any, Any], bool]


class Liar(NamedTuple):
    """A head that gives `lie` its end of the channel, and the message and bytes that would be right, for each answer to
    a question about a piece. The channel ends when that returns False."""

    server: WeightServer
    lie: Lie

    def serve(self, channel: Channel, shard: Shard) -> None:
        serving = weight_server._Serving(self.server._checkpoint, "keep", self.server._source, shard)
        with channel, suppress(GroupError):
            while True:
                question = channel.receive_message(weight_server.WeightQuestion, 10)
                answer, data = serving.answer(question)
                if data is None:
                    channel.send_message(answer)
                elif not self.lie(channel, answer, data):
                    return


def altered(channel: Channel, answer: Any, data: Any) -> bool:
    channel.send_message(answer)
    wrong = np.array(data)
    wrong[len(wrong) // 2] ^= 4
    channel.send(wrong)
    return True


def wrong_checksum(channel: Channel, answer: Any, data: Any) -> bool:
    channel.send_message(PieceFollows("0" * 16))
    channel.send(data)
    return True


def no_checksum(channel: Channel, answer: Any, data: Any) -> bool:
    channel.send_message(PieceFollows("../../etc/passwd"))
    channel.send(data)
    return True


def truncated(channel: Channel, answer: Any, data: Any) -> bool:
    channel.send_message(answer)
    channel.send(data[:-1])
    return False


def oversized(channel: Channel, answer: Any, data: Any) -> bool:
    channel.send_message(answer)
    channel.send(data, b"\xff" * 5000)
    return True


def silent(channel: Channel, answer: Any, data: Any) -> bool:
    time.sleep(1)
    return False


def another_message(channel: Channel, answer: Any, data: Any) -> bool:
    channel.send_message(Describe(1, 1))
    return True


def long_message(channel: Channel, answer: Any, data: Any) -> bool:
    channel.send((1 << 30).to_bytes(4, "little"), b"x" * 100)
    return True


def long_refusal(channel: Channel, answer: Any, data: Any) -> bool:
    channel.send_message(Refused("internal", "x" * 3000))
    return True


def noise(channel: Channel, answer: Any, data: Any) -> bool:
    channel.send(random.Random(1).randbytes(10_000))
    return True


@pytest.mark.parametrize(
    "lie",
    [
        altered,
        wrong_checksum,
        no_checksum,
        truncated,
        oversized,
        silent,
        another_message,
        long_message,
        long_refusal,
        noise,
    ],
)
def test_answers_that_are_wrong_are_refused(
    lie: Lie, checkpoint: Checkpoint, shard: Shard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(piece_sources, "ANSWER_S", 0.5)
    cache = ShardCache(tmp_path / "shards")
    with served(Liar(WeightServer(checkpoint), lie), shard, 1) as (channel,):
        began_s = time.monotonic()
        with pytest.raises(ChannelError):
            fetch_shard([channel], cache)
        assert time.monotonic() - began_s < 5
        assert channel.closed
    assert [entry.complete for entry in cache.list()] == [False]


def test_a_refusal_is_told_with_its_code(checkpoint: Checkpoint, shard: Shard, tmp_path: Path) -> None:
    def refuse(channel: Channel, answer: Any, data: Any) -> bool:
        channel.send_message(Refused("corrupt", "the file ends too early"))
        return True

    with served(Liar(WeightServer(checkpoint), refuse), shard, 1) as (channel,):
        with pytest.raises(DaemonError, match="the file ends too early") as caught:
            fetch_shard([channel], ShardCache(tmp_path / "shards"))
        assert caught.value.code == "corrupt"


def broken_descriptions(right: Description) -> Iterator[Description]:
    spec, shard = right.spec, right.shard

    def ranges(**own: Range) -> Description:
        changed = {**vars(shard.ranges), **own}
        return replace(right, shard=Shard(shard.rank, shard.ranks, type(shard.ranges)(**changed)))

    yield replace(right, form_of=right.form_of[:-1])
    yield replace(right, form_of=[*right.form_of, 0])
    yield replace(right, form_of=[99] * len(right.form_of))
    yield replace(right, form_of=[-1] * len(right.form_of))
    yield replace(right, forms=[])
    attn = right.forms[right.form_of[1]]
    for types in ({}, {**attn.types, "x": 0}, {**attn.types, "q": 999}, dict.fromkeys(attn.types, 12)):
        yield replace(right, forms=[*right.forms, BlockForm(types, attn.vectors)], form_of=patched(right))
    for vectors in ([], [*attn.vectors[1:]], [*attn.vectors, "x"], [*attn.vectors, *attn.vectors]):
        yield replace(right, forms=[*right.forms, BlockForm(attn.types, vectors)], form_of=patched(right))
    yield replace(right, shard=Shard(5, 2, shard.ranges))
    yield replace(right, shard=Shard(-1, 2, shard.ranges))
    yield replace(right, shard=Shard(0, 1 << 40, shard.ranges))
    yield ranges(ffn=Range(32, 0))
    yield ranges(heads=Range(0, 1 << 40))
    yield ranges(ffn=Range(0, 1 << 60))
    yield ranges(shared_ffn=Range(0, 1 << 63))
    yield ranges(o_columns=Range(1 << 50, 1 << 51))
    yield replace(right, spec=dataclasses.replace(spec, layers=spec.layers[:1] * 4096))


def patched(right: Description) -> list[int]:
    """The first block of attention gets the form that was added."""
    return [right.form_of[0], len(right.forms), *right.form_of[2:]]


def test_descriptions_that_cannot_be_are_refused(
    checkpoint: Checkpoint, shard: Shard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = CheckpointShard(checkpoint, shard)
    right = described(part, checkpoint.spec, shard, "keep", "0" * 32)
    count = 0
    for wrong in broken_descriptions(right):
        monkeypatch.setattr(weight_server, "described", lambda *_, wrong=wrong: wrong)
        monkeypatch.setattr(weight_server, "ShardFacts", lambda _: None)
        with served(WeightServer(checkpoint), shard, 1) as channels:
            with pytest.raises(DaemonError, match="the head described a shard that cannot be") as caught:
                RemoteShard(channels)
            assert caught.value.code == "corrupt"
            assert "\n" not in str(caught.value)
        count += 1
    assert count > 15


def test_bytes_that_are_no_description(checkpoint: Checkpoint, shard: Shard) -> None:
    part = CheckpointShard(checkpoint, shard)
    right = msgspec.msgpack.encode(described(part, checkpoint.spec, shard, "keep", "0" * 32))
    chance = random.Random(3)
    for _ in range(300):
        wrong = bytearray(right)
        for _ in range(chance.randrange(1, 4)):
            wrong[chance.randrange(len(wrong))] = chance.randrange(256)
        mine, theirs = channel_pair("weights")
        with mine, theirs:
            theirs.send(len(wrong).to_bytes(4, "little"), wrong)
            try:
                remote = RemoteShard([mine])
            except (GroupError, DaemonError):
                continue
            assert remote.facts.nbytes < 1 << 60


def test_names_and_keys_of_the_head_lead_nowhere(
    checkpoint: Checkpoint, shard: Shard, tmp_path: Path
) -> None:
    part = CheckpointShard(checkpoint, shard)
    right = described(part, checkpoint.spec, shard, "keep", "0" * 32)
    cache = ShardCache(tmp_path / "shards")
    for wrong in (replace(right, name="../../x/\x00\x1b[31m"), replace(right, key="../" * 10 + "aa")):
        mine, theirs = channel_pair("weights")
        with mine, theirs:
            theirs.send_message(wrong)
            if wrong.key != right.key:
                with pytest.raises(ChannelError):
                    RemoteShard([mine])
            else:
                place = cache.place(RemoteShard([mine]).facts)
                assert place.parent == cache.root
                assert place.name.replace(".", "").replace("-", "").isalnum()


# --- a worker that asks for too much ----------------------------------------------------------------------------


def test_questions_about_what_the_shard_has_not_are_refused_and_the_channel_goes_on(
    checkpoint: Checkpoint, shard: Shard
) -> None:
    server = WeightServer(checkpoint)
    with served(server, shard, 1) as (channel,):
        remote = RemoteShard([channel])
        content, rows = remote.facts.content, remote.matrices(ATTN)["q"][1]
        wrong = [
            ("x", ATTN, "q", 0, 16),
            (content, BlockId("attn", 99), "q", 0, 16),
            (content, BlockId("attn", -5), "q", 0, 16),
            (content, BlockId("expert", 0, 0), "gate", 0, 16),
            (content, ATTN, "nothing", 0, 16),
            (content, ATTN, "q", 0, 0),
            (content, ATTN, "q", 16, 0),
            (content, ATTN, "q", 1, 16),
            (content, ATTN, "q", 0, rows - 1),
            (content, ATTN, "q", 0, rows + 16),
            (content, ATTN, "q", 0, 1 << 40),
            (content, ATTN, "norm", 0, 1 << 40),
            (content, ATTN, "norm", 5, 5),
        ]
        for question in wrong:
            channel.send_message(WantPiece(*question))
            answer = channel.receive_message(PieceFollows | Refused, 5)
            assert isinstance(answer, Refused), question
            assert answer.code == ("version" if question[0] == "x" else "bad_request")
            assert "\n" not in answer.reason
        for block in (BlockId("attn", 99), BlockId("head", -1, 99)):
            channel.send_message(WantChecksum(content, block))
            assert isinstance(channel.receive_message(Refused, 5), Refused)
        channel.send_message(Describe(PACK_FORMAT + 1, KERNEL_LAYOUT))
        assert channel.receive_message(Refused, 5).code == "version"
        assert remote.read_block(ATTN).matrix["q"].rows == rows
        remote.close()


def test_no_piece_is_larger_than_stated(
    checkpoint: Checkpoint, shard: Shard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_facts, "MOST_PIECE_BYTES", 1000)
    with served(WeightServer(checkpoint), shard, 1) as (channel,):
        remote = RemoteShard([channel])
        kind, rows, cols = remote.matrices(ATTN)["q"]
        assert kind.matrix_bytes(rows, cols) > 1000
        channel.send_message(WantPiece(remote.facts.content, ATTN, "q", 0, rows))
        assert channel.receive_message(Refused, 5).code == "bad_request"


def test_noise_ends_a_channel_and_no_other(checkpoint: Checkpoint, shard: Shard) -> None:
    server = WeightServer(checkpoint)
    chance = random.Random(7)
    with served(server, shard, 1) as (good,):
        remote = RemoteShard([good])
        for _ in range(200):
            with served(server, shard, 1) as (bad,), suppress(ChannelError):
                bad.send(chance.randbytes(chance.randrange(1, 3000)))
                bad.receive_into(bytearray(1), 0.02)
        assert remote.read_block(ATTN).matrix
        remote.close()


def test_versions_that_differ_are_told(
    checkpoint: Checkpoint, shard: Shard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_shard, "KERNEL_LAYOUT", KERNEL_LAYOUT + 1)
    with served(WeightServer(checkpoint), shard, 1) as channels:
        with pytest.raises(DaemonError, match="run the same version of Shoal on both") as caught:
            RemoteShard(channels)
        assert caught.value.code == "version"
