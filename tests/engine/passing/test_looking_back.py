"""Which rows of a group attend on the device: each is in one place, and every text finds its pages there."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from shoal.engine.passing.looking_back import Looks, RowsThere, dealt
from shoal.kernels.attention_operands import Rotation, Segments
from shoal.models.step import Part, Step
from shoal.partition.memory_layout import PAGE_TOKENS

POOL = 2000
Text = tuple[int, int]  # rows, and the position of the first


def part_of(texts: list[Text], shared: int = 0) -> Part:
    """A group of texts with pages of their own, but for so many that all begin with."""
    numbers = iter(np.random.default_rng(1).permutation(np.arange(100, POOL)).tolist())
    segments = []
    for rows, start in texts:
        count, common = -(-(start + rows) // PAGE_TOKENS), min(shared, start // PAGE_TOKENS)
        segments.append(
            ([0] * rows, start, [*range(common), *(next(numbers) for _ in range(count - common))], 0)
        )
    (part,) = Step.build(segments).parts
    return part


def looks_of(part: Part, least_rows: int, most_pages: int) -> Looks:
    rows = part.segments.tokens
    angles = np.arange(rows, dtype=np.float32)[:, None]
    return dealt(part, [Rotation(2, False, angles, -angles)], least_rows, most_pages)


texts = st.lists(st.tuples(st.integers(1, 150), st.integers(0, 200)), min_size=1, max_size=8)


@given(texts=texts, least_rows=st.integers(0, 100), most_pages=st.integers(0, 30), shared=st.integers(0, 3))
def test_each_row_is_in_one_place(texts: list[Text], least_rows: int, most_pages: int, shared: int) -> None:
    part = part_of(texts, shared)
    looks = looks_of(part, least_rows, most_pages)
    its = [*looks.here, *looks.there]
    table, pages = part.segments.table, part.segments.pages
    seen = []
    for one in its:
        assert one.segments.tokens == one.rows.stop - one.rows.start
        np.testing.assert_array_equal(one.rotations[0].cos[:, 0], np.arange(one.rows.start, one.rows.stop))
        seen += range(one.rows.start, one.rows.stop)
    assert sorted(seen) == list(range(part.segments.tokens))
    for one in looks.here:  # texts are as they were
        for first, rows, start, page in one.segments.table.tolist():
            (whole,) = [it for it in table.tolist() if it[0] == one.rows.start + first]
            assert whole[1:3] == [rows, start]
            count = -(-(start + rows) // PAGE_TOKENS)
            assert (
                one.segments.pages[page : page + count].tolist()
                == pages[whole[3] : whole[3] + count].tolist()
            )
    for there in looks.there:
        assert there.held <= most_pages
        assert (there.segments.table[:, 1] >= least_rows).all()
        comes_and_goes(part.segments, there)


def comes_and_goes(whole: Segments, there: RowsThere) -> None:
    """Every page of a text has there what it had here, and here what it gets there."""
    pool = np.arange(POOL)
    lent = np.full(there.held, -1)
    lent[: len(there.coming)] = pool[there.coming]
    rows = {first: page for first, _, _, page in whole.table.tolist()}
    for first, count, start, page in there.segments.table.tolist():
        mine = there.segments.pages[page : page + -(-(start + count) // PAGE_TOKENS)]
        theirs = whole.pages[rows[there.rows.start + first] :][: len(mine)]
        before = -(-start // PAGE_TOKENS)
        np.testing.assert_array_equal(lent[mine[:before]], theirs[:before])
        lent[mine[start // PAGE_TOKENS :]] = 1000 + theirs[start // PAGE_TOKENS :]
    pool[there.leaving] = lent[there.held - len(there.leaving) :]
    for first, count, start, page in whole.table.tolist():
        if there.rows.start <= first < there.rows.stop:
            theirs = whole.pages[page : page + -(-(start + count) // PAGE_TOKENS)]
            np.testing.assert_array_equal(
                pool[theirs[start // PAGE_TOKENS :]] - 1000, theirs[start // PAGE_TOKENS :]
            )
            np.testing.assert_array_equal(
                pool[theirs[: start // PAGE_TOKENS]], theirs[: start // PAGE_TOKENS]
            )


def there_of(texts: list[Text], least_rows: int, most_pages: int) -> list[int]:
    """Rows of each text that attends there."""
    looks = looks_of(part_of(texts), least_rows, most_pages)
    return [rows for there in looks.there for rows in there.segments.table[:, 1].tolist()]


def test_those_with_most_rows_have_the_room() -> None:
    assert there_of([(1, 500), (20, 0), (64, 0), (128, 0)], 16, 9) == [20, 64, 128]
    assert there_of([(1, 500), (20, 0), (64, 0), (128, 0)], 16, 3) == [64, 128]
    assert there_of([(128, 0), (64, 0), (20, 0), (1, 500)], 16, 2) == [128]
    assert there_of([(128, 0), (64, 0)], 16, 1) == []
    assert there_of([(128, 0), (64, 0)], 0, 9) == []
    assert there_of([(50, 0), (1, 80), (60, 0)], 16, 9) == [60]


def test_what_texts_share_takes_room_once() -> None:
    part = part_of([(40, 3072)] * 20, shared=48)
    (there,) = looks_of(part, 16, 48 + 20).there
    assert (there.held, len(there.segments.table), len(there.coming)) == (68, 20, 48)
