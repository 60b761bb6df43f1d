"""Shares that stay as they were: a model is not cut anew because a machine was measured to be a little quicker.

Another cut means that weights are sent again, and that KV on disk is not found. So two things are kept in a file: the
speeds that machines were chosen by, which hold while new ones may be the same, badly measured; and the cuts that were
used, of which `partition.group_search.choose` takes the last one again unless another is clearly faster.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from msgspec import Struct

from shoal.daemon.private_files import keep, kept
from shoal.partition.group_choice import KeptCut, KeptCuts, Split
from shoal.partition.slicing import CutOfExperts

from .speed import STARTS, NodeSpeed

# Times: two figures of the same machine, each up to 30% off, since something else was running.
ROUGH = 1.3 / 0.7
SETTLED = 1.1  # the best of several measurements is not far off
MOST_KEPT = 64  # cuts, and machines; the longest unused go first

Shares = tuple[float, ...]


class UsedCut(Struct, frozen=True):
    """`members`: fingerprints of the workers, by rank. `there`: of all workers that there were to choose from."""

    model: str  # with all else that decides about the bytes of a shard
    members: tuple[str, ...]
    shares: Shares
    experts: CutOfExperts
    there: tuple[str, ...] = ()
    split: Split = "tensor"


class _Kept(Struct, frozen=True):
    """What is in the file, the latest last. `speeds`: by fingerprint."""

    cuts: list[UsedCut] = []
    speeds: dict[str, NodeSpeed] = {}


class SteadyShares:
    """`path`: the file; None = what is used is not kept."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path

    def speeds(self, measured: Mapping[str, NodeSpeed]) -> dict[str, NodeSpeed]:
        """The speeds to choose by: those of last time, as far as what is measured now may be the same."""
        before = self._read().speeds
        return {who: _held(before.get(who, now), now) for who, now in measured.items()}

    def cuts(self, model: str, there: Sequence[str]) -> KeptCuts:
        """What was used for a model with these workers, by their places behind the head, in their order."""
        place = {who: number for number, who in enumerate(there, 1)}
        by_places, last = {}, None
        for cut in self._read().cuts:
            if cut.model == model and place.keys() >= set(cut.members):
                places = (0, *(place[who] for who in cut.members))
                if list(places) != sorted({*places}):
                    continue  # nobody has written that
                by_places[places] = KeptCut(cut.shares, cut.experts, cut.split)
                if set(cut.there) == place.keys():
                    last = places
        return KeptCuts(by_places, last)

    def use(self, speeds: Mapping[str, NodeSpeed], cut: UsedCut | None = None) -> None:
        """Note what is used now. What cannot be kept is chosen anew next time."""
        if self._path is None:
            return
        before = self._read()
        cuts = [it for it in before.cuts if cut is None or (it.model, it.members) != (cut.model, cut.members)]
        known = {who: it for who, it in before.speeds.items() if who not in speeds} | dict(speeds)
        latest = _Kept([*cuts, *([cut] if cut else [])][-MOST_KEPT:], dict([*known.items()][-MOST_KEPT:]))
        if latest != before:
            keep(self._path, latest)

    def _read(self) -> _Kept:
        return (kept(self._path, _Kept) if self._path else None) or _Kept()


def _held(before: NodeSpeed, now: NodeSpeed) -> NodeSpeed:
    """Figure by figure what held before, unless what is measured now cannot be the same."""
    most = SETTLED if now.measured >= STARTS else ROUGH
    return NodeSpeed(
        _same(before.memory_bytes_per_s, now.memory_bytes_per_s, most),
        _same(before.flops, now.flops, most),
        _same(before.disk_bytes_per_s, now.disk_bytes_per_s, most),
        now.measured,
    )


def _same(before: float, now: float, most: float) -> float:
    return before if now / most <= before <= now * most else now
