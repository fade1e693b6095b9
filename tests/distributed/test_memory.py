"""Memory of a rank over many steps: packed lengths are always new, and what is compiled for each must not pile up."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from tiny_job import ROOT, WORDS, free_port, make_job, run_ranks

pytestmark = pytest.mark.dist


def test_memory_stays_level_while_packed_lengths_change(tmp_path: Path) -> None:
    """Two ranks, 40 steps in bf16, two pairs each a rank, answers of 2 to 40 words: after step 20 at most 10 % more. On
    a CPU with bf16 units it was 36 % with all that oneDNN and ATen keep (others have nothing to compile).
    """
    job, rng = make_job(tmp_path, pairs=1), random.Random(0)
    with (tmp_path / "pairs.jsonl").open("w") as file:
        for number in range(160):
            answers = [[" ".join(rng.choices(WORDS, k=rng.randint(2, 40)))] for _ in range(2)]
            record = {"Template": ["CUSTOM"], "User": [f"say {number}"], "Accepted": answers[0], "Rejected": answers[1]}
            file.write(json.dumps(record) + "\n")
    settings = {**job.settings, "deepspeed_config": str(ROOT / "ds_configs" / "zero2_bf16.json"), "reference": "online"}
    settings |= {"batch_size": 2, "grad_accum_steps": 1, "epochs": 1, "val_share": 0, "eval_interval": 0}
    run_ranks("launch/train_dpo.py", settings, world=2, port=free_port())
    peaks = job.curve("perf/peak_memory_gb")
    assert len(peaks) == 40
    assert peaks[-1] <= 1.1 * peaks[19], peaks
