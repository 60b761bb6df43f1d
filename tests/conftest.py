"""SHOAL_TEST_LIBRARY names another build of the native kernels to test: with sanitizers, or for another machine."""

from __future__ import annotations

import os
from pathlib import Path

from shoal.kernels import library

if build := os.environ.get("SHOAL_TEST_LIBRARY"):
    library.LIBRARY = Path(build).resolve(strict=True)
