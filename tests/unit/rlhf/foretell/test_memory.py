"""Memory by hand.

Two layers of width 32 with 2 heads of 16 and 96 hidden numbers, 50 tokens; a pair of prefix 3, branches of 2 and 3
tokens: 6 packed rows, 5 scored; the second branch's 2 rows see 3 + 2 keys.
"""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from benchmarks.measure import peak_extra_bytes
from kept_bytes import kept_bytes
from simple_llama.cluster.distributed import Ranks
from simple_llama.ops import attention, linear, logprob, logprob_chunks
from simple_llama.ops.machine import has_fast_bf16
from simple_llama.ops.remade import keeping_all
from simple_llama.pretraining.architecture import Architecture
from simple_llama.pretraining.config import TrainingConfig
from simple_llama.pretraining.llama_transformer import LLaMaTransformer
from simple_llama.reinforcement_learning.rlhf.data.pair_batch import PairBatch
from simple_llama.reinforcement_learning.rlhf.data.tokenized_pair import TokenizedPair
from simple_llama.reinforcement_learning.rlhf.foretell import memory
from simple_llama.reinforcement_learning.rlhf.foretell.memory import Base, Engine, TrainedModel, moments, step_extra
from simple_llama.reinforcement_learning.rlhf.objective.cost import ModelSize

BATCH = PairBatch.pack([TokenizedPair.from_chats([1, 2, 3, 4, 5], 2, [1, 2, 3, 6, 7, 8], 3)])
TINY = TrainingConfig(n_embd=32, n_layers=2, n_heads=2, multiple_of=16, max_seq_len=512)
MODEL = TrainedModel(ModelSize(8000, 1600, 400), 10_000, Architecture.of(TINY, 50), torch.bfloat16)
ALONE = Engine("cpu", 1, 2, buckets=False)
BASE = Base(1_000_000, 50_000)


def parts(engine: Engine, model: TrainedModel = MODEL) -> dict[str, dict[str, int]]:
    """The moments by name."""
    return {moment.name: moment.parts for moment in moments(model, engine, BATCH, BASE)}


@pytest.mark.parametrize(("fast", "head"), [(False, 17_960), (True, 11_560)])
def test_one_rank_in_bf16_by_hand(monkeypatch: pytest.MonkeyPatch, fast: bool, head: int) -> None:
    """10,000 weights: 20,000 bytes, masters and moments 120,000; two tensors that are read, as large as
    the head: 12,800.

    gradients    40,000 of fp32 sums and 3,200 of bf16, of the largest parameter; in a step the sums
    activations  a row and layer 2 * 32 + 2 * 96 = 256 numbers; of attention, in fp32, a row 2 * 32 + 3 * 32, and
                 4 keys of the first block and 5 of the second 2 * (32 + 32): 1,536 + 960 + 1,152 = 3,648 numbers, in
                 two layers of 2 bytes 14,592; on their way 2 * 6 * (3 * 96 + 4 * 32) = 4,992; once 6 rows of
                 2 * 32 + 4 * 16: 768
    head         5 * 50 logits of 4 bytes; 1,600 * (4 + 4 + 2); 5 rows of 32 * (4 + 2): 1,000 + 16,000 + 960;
                 with bf16 units the gradient of the one chunk is bf16 alone, 1,600 * (4 + 2) in the middle
    """
    monkeypatch.setattr(memory, "has_fast_bf16", lambda _device: fast)
    found = parts(ALONE)
    held = {"Python, torch and data": 1_000_000, "weights": 20_000, "reference": 0, "masters and moments": 120_000}
    assert found["start"] == {**held, "read": 12_800}
    steady = {**held, "compiled GEMMs": 50_000}
    assert found["passes"] == {**steady, "gradients": 43_200, "activations": 20_352, "head": head}
    assert found["step"] == {**steady, "gradients": 40_000}
    assert found["save"] == {**steady, "state that is written": 120_000}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("most_wide", [0, 100, 125, 512])
def test_layers_keep_what_is_counted(monkeypatch: pytest.MonkeyPatch, most_wide: int, recompute: bool) -> None:
    """What autograd saves of the real layers, weights left out, is what the formula counts, to 2 %: norms' factors,
    logsumexp and rotations are small. Whether attention computes no block in fp32, some, or all; and of one layer
    that is computed again, in which nothing is made again beside."""
    monkeypatch.setattr(attention, "_MOST_WIDE_KEYS", most_wide)
    for module in (attention, linear):
        monkeypatch.setattr(module, "cpu_emulates_bf16", lambda: False)
    layers, keeping = (1, keeping_all) if recompute else (2, nullcontext)
    shape = Architecture.of(TrainingConfig(n_embd=128, n_layers=layers, n_heads=4, max_seq_len=512), 100)
    numbers = list(range(10, 90))
    pairs = [TokenizedPair.from_chats(numbers + [5] * 40, 40, numbers + [6] * 30, 30) for _ in range(3)]
    pairs.append(TokenizedPair.from_chats(numbers[:20] + [5] * 20, 20, numbers[:20] + [6] * 60, 60))
    batch = PairBatch.pack(pairs)
    for dtype in (torch.bfloat16, torch.float32):
        model = LLaMaTransformer(shape).to(dtype)
        with keeping():
            kept = kept_bytes(lambda: model.hidden(batch.tokens_T, batch.positions_T, batch.layout), model.parameters())  # noqa: B023
        beside = 3 * shape.hidden_width + (5 if recompute else 4) * shape.width  # on their way; a layer's input
        beside *= dtype.itemsize * len(batch.tokens_T)
        engine = ALONE._replace(recompute=recompute)
        counted = memory._activations(MODEL._replace(architecture=shape, dtype=dtype), engine, batch) - beside
        assert kept == pytest.approx(counted, rel=0.02)


@pytest.mark.skipif(not has_fast_bf16("cpu"), reason="a CPU without bf16 units")
@pytest.mark.parametrize("chunk", [512, 100])
def test_the_head_takes_what_is_counted(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """The most that exists at once of a real call, in one chunk and in four, of a matrix that is widened in parts."""
    monkeypatch.setattr(logprob_chunks, "_CPU_ROWS", chunk)
    for module in (memory, logprob):
        monkeypatch.setattr(module, "WIDENED_ROWS", 1024)
    shape = Architecture.of(TrainingConfig(n_embd=128, n_layers=1, n_heads=4, max_seq_len=512), 8192)
    batch = PairBatch.pack([TokenizedPair.from_chats([1, 2, 3], 1, [1, 2, 4], 1) for _ in range(200)])
    hidden = torch.randn(400, 128).bfloat16().requires_grad_()
    weight = torch.randn(8192, 128).bfloat16().requires_grad_()
    targets = torch.randint(8192, (400,))

    def head() -> None:
        loss, *_ = logprob.pair_loss(hidden, weight, targets, [(1, 1)] * 200, lambda sums, _: sums.sum(1))
        torch.autograd.grad(loss, (hidden, weight))

    counted = memory._head(MODEL._replace(architecture=shape, dtype=torch.bfloat16), ALONE, batch)
    head()
    assert peak_extra_bytes(head, torch.device("cpu")) == pytest.approx(counted, rel=0.1)


def test_recomputation_keeps_one_vector_a_layer_and_one_whole_layer() -> None:
    """6 rows * 32 * 2 layers * 2 bytes = 768, one layer, of which a row keeps all 4 * 32 + 3 * 96 numbers, 9,216, and
    the same 4,992 on their way and 768 once."""
    assert parts(ALONE._replace(recompute=True))["passes"]["activations"] == 768 + 9_216 + 4_992 + 768


@pytest.mark.parametrize(("stage", "weights"), [(2, 20_000), (3, 5_000)])
def test_ranks_share_states_and_with_stage_3_weights(stage: int, weights: int) -> None:
    """10,000 weights on 4 ranks: masters and moments of a quarter."""
    found = parts(Engine("cpu", 4, stage))["step"]
    assert (found["weights"], found["masters and moments"]) == (weights, 30_000)


@pytest.mark.parametrize(("engine", "copy"), [(ALONE, 120_000), (Engine("cpu", 4, 2), 30_000)])
def test_what_saves_are_written_from_stands_beside_passes_and_step(engine: Engine, copy: int) -> None:
    """12 bytes of 10,000 weights, or of a quarter; no other part changes, nor the save itself. Not on a GPU."""
    before, found = parts(engine), parts(engine._replace(copies=True))
    for name in ("passes", "step"):
        assert found[name] == {**before[name], "copy for a save": copy}
    assert (found["start"], found["save"]) == (before["start"], before["save"])
    assert parts(Engine("cuda", 1, 2, copies=True)) == parts(Engine("cuda", 1, 2))


def test_a_frozen_reference_and_few_trained_weights() -> None:
    """The reference is 20,000 bytes more; 1,200 trained weights have 14,400 of states."""
    found = parts(ALONE, MODEL._replace(online=True, trained=1_200))["step"]
    assert (found["reference"], found["masters and moments"]) == (20_000, 14_400)


def test_one_reduction_a_step_keeps_whole_sums() -> None:
    """10,000 fp32 sums on each of 4 ranks, whatever the accumulation, and those of a quarter that are the step's; two
    buckets of 1000 numbers, but the largest parameter's 1,600 are exchanged apart, in fp32 beside themselves."""
    found = parts(Engine("cpu", 4, 2, reduce_once=True, bucket=1000))
    assert found["passes"]["gradients"] == 40_000 + 10_000 + 2 * 1000 * 2 + 1600 * (4 + 2)


def test_alone_no_gradient_waits() -> None:
    """10,000 weights: the sums, and the gradient of the largest parameter, 1,600, whatever a bucket has; in fp32 the
    gradients of a micro-batch beside the sums of those before it."""
    for engine in (ALONE, ALONE._replace(device="cuda", bucket=1000)):
        assert parts(engine)["passes"]["gradients"] == 40_000 + 2 * 1600
    found = parts(ALONE, MODEL._replace(dtype=torch.float32))["passes"]["gradients"]
    assert found == 40_000 + 40_000


def test_a_gpu_counts_what_its_allocator_gives() -> None:
    """No Python, no file; offloaded states, and the gradients for them, are on the host: 40,000 + 20,000 of bf16."""
    found = parts(Engine("cuda", 1, 2, offloads=True))["start"]
    assert found == {"weights": 20_000, "reference": 0, "masters and moments": 0, "read": 0}
    for device, gradients in (("cuda", 60_000), ("cpu", 100_000)):
        found = parts(Engine(device, 1, 2, buckets=False, offloads=True))["passes"]
        assert found["gradients"] == gradients


@pytest.mark.parametrize(
    ("rows", "width", "mib"),
    [(4096, 4096, 2068), (8192, 2048, 2537), (5000, 4096, 3093)],  # as tests/unit/ops/test_logprob_cuda.py counts them
)
def test_a_gpus_head_takes_what_its_tensors_do(rows: int, width: int, mib: float) -> None:
    """In one chunk, and in two of 4,096 and of 2,500 rows, of 128,256 tokens; 3 % for logits that are fewer than may
    be. With a frozen head no gradient of the matrix: 1,002 MiB less. By hand, of the pair of 5 rows above: 5 * 50
    numbers of bf16, the gradient of 1,600, 5 rows of 32 in fp32, and in bf16."""
    assert parts(ALONE._replace(device="cuda"))["passes"]["head"] == 500 + 3200 + 640 + 320
    model = MODEL._replace(architecture=Architecture.of(TrainingConfig(n_embd=width, n_heads=16), 128_256))
    assert memory._gpu_head(model, rows, 1024) / 2**20 == pytest.approx(mib, rel=0.03)
    if rows == 4096:  # at their making then, with 501 of logits, 32 of hidden rows
        frozen = memory._gpu_head(model._replace(head=False), rows, 1024) / 2**20
        assert frozen == pytest.approx(1002 + 501 + 32, abs=1)


def test_what_a_step_adds_by_hand() -> None:
    """The larger group flat, 4 * 700, or the norm of the largest parameter in fp64, 8 * 400; offloaded: only that;
    nothing where the sums are flat already."""
    assert step_extra([700, 300], 100, offloads=False, sums_in_one=False) == 2800
    assert step_extra([700, 300], 400, offloads=False, sums_in_one=False) == 3200
    assert step_extra([700, 300], 100, offloads=True, sums_in_one=False) == 800
    assert step_extra([700, 300], 400, offloads=False, sums_in_one=True) == 0


def test_the_base_is_measured(ranks: Ranks) -> None:
    """More than Python alone, less than a machine; fp32 makes no code to speak of."""
    found = memory.measure_base(ranks, torch.float32)
    assert 50 << 20 < found.resident < 8 << 30 and 0 <= found.compiled < 100 << 20
