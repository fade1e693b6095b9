"""Log-probs of scored tokens, the door: Triton row kernels on CUDA, plain torch elsewhere.

`logprob_torch` is the specification and holds the documentation of every argument.
Shapes: B pairs, N scored tokens, D width, V vocabulary.
"""

from __future__ import annotations

import functools
import importlib.util

import torch

from simple_llama.ops import logprob_torch
from simple_llama.ops.logprob_torch import Counts, LossFn, RowKernels

# Part of the name of a reference store. Change it with anything that changes a log-prob by more than rounding noise.
HEAD_VERSION = "fp32-logits-1"


def pair_loss(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_N: torch.Tensor,
    counts: Counts,
    loss_fn: LossFn,
    chunk_rows: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum of the pairs' losses, logps_B2 detached) in three GEMMs; see `logprob_torch.pair_loss`."""
    rows = row_kernels(hidden_ND.device.type, hidden_ND.dtype)
    return logprob_torch.pair_loss(hidden_ND, weight_VD, targets_N, counts, loss_fn, chunk_rows, rows)


def pair_logps(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_N: torch.Tensor,
    counts: Counts,
    chunk_rows: int | None = None,
) -> torch.Tensor:
    """Log-prob sums (B, 2) of the answers, differentiable; see `logprob_torch.pair_logps`."""
    rows = row_kernels(hidden_ND.device.type, hidden_ND.dtype)
    return logprob_torch.pair_logps(hidden_ND, weight_VD, targets_N, counts, chunk_rows, rows)


def token_logps(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, targets_N: torch.Tensor, chunk_rows: int | None = None
) -> torch.Tensor:
    """Log-prob (N,) of each target, differentiable; see `logprob_torch.token_logps`."""
    rows = row_kernels(hidden_ND.device.type, hidden_ND.dtype)
    return logprob_torch.token_logps(hidden_ND, weight_VD, targets_N, chunk_rows, rows)


@functools.cache
def row_kernels(device_type: str, dtype: torch.dtype) -> RowKernels:
    """The fastest row kernels that this installation has for a device and dtype (Triton's compute in fp32)."""
    if device_type == "cuda" and dtype != torch.float64 and importlib.util.find_spec("triton"):
        from simple_llama.ops.logprob_triton import TRITON_ROWS, has_driver

        if has_driver():
            return TRITON_ROWS
    return logprob_torch.TORCH_ROWS
