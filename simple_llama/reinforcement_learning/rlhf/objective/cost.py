"""What a batch costs: useful FLOPs and memory. Useful = shared prefix once, scored rows only."""

from __future__ import annotations

from typing import NamedTuple

import torch

from simple_llama.ops.logprob import CHUNK_ROWS
from simple_llama.pretraining.architecture import Architecture
from simple_llama.pretraining.llama_transformer import LLaMaTransformer
from simple_llama.reinforcement_learning.rlhf.data.pair_batch import PairBatch


class ModelSize(NamedTuple):
    """Weights by the work they do."""

    layers: int  # multiplied once a packed row: all matrices of the decoder blocks
    head: int  # V * D, multiplied once a scored row
    other: int  # embeddings (where they are not the head), norms and biases: looked up or negligible


def useful_flops(size: ModelSize, architecture: Architecture, batch: PairBatch, backward: bool) -> float:
    """FLOPs that the result needs: 2 a weight and row forward, 4 more backward; attention over visible keys only."""
    visible = 0
    for prefix, branches in batch.layout.segments:
        visible += prefix * (prefix + 1) // 2
        visible += sum(rows * prefix + rows * (rows + 1) // 2 for rows in branches)
    head_flops = 2 * (architecture.key_width + architecture.value_width)  # a query head and visible key
    attention = visible * architecture.layers * architecture.heads * head_flops
    matrices = 2 * (len(batch.tokens_T) * size.layers + len(batch.targets_N) * size.head)
    return float((attention + matrices) * (3 if backward else 1))


def model_size(model: LLaMaTransformer) -> ModelSize:
    """Counts the weights, a tied head's once: as the head."""
    layers = sum(p.numel() for n, p in model.named_parameters() if n.startswith("decoder_blocks.") and p.dim() == 2)
    head = model.head_weight.numel()
    return ModelSize(layers, head, sum(p.numel() for p in model.parameters()) - layers - head)


class MemoryEstimate(NamedTuple):
    """Bytes per rank."""

    weights: int
    gradients: int
    optimizer: int
    activations: int


def estimate_memory(
    size: ModelSize,
    trained: int,
    architecture: Architecture,
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
    width = architecture.width
    rows, scored = len(batch.tokens_T), len(batch.targets_N)
    per_row_layer = 10 * width + 3 * architecture.hidden_width
    head = min(scored, CHUNK_ROWS["cuda"]) * architecture.vocab_size * 4 + size.head * 4
    stored = width * architecture.layers + per_row_layer if recompute else per_row_layer * architecture.layers
    return MemoryEstimate(
        weights=(weights // world_size if stage == 3 else weights) * item,
        gradients=((shard if stage >= 2 else trained) + (trained if reduce_once else 0)) * 4,
        optimizer=shard * 12,
        activations=rows * stored * item + scored * width * item + head,
    )
