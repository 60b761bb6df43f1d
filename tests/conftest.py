"""SHOAL_TEST_LIBRARY names another build of the native kernels to test: with sanitizers, or for another machine.

Besides: fixtures that several files use.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

from shoal.comm.home import Home
from shoal.kernels import native_library as library

if TYPE_CHECKING:
    from shoal.daemon.node import Node

# How long it takes to make up inputs says more about a busy or emulated machine than about a test.
anywhere = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
# The same code gets the same verdict: the made-up inputs are the same in each run. Others: --hypothesis-profile explore
settings.register_profile("shoal", anywhere, derandomize=True)
settings.register_profile("explore", anywhere)
settings.load_profile("shoal")

# On a busy or emulated machine the barriers of torch's pool cost more than the work of a test. Most tests do without
# torch: those that load it do so after this.
os.environ["OMP_NUM_THREADS"] = "1"

# Kernels in Triton are interpreted, where tests are not for a graphics card. Triton looks when it is imported.
if "SHOAL_TEST_DEVICE" not in os.environ:
    os.environ["TRITON_INTERPRET"] = "1"

if build := os.environ.get("SHOAL_TEST_LIBRARY"):
    library.LIBRARY = Path(build).resolve(strict=True)


def pytest_collection_finish() -> None:
    """Each load of a model looks for garbage. It need not look through torch and transformers, which stay."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    """A home of the test's own; lines of a terminal are long."""
    monkeypatch.setenv("SHOAL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "300")
    return Home.from_env()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A file that the test may do anything to."""
    from fakes import tiny  # brings torch

    return tiny.save_gguf(tiny.hf_model("qwen2"), tmp_path / "tiny.gguf", type="F16")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that the tests of a module share."""
    from fakes import tiny

    directory = tmp_path_factory.mktemp("m")
    return tiny.save_gguf(tiny.hf_model("llama", seed=11), directory / "tiny.gguf", type="Q8_0")


@pytest.fixture
def node(path: Path) -> Iterator[Node]:
    """With the model of `path` loaded."""
    from fakes.asking import CONFIG  # the emulated ARM of the kernel tests has nothing of the daemon

    from shoal.comm.messages import Load
    from shoal.daemon.node import Node

    with Node(CONFIG) as node:
        node.load(Load(model=str(path)))
        yield node
