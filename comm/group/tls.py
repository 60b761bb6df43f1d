"""The TLS of a group: version 1.3 and nothing below, certificates pinned, no name or date of any meaning.

OpenSSL checks that a certificate is, or was signed by, one of the pinned ones. Whoever was paired could sign others
with his key: so `peers.get` of the fingerprint has the last word. No session is resumed: a forgotten node could.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterable

from .node_identity import NodeIdentity


def server_context(identity: NodeIdentity, pinned: Iterable[bytes]) -> ssl.SSLContext:
    """For connections that came in: a client shows one of the `pinned` certificates, or none at all."""
    context = _context(ssl.PROTOCOL_TLS_SERVER, pinned)
    context.load_cert_chain(identity.file)
    context.verify_mode = ssl.CERT_OPTIONAL
    context.num_tickets = 0
    return context


def client_context(identity: NodeIdentity, pinned: bytes) -> ssl.SSLContext:
    """For a connection to the paired node whose certificate is `pinned`."""
    context = _context(ssl.PROTOCOL_TLS_CLIENT, [pinned])
    context.load_cert_chain(identity.file)
    context.verify_mode = ssl.CERT_REQUIRED
    return context


def stranger_context() -> ssl.SSLContext:
    """For a connection to whom one wants to be paired with: nothing is shown, anything is believed for now."""
    context = _context(ssl.PROTOCOL_TLS_CLIENT, [])
    context.verify_mode = ssl.CERT_NONE
    return context


def _context(side: ssl._SSLMethod, pinned: Iterable[bytes]) -> ssl.SSLContext:
    context = ssl.SSLContext(side)
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    if der := b"".join(pinned):
        context.load_verify_locations(cadata=der)
    return context
