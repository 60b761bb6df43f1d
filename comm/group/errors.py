"""Errors between the machines of a group.

CommError
└── GroupError
    ├── ChannelError        a connection that failed or ended, or what came over it is not what was agreed
    │   └── ChannelTimeout  nothing came, or nothing could be sent, within the stated time
    ├── NotPaired           a node that is not, or is no longer, known here or there
    │   └── Forgotten       the other node, whose certificate was proved, has said that it does not know this one
    ├── VersionMismatch     two nodes whose ranges of the protocol do not overlap
    └── PairingRefused      a join code that is wrong, used or expired, or somebody in the middle
Files of keys and nodes that cannot be used raise `comm.errors.KeyFileError`.
"""

from __future__ import annotations

from ..errors import CommError

DOES_NOT_KNOW = "the other node does not know this one, or no longer: pair them again"
NOT_PROVED = (
    "somebody at this address, who has not proved to be the other node, refuses this one: see whether the address is"
    " still that node's; only if it has forgotten this one, pair anew"
)


class GroupError(CommError):
    """Root of this folder's errors."""


class ChannelError(GroupError):
    """The channel failed, was closed by either side, or got bytes that it must not get. It is of no further use."""


class ChannelTimeout(ChannelError):
    """Not within the stated time. If no byte of what was awaited has come, the channel can be used further."""


class NotPaired(GroupError):
    """One of the two nodes does not know the other."""


class Forgotten(NotPaired):
    """The other node does not know this one, or no longer. It has proved before that it is the one that was dialled, so
    nobody else can have said so."""


class VersionMismatch(GroupError):
    """No version of the protocol is spoken by both nodes."""


class PairingRefused(GroupError):
    """Pairing failed, and nothing was stored. `reason` is stable: code, used, expired, often, proof, stored or peer."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
