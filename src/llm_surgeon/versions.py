"""Versions of what decides a result."""

from __future__ import annotations

import platform
from importlib.metadata import version

_PACKAGES = ("llm-surgeon", "torch", "transformers", "safetensors", "tokenizers", "datasets")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result, for the record."""
    return {"python": platform.python_version()} | {package: version(package) for package in _PACKAGES}
