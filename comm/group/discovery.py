"""Heads on the local network: how one says where it is (mDNS and DNS-SD, RFC 6762 and 6763), and how it is found.

What is found was said by anybody. So it is bounded, and it is only where to ask: who is right is proved in pairing, or
by the pinned certificate.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING

from .group_protocol import OURS, Speaks
from .node_identity import node_name
from .peers import MAX_ADDRESSES
from .streams import Address

if TYPE_CHECKING:  # imported when it is needed: 0.2 s, and only heads and who looks for one need it
    from zeroconf import ServiceInfo, Zeroconf

SERVICE = "_shoal._tcp.local."
BROWSE_S = 3.0
MAX_HEADS = 60  # that are listened to: anybody can announce some that are none
FINGERPRINT_DIGITS = 16  # of it are announced
TTL_S = 120


@dataclass(frozen=True)
class FoundHead:
    """A head as it describes itself. `fingerprint`: the first digits."""

    name: str
    fingerprint: str
    addresses: tuple[Address, ...]
    speaks: Speaks = OURS


class Announcement:
    """Tells who asks where this head is, until it is closed. `interfaces` are the numeric addresses of those to tell it
    at. Raises OSError where that cannot be done."""

    def __init__(self, head: FoundHead, interfaces: Sequence[str]) -> None:
        from zeroconf import Error

        self._zeroconf = _opened(interfaces)
        self._info = described(head)
        try:
            self._zeroconf.register_service(self._info, allow_name_change=True)
        except (Error, OSError, RuntimeError, TimeoutError) as error:
            self._zeroconf.close()
            raise OSError(f"{type(error).__name__}: {error}") from error

    def close(self) -> None:
        """Take it back, and listen no more."""
        from zeroconf import Error

        with contextlib.suppress(Error, OSError, RuntimeError, TimeoutError):
            self._zeroconf.unregister_service(self._info)
        self._zeroconf.close()


def find_heads(
    interfaces: Sequence[str], seconds: float = BROWSE_S, fingerprint: str = ""
) -> list[FoundHead]:
    """The heads that answer within `seconds`, `MAX_HEADS` at most; if `fingerprint` is given, of those only that
    announce it. Raises OSError where nothing can be asked. Not within an event loop."""
    return asyncio.run(_browse(interfaces, seconds, fingerprint[:FINGERPRINT_DIGITS]))


def addresses_of(heads: Iterable[FoundHead]) -> list[Address]:
    """Each head's first address, then each one's second, and so on: a head with many keeps no other one out."""
    turns = zip_longest(*(head.addresses for head in heads))
    return list(dict.fromkeys(address for turn in turns for address in turn if address is not None))


def described(head: FoundHead) -> ServiceInfo:
    """`head` as a service of DNS-SD."""
    from zeroconf import ServiceInfo

    digits = head.fingerprint[:FINGERPRINT_DIGITS]
    port = head.addresses[0][1]
    return ServiceInfo(
        SERVICE,
        f"{node_name(head.name)[:40]} {digits}.{SERVICE}",
        port=port,
        # A name of its own: the host's may be announced by the system already, with other addresses.
        server=f"shoal-{digits}.local.",
        parsed_addresses=[host for host, _ in head.addresses[:MAX_ADDRESSES]],
        properties={
            "name": head.name,
            "fp": digits,
            "oldest": str(head.speaks.oldest),
            "newest": str(head.speaks.newest),
        },
        host_ttl=TTL_S,
        other_ttl=TTL_S,
    )


def read_head(
    port: int | None, hosts: Sequence[str], properties: Mapping[bytes, bytes | None]
) -> FoundHead | None:
    """What was announced, as far as it can be meant; None if there is no address to ask at."""
    if port is None or not 0 < port < 1 << 16:
        return None
    allowed = [host for text in hosts[: 4 * MAX_ADDRESSES] if (host := _allowed(text))]
    addresses = tuple((host, port) for host in dict.fromkeys(allowed))[:MAX_ADDRESSES]
    if not addresses:
        return None

    def said(key: bytes, pattern: str, default: str = "") -> str:
        text = (properties.get(key) or b"")[:256].decode("utf-8", "replace")
        return text if re.fullmatch(pattern, text) else default

    oldest, newest = (int(said(key, "[0-9]{1,4}", "1")) for key in (b"oldest", b"newest"))
    name = node_name((properties.get(b"name") or b"")[:256].decode("utf-8", "replace"))
    return FoundHead(
        name, said(b"fp", f"[0-9a-f]{{{FINGERPRINT_DIGITS}}}"), addresses, Speaks(oldest, newest)
    )


def _allowed(text: str) -> str:
    """A numeric address that may be another machine's, as it is written; or ""."""
    try:
        ip = ipaddress.ip_address(text)
    except ValueError:
        return ""
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    if (
        ip.is_loopback
        or ip.is_unspecified
        or ip.is_multicast
        or ip == ipaddress.ip_address("255.255.255.255")
    ):
        return ""
    if ip.version == 4:
        return "" if int(ip) < 1 << 24 or ip in ipaddress.ip_network("240.0.0.0/4") else str(ip)
    # Such an address means something at one interface only, and which that is would be forgotten.
    return "" if ip.is_link_local else str(ip)


def _opened(interfaces: Sequence[str]) -> Zeroconf:
    """Sockets at all interfaces that can be had. OSError if there is none."""
    from zeroconf import Error, IPVersion, Zeroconf

    # It tells of every packet that an interface does not take. What matters is raised, and told by whoever called.
    logging.getLogger("zeroconf").setLevel(logging.CRITICAL)
    failure: Exception = OSError("no interface is up")
    for chosen in _choices(interfaces):
        versions = {ipaddress.ip_address(host).version for host in chosen}
        version = (
            IPVersion.All if len(versions) > 1 else IPVersion.V6Only if 6 in versions else IPVersion.V4Only
        )
        try:
            return Zeroconf(interfaces=chosen, ip_version=version)
        except (Error, OSError, RuntimeError, ValueError) as error:
            failure = error
    raise OSError(str(failure) or type(failure).__name__)


def _choices(interfaces: Sequence[str]) -> Iterator[list[str]]:
    """All together, those of IPv4, and each alone: one that has no multicast need not spoil it for the others."""
    numeric = list(dict.fromkeys(interfaces))[:MAX_ADDRESSES]
    fours = [host for host in numeric if ":" not in host]
    tried: list[list[str]] = []
    for chosen in (numeric, fours, *([host] for host in numeric)):
        if chosen and chosen not in tried:
            tried.append(chosen)
            yield chosen


async def _browse(interfaces: Sequence[str], seconds: float, digits: str) -> list[FoundHead]:
    from zeroconf import Error, ServiceStateChange
    from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf

    ends_s = asyncio.get_running_loop().time() + seconds
    opened = AsyncZeroconf(zc=_opened(interfaces))
    asked: dict[str, asyncio.Task[FoundHead | None]] = {}

    async def ask(name: str) -> FoundHead | None:
        left_s = ends_s - asyncio.get_running_loop().time()
        try:
            info = AsyncServiceInfo(SERVICE, name)
            if not await info.async_request(opened.zeroconf, max(1.0, left_s * 1000)):
                return None
        except (Error, OSError, ValueError):
            return None
        return read_head(info.port, info.parsed_scoped_addresses(), info.properties)

    def noticed(zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange) -> None:
        # The name has the fingerprint: so whoever else says a lot does not use up the limit before it comes.
        meant = state_change is not ServiceStateChange.Removed and digits in name
        if meant and name not in asked and len(asked) < MAX_HEADS:
            asked[name] = asyncio.ensure_future(ask(name))

    try:
        browser = AsyncServiceBrowser(opened.zeroconf, SERVICE, handlers=[noticed])
        await asyncio.sleep(seconds)
        await browser.async_cancel()
        found = await asyncio.gather(*asked.values())
    finally:
        await opened.async_close()
    return [head for head in found if head is not None and head.fingerprint.startswith(digits)]
