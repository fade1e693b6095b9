"""The model as a GPU computes it, without one: Triton's interpreter runs its kernels on CPU tensors."""

from __future__ import annotations

from pathlib import Path

from triton_interpreter import assert_checks_pass

CHECKS = Path(__file__).with_name("interpreted_gpu_way.py")


def test_the_model_in_the_interpreter() -> None:
    """All checks of the file beside this one pass."""
    assert_checks_pass(CHECKS)
