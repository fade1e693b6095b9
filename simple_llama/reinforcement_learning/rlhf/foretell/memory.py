"""Memory of a rank by arithmetic: what stands in it at each of the moments that may be the fullest.

    start    the weights are read and dealt into DeepSpeed's flat buffers
    passes   forward and backward of the largest micro-batch, gradients of the ones before it added up
    step     the gradients flat beside themselves, for AdamW
    save     masters and moments once more, as they are written

Where saves are written while training goes on, what they are written from stands beside passes and step on a CPU too;
beside a GPU it is host memory, which is not counted here.

What Python, torch, DeepSpeed and the data take is measured of this process (`measure_base`), the rest is counted, by
the accounting of the ZeRO paper (arXiv:1910.02054, Sec. 3.1) with the buffers that DeepSpeed 0.19.8 makes. An estimate.

Shapes: T packed rows, N scored tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn import functional as F

from simple_llama.cluster.distributed import Ranks
from simple_llama.ops.attention import is_widened
from simple_llama.ops.logprob import WIDENED_ROWS
from simple_llama.ops.logprob_chunks import MOST_CHUNKS, rows_at_once
from simple_llama.ops.machine import has_fast_bf16, resident_bytes
from simple_llama.pretraining.architecture import Architecture
from simple_llama.reinforcement_learning.rlhf.data.pair_batch import PairBatch
from simple_llama.reinforcement_learning.rlhf.engine.ds_config import EngineConfig, ds_config_here, zero_stage
from simple_llama.reinforcement_learning.rlhf.engine.engine import import_deepspeed
from simple_llama.reinforcement_learning.rlhf.objective.cost import ModelSize

_SHAPES = 140  # GEMMs of other shapes: more than a process keeps (`prepare_gemms`)
_BUCKET = 500_000_000  # elements of a bucket where the JSON names none: DeepSpeed's own default


class Base(NamedTuple):
    """Bytes of this process before a model is in it."""

    resident: int  # Python, torch, DeepSpeed, the data
    compiled: int  # code that oneDNN makes for the shapes of GEMMs, on a CPU


class TrainedModel(NamedTuple):
    """What of the memory the model decides."""

    size: ModelSize
    trained: int  # weights that have a gradient and an optimizer state
    architecture: Architecture
    dtype: torch.dtype
    online: bool = False  # whether the reference is in memory too
    head: bool = True  # whether the vocabulary matrix has a gradient

    @property
    def largest(self) -> int:
        """Weights of the largest trained parameter, at most."""
        return min(self.trained, self.size.head)


class Engine(NamedTuple):
    """What of it DeepSpeed and the ranks decide."""

    device: str  # its type
    world_size: int
    stage: int
    bucket: int = _BUCKET  # elements that are exchanged at once
    buckets: bool = True  # whether gradients go through them
    offloads: bool = False
    recompute: bool = False
    reduce_once: bool = False
    accumulates: bool = True  # several micro-batches a step
    copies: bool = False  # whether saves are written beside the passes

    def sums_in_one(self, dtype: torch.dtype) -> bool:
        """Whether a step's sums of gradients lie in one tensor from the first micro-batch on (fewer_passes.py)."""
        return self.stage == 2 and dtype != torch.float32 and not self.offloads


class Moment(NamedTuple):
    """What is in memory at one of the moments, in bytes by its name."""

    name: str
    parts: dict[str, int]

    @property
    def sum(self) -> int:
        """All of it."""
        return sum(self.parts.values())


def describe_engine(config: EngineConfig, ranks: Ranks) -> Engine:
    """The settings as numbers."""
    ds_config = ds_config_here(config, ranks.world_size, ranks.device.type)
    zero = ds_config.get("zero_optimization", {})
    return Engine(
        device=ranks.device.type,
        world_size=ranks.world_size,
        stage=zero_stage(ds_config),
        bucket=int(zero.get("reduce_bucket_size", _BUCKET)),
        buckets=bool(zero.get("contiguous_gradients", True)),
        offloads="offload_optimizer" in zero,
        recompute=config.activation_checkpointing,
        reduce_once=config.reduce_once,
        accumulates=config.accumulates,
    )


def moments(model: TrainedModel, engine: Engine, batch: PairBatch, base: Base) -> list[Moment]:
    """The moments that may be the fullest, of a rank whose largest micro-batch this is."""
    item, weights, shard = model.dtype.itemsize, sum(model.size), -(-model.trained // engine.world_size)
    on_cpu = engine.device == "cpu"
    # On a GPU only what torch allocates there counts, as in perf/peak_memory_gb.
    ground = {"Python, torch and data": base.resident} if on_cpu else {}
    held = {
        "weights": (weights // engine.world_size if engine.stage == 3 else weights) * item,
        "reference": weights * item if model.online else 0,
        "masters and moments": 12 * shard if on_cpu or not engine.offloads else 0,
    }
    start = {**ground, **held, "read": 2 * 4 * model.size.head if on_cpu else 0}  # two tensors
    steady = {**ground, "compiled GEMMs": base.compiled, **held}
    summed = _summed(model, engine, shard)
    beside = {"copy for a save": 12 * shard} if on_cpu and engine.copies else {}
    passes = {
        **steady,
        **beside,
        "gradients": summed + _flowing(model, engine),
        "activations": _activations(model, engine, batch),
        "head": _head(model, engine, batch),
    }
    extra = step_extra([shard], model.largest, engine.offloads, engine.sums_in_one(model.dtype))
    step = {**steady, **beside, "gradients": max(summed, 4 * shard) + extra}
    save = {**steady, "state that is written": 12 * shard if on_cpu else 0}
    return [Moment("start", start), Moment("passes", passes), Moment("step", step), Moment("save", save)]


def _summed(model: TrainedModel, engine: Engine, shard: int) -> int:
    """Bytes of gradients that are kept from one micro-batch to the next."""
    in_one = engine.sums_in_one(model.dtype)
    if engine.reduce_once:
        return 4 * model.trained + 4 * shard * in_one
    kept = 4 * shard if engine.accumulates or engine.stage == 3 or in_one else 0
    return kept + (4 * shard if engine.offloads and engine.device == "cpu" else 0)


def _flowing(model: TrainedModel, engine: Engine) -> int:
    """Bytes of gradients and weights on their way in a backward pass, at most."""
    item, way = model.dtype.itemsize, min(engine.bucket, model.trained)
    alone = model.largest if model.largest > way else 0  # too large for a bucket
    if not engine.buckets:
        if engine.world_size == 1 and not engine.offloads:  # each is forgotten once it is added up; in fp32 none is
            return item * (model.largest if item == 2 else model.trained)
        return item * min(way + model.largest, model.trained)
    gathered = min(sum(model.size), engine.bucket) * item if engine.stage == 3 else 0
    return 2 * way * item + max(way, alone) * 4 + alone * item + gathered


def _activations(model: TrainedModel, engine: Engine, batch: PairBatch) -> int:
    """Bytes that the layers keep for the backward pass, with what one of them needs while it is computed.

    A row and layer: 2 vectors of the width and 2 hidden ones, inputs of the norms and of SwiGLU, and what attention
    keeps (`_attention`). With recomputation, in the layer whose turn it is, 2 and 1 more, inputs of matrices, which
    are made again otherwise (ops/remade.py). Of all layers once: rotations, and what the last norm is given. As torch's
    saved_tensors_hooks count them; on a GPU where Triton is.
    """
    shape, item, rows = model.architecture, model.dtype.itemsize, len(batch.tokens_T)
    of_row = 2 * shape.width + 2 * shape.hidden_width
    of_row += 2 * shape.width + shape.hidden_width if engine.recompute else 0
    of_row += shape.lora.rank * len(shape.lora.targets) if shape.lora else 0
    of_layer = item * (rows * of_row + _attention(model, engine, batch))
    moving = item * rows * (3 * shape.hidden_width + 4 * shape.width)
    once = rows * (item * shape.width + 4 * shape.rope_width)
    between = rows * shape.width * item * shape.layers
    return moving + once + (between + of_layer if engine.recompute else of_layer * shape.layers)


def _attention(model: TrainedModel, engine: Engine, batch: PairBatch) -> int:
    """Numbers of the model's dtype that attention keeps in a layer.

    A row's: the output of the QKV matrix, rotated queries and keys, its own output twice; and the keys and values of
    each branch behind its prefix. A block that is computed in fp32 keeps queries, keys, values and its output so (two
    numbers of bf16 each), its output in bf16 too, and nothing else; but where another block is not, the output of the
    QKV matrix and rotated queries and keys stay whole for that one's sake.

    A GPU's kernel of half precision keeps queries and its output, keys and values of all blocks where prefixes are
    shared, and else rotated keys, and values as the matrix made them.
    """
    shape = model.architecture
    queries, values = shape.heads * shape.key_width, shape.heads * shape.value_width
    keys, key_values = shape.key_heads * shape.key_width, shape.key_heads * shape.value_width
    as_made, found = 2 * (queries + keys) + key_values, 0
    if engine.device == "cuda" and model.dtype != torch.float32:
        shared = any(block.prefix for block in batch.layout.blocks)
        seen = sum(block.prefix + block.rows for block in batch.layout.blocks) * (keys + key_values)
        return len(batch.tokens_T) * (queries + values + (0 if shared else queries + keys)) + seen
    wide = [is_widened(model.dtype, engine.device, block.prefix + block.rows) for block in batch.layout.blocks]
    for block, is_wide in zip(batch.layout.blocks, wide, strict=True):
        others = block.prefix + block.rows if block.prefix else 0  # keys of a branch are a copy
        if not is_wide:
            found += block.rows * (as_made + 2 * values) + others * (keys + key_values)
            continue
        found += block.rows * (2 * queries + 3 * values) + 2 * (others or block.rows) * (keys + key_values)
        found += 0 if all(wide) else block.rows * as_made
    return found


def _head(model: TrainedModel, engine: Engine, batch: PairBatch) -> int:
    """Bytes of the head on a CPU: a chunk of logits, the gradient of the vocabulary matrix, in fp32 or where one chunk
    is all and the CPU has bf16 units in bf16; of bf16 a wider copy of that matrix, or of a part of it."""
    scored, item, shape = len(batch.targets_N), model.dtype.itemsize, model.architecture
    few, longest = rows_at_once(engine.device, shape.vocab_size), max(map(sum, batch.answer_counts), default=0)
    if engine.device != "cpu":
        return _gpu_head(model, scored, few)
    chunk, matrix = max(min(scored, few), min(longest, MOST_CHUNKS * few)), shape.vocab_size * shape.width
    gradient, wide = 4 * matrix, 0
    if item == 2:
        fast = has_fast_bf16("cpu")
        wide = 4 * (min(WIDENED_ROWS, shape.vocab_size) * shape.width if fast else matrix)
        gradient = 2 * matrix if fast and chunk == scored else 6 * matrix  # a chunk's product beside their sum
    gradient *= bool(model.head)
    return 4 * chunk * shape.vocab_size + gradient + wide + scored * shape.width * (4 + item)


def _gpu_head(model: TrainedModel, scored: int, few: int) -> int:
    """Bytes of the head on a GPU, of `scored` rows of which `few` have logits at once (ops/logprob_cuda.py).

    A chunk's gradients of logits stand beside its fp32 logits, then beside the gradient of the vocabulary matrix. Where
    one chunk is all, that one is in the model's dtype; else in fp32 from the first chunk on, and at last beside itself
    in that dtype. Of the hidden rows the gradient, and of a chunk's first that in fp32, then the rows weighted.
    """
    shape, item = model.architecture, model.dtype.itemsize
    chunks = max(1, -(-scored // (MOST_CHUNKS * few)))
    alone, chunk, matrix = chunks == 1, -(-scored // chunks), shape.vocab_size * shape.width * bool(model.head)
    of_chunk, gradient = item * chunk * shape.vocab_size, (item if alone else 4) * matrix
    making = 4 * min(few, chunk) * shape.vocab_size + of_chunk + (0 if alone else gradient)
    adding = of_chunk + gradient + max(4, item) * chunk * shape.width
    casting = 0 if alone or item == 4 else gradient + item * matrix
    return max(making, adding, casting) + item * scored * shape.width


def step_extra(masters: Sequence[int], largest: int, offloads: bool, sums_in_one: bool) -> int:
    """Bytes that an optimizer step needs beside what is there after the backward passes: none where the sums of
    gradients lie in one tensor.

    Else DeepSpeed flattens those of a group beside themselves, and before that takes each one's norm in fp64.

    Args:
        masters: sizes of a rank's flat groups. largest: weights of the largest parameter.
    """
    if sums_in_one:
        return 0
    flat = 0 if offloads else 4 * max(masters)
    return max(flat, 8 * min(largest, max(masters)))


def measure_base(ranks: Ranks, dtype: torch.dtype) -> Base:
    """What this process takes without a model: DeepSpeed imported, and the GEMMs of many shapes made."""
    import_deepspeed(ranks.device)
    before = resident_bytes(ranks.device)
    if ranks.device.type != "cpu":
        return Base(before, 0)
    _make_gemms(dtype)
    return Base(before, max(0, resident_bytes(ranks.device) - before))


def _make_gemms(dtype: torch.dtype) -> None:
    """Multiplies and attends in as many shapes as a process keeps the code of: packed lengths are always others."""
    shapes = _SHAPES if dtype == torch.bfloat16 and has_fast_bf16("cpu") else 1
    weight_OI = torch.zeros(64, 64, dtype=dtype, requires_grad=True)
    for rows in range(100, 100 + shapes):
        x_TI = torch.zeros(rows, 64, dtype=dtype, requires_grad=True)
        F.linear(x_TI, weight_OI).sum().backward()
        if rows % 2:
            continue
        heads = x_TI.detach().view(1, rows, 2, 32).transpose(1, 2).requires_grad_()
        F.scaled_dot_product_attention(heads, heads, heads, is_causal=True).sum().backward()
