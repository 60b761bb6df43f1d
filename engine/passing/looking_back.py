"""Who attends for which rows of a group whose weights pass through a device.

An answer's one row reads K and V of its whole text: that is for the host, in whose memory they lie. Of many rows of a
text each reads them again, so there is as much to multiply as with weights: that is for the device. For these K and V
of one layer come there, as far as the text had any before, and what the rows add leaves for the host's memory.

Knows rows and pages; computes nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np

from shoal.kernels.arrays import Ids
from shoal.kernels.attention_operands import Rotation, Segments
from shoal.models.step import Part
from shoal.partition.memory_layout import PAGE_TOKENS


class RowsHere(NamedTuple):
    """Consecutive rows of a group, for which the host attends."""

    rows: slice
    segments: Segments
    rotations: list[Rotation]


class RowsThere(NamedTuple):
    """For which the device does. There K and V of a layer have `held` pages, by which `segments` call them: first come
    those of `coming`, numbers of the host's pages; the last ones leave for those of `leaving`. What the rows are added
    to in the middle of a page comes and leaves."""

    rows: slice
    segments: Segments
    rotations: list[Rotation]
    coming: Ids
    leaving: Ids
    held: int


class Looks(NamedTuple):
    """All rows of a group, each once: at most two parts here, and one there, between them or beside."""

    here: list[RowsHere]
    there: list[RowsThere]


class _Text(NamedTuple):
    rows: int
    start: int
    pages: list[int]


def dealt(part: Part, rotations: list[Rotation], least_rows: int, most_pages: int) -> Looks:
    """The device attends for texts with so many rows or more (0: for none) that follow each other, as far as so many
    pages suffice: a step has texts in the order of their rows, and where it is cut in two, those with most of them are
    next to the cut."""
    segments = part.segments
    texts = [*_texts(segments)]
    chosen = _chosen(texts, least_rows, most_pages) if least_rows else range(0)
    if not chosen:
        return Looks([RowsHere(slice(0, segments.tokens), segments, rotations)], [])
    here = []
    for which in (range(chosen.start), range(chosen.stop, len(texts))):
        if which:
            rows = _rows(segments, which)
            its = Segments.build(texts[place] for place in which)
            here.append(RowsHere(rows, its, _cut(rotations, rows)))
    return Looks(here, [_there(segments, texts, chosen, rotations)])


def _texts(segments: Segments) -> Iterator[_Text]:
    for _, rows, start, first in segments.table.tolist():
        count = _pages(start + rows)
        yield _Text(rows, start, segments.pages[first : first + count].tolist())


def _chosen(texts: Sequence[_Text], least_rows: int, most_pages: int) -> range:
    """Of texts with enough rows that follow each other those that have most rows together; without those with the
    fewest at the ends, until there is room for the others."""
    runs = groupby(range(len(texts)), key=lambda place: texts[place].rows >= least_rows)
    found = [[*run] for enough, run in runs if enough]
    if not found:
        return range(0)
    run = max(found, key=lambda run: sum(texts[place].rows for place in run))
    begin, end = run[0], run[-1] + 1
    # Texts may share what they have before.
    users = Counter(page for place in range(begin, end) for page in texts[place].pages)
    while len(users) > most_pages:
        fewest = begin if texts[begin].rows < texts[end - 1].rows else end - 1
        begin, end = (begin + 1, end) if fewest == begin else (begin, end - 1)
        users -= Counter(texts[fewest].pages)
    return range(begin, end)


def _there(segments: Segments, texts: Sequence[_Text], chosen: range, rotations: list[Rotation]) -> RowsThere:
    its = [texts[place] for place in chosen]
    # Texts may share what they have before.
    whole = dict.fromkeys(page for text in its for page in text.pages[: text.start // PAGE_TOKENS])
    begun = [text.pages[text.start // PAGE_TOKENS] for text in its if text.start % PAGE_TOKENS]
    added = [page for text in its for page in text.pages[_pages(text.start) :]]
    number = {page: place for place, page in enumerate((*whole, *begun, *added))}
    rows = _rows(segments, chosen)
    return RowsThere(
        rows,
        Segments.build((text.rows, text.start, [number[page] for page in text.pages]) for text in its),
        _cut(rotations, rows),
        np.array([*whole, *begun], np.int64),
        np.array([*begun, *added], np.int64),
        len(number),
    )


def _rows(segments: Segments, which: range) -> slice:
    first, (last, rows) = segments.table[which[0], 0], segments.table[which[-1], :2]
    return slice(int(first), int(last + rows))


def _cut(rotations: Sequence[Rotation], rows: slice) -> list[Rotation]:
    return [Rotation(it.dims, it.interleaved, it.cos[rows], it.sin[rows]) for it in rotations]


def _pages(tokens: int) -> int:
    return -(-tokens // PAGE_TOKENS)
