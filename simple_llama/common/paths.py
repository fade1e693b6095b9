"""Where the project lies on disk."""

from __future__ import annotations

from pathlib import Path


def root_path(*parts: str) -> str:
    """Absolute path of `parts` below the project root (the folder that holds the `simple_llama` package)."""
    return str(Path(__file__).resolve().parents[2].joinpath(*parts))
