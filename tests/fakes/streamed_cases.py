"""Helpers: tiny models with their packs and their logits from memory, and a file whose reads fail or take time."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from fakes.running import Running
from fakes.streaming import MODELS, packed, run, texts

from shoal.kernels.arrays import Bytes
from shoal.offload.direct_io import DirectFile


class Case:
    def __init__(self, directory: Path, name: str) -> None:
        family, overrides = MODELS[name]
        self.path, self.pack = packed(directory, family, **overrides)
        self.resident = Running(self.path)
        (self.ids,) = texts(self.resident.spec.vocab, [60])
        self.expected = run(self.resident, self.ids)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    return {name: Case(tmp_path_factory.mktemp(name), name) for name in MODELS}


@pytest.fixture
def tied(cases: dict[str, Case]) -> Case:
    return cases["tied"]


class Faulty:
    """Makes reads that touch the bytes `bad` of a file fail with `error`, and all reads take `slow_s` longer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bad: tuple[int, int] | None = None
        self.error: Exception = OSError(5, "Input/output error")
        self.slow_s = 0.0
        self.reads = 0
        read = DirectFile.read

        def faulty(file: DirectFile, offset: int, into: Bytes) -> None:
            self.reads += 1
            if self.slow_s:
                time.sleep(self.slow_s)
            if self.bad and offset < self.bad[1] and self.bad[0] < offset + len(into):
                raise self.error
            read(file, offset, into)

        monkeypatch.setattr(DirectFile, "read", faulty)


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> Faulty:
    return Faulty(monkeypatch)
