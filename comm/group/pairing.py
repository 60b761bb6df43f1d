"""Pairing: how two nodes that have nothing in common but a join code come to pin each other's certificate.

    worker → head   Claim      a nonce, the worker's certificate and name
    head → worker   Challenge  a nonce, the head's name
    worker → head   Proof      HMAC by the code over "worker" and all that was said
    head → worker   Paired     HMAC by the code over "head" and all that was said
                    or Denied

All that was said has both certificates, the head's as each of the two sees it in TLS. So whoever stands in the middle
with a certificate of his own has a proof that the head refuses, and no code to make one that the worker believes. He
could try all codes at leisure, but these are 2^65 and a code lives for ten minutes.
"""

from __future__ import annotations

import hmac
import secrets
import time
from typing import Annotated, TypeVar

import msgspec

from ..errors import KeyFileError
from .channel import Channel
from .errors import NotPaired, PairingRefused
from .join_code import Codes, read_code
from .node_identity import MAX_CERTIFICATE_BYTES, NodeIdentity, check_certificate, node_name
from .peers import PairedNode, Peers

NONCE_BYTES = 32
PAIRING_BYTES = 4096  # the longest message
PAIR_S = 5.0

S = TypeVar("S", bound=msgspec.Struct)

_Bytes32 = Annotated[bytes, msgspec.Meta(min_length=NONCE_BYTES, max_length=NONCE_BYTES)]
_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=64)]


class Claim(msgspec.Struct, frozen=True, tag="claim"):
    nonce: _Bytes32
    certificate: Annotated[bytes, msgspec.Meta(max_length=MAX_CERTIFICATE_BYTES)]
    name: _Name


class Challenge(msgspec.Struct, frozen=True, tag="challenge"):
    nonce: _Bytes32
    name: _Name


class Proof(msgspec.Struct, frozen=True, tag="proof"):
    hmac: _Bytes32


class Paired(msgspec.Struct, frozen=True, tag="paired"):
    hmac: _Bytes32
    known_as: _Name  # the worker's name at the head, where two may not have the same


class Denied(msgspec.Struct, frozen=True, tag="denied"):
    """`reason` as of `PairingRefused`."""

    reason: _Name


_REASONS = {
    "code": "no such join code: it may be mistyped, or too old",
    "used": "this join code was used already",
    "expired": "this join code has expired",
    "often": "too many wrong join codes were tried lately: try again in a minute",
    "stored": "the head cannot remember another node: see its log",
    "peer": "a node cannot be paired with itself",
}


def join(channel: Channel, server: bytes, identity: NodeIdentity, code: str) -> tuple[PairedNode, str]:
    """As worker, over a channel for pairing whose other side showed the certificate `server`.

    The head as it is to be remembered, and this node's name there. PairingRefused, ChannelError.
    """
    plain, deadline = read_code(code), time.monotonic() + PAIR_S
    claim = Claim(secrets.token_bytes(NONCE_BYTES), identity.certificate, identity.name)
    channel.send_message(claim)
    challenge = _receive(channel, Challenge, deadline)
    said = _said(channel, claim, challenge, server)
    channel.send_message(Proof(_hmac(plain, b"worker", said)))
    paired = _receive(channel, Paired, deadline)
    if not hmac.compare_digest(paired.hmac, _hmac(plain, b"head", said, paired.known_as)):
        raise PairingRefused("proof", "the other node does not have this join code: is it the right address?")
    try:
        certificate = check_certificate(server)
    except ValueError as error:
        raise PairingRefused("proof", f"the other node is no node of a group: {error}") from error
    head = PairedNode(node_name(challenge.name), "head", certificate, (channel.remote,))
    return head, node_name(paired.known_as)


def admit(channel: Channel, identity: NodeIdentity, peers: Peers, codes: Codes) -> PairedNode:
    """As head: the worker as it was stored. PairingRefused, ChannelError, KeyFileError: nothing stored."""
    deadline = time.monotonic() + PAIR_S
    claim = _receive(channel, Claim, deadline)
    challenge = Challenge(secrets.token_bytes(NONCE_BYTES), identity.name)
    try:
        if claim.certificate == identity.certificate:
            raise PairingRefused("peer", "this node wants to be paired with itself")
        channel.send_message(challenge)
        proof = _receive(channel, Proof, deadline).hmac
        said = _said(channel, claim, challenge, identity.certificate)
        used: list[str] = []

        def proven(code: str) -> bool:
            if same := hmac.compare_digest(proof, _hmac(code, b"worker", said)):
                used.append(code)
            return same

        peer = codes.redeem(channel.remote[0], proven, lambda: _stored(peers, claim, identity.name))
    except PairingRefused as error:
        channel.send_message(Denied(error.reason))
        raise
    channel.send_message(Paired(_hmac(used[0], b"head", said, peer.name), peer.name))
    return peer


def _stored(peers: Peers, claim: Claim, own_name: str) -> PairedNode:
    try:
        return peers.add(PairedNode(claim.name, "worker", check_certificate(claim.certificate)), own_name)
    except (KeyFileError, NotPaired, ValueError) as error:
        raise PairingRefused("stored", str(error)) from error


def _said(channel: Channel, claim: Claim, challenge: Challenge, server: bytes) -> bytes:
    """All that both sides must have seen alike, each part behind its length."""
    version = str(channel.agreed.version).encode()
    names = claim.name.encode(), challenge.name.encode()
    parts = (version, claim.nonce, challenge.nonce, claim.certificate, server, *names)
    return b"".join(len(part).to_bytes(4, "little") + part for part in parts)


def _hmac(code: str, role: bytes, said: bytes, known_as: str = "") -> bytes:
    """The role keeps a node's own proof from being sent back to it."""
    return hmac.digest(code.encode(), b"shoal pairing, " + role + b"\0" + said + known_as.encode(), "sha256")


def _receive(channel: Channel, kind: type[S], deadline: float) -> S:
    """The next message. PairingRefused if it is `Denied` instead."""
    left_s = max(0.0, deadline - time.monotonic())
    message: S | Denied = channel.receive_message(kind | Denied, left_s, PAIRING_BYTES, rest_s=0)
    if isinstance(message, Denied):
        raise PairingRefused(message.reason, _REASONS.get(message.reason, "the head refuses to pair"))
    return message
