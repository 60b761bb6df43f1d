"""Plans on terminals of all widths: names are broken at commas, words and figures never."""

from __future__ import annotations

import io
from itertools import takewhile

import pytest
from rich.console import Console

from shoal.cli.throughput.figures import start_words
from shoal.cli.throughput.plan_table import batches_table, plans_table
from shoal.daemon.throughput.batch_foresight import BatchRow
from shoal.daemon.throughput.foresight import PlanRow

NAMES = (
    "through gpu from disk, where prompts attend, q4, KV i8",
    "on gpu: 13 of 80 layers, others from disk",
    "memory",
)
PLANS = [
    PlanRow(
        name,
        name != "memory",
        355.0,
        69.0,
        0.0145,
        (0.0116, 0.0181),
        {"pc": 3_540_000_000} | ({} if name == "memory" else {"gpu": 7_290_000_000}),
        "disk",
        None if name != "memory" else "140 GB of memory",
        None if name != "memory" else 144_000_000_000,
    )
    for name in NAMES
]


def drawn(width: int, *best: str, all_: bool = False) -> list[str]:
    out = io.StringIO()
    made = plans_table(PLANS, best, NAMES[0], {"pc"}, all_=all_)
    Console(file=out, width=width).print(made)
    return out.getvalue().splitlines()


@pytest.mark.parametrize("width", [30, 40, 60, 80, 100, 120, 160])
def test_no_word_or_figure_is_broken(width: int) -> None:
    lines = drawn(width, *NAMES)
    assert all(len(line.rstrip()) <= width for line in lines)
    text = "\n".join(lines)
    for whole in ("5 min 55 s", "3.54 GB", "7.29 GB", "0.0145", "144 GB", "25%"):
        assert whole in text
    assert set(" ".join(NAMES).split()) <= set(text.split())


def test_a_name_goes_on_further_right_than_names_begin() -> None:
    lines = drawn(80, *NAMES[:2])
    assert lines[2].startswith("→ through gpu from disk,  ")
    assert lines[3].startswith("    where prompts attend,")
    assert lines[4].startswith("    q4, KV i8 ")
    assert lines[5].startswith("  on gpu: 13 of 80 layers,  ")
    assert lines[6].startswith("    others from disk ")
    assert all(" disk" in lines[number] for number in (2, 5))
    assert lines[-1] == "  and 1 more that does not fit: --all"


def test_only_plans_that_lack_something_say_what_they_need() -> None:
    assert "needs" not in drawn(120, *NAMES[:2])[0]
    lines = drawn(120, all_=True)
    assert "needs" in lines[0]
    assert lines[4].split()[:4] == ["✗", "memory", "144", "GB"]
    assert not any("--all" in line for line in lines)


def test_many_requests_are_shown_likewise() -> None:
    row = BatchRow("stream", True, 9, 256, 5e5, 0.1, 1.0, {"pc": 10**9}, "disk", None, None)
    lack = BatchRow("memory", False, None, None, None, None, None, {"pc": 10**9}, "disk", "1 GB", 10**9)
    out = io.StringIO()
    Console(file=out, width=80).print(batches_table([row, lack], ["stream"], "stream", {"pc"}, all_=False))
    head, _, first, *others = (line.rstrip() for line in out.getvalue().splitlines())
    assert head.split() == ["plan", "at", "once", "all", "take", "tokens/s", "peak", "binds"]
    assert first.split()[:2] == ["→", "stream"]
    assert [*takewhile(bool, others)] == ["  and 1 more that does not fit: --all"]


def test_a_plan_that_holds_nothing_is_not_said_to_be_loaded_in_no_time() -> None:
    """Its weights may all pass through a device, or a window."""
    assert start_words(0.0, 256.0) == "its pack would be made once, in 4 min 16 s"
    assert (
        start_words(0.93, 256.0) == "it would be loaded in 930 ms, after making its pack once in 4 min 16 s"
    )
    assert start_words(0.93, 0.0) == "it would be loaded in 930 ms"
    assert start_words(0.001, 0.0) == ""
