"""The first words on a channel, from both sides: `greet` dialled, `welcome` was dialled."""

from __future__ import annotations

import time
from typing import get_args

from . import same_host
from .channel import Channel
from .errors import ChannelError, VersionMismatch
from .group_protocol import (
    BESIDE,
    OPENING_BYTES,
    PURPOSES,
    Declined,
    Opened,
    Opening,
    Purpose,
    Speaks,
    agree,
    declined,
)


def greet(channel: Channel, purpose: Purpose, ours: Speaks, deadline: float) -> None:
    """Say what `channel` is for and hear whether that is welcome. NotPaired, VersionMismatch, ChannelError."""
    channel.send_message(Opening(purpose, ours), _left(deadline))
    answer: Opened | Declined = channel.receive_message(
        Opened | Declined, _left(deadline), OPENING_BYTES, rest_s=0
    )
    if isinstance(answer, Declined):
        raise declined(ours, answer)
    channel.purpose, channel.agreed = purpose, agree(ours, answer.speaks)
    if _may_change_over(channel):
        same_host.offer(channel, deadline)


def welcome(channel: Channel, ours: Speaks, deadline: float, refusal: str = "") -> None:
    """Hear what `channel` is for and answer, with `refusal` if there is one. Raises when the other is turned away."""
    opening: Opening = channel.receive_message(Opening, _left(deadline), OPENING_BYTES, rest_s=0)
    if reason := _objection(channel, opening, ours) or refusal:
        channel.send_message(Declined(reason, ours), _left(deadline))
        raise ChannelError(f"{opening.purpose[:64]!r} channel of {opening.speaks}: {reason}")
    channel.purpose = next(purpose for purpose in get_args(Purpose) if purpose == opening.purpose)
    channel.agreed = agree(ours, opening.speaks)
    channel.send_message(Opened(ours), _left(deadline))
    if _may_change_over(channel):
        same_host.answer(channel, deadline)


def _may_change_over(channel: Channel) -> bool:
    return channel.purpose == "data" and BESIDE in channel.agreed.features


def _objection(channel: Channel, opening: Opening, ours: Speaks) -> str:
    """A reason of `Declined`. A stranger learns which versions there are and nothing else."""
    try:
        agree(ours, opening.speaks)
    except VersionMismatch:
        return "version"
    if channel.peer is None and opening.purpose != "pair":
        return "unpaired"
    if opening.purpose not in PURPOSES or (channel.peer is not None and opening.purpose == "pair"):
        return "purpose"
    return ""


def _left(deadline: float) -> float:
    return max(0.0, deadline - time.monotonic())
