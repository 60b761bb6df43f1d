"""Copies of pages have a place each, and those that are used stay."""

from __future__ import annotations

import random

import pytest

from shoal.engine.copied_pages import CopiedPages


@pytest.mark.parametrize("seed", range(5))
def test_every_page_has_a_place_of_its_own(seed: int) -> None:
    source = random.Random(seed)
    copied = CopiedPages(8)
    for _ in range(300):
        before = dict(copied.places)
        pages = source.sample(range(20), source.randrange(12))
        if len(pages) > 8:
            assert not copied.place(pages)
            assert copied.places == before
            continue
        assert copied.place(pages)
        assert set(pages) <= copied.places.keys()
        assert len(set(copied.places.values())) == len(copied.places) <= 8
        assert set(copied.places.values()) <= set(range(8))
        kept = before.keys() & copied.places.keys()
        assert {page: before[page] for page in kept} == {page: copied.places[page] for page in kept}
        gone = len(before.keys() - copied.places.keys())
        assert gone == max(0, len(before.keys() | set(pages)) - 8)


def test_the_one_used_longest_ago_goes() -> None:
    copied = CopiedPages(3)
    for pages in ([10, 11, 12], [10], [13]):
        assert copied.place(pages)
    assert copied.places.keys() == {10, 12, 13}
    assert CopiedPages(3).place([])


def test_with_as_many_pages_all_have_their_own_numbers() -> None:
    source, copied = random.Random(1), CopiedPages(9)
    for _ in range(50):
        assert copied.place(source.sample(range(9), source.randrange(9)))
        assert all(page == place for page, place in copied.places.items())
