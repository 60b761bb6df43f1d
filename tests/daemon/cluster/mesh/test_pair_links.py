"""Links between workers: assumed, then measured at their best, or none."""

from __future__ import annotations

from dataclasses import dataclass

from shoal.daemon.cluster.mesh.pair_links import PairLinks
from shoal.partition.machines import LinkSpeed


@dataclass
class One:
    fingerprint: str
    link: LinkSpeed


NEAR, FAR = One("a", LinkSpeed(1e-4, 1e8)), One("b", LinkSpeed(1e-3, 1e6))


def test_a_link_is_as_bad_as_the_worse_one_until_it_is_measured() -> None:
    links = PairLinks()
    assert links.between(NEAR, FAR) == LinkSpeed(1e-3, 1e6)
    links.note(FAR, NEAR, LinkSpeed(2e-4, 5e7))
    links.note(NEAR, FAR, LinkSpeed(1e-4, 4e7))
    assert links.between(NEAR, FAR) == LinkSpeed(1e-4, 5e7)


def test_who_does_not_reach_another_is_remembered_until_it_attaches_anew() -> None:
    links = PairLinks()
    links.note(NEAR, FAR, None)
    assert links.between(FAR, NEAR) is None
    links.forget("b")
    assert links.between(FAR, NEAR) is not None


def test_who_lost_another_stays_apart_though_they_meet_again() -> None:
    links = PairLinks()
    links.part(NEAR, FAR)
    links.note(NEAR, FAR, LinkSpeed(1e-4, 1e8))
    assert links.between(FAR, NEAR) is None
    links.forget("a")
    assert links.between(FAR, NEAR) is not None
