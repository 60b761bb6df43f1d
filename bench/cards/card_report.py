"""What figures of a graphics card mean: ratios to the peer, shares of what the card can do, and what was aimed at.

Pure: figures in, lines out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

AIMS = {"interactive": 5.0, "offline": 10.0}  # times as many tokens a second as the peer
DENSE_AIM = 0.6  # of the card's memory bandwidth
PREDICTED_AIM = 0.06
SHARE_AIM = 0.8  # offline, of what the narrowest of link, card, attention and K and V allows


def report(results: Mapping[str, Any]) -> list[str]:
    """One line for each figure. Parts that failed, or were not run, say so."""
    lines = [f"{name}: failed: {its['failed']}" for name, its in results.items() if "failed" in its]
    parts = {name: its for name, its in results.items() if "failed" not in its}
    for name in ("tests", "tests-triton"):
        if name in parts:
            lines += _tests(name, parts[name])
    for name, say in (("copies", _copies), ("crossover", _crossover), ("layers", _layers)):
        if name in parts:
            lines += say(parts[name])
    if "kernels" in parts:
        lines += _kernels(parts["kernels"], parts.get("copies"))
    for name in ("dense", "dense-torch"):
        if name in parts:
            lines += _dense(name, parts[name], parts.get("copies"))
    for budget in ("16", "24"):
        for which in AIMS:
            its = parts.get(f"{which}-{budget}")
            lines += _mixture(budget, which, its, parts.get(f"peer-{budget}"))
            if its is not None and which == "offline":
                lines += _share(its, parts.get("copies"))
    return lines


def _tests(name: str, its: Mapping[str, Any]) -> Iterator[str]:
    yield f"{name} on the card: {'passed' if its['passed'] else 'FAILED'}: {its['said']}"


def _copies(its: Mapping[str, Any]) -> Iterator[str]:
    for name, value in its["bytes_per_s"].items():
        yield f"{name}: {value / 1e9:.1f} GB/s" if isinstance(value, float) else f"{name}: {value}"


def _kernels(its: Mapping[str, Any], copies: Mapping[str, Any] | None) -> Iterator[str]:
    for name, said in its["failed with"].items():
        yield f"kernels of {name}: {said}"
    if late := its.get("no time for"):
        yield f"kernels: there was no time for {', '.join(late)}"
    within = copies["bytes_per_s"]["within"] if copies is not None else None
    for it in (*its["products"], *its.get("programs", ()), *its.get("looks", ())):
        each = ", ".join(f"{name} {s * 1e6:.4g} µs" for name, s in it["seconds"].items())
        quickest = min(it["seconds"].values(), default=float("inf"))
        said = f"{it['type']} by {it['rows']}: {each}; {it['nbytes'] / quickest / 1e9:.4g} GB/s"
        said += f", {it['nbytes'] / quickest / within:.0%} of the card's memory" if within else ""
        yield f"{said}, {it['flops'] / quickest / 1e12:.3g} Tflop/s, {it['off']:.0e} apart"


def _dense(name: str, its: Mapping[str, Any], copies: Mapping[str, Any] | None) -> Iterator[str]:
    speed = its["interactive"]["tokens_per_s"]
    read = speed * its["weights_bytes"]
    if kernels := its.get("kernels"):
        lacks = its.get("not better")
        yield f"{name} computes with {kernels}{f' ({lacks})' if lacks else ''}"
    said = f"{name}, 4 bits: {speed:.4g} tokens/s, {read / 1e9:.0f} GB/s of weights"
    if copies is not None:
        share = read / copies["bytes_per_s"]["within"]
        said += f", {share:.0%} of the card's memory ({_aimed(share, DENSE_AIM, '60%')})"
    yield said
    yield from _foreseen(name, speed, its["predicted"].get("tokens_per_s"))


def _mixture(
    budget: str, which: str, ours: Mapping[str, Any] | None, peer: Mapping[str, Any] | None
) -> Iterator[str]:
    if ours is None:
        return
    yield f"{which} in {budget} GB: {ours['plan']}; tried in {ours['tried_s']:.0f} s, loaded in {ours['load_s']:.0f} s"
    within = ours["peak_bytes"] <= ours["limit_bytes"]
    yield f"  peak {ours['peak_bytes'] / 1e9:.3g} GB, {'within' if within else 'BEYOND'} its budget"
    if ours["unpinned"]:
        yield f"  without page-locked memory: {ours['unpinned']}"
    speed = ours["measured"]["tokens_per_s"]
    said = f"  {speed:.4g} tokens/s"
    if peer is not None:
        theirs, aim = peer[which]["tokens_per_s"], AIMS[which]
        ratio = speed / theirs
        said += f", Accelerate {theirs:.4g}: {ratio:.3g} times ({_aimed(ratio, aim, f'{aim:g}')})"
    yield said
    rate = "tokens_per_s" if which == "interactive" else "whole_tokens_per_s"
    yield from _foreseen("  it", speed, ours["predicted"].get(rate))


def _share(its: Mapping[str, Any], copies: Mapping[str, Any] | None) -> Iterator[str]:
    """How much of a step is the longest of what goes on beside each other in it."""
    known = its.get("bounds")
    if not known:
        yield "  no share of link, card, attention and KV: its weights do not pass, or nothing was tried"
        return
    copied = copies["bytes_per_s"].get("in, page-locked") if copies is not None else None
    each = {
        "the link": known["come_bytes"] / copied if copied else known["link_s"],
        "the card": known["card_s"],
        "the processor's attention": known["attention_s"],
        "reading K and V": known["kv_s"],
    }
    narrowest = max(each, key=lambda name: each[name])
    share = each[narrowest] / its["measured"]["token_s"]
    others = ", ".join(f"{name} {seconds * 1e3:.3g} ms" for name, seconds in each.items())
    yield f"  {share:.0%} of what {narrowest} allows ({_aimed(share, SHARE_AIM, '80%')}): {others}"


def _layers(its: Mapping[str, Any]) -> Iterator[str]:
    yield from _crossover(its, "a dense model's layers")


def _crossover(its: Mapping[str, Any], what: str = "experts") -> Iterator[str]:
    yield f"{what} come: predicted from {its['predicted_tokens']} tokens on, seen from {its['seen_tokens']} on"
    for count, both in its["seconds"].items():
        stay, come = both["stay"] * 1e3, both["come"] * 1e3
        yield f"  {count} tokens: {stay:.1f} ms where they stay, {come:.1f} ms where they come"


def _foreseen(what: str, measured: float, predicted: float | None) -> Iterator[str]:
    if predicted:
        off = measured / predicted - 1
        aimed = _aimed(-abs(off), -PREDICTED_AIM, "6%")
        yield f"{what}: predicted {predicted:.4g} tokens/s, measured {off:+.0%} ({aimed})"


def _aimed(value: float, aim: float, said: str) -> str:
    return f"aim {said}: {'met' if value >= aim else 'MISSED'}"
