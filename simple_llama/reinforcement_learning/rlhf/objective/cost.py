"""What a batch costs: useful FLOPs. Useful = shared prefix once, scored rows only."""

from __future__ import annotations

from typing import NamedTuple

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
