"""What figures of links mean (pure): a verdict on every member, and which of them a token waits for.

A token needs two sums a layer. Each is a small message there and back, so a delay counts twice a layer and bytes per
second count little, until a link is so thin that these few bytes take longer than the delay.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from msgspec.structs import replace

from shoal.comm.cluster_messages import LinkStatus, LinkVerdict
from shoal.partition.amounts import format_bytes, format_delay

SUM_BYTES = 16 << 10  # of a part of a sum of one token: 4,096 columns of f32
FAR_S = 2e-3  # there and back; over a cable it is a fifth of that
UNSTEADY_S = 5e-3
SLOW_S = 2e-3
STANDS_OUT = 3.0  # times what others have
FEW_WAITS = 16  # parts that a verdict about computing needs


def judged(links: Sequence[LinkStatus]) -> list[LinkStatus]:
    """The same with `verdict` and `why`."""
    return [_judged(link, [it for it in links if it is not link and _known(it)]) for link in links]


def culprit(links: Sequence[LinkStatus]) -> tuple[str, str]:
    """Of judged links: (name, why) of the member that others wait for; ("", why there is none)."""
    lost = [link for link in links if link.verdict == "lost"]
    bad = [link for link in links if link.verdict not in ("good", "lost")]
    if lost:
        return lost[0].name, f"{lost[0].name} was lost meanwhile: {lost[0].why}"
    if not bad:
        return "", "no member stands out" if len(links) > 1 else "nothing is wrong with it"
    worst = max(bad, key=_cost_s)
    return worst.name, f"{worst.name}: {worst.why}: it is what a token waits for"


def _judged(link: LinkStatus, others: Sequence[LinkStatus]) -> LinkStatus:
    verdict, why = ("lost", link.why) if not _known(link) else _verdict(link, others)
    return replace(link, verdict=verdict, why=why)


def _verdict(link: LinkStatus, others: Sequence[LinkStatus]) -> tuple[LinkVerdict, str]:
    wire_s = _wire_s(link, SUM_BYTES)
    explained_s = link.rtt_s + _wire_s(link, link.part_bytes)
    if link.waits >= FEW_WAITS and link.wait_s > SLOW_S + STANDS_OUT * explained_s:
        said = f"the head waits {format_delay(link.wait_s)} for each of its parts, and its link takes "
        return "computes slowly", f"{said}{format_delay(explained_s)} of that"
    if wire_s > max(FAR_S, link.rtt_s):
        thin, way = min((link.to_bytes_per_s, "to"), (link.from_bytes_per_s, "from"))
        return "thin", f"{format_bytes(thin)}/s {way} it, {format_delay(wire_s)} for every sum"
    if link.rtt_s > FAR_S:
        return "far", f"{format_delay(link.rtt_s)} there and back{_times(link, others)}"
    if link.rtt_p99_s > UNSTEADY_S:
        said = f"one message of a hundred takes {format_delay(link.rtt_p99_s)}"
        return "unsteady", f"{said}, the others {format_delay(link.rtt_s)}"
    return "good", ""


def _known(link: LinkStatus) -> bool:
    return link.rtt_s > 0 and link.to_bytes_per_s > 0 and link.from_bytes_per_s > 0


def _wire_s(link: LinkStatus, nbytes: int) -> float:
    """That so many bytes take there and as many back, beyond the delay."""
    return nbytes / link.to_bytes_per_s + nbytes / link.from_bytes_per_s


def _cost_s(link: LinkStatus) -> float:
    """What one sum has to wait for it. Waits that were seen are better evidence than probes, once there are some."""
    probed_s = link.rtt_s + _wire_s(link, SUM_BYTES)
    if link.verdict == "unsteady":
        probed_s += link.rtt_p99_s / 100
    return max(probed_s, link.wait_s if link.verdict == "computes slowly" else 0.0)


def _times(link: LinkStatus, others: Sequence[LinkStatus]) -> str:
    if not others:
        return ""
    factor = link.rtt_s / median(it.rtt_s for it in others)
    if factor < STANDS_OUT:
        return ""
    return f", {factor:.0f} times the others" if len(others) > 1 else f", {factor:.0f} times the other"
