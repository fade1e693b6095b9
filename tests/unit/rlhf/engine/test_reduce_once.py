"""`--reduce_once` in one process: what it needs of the model, what it refuses, and the same run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from simple_llama.cluster.distributed import Ranks
from simple_llama.common.errors import UserError
from simple_llama.pretraining.architecture import Architecture
from simple_llama.pretraining.config import TrainingConfig
from simple_llama.pretraining.llama_transformer import LLaMaTransformer
from simple_llama.reinforcement_learning.rlhf.apply_dpo import train
from simple_llama.reinforcement_learning.rlhf.data.pair_batch import PairBatch
from simple_llama.reinforcement_learning.rlhf.data.tokenized_pair import TokenizedPair
from simple_llama.reinforcement_learning.rlhf.dpo_config import DPOConfig
from simple_llama.reinforcement_learning.rlhf.inputs import load_inputs
from simple_llama.reinforcement_learning.rlhf.objective.policy import DPOPolicy
from simple_llama.reinforcement_learning.rlhf.objective.preference_loss import PreferenceLoss
from tiny_job import ROOT, TINY, make_job

MLA = {"use_mla": True, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8}
SHAPES = {"mha": {}, "mla": {**MLA, "v_head_dim": 16}, "lora": {"use_lora": True, "lora_rank": 4}}


@pytest.mark.parametrize("name", SHAPES)
def test_every_parameter_takes_part_in_every_micro_batch(name: str) -> None:
    """What `Engine.accumulate_locally` relies on: the last micro-batch, here one pair of weight 0, touches them all."""
    config = TrainingConfig(batch_size=1, tokens_per_update=512, **{**TINY, **SHAPES[name]})
    model = LLaMaTransformer(Architecture.of(config, 20))
    pair = TokenizedPair.from_chats([1, 2, 3], 1, [1, 2, 4], 1)
    policy = DPOPolicy(model, PreferenceLoss("sigmoid", 0.5, 0.0))
    (policy(PairBatch.pack([pair]), torch.zeros(1, 2)).loss * 0.0).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_the_run_is_the_same(tmp_path: Path, ranks: Ranks) -> None:
    """Three steps in bf16 with and without: losses to 1e-4, gradient norms to 1e-3."""
    job = make_job(tmp_path)
    for run, once in (("each", False), ("once", True)):
        own = {"run_name": run, "reference": "online", "n_samples": 0, "reduce_once": once, "epochs": 1}
        settings = {**job.settings, **own}
        settings["deepspeed_config"] = str(ROOT / "ds_configs" / "zero2_bf16.json")
        config = DPOConfig(**settings)
        train(config, load_inputs(config, ranks), ranks)
    np.testing.assert_allclose(job.curve("loss", "once"), job.curve("loss", "each"), atol=1e-4)
    np.testing.assert_allclose(job.curve("grad_norm", "once"), job.curve("grad_norm", "each"), rtol=1e-3)
    assert job.curve("perf/comm_mb", "once") == [0.0] * 3  # one rank alone


def test_zero_3_is_refused(tmp_path: Path, ranks: Ranks) -> None:
    settings = {**make_job(tmp_path).settings, "reduce_once": True}
    settings["deepspeed_config"] = str(ROOT / "ds_configs" / "zero3_bf16.json")
    with pytest.raises(UserError, match=r"reduce_once: expected ZeRO stage 2, found stage 3 in .*zero3_bf16\.json"):
        load_inputs(DPOConfig(**settings), ranks)


def test_one_micro_batch_a_step_is_refused() -> None:
    with pytest.raises(UserError, match="reduce_once: expected grad_accum_steps above 1, found 1"):
        DPOConfig(reduce_once=True, grad_accum_steps=1)
