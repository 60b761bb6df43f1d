"""Lets no machine compute for others before its kernels have been found to compute what the reference computes.

Once for each build, processor and choice of kernels: a file remembers which passed.
"""

from __future__ import annotations

import logging
import threading
from pathlib import Path

from shoal import kernels
from shoal.daemon.errors import DaemonError
from shoal.kernels.self_test import examined

from .speed import kernels_key

log = logging.getLogger(__name__)

_testing = threading.Lock()
_failed: dict[str, DaemonError] = {}  # in this process; the next one tests again


def check_kernels(passed: Path) -> None:
    """`passed`: the file of what passed last. Takes seconds if nothing has. Raises DaemonError."""
    key = kernels_key()
    with _testing:
        if key in _failed:
            raise _failed[key]
        if _read(passed) == key or kernels.home() == "reference":
            return
        log.info("comparing the %s kernels with the reference, once", kernels.home())
        if trouble := kernel_trouble():
            _failed[key] = DaemonError("internal", trouble, "SHOAL_KERNELS=scalar chooses the plainest ones")
            raise _failed[key]
        try:
            passed.parent.mkdir(parents=True, exist_ok=True)
            passed.write_text(key)
        except OSError as error:
            log.warning("%s cannot be written, so the kernels will be tested again: %s", passed, error)


def _read(passed: Path) -> str:
    try:
        return passed.read_text()
    except (OSError, UnicodeError):
        return ""


def kernel_trouble() -> str:
    """What is wrong with the kernels, in words; "" = nothing."""
    try:
        wrong = examined(kernels.home())
    except kernels.KernelError as error:
        return str(error)
    if not wrong:
        return ""
    more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    return f"the {kernels.home()} kernels of this machine compute wrong numbers: {wrong[0]}{more}"
