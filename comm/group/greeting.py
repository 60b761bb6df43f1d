"""The first words on a channel, from both sides: `greet` dialled, `welcome` was dialled."""

from __future__ import annotations

import time
from typing import get_args

from .channel import Channel
from .errors import ChannelError, VersionMismatch
from .group_protocol import HELLO_BYTES, PURPOSES, Hello, Purpose, Speaks, Turned, Welcome, agree, turned_away


def greet(channel: Channel, purpose: Purpose, ours: Speaks, deadline: float) -> None:
    """Say what `channel` is for and hear whether that is welcome. NotPaired, VersionMismatch, ChannelError."""
    channel.send_message(Hello(purpose, ours), _left(deadline))
    answer: Welcome | Turned = channel.receive_message(
        Welcome | Turned, _left(deadline), HELLO_BYTES, rest_s=0
    )
    if isinstance(answer, Turned):
        raise turned_away(ours, answer)
    channel.purpose, channel.agreed = purpose, agree(ours, answer.speaks)


def welcome(channel: Channel, ours: Speaks, deadline: float, refusal: str = "") -> None:
    """Hear what `channel` is for and answer, with `refusal` if there is one. Raises when the other is turned away."""
    hello: Hello = channel.receive_message(Hello, _left(deadline), HELLO_BYTES, rest_s=0)
    if reason := _objection(channel, hello, ours) or refusal:
        channel.send_message(Turned(reason, ours), _left(deadline))
        raise ChannelError(f"{hello.purpose[:64]!r} channel of {hello.speaks}: {reason}")
    channel.purpose = next(purpose for purpose in get_args(Purpose) if purpose == hello.purpose)
    channel.agreed = agree(ours, hello.speaks)
    channel.send_message(Welcome(ours), _left(deadline))


def _objection(channel: Channel, hello: Hello, ours: Speaks) -> str:
    """A reason of `Turned`. A stranger learns which versions there are and nothing else."""
    try:
        agree(ours, hello.speaks)
    except VersionMismatch:
        return "version"
    if channel.peer is None and hello.purpose != "pair":
        return "unpaired"
    if hello.purpose not in PURPOSES or (channel.peer is not None and hello.purpose == "pair"):
        return "purpose"
    return ""


def _left(deadline: float) -> float:
    return max(0.0, deadline - time.monotonic())
