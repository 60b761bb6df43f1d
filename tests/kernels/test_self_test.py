"""The self-test passes every home that works, and finds faults of every kind."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes.homes import NATIVE, TRUTH

from shoal.kernels import KernelError, self_test
from shoal.kernels.homes import choose
from shoal.kernels.self_test import disagreements, examined


class Faulty:
    """A home of which one function computes something else. It changes what that function returns, or its `into`."""

    def __init__(self, function: str, fault: Callable[[Any], None], rows: int | None = None) -> None:
        self._function = function
        self._fault = fault
        self._rows = rows

    def __getattr__(self, name: str) -> Any:
        function = getattr(TRUTH, name)
        if name != self._function:
            return function

        def faulty(x: Any, *others: Any) -> Any:
            result = function(x, *others)
            if self._rows in (None, len(x)):
                for part in (
                    result if isinstance(result, list) else [others[-1] if result is None else result]
                ):
                    self._fault(part)
            return result

        return faulty


def one_number(x: Any) -> None:
    x[-1, -1] += 0.01 * np.abs(x).max()


def not_a_number(x: Any) -> None:
    x[0, 0] = np.nan


def last_bit(x: Any) -> None:
    x[0, 0] = np.nextafter(x[0, 0], np.float32(np.inf))


@pytest.mark.parametrize("name", NATIVE)
def test_what_works_agrees(name: str) -> None:
    assert disagreements(choose(name), TRUTH) == []
    choose()


@pytest.mark.parametrize(
    ("home", "named"),
    [
        (Faulty("linears", one_number, rows=4), "Q4_K by 4 rows"),
        (Faulty("linears", not_a_number, rows=1), "IQ4_NL by 1 rows"),
        (Faulty("experts", one_number), "experts of Q6_K"),
        (Faulty("rms_norm", last_bit), "norms"),
        (Faulty("scores", last_bit), "routers"),
    ],
)
def test_faults_are_found(home: Any, named: str) -> None:
    found = disagreements(home, TRUTH)
    assert any(it.startswith(named) for it in found)
    assert len(found) < 30  # what is right is not blamed


def test_it_runs_in_a_process_of_its_own() -> None:
    assert examined(NATIVE[-1]) == []


def test_kernels_that_are_not_there() -> None:
    with pytest.raises(KernelError, match=r"could not be tested: .*nonsense"):
        examined("nonsense")


def test_a_process_that_dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\nkill -ILL $$\n")
    script.chmod(stat.S_IRWXU)
    monkeypatch.setattr(sys, "executable", os.fspath(script))
    assert examined("avx2") == ["they end the process by signal 4"]


def test_a_process_that_does_not_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\nexec sleep 60\n")
    script.chmod(stat.S_IRWXU)
    monkeypatch.setattr(sys, "executable", os.fspath(script))
    monkeypatch.setattr(self_test, "PATIENCE_S", 0.2)
    with pytest.raises(KernelError, match="timed out"):
        examined("avx2")
