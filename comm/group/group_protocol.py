"""What two nodes of a group say to each other first: what a channel is for, and which versions each speaks (pure).

A node speaks a range of versions and names the features that it has beyond them. The highest common version and the
common features hold for the channel. The three messages here may gain fields and never lose any, since nodes of all
versions must understand them.
"""

from __future__ import annotations

from typing import Annotated, Literal, get_args

import msgspec

from .errors import DOES_NOT_KNOW, ChannelError, Forgotten, GroupError, VersionMismatch

Purpose = Literal["control", "data", "weights", "measure", "pair"]
PURPOSES: frozenset[str] = frozenset(get_args(Purpose))
OPENING_BYTES = 4096

_Short = Annotated[str, msgspec.Meta(max_length=64)]
_Version = Annotated[int, msgspec.Meta(ge=0, le=1 << 16)]


class Speaks(msgspec.Struct, frozen=True):
    """The versions of the protocol that a node speaks, both ends included, and its features."""

    oldest: _Version = 1
    newest: _Version = 1
    features: Annotated[tuple[_Short, ...], msgspec.Meta(max_length=128)] = ()

    def __str__(self) -> str:
        return (
            f"version {self.newest}"
            if self.oldest == self.newest
            else f"versions {self.oldest} to {self.newest}"
        )


class Agreed(msgspec.Struct, frozen=True):
    """What holds for a channel; `theirs` is all that the other node could do."""

    version: int = 1
    features: frozenset[str] = frozenset()
    theirs: Speaks = Speaks()


class Opening(msgspec.Struct, frozen=True, tag="opening"):
    """The first message, by the node that dialled."""

    purpose: _Short
    speaks: Speaks


class Opened(msgspec.Struct, frozen=True, tag="opened"):
    """The answer."""

    speaks: Speaks


class Declined(msgspec.Struct, frozen=True, tag="declined"):
    """The other answer. The node that reads it has its own words for the reasons."""

    reason: _Short  # version, unpaired, purpose or full
    speaks: Speaks


FELLOWS = "fellows"  # workers of a group reach each other, and add sums in more ways than by a star
BESIDE = "beside"  # on one machine, channels for data change over to memory (`same_host`)
PAGES = "pages"  # workers exchange K and V of their heads with a head that has all of them
VOCABULARY = "vocabulary"  # workers have rows of embedding and head, and get token ids then

OURS = Speaks(features=(FELLOWS, BESIDE, PAGES, VOCABULARY))


def agree(ours: Speaks, theirs: Speaks) -> Agreed:
    """VersionMismatch when there is no common version."""
    version = min(ours.newest, theirs.newest)
    if version < max(ours.oldest, theirs.oldest):
        raise VersionMismatch(
            f"this node speaks {ours} of the group's protocol, the other node {theirs}: update the older one"
        )
    return Agreed(version, frozenset(ours.features) & frozenset(theirs.features), theirs)


def declined(ours: Speaks, answer: Declined) -> GroupError:
    """What `answer` means here."""
    if answer.reason == "version":
        try:
            agree(ours, answer.speaks)
        except VersionMismatch as error:
            return error
    if answer.reason == "unpaired":
        return Forgotten(DOES_NOT_KNOW)
    if answer.reason == "full":
        return ChannelError("the other node has too many channels with this one")
    return ChannelError("the other node has no use for this channel")
