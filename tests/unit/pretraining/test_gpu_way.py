"""The model as a GPU computes it, without one: Triton's interpreter runs its kernels on CPU tensors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKS = Path(__file__).with_name("interpreted_gpu_way.py")


def test_the_model_in_the_interpreter() -> None:
    """All checks of the file beside this one pass. Its own process, as Triton takes its mode on first import."""
    pytest.importorskip("triton", reason="the kernels need triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CHECKS)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout and "skipped" not in done.stdout
