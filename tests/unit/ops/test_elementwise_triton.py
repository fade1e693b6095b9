"""The Triton element-wise kernels without a GPU: Triton's interpreter runs them on CPU tensors."""

from __future__ import annotations

from pathlib import Path

from triton_interpreter import assert_checks_pass

CHECKS = Path(__file__).with_name("interpreted_elementwise_triton.py")


def test_kernels_in_the_interpreter() -> None:
    """All checks of the file beside this one pass."""
    assert_checks_pass(CHECKS)
