"""Ending another process, with what Linux has for that and without."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from shoal.cli.other_process import find_process


@pytest.fixture(params=["as here", "without pidfd"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "without pidfd":
        monkeypatch.delattr(os, "pidfd_open", raising=False)
        monkeypatch.delattr(signal, "pidfd_send_signal", raising=False)


@pytest.mark.usefixtures("system")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_process_is_ended_and_found_gone(number: signal.Signals) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    process = find_process(child.pid)
    assert not process.gone(0.05)
    process.signal(number)
    assert process.gone(30.0)  # also before anybody has waited for it
    assert child.wait() == -number
    assert process.gone()
    with pytest.raises(ProcessLookupError):
        process.signal(number)
    process.close()
    with pytest.raises(ProcessLookupError):
        find_process(child.pid)


MISSING = """
import fcntl, importlib, mmap, os, pkgutil, select, signal, socket
HIDDEN = {
    os: ["pidfd_open", "memfd_create", "sched_getaffinity", "posix_fadvise", "posix_fallocate", "O_DIRECT", "O_TMPFILE",
         "POSIX_FADV_DONTNEED", "POSIX_FADV_RANDOM"],
    signal: ["pidfd_send_signal"], select: ["epoll"], mmap: ["MADV_HUGEPAGE"], socket: ["SO_PEERCRED"],
    fcntl: ["F_OFD_SETLK", "F_ADD_SEALS"],
}
for module, names in HIDDEN.items():
    for name in names:
        if hasattr(module, name):
            delattr(module, name)
import shoal
for room in ("cli", "client", "comm", "daemon", "engine", "models", "offload", "kernels", "partition"):
    package = importlib.import_module(f"shoal.{room}")
    for found in pkgutil.walk_packages(package.__path__, f"shoal.{room}."):
        if not found.name.endswith(("__main__", "libshoal", "libshoal_bytes")):
            importlib.import_module(found.name)
from shoal.daemon.config import NodeConfig
from shoal.kernels.huge_pages import mapped
NodeConfig()
assert mapped(5).sum() == 0
"""


def test_every_module_imports_without_what_only_linux_has() -> None:
    subprocess.run([sys.executable, "-c", MISSING], check=True, timeout=600)
