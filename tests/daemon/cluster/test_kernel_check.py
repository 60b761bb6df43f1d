"""Machines whose kernels compute wrong numbers take part in nothing; what has passed is not tested again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal import kernels
from shoal.daemon.cluster import kernel_check
from shoal.daemon.errors import DaemonError


class Examiner:
    """Stands for the test."""

    def __init__(self, *wrong: str) -> None:
        self.wrong = wrong
        self.times = 0

    def __call__(self, home: str) -> list[str]:
        self.times += 1
        return list(self.wrong)


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    kernel_check._failed.clear()
    yield
    kernel_check._failed.clear()


def test_it_is_tested_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examiner = Examiner()
    monkeypatch.setattr(kernel_check, "examined", examiner)
    kept = tmp_path / "cluster" / "kernels.tested"
    kernel_check.check_kernels(kept)
    kernel_check.check_kernels(kept)
    assert examiner.times == 1
    kept.write_bytes(b"\xff")  # damaged, or of other kernels
    kernel_check.check_kernels(kept)
    assert examiner.times == 2


def test_wrong_numbers_are_refused_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examiner = Examiner("Q4_K by 1 rows: 3.0e-01 of the largest number away", "norms: …")
    monkeypatch.setattr(kernel_check, "examined", examiner)
    for _ in range(2):
        with pytest.raises(DaemonError, match=r"compute wrong numbers: Q4_K by 1 rows.*, and 1 more"):
            kernel_check.check_kernels(tmp_path / "kernels.tested")
    assert examiner.times == 1
    assert not (tmp_path / "kernels.tested").exists()


def test_what_cannot_be_tested_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(home: str) -> list[str]:
        raise kernels.KernelError("the kernels could not be tested: no torch")

    monkeypatch.setattr(kernel_check, "examined", fails)
    with pytest.raises(DaemonError, match="no torch"):
        kernel_check.check_kernels(tmp_path / "kernels.tested")


def test_a_full_disk_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_check, "examined", Examiner())
    (tmp_path / "file").write_text("")
    kernel_check.check_kernels(tmp_path / "file" / "kernels.tested")
