"""Runs checks of Triton kernels without a GPU: Triton's interpreter runs them on CPU tensors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def assert_checks_pass(checks: Path) -> None:
    """All tests of a file pass, none skipped, in a process of its own, as Triton takes its mode on first import. Skips
    where Triton is not installed."""
    pytest.importorskip("triton", reason="the kernels need triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(checks)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout and "skipped" not in done.stdout
