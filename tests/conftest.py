"""SHOAL_TEST_LIBRARY names another build of the native kernels to test: with sanitizers, or for another machine."""

from __future__ import annotations

import os
from pathlib import Path

from hypothesis import HealthCheck, settings

from shoal.kernels import library

# How long it takes to make up inputs says more about a busy or emulated machine than about a test.
anywhere = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
# The same code gets the same verdict: the made-up inputs are the same in each run. Others: --hypothesis-profile explore
settings.register_profile("shoal", anywhere, derandomize=True)
settings.register_profile("explore", anywhere)
settings.load_profile("shoal")

# On a busy or emulated machine the barriers of torch's pool cost more than the work of a test. Most tests do without
# torch: those that load it do so after this.
os.environ["OMP_NUM_THREADS"] = "1"

if build := os.environ.get("SHOAL_TEST_LIBRARY"):
    library.LIBRARY = Path(build).resolve(strict=True)
