"""The policy's forward and backward on a GPU: near the CPU's fp32, without a host sync."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from host_waits import no_host_waits
from simple_llama.pretraining.architecture import Architecture
from simple_llama.pretraining.config import TrainingConfig
from simple_llama.pretraining.llama_transformer import LLaMaTransformer
from simple_llama.reinforcement_learning.rlhf.data.pair_batch import PairBatch
from simple_llama.reinforcement_learning.rlhf.data.tokenized_pair import TokenizedPair
from simple_llama.reinforcement_learning.rlhf.objective.policy import DPOPolicy
from simple_llama.reinforcement_learning.rlhf.objective.preference_loss import PreferenceLoss
from simple_llama.reinforcement_learning.rlhf.run.metrics import _SUMMED, MetricSums

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
VOCAB = 300
SHAPE = {"n_embd": 128, "n_heads": 4, "n_layers": 3, "multiple_of": 64, "max_seq_len": 512, "tokens_per_update": 512}
MLA = {"use_mla": True, "kv_lora_rank": 32, "qk_nope_head_dim": 24, "qk_rope_head_dim": 8, "v_head_dim": 32}
LOSS = PreferenceLoss("sigmoid", 0.1, 0.0)


def _model(**changes: object) -> LLaMaTransformer:
    """Random weights on the CPU in fp32, large enough that every part matters and all are bf16 values."""
    torch.manual_seed(0)
    config = TrainingConfig(**{**SHAPE, "batch_size": 1, **changes})  # type: ignore[arg-type]
    model = LLaMaTransformer(Architecture.of(config, VOCAB))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                torch.nn.init.normal_(parameter, std=0.1)
            parameter.copy_(parameter.bfloat16())
    return model


def _pairs(count: int, seed: int = 0) -> list[TokenizedPair]:
    """Prompts of 5-150 tokens, answers of 1-60."""
    rng = np.random.default_rng(seed)
    pairs = []
    for _ in range(count):
        prompt = [1, *rng.integers(2, VOCAB, rng.integers(4, 150))]
        chosen, rejected = (list(rng.integers(2, VOCAB, rng.integers(1, 60))) for _ in range(2))
        pairs.append(TokenizedPair.from_chats([*prompt, *chosen], len(chosen), [*prompt, *rejected], len(rejected)))
    return pairs


def _step(policy: DPOPolicy, batch: PairBatch) -> torch.Tensor:
    """Forward and backward with a reference of 0 where its log-probs are unknown; the pairs' log-probs."""
    out = policy(batch, torch.zeros(len(batch), 2, device=batch.tokens_T.device))
    out.loss.backward()
    return out.logps_B2


@pytest.mark.parametrize("changes", [{}, MLA], ids=["mha", "mla"])
def test_bf16_is_near_fp32_on_the_cpu(changes: dict[str, object]) -> None:
    """Log-probs within 0.02 nats a token, each gradient within 5 % of its norm."""
    slow = DPOPolicy(_model(**changes), LOSS)
    fast = copy.deepcopy(slow).to("cuda", torch.bfloat16)
    batch = PairBatch.pack(_pairs(6))
    expected = _step(slow, batch)
    found = _step(fast, batch.to(torch.device("cuda")))
    counts_B2 = torch.tensor(batch.counts)
    assert ((found.cpu() - expected).abs() / counts_B2).max() < 0.02
    for (name, mine), theirs in zip(slow.named_parameters(), fast.parameters(), strict=True):
        assert mine.grad is not None and theirs.grad is not None, name
        assert (theirs.grad.float().cpu() - mine.grad).norm() < 0.05 * mine.grad.norm(), name


def test_a_micro_batch_makes_no_host_sync() -> None:
    """From the packed batch to the sums of the metrics; the allocators and kernels are warm."""
    device = torch.device("cuda")
    policy = DPOPolicy(_model().to(device, torch.bfloat16), LOSS)
    pairs, sums, ref = _pairs(6), MetricSums(device, work=lambda batch: 1.0), torch.zeros(6, 2)

    def micro_batch() -> None:
        batch = PairBatch.pack(pairs).to(device)
        ref_B2 = ref.pin_memory().to(device, non_blocking=True)
        out = policy(batch, ref_B2)
        out.loss.backward()
        sums.add(out, batch)

    micro_batch()
    with no_host_waits():
        micro_batch()
    assert sums.sums[_SUMMED.index("pairs")] == 12


def test_activation_checkpointing_keeps_less() -> None:
    """Peak memory of a forward and backward, beyond the weights, with and without."""
    peaks = []
    for recompute in (False, True):
        model = _model(n_layers=8).to("cuda", torch.bfloat16)
        model.activation_checkpointing = recompute
        policy, batch = DPOPolicy(model, LOSS), PairBatch.pack(_pairs(40)).to(torch.device("cuda"))
        _step(policy, batch)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        _step(policy, batch)
        torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < 0.6 * peaks[0]
