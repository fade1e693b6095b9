"""What a batch costs: useful FLOPs, memory, and the machine's peak. Useful = shared prefix once, scored rows only."""

from __future__ import annotations

import re
import resource
import time
from typing import NamedTuple

import torch

from simple_llama.ops.logprob_torch import CHUNK_ROWS
from simple_llama.pretraining.config import TrainingConfig
from simple_llama.reinforcement_learning.rlhf.data.pair_batch import PairBatch

BF16_PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "H20": 148e12, "A100": 312e12, "A800": 312e12, "L40S": 362e12}


class ModelSize(NamedTuple):
    """Weights by the work they do."""

    layers: int  # multiplied once a packed row: all matrices of the decoder blocks
    head: int  # V * D, multiplied once a scored row
    other: int  # embeddings, norms and biases: looked up or negligible


def useful_flops(size: ModelSize, config: TrainingConfig, batch: PairBatch, backward: bool) -> float:
    """FLOPs that the result needs: 2 a weight and row forward, 4 more backward; attention over visible keys only."""
    visible = 0
    for prefix, branches in batch.layout.segments:
        visible += prefix * (prefix + 1) // 2
        visible += sum(rows * prefix + rows * (rows + 1) // 2 for rows in branches)
    qk_dim = config.qk_nope_head_dim + config.qk_rope_head_dim if config.use_mla else config.n_embd // config.n_heads
    v_dim = config.v_head_dim if config.use_mla else qk_dim
    attention = 2 * visible * config.n_layers * config.n_heads * (qk_dim + v_dim)
    matrices = 2 * (len(batch.tokens_T) * size.layers + len(batch.targets_N) * size.head)
    return float((attention + matrices) * (3 if backward else 1))


def model_size(model: torch.nn.Module) -> ModelSize:
    """Counts the weights of a LLaMaTransformer."""
    layers = sum(p.numel() for n, p in model.named_parameters() if n.startswith("decoder_blocks.") and p.dim() == 2)
    head = sum(p.numel() for n, p in model.named_parameters() if n.startswith("final_linear."))
    return ModelSize(layers, head, sum(p.numel() for p in model.parameters()) - layers - head)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Peak FLOP/s for MFU: a GPU's data sheet (dense bf16) where known, else the best of a few square GEMMs here."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        words = re.split(r"[\s-]", torch.cuda.get_device_name(device))  # NVIDIA A100-SXM4-80GB
        for key, peak in BF16_PEAK_FLOPS.items():
            if key in words:
                return peak
    return measured_gemm_flops(device, dtype, size=1024 if device.type == "cpu" else 8192)


def measured_gemm_flops(device: torch.device, dtype: torch.dtype, size: int, tries: int = 5) -> float:
    """Best FLOP/s of `size`^3 GEMMs in `dtype`, or in fp32 where a CPU is faster in it than in bf16."""
    dtypes = {dtype, torch.float32} if device.type == "cpu" else {dtype}
    best = 0.0
    for kind in dtypes:
        left, right = (torch.ones(size, size, dtype=kind, device=device) for _ in range(2))
        for _ in range(tries):
            synchronize(device)
            start = time.perf_counter()
            torch.mm(left, right)
            synchronize(device)
            best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def synchronize(device: torch.device) -> None:
    """Waits for the device's queue; a CPU has none."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory_gb(device: torch.device) -> float:
    """Largest memory so far in GiB: of the CUDA allocator, or the process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class MemoryEstimate(NamedTuple):
    """Bytes per rank."""

    weights: int
    gradients: int
    optimizer: int
    activations: int


def estimate_memory(
    size: ModelSize,
    trained: int,
    config: TrainingConfig,
    batch: PairBatch,
    dtype: torch.dtype,
    world_size: int,
    stage: int,
    recompute: bool = False,
    reduce_once: bool = False,
) -> MemoryEstimate:
    """Bytes a rank needs to train on its largest micro-batch: ZeRO paper's accounting (arXiv:1910.02054, Sec. 3.1).

    Activations: about ten vectors of width D and SwiGLU's three hidden ones a row and layer, without recomputation,
    with recomputation one a row and layer and all of one layer; plus the head's scored rows, its fp32 weight gradient
    and one fp32 chunk of logits. An estimate, to tell 10 GB from 100 GB.

    Args:
        size: all weights. trained: how many of them have a gradient and an optimizer state.
        reduce_once: whether a rank keeps the whole fp32 sum of its micro-batches, beside its share of the ranks' sum.
    """
    weights = sum(size)
    item = torch.finfo(dtype).bits // 8
    shard = trained // world_size
    hidden = config.multiple_of * -(-int(8 / 3 * config.n_embd) // config.multiple_of)
    rows, scored = len(batch.tokens_T), len(batch.targets_N)
    per_row_layer = 10 * config.n_embd + 3 * hidden
    head = min(scored, CHUNK_ROWS["cuda"]) * (size.head // config.n_embd) * 4 + size.head * 4
    stored = config.n_embd * config.n_layers + per_row_layer if recompute else per_row_layer * config.n_layers
    return MemoryEstimate(
        weights=(weights // world_size if stage == 3 else weights) * item,
        gradients=((shard if stage >= 2 else trained) + (trained if reduce_once else 0)) * 4,
        optimizer=shard * 12,
        activations=rows * stored * item + scored * config.n_embd * item + head,
    )
