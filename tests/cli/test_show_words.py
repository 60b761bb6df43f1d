"""What `shoal show` says of how a model would run, with a device, with a disk, and with both."""

from __future__ import annotations

from io import StringIO

from msgspec.structs import replace
from rich.console import Console

from shoal.cli.show import _words
from shoal.daemon.loading.outlook import Outlook, Uses

MB = 10**6
ALONE = Outlook(
    "a plan",
    "keep",
    100 * MB,
    Uses(40 * MB, 0, 5 * MB, 5 * MB, 20 * MB, 30 * MB),
    40 * MB,
    0,
    512,
    512,
    "f16",
)


def said(found: Outlook) -> str:
    screen = Console(width=200, record=True, file=StringIO())
    screen.print(_words(found))
    return " ".join(screen.export_text().split())


def test_where_weights_are() -> None:
    assert "weights all 40 MB stay in memory" in said(ALONE)
    streamed = replace(
        ALONE, memory_bytes=replace(ALONE.memory_bytes, weights=10 * MB), streamed_bytes=30 * MB, step_s=0.02
    )
    assert "weights 10 MB of 40 MB stay in memory, the rest is streamed from disk" in said(streamed)
    assert "reading 30 MB for each token, 0.02 s at " in said(streamed)
    there = replace(ALONE, device="cuda:0", device_bytes=20 * MB, placed="2 of 4 layers on cuda:0")
    assert "weights 2 of 4 layers on cuda:0 cuda:0 20 MB of its memory" in said(there)
    assert "reading" not in said(there)
    both = said(replace(there, streamed_bytes=30 * MB, step_s=0.02))
    assert "weights 2 of 4 layers on cuda:0 reading 30 MB for each token, 0.02 s at " in both
    assert "stay in memory" not in both


def test_the_first_token_has_its_prompt_beside_it() -> None:
    found = replace(ALONE, tokens_per_s=4.33, band=(3.28, 5.71), first_s=64.0, prompt_tokens=512)
    assert "the first after 64 s with a prompt of 512 tokens" in said(found)
