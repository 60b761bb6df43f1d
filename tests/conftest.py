"""SHOAL_TEST_LIBRARY names another build of the native kernels to test: with sanitizers, or for another machine."""

from __future__ import annotations

import os
from pathlib import Path

from hypothesis import HealthCheck, settings

from shoal.kernels import library

# How long it takes to make up inputs says more about a busy or emulated machine than about a test.
settings.register_profile("shoal", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shoal")

if build := os.environ.get("SHOAL_TEST_LIBRARY"):
    library.LIBRARY = Path(build).resolve(strict=True)
