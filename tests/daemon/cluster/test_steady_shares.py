"""Shares stay as they were while machines are measured to be nearly as quick as before."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.daemon.cluster.steady_shares import MOST_KEPT, SteadyShares

USED = (0.5, 0.3, 0.2)


@pytest.mark.parametrize(
    ("best", "steady"),
    [
        (USED, True),
        ((0.47, 0.31, 0.22), True),
        ((0.6, 0.2, 0.2), False),
        ((0.5, 0.25, 0.25), False),
        ((0.6, 0.4), False),
    ],
)
def test_only_what_is_near_stays(best: tuple[float, ...], steady: bool, tmp_path: Path) -> None:
    path = tmp_path / "shares.json"
    SteadyShares(path).use("m a b", USED)
    again = SteadyShares(path)
    assert again.near("m a b", best) == (USED if steady else best)
    assert again.near("m a c", best) == best


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"m a b": "x"}', b"\xff\x00"])
def test_a_damaged_file_is_none(damage: bytes, tmp_path: Path) -> None:
    path = tmp_path / "shares.json"
    path.write_bytes(damage)
    shares = SteadyShares(path)
    assert shares.near("m a b", USED) == USED
    shares.use("m a b", USED)
    assert shares.near("m a b", (0.47, 0.31, 0.22)) == USED


def test_what_cannot_be_kept_and_what_is_too_much(tmp_path: Path) -> None:
    SteadyShares(tmp_path / "nowhere" / "shares.json").use("m", USED)
    SteadyShares().use("m", USED)
    shares = SteadyShares(tmp_path / "shares.json")
    for number in range(MOST_KEPT + 1):
        shares.use(f"m{number}", (0.5 + number / 1e4, 0.5 - number / 1e4))
    assert shares.near("m0", (0.501, 0.499)) == (0.501, 0.499)
    assert shares.near("m1", (0.501, 0.499)) == (0.5001, 0.4999)
