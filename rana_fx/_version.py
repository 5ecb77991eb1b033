"""The version, in one place: the build reads it from here, and so does everything that records versions."""

from __future__ import annotations

import importlib.metadata
import platform

__version__ = "0.1.0"


def versions() -> dict[str, str]:
    """Versions that a plan or a report records."""
    found = {"python": platform.python_version()}
    for package in ("rana_fx", "torch", "triton", "transformers"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
