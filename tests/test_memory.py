"""Memory given back, and imports that the garbage collector leaves alone."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import numpy as np
import pytest

from shoal.cli.imports import engine_imports
from shoal.daemon import memory


def test_computing_goes_on_after_memory_was_returned() -> None:
    x = np.arange(12.0).reshape(3, 4)
    before = np.exp(x @ x.T / 99)
    memory.return_freed()
    assert np.array_equal(np.exp(x @ x.T / 99), before)
    assert sys.platform != "linux" or list(memory._code_mappings())


def test_computing_goes_on_with_code_that_is_read_in_pieces() -> None:
    x = np.arange(12.0).reshape(3, 4)
    before = np.exp(x @ x.T / 99)
    for _ in range(2):  # the second time there is nothing left to cut
        memory._read_code_in_pieces()
        sizes = [size for _, size in memory._code_mappings()]
        assert sys.platform != "linux" or 0 < max(sizes) <= memory.PIECE_BYTES
    memory.return_freed()
    assert np.array_equal(np.exp(x @ x.T / 99), before)


def test_code_mappings_are_those_of_unchanged_files(monkeypatch: pytest.MonkeyPatch) -> None:
    def mapping(span: str, mode: str, inode: int, path: str, own_kb: int) -> str:
        return (
            f"{span} {mode} 00001000 fe:00 {inode:<26} {path}\n"
            f"Size:                 64 kB\nRss:                  64 kB\nAnonymous:      {own_kb:8} kB\n"
            "THPeligible:           0\nVmFlags: rd ex mr mw me\n"
        )

    smaps = (
        mapping("1000-3000", "r-xp", 7, "/lib/a.so", 0)
        + mapping("4000-5000", "r-xp", 7, "/lib/patched.so", 4)
        + mapping("6000-7000", "r--p", 7, "/lib/a.so", 0)
        + mapping("8000-9000", "rwxp", 7, "/lib/a.so", 0)
        + mapping("a000-b000", "r-xs", 7, "/lib/a.so", 0)
        + mapping("c000-d000", "r-xp", 0, "[vdso]", 0)
        + mapping("e000-f000", "r-xp", 0, "", 0)
        + mapping("7f00-8f00", "r-xp", 9, "/a dir/b.so (deleted)", 0)
    )
    monkeypatch.setattr(Path, "read_text", lambda self: smaps)
    assert list(memory._code_mappings()) == [(0x1000, 0x2000), (0x7F00, 0x1000)]


def test_what_was_imported_is_no_business_of_the_garbage_collector() -> None:
    gc.unfreeze()
    try:
        with engine_imports():
            assert not gc.isenabled()
            kept: list[list[int]] = [[] for _ in range(1000)]
        assert gc.isenabled()
        assert gc.get_freeze_count() >= len(kept)
    finally:
        gc.unfreeze()
