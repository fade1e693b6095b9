"""What a batch costs: useful FLOPs. Useful = shared prefix once, scored rows only."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from simple_llama.pretraining.architecture import Architecture
from simple_llama.pretraining.llama_transformer import LLaMaTransformer
from simple_llama.reinforcement_learning.rlhf.data.pair_batch import PairBatch


class ModelSize(NamedTuple):
    """Weights by the work they do."""

    layers: int  # multiplied once a packed row: all matrices of the decoder blocks
    head: int  # V * D, multiplied once a scored row
    other: int  # embeddings (where they are not the head), norms and biases: looked up or negligible


class TrainedPart(NamedTuple):
    """What a backward pass has to compute, as shares."""

    depth: float = 1.0  # of the decoder blocks: those that gradients pass through
    layers: float = 1.0  # of their matrices' weights: those that have a gradient
    head: float = 1.0  # 1 where the head has one, else 0


def useful_flops(
    size: ModelSize,
    architecture: Architecture,
    batch: PairBatch,
    backward: bool,
    trained: TrainedPart = TrainedPart(),  # noqa: B008 - immutable
) -> float:
    """FLOPs that the result needs: 2 a weight and row forward; backward 2 more for the gradient of the row, and 2 for
    that of the weight, where it has one. Attention over visible keys only."""
    visible = 0
    for prefix, branches in batch.layout.segments:
        visible += prefix * (prefix + 1) // 2
        visible += sum(rows * prefix + rows * (rows + 1) // 2 for rows in branches)
    head_flops = 2 * (architecture.key_width + architecture.value_width)  # a query head and visible key
    attention = visible * architecture.layers * architecture.heads * head_flops
    layers, head = 2 * len(batch.tokens_T) * size.layers, 2 * len(batch.targets_N) * size.head
    forward = float(attention + layers + head)
    if not backward:
        return forward
    behind = layers * (trained.depth + trained.layers) + head * (1 + trained.head)
    return forward + 2 * attention * trained.depth + behind


def trained_part(model: LLaMaTransformer, names: Collection[str]) -> TrainedPart:
    """What a backward pass computes where the parameters of these names are trained."""
    blocks, layers = model.architecture.layers, model_size(model).layers
    matrices = {
        name: p.numel() for name, p in model.named_parameters() if name.startswith("decoder_blocks.") and p.dim() == 2
    }
    first = min((int(name.split(".")[1]) for name in names if name.startswith("decoder_blocks.")), default=blocks)
    if any(name.startswith("embeddings.") for name in names):
        first = 0
    head = "embeddings.weight" if model.architecture.tied_head else "final_linear.weight"
    share = sum(count for name, count in matrices.items() if name in names) / layers
    return TrainedPart((blocks - first) / blocks, share, float(head in names))


def model_size(model: LLaMaTransformer) -> ModelSize:
    """Counts the weights, a tied head's once: as the head."""
    layers = sum(p.numel() for n, p in model.named_parameters() if n.startswith("decoder_blocks.") and p.dim() == 2)
    head = model.head_weight.numel()
    return ModelSize(layers, head, sum(p.numel() for p in model.parameters()) - layers - head)
