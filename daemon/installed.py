"""Which version of Shoal this is."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def package_version() -> str:
    try:
        return version("shoal")
    except PackageNotFoundError:  # run from a source tree
        return "0"
