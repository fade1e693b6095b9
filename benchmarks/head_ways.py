"""The log-prob head of a DPO step as each library computes it, and in fp64: what bench_logprob times and checks.

Every way starts from the same scored rows, weight and targets and gives the gradients of the mean over pairs of the
sigmoid DPO loss (arXiv:2305.18290, Eq. 7; reference log-probs 0) in the rows and in the weight. All answers have the
same length, so that no way pays for padding.

Shapes: B pairs, N scored tokens, D width, V vocabulary, T tokens an answer: N = 2 B T, pair after pair, chosen first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from simple_llama.ops import logprob
from simple_llama.ops.logprob_chunks import Counts, rows_at_once

BETA = 0.1
NLL = "torch sum"  # the one way with another loss
TRL_OUTPUTS = ("log_probs", "entropy", "mean_logits", "is_top1")  # what DPOTrainer 1.16 asks its head for


@dataclass(frozen=True)
class Problem:
    """Inputs of one size in one dtype; hidden_ND and weight_VD are leaves that require a gradient."""

    hidden_ND: torch.Tensor
    weight_VD: torch.Tensor
    targets_N: torch.Tensor
    answer_tokens: int  # T

    @property
    def counts(self) -> Counts:
        """(T, T) for each pair."""
        return ((self.answer_tokens, self.answer_tokens),) * (len(self.targets_N) // (2 * self.answer_tokens))


@dataclass(frozen=True)
class Outcome:
    """What a way computed."""

    hidden_ND: torch.Tensor  # gradient in the rows
    weight_VD: torch.Tensor  # gradient in the weight
    logps_B2: torch.Tensor | None = None  # sums over the answers; None where a way does not give them
    token_N: torch.Tensor | None = None  # the tokens' log-probs, likewise


@dataclass(frozen=True)
class Exact:
    """The same in fp64."""

    token_N: torch.Tensor
    hidden_ND: torch.Tensor
    weight_VD: torch.Tensor


@dataclass(frozen=True)
class Errors:
    """Largest differences from fp64."""

    gradient: float  # of a gradient's entries over that gradient's largest entry; the worse of rows and weight
    sums: float | None = None  # of an answer's log-prob sum
    token: float | None = None  # of a token's log-prob


Way = Callable[[Problem], Outcome]


def make_problem(rows: int, width: int, vocabulary: int, answer_tokens: int, device: torch.device) -> Problem:
    """Random bf16 inputs. Logits have standard deviation 3, so that a bf16 logit is off by what a model's would be."""
    if rows % (2 * answer_tokens):
        raise ValueError(f"N is {rows}; expected a multiple of {2 * answer_tokens}, a pair's scored tokens")
    generator = torch.Generator(device).manual_seed(0)
    hidden_ND = torch.randn(rows, width, generator=generator, device=device).bfloat16()
    weight_VD = torch.randn(vocabulary, width, generator=generator, device=device).mul_(3 / width**0.5).bfloat16()
    targets_N = torch.randint(vocabulary, (rows,), generator=generator, device=device)
    return Problem(hidden_ND.requires_grad_(), weight_VD.requires_grad_(), targets_N, answer_tokens)


def held_in(problem: Problem, dtype: torch.dtype) -> Problem:
    """The same numbers in another dtype: fp64 is the same reference for all."""
    if dtype == problem.hidden_ND.dtype:
        return problem
    hidden_ND, weight_VD = (x.detach().to(dtype).requires_grad_() for x in (problem.hidden_ND, problem.weight_VD))
    return Problem(hidden_ND, weight_VD, problem.targets_N, problem.answer_tokens)


def ways(device_type: str, dtype: torch.dtype) -> dict[str, Way]:
    """Name -> way. torch's own chunks only in bf16: fp32 inputs are there to show each peer in its best setting."""
    peers: dict[str, Way] = {"TRL 1.16": trl, "torch none": torch_none}
    if dtype == torch.bfloat16:
        peers["torch none, own chunks"] = torch_none_own_chunks
    peers |= {NLL: torch_sum, "eager": eager}
    if device_type == "cuda":
        peers |= {"Liger Triton": liger_triton, "Liger Triton, large chunks": liger_triton_large_chunks}
    peers["Liger DPO"] = liger_dpo
    return {"ours": ours, "ours, 4 GEMMs": ours_recomputed, **peers}


def ours(problem: Problem) -> Outcome:
    """`pair_loss`: three GEMMs."""
    loss, _, logps_B2 = logprob.pair_loss(
        problem.hidden_ND,
        problem.weight_VD,
        problem.targets_N,
        problem.counts,
        lambda logps_b2, _: dpo_losses(logps_b2),
        factor=1 / len(problem.counts),
    )
    return _differentiated(loss, problem, logps_B2)


def ours_recomputed(problem: Problem) -> Outcome:
    """`pair_logps`: four GEMMs, any loss."""
    logps_B2 = logprob.pair_logps(problem.hidden_ND, problem.weight_VD, problem.targets_N, problem.counts)
    return _differentiated(dpo_losses(logps_B2).mean(), problem, logps_B2)


def eager(problem: Problem) -> Outcome:
    """Linear, fp32 log_softmax, gather: all logits at once."""
    logps_NV = F.linear(problem.hidden_ND, problem.weight_VD).float().log_softmax(-1)
    return _from_tokens(logps_NV.gather(1, problem.targets_N[:, None])[:, 0], problem)


def trl(problem: Problem) -> Outcome:
    """TRL's chunked log-probs as its DPOTrainer calls them, on the scored rows only (on a CPU it scores every row)."""
    from trl.kernels import ChunkedLogProbFunction  # pyright: ignore[reportMissingImports]
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE  # pyright: ignore[reportMissingImports]

    token_N, *_ = ChunkedLogProbFunction.apply(
        problem.hidden_ND,
        problem.weight_VD,
        None,
        problem.targets_N,
        1.0,  # temperature
        _CHUNKED_LOGPROB_CHUNK_SIZE,
        None,
        1.0,
        TRL_OUTPUTS,
    )
    return _from_tokens(token_N, problem)


def torch_none(problem: Problem) -> Outcome:
    """torch's per-token loss with as many rows of logits at once as ours, which is faster than its own choice."""
    return _from_tokens(-_torch_loss(problem, "none", _our_rows(problem)), problem)


def torch_none_own_chunks(problem: Problem) -> Outcome:
    """torch's per-token loss with the chunks that `LinearCrossEntropyOptions()` chooses."""
    return _from_tokens(-_torch_loss(problem, "none", None), problem)


def torch_sum(problem: Problem) -> Outcome:
    """torch's three-GEMM loss: the plain sum over all tokens, since nothing else can be put between."""
    return _differentiated(_torch_loss(problem, "sum", _our_rows(problem)), problem, None)


def liger_dpo(problem: Problem) -> Outcome:
    """Liger's fused DPO loss, uncompiled, with as many rows of logits at once as ours (its default is one pair's)."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss  # pyright: ignore[reportMissingImports]

    chunk_pairs = max(1, _our_rows(problem) // (2 * problem.answer_tokens))
    loss_fn = LigerFusedLinearDPOLoss(beta=BETA, compiled=False, use_ref_model=False, chunk_size=chunk_pairs)
    # it wants all chosen answers, then all rejected ones: a copy of the rows, small against a chunk of logits
    hidden_2BTD = problem.hidden_ND.unflatten(0, (-1, 2, problem.answer_tokens)).transpose(0, 1).flatten(0, 1)
    targets_2BT = problem.targets_N.view(-1, 2, problem.answer_tokens).transpose(0, 1).flatten(0, 1)
    loss, (chosen_B, rejected_B, *_) = loss_fn(problem.weight_VD, hidden_2BTD, targets_2BT)
    return _differentiated(loss, problem, torch.stack((chosen_B, rejected_B), 1))


def liger_triton(problem: Problem) -> Outcome:
    """Liger's Triton fused linear cross-entropy, per token, with its default chunks."""
    return _liger_triton(problem, 1)


def liger_triton_large_chunks(problem: Problem) -> Outcome:
    """The same with all rows in one chunk, which costs memory and saves time."""
    vocabulary, width = problem.weight_VD.shape
    return _liger_triton(problem, -(-vocabulary // width))


def _liger_triton(problem: Problem, memory_factor: int) -> Outcome:
    from liger_kernel.transformers.functional import (  # pyright: ignore[reportMissingImports]
        liger_fused_linear_cross_entropy,
    )

    losses_N = liger_fused_linear_cross_entropy(
        problem.hidden_ND, problem.weight_VD, problem.targets_N, reduction="none", chunk_mem_const=memory_factor
    )
    return _from_tokens(-losses_N, problem)


def _torch_loss(problem: Problem, reduction: str, chunk_rows: int | None) -> torch.Tensor:
    # with a chunk size given, the dtypes of sums and products stay torch's choice for the device
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk_rows)
    return F.linear_cross_entropy(
        problem.hidden_ND, problem.weight_VD, problem.targets_N, reduction=reduction, options=options
    )


def _our_rows(problem: Problem) -> int:
    rows = rows_at_once(problem.hidden_ND.device.type, len(problem.weight_VD))
    return min(rows, len(problem.targets_N))


def dpo_losses(logps_B2: torch.Tensor) -> torch.Tensor:
    """Sigmoid DPO losses (B,) with reference log-probs 0."""
    return -F.logsigmoid(BETA * (logps_B2[:, 0] - logps_B2[:, 1]))


def answer_sums(token_N: torch.Tensor, problem: Problem) -> torch.Tensor:
    """Sums (B, 2) over the answers, in fp32 at least."""
    wide = torch.promote_types(token_N.dtype, torch.float32)
    return token_N.to(wide).view(-1, 2, problem.answer_tokens).sum(-1)


def _from_tokens(token_N: torch.Tensor, problem: Problem) -> Outcome:
    logps_B2 = answer_sums(token_N, problem)
    outcome = _differentiated(dpo_losses(logps_B2).mean(), problem, logps_B2)
    return replace(outcome, token_N=token_N.detach())


def _differentiated(loss: torch.Tensor, problem: Problem, logps_B2: torch.Tensor | None) -> Outcome:
    hidden_ND, weight_VD = torch.autograd.grad(loss, (problem.hidden_ND, problem.weight_VD))
    return Outcome(hidden_ND, weight_VD, None if logps_B2 is None else logps_B2.detach())


def exact(problem: Problem, nll: bool = False, columns: int = 4096) -> Exact:
    """Log-probs and gradients in fp64, `columns` of the vocabulary at a time; `nll`: of the tokens' plain sum.

    The textbook's gradient, coefficient * (onehot - softmax), with nothing shared with the ways above.
    """
    hidden_ND, weight_VD = problem.hidden_ND.detach().double(), problem.weight_VD.detach()
    target_ND = weight_VD[problem.targets_N].double()
    lse_N = hidden_ND.new_full((len(hidden_ND),), float("-inf"))
    for chunk_cD in weight_VD.split(columns):
        lse_N = torch.logaddexp(lse_N, (hidden_ND @ chunk_cD.double().T).logsumexp(1))
    token_N = ((hidden_ND * target_ND).sum(1) - lse_N).requires_grad_()
    loss = -token_N.sum() if nll else dpo_losses(answer_sums(token_N, problem)).mean()
    coefs_N1 = torch.autograd.grad(loss, token_N)[0][:, None]
    hidden_grad_ND = coefs_N1 * target_ND
    weight_grad_VD = torch.zeros_like(weight_VD, dtype=torch.float64)
    weight_grad_VD.index_add_(0, problem.targets_N, coefs_N1 * hidden_ND)
    for chunk_cD, grad_cD in zip(weight_VD.split(columns), weight_grad_VD.split(columns), strict=True):
        wide_cD = chunk_cD.double()
        softmax_Nc = (hidden_ND @ wide_cD.T).sub_(lse_N[:, None]).exp_().mul_(coefs_N1)
        hidden_grad_ND -= softmax_Nc @ wide_cD
        grad_cD -= softmax_Nc.T @ hidden_ND
    return Exact(token_N.detach(), hidden_grad_ND, weight_grad_VD)


def errors(outcome: Outcome, reference: Exact, problem: Problem) -> Errors:
    """How far a way's outcome is from fp64."""
    relative = [
        _largest_difference(found, exactly) / float(exactly.abs().max())
        for found, exactly in ((outcome.hidden_ND, reference.hidden_ND), (outcome.weight_VD, reference.weight_VD))
    ]
    exact_sums_B2 = answer_sums(reference.token_N, problem)
    return Errors(
        worst(relative),
        None if outcome.logps_B2 is None else _largest_difference(outcome.logps_B2, exact_sums_B2),
        None if outcome.token_N is None else _largest_difference(outcome.token_N, reference.token_N),
    )


def _largest_difference(found: torch.Tensor, exactly: torch.Tensor) -> float:
    return float((found.double() - exactly).abs().max())


def worst(values: Sequence[float]) -> float:
    """The largest; NaN if one is, which `max` would only sometimes give."""
    return float(torch.tensor(values, dtype=torch.float64).max())


def with_our_tokens(outcome: Outcome, problem: Problem) -> Outcome:
    """The outcome of ours with the tokens' log-probs, which both our ways compute as `token_logps` does and sum."""
    with torch.no_grad():
        token_N = logprob.token_logps(problem.hidden_ND, problem.weight_VD, problem.targets_N)
    return replace(outcome, token_N=token_N)
