"""A job small enough for a test: a model of a few thousand weights, a tokenizer of 300 tokens, made-up pairs."""

from __future__ import annotations

import functools
import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import rank_server
from rank_server import ForkedRank, RankServer
from simple_llama.common.paths import root_path
from simple_llama.dataset.tokenizer import load_tokenizer
from simple_llama.dataset.train_bpe import tokenizer_json, train_bpe
from simple_llama.pretraining.architecture import Architecture
from simple_llama.pretraining.config import TrainingConfig
from simple_llama.pretraining.llama_transformer import LLaMaTransformer
from simple_llama.pretraining.weights import load_weights, save_weights

ROOT = Path(root_path())
WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "bird",
    "sits",
    "runs",
    "sings",
    "on",
    "under",
    "near",
    "mat",
    "tree",
    "house",
    "red",
    "blue",
    "green",
    "quick",
    "slow",
    "old",
]
TINY = {"n_embd": 32, "n_layers": 2, "n_heads": 2, "multiple_of": 16, "max_seq_len": 512}
# multi-head latent attention for a width of 32 and 4 heads
MLA: dict[str, Any] = {
    "use_mla": True,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}

RankProcess = subprocess.Popen[str] | ForkedRank
ENVIRONMENT = dict(os.environ)  # of the processes that fork ranks: before any test changes it


@dataclass(frozen=True)
class TinyJob:
    """Paths of a job's inputs and outputs, all below one folder."""

    folder: Path

    @property
    def settings(self) -> dict[str, object]:
        """Settings of a run of 6 steps in fp32: 24 pairs (3 of them held out), 2 epochs of 3 steps."""
        return {
            "model_path": str(self.folder / "start.pth"),
            "tokenize_path": str(self.folder / "tokenizer.json"),
            "rlhf_dataset_path": str(self.folder / "pairs.jsonl"),
            "ckpt_dir": str(self.folder / "checkpoints"),
            "ref_cache_dir": str(self.folder / "ref_cache"),
            "log_dir": str(self.folder / "runs"),
            "deepspeed_config": str(ROOT / "ds_configs" / "zero2_fp32.json"),
            "run_name": "tiny",
            "device": "cpu",
            "val_share": 0.15,
            "batch_size": 2,
            "grad_accum_steps": 4,
            "epochs": 2,
            "warmup_iterations": 2,
            "max_lr": 1e-3,
            "min_lr": 1e-4,
            "eval_interval": 2,
            "n_samples": 2,
            "sample_tokens": 4,
            "start_timeout_s": 120.0,
        }

    def lines(self, run: str = "tiny") -> list[dict[str, float]]:
        """metrics.jsonl of a run."""
        return [json.loads(line) for line in (self.folder / "runs" / run / "metrics.jsonl").read_text().splitlines()]

    def curve(self, name: str, run: str = "tiny") -> list[float]:
        """One metric over the steps."""
        return [line[name] for line in self.lines(run) if name in line]

    def weights(self, run: str = "tiny") -> dict[str, torch.Tensor]:
        """The newest exported weights."""
        path = max((self.folder / "checkpoints" / run).glob("dpo_*.pth"), key=lambda file: file.stat().st_mtime_ns)
        return torch.load(path, weights_only=False)["model_state_dict"]


def make_job(folder: Path, pairs: int = 24, **model: object) -> TinyJob:
    """Writes the tokenizer, the pairs and a random start model below `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_bytes(tokenizer_json(train_bpe([" ".join(WORDS)] * 4, 300)))
    write_pairs(folder / "pairs.jsonl", range(pairs))
    torch.manual_seed(7)
    config = TrainingConfig(**{"batch_size": 1, "tokens_per_update": 512, **TINY, **model})
    vocab = load_tokenizer(folder / "tokenizer.json").get_vocab_size()
    save_weights(folder / "start.pth", LLaMaTransformer(Architecture.of(config, vocab)).state_dict(), config, {})
    return TinyJob(folder)


def make_tuned(job: TinyJob) -> Path:
    """`tuned.pth`: what a run might have made of the start model, with the settings that it had and a beta of 0.25."""
    start = load_weights(job.folder / "start.pth")
    torch.manual_seed(1)
    tuned = {name: value + 0.02 * torch.randn_like(value) for name, value in start.state_dict.items()}
    metadata = {"dpo_config": {**job.settings, "beta": 0.25, "seed": 42}, "run": "tiny"}
    save_weights(job.folder / "tuned.pth", tuned, start.config, metadata)
    return job.folder / "tuned.pth"


def write_pairs(path: Path, numbers: range) -> None:
    """One record a number, each with its own prompt; accepted answers have even words, rejected ones odd words."""
    rows = []
    for n in numbers:
        accepted = " ".join(WORDS[(n * 3 + 2 * k) % 20] for k in range(2 + n % 5))
        rejected = " ".join(WORDS[(n * 5 + 2 * k + 1) % 20] for k in range(2 + n % 7))
        rows.append({"Template": ["CUSTOM"], "User": [f"say {n}"], "Accepted": [accepted], "Rejected": [rejected]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_rankings(path: Path, numbers: range, answers: int = 4) -> None:
    """One record a number, of so many answers of 2 to 6 words with scores; among four, two are of equal score."""
    rows = []
    for n in numbers:
        found = [
            " ".join(WORDS[(n * (3 + a) + 2 * k + a) % 20] for k in range(2 + (n + 2 * a) % 5)) for a in range(answers)
        ]
        scores = [(n + 3 * a) % answers if a < 3 else (n + 3) % answers for a in range(answers)]
        rows.append({"Template": ["CUSTOM"], "User": [f"say {n}"], "Responses": found, "Scores": scores})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_rank(
    script: str,
    settings: dict[str, object],
    rank: int = 0,
    world: int = 1,
    port: int = 0,
    flags: tuple[str, ...] = (),
    afresh: bool = False,
) -> RankProcess:
    """Starts one rank of a script from the project's root, as a launcher would.

    Forked by tests/rank_server.py where that can be, which saves its imports; `afresh`: always by Python itself.
    """
    # torch's compiler leaves an address of this process's memory in the environment
    left_out = ("RANK", "WORLD_SIZE", "_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR")
    environment = {name: value for name, value in os.environ.items() if name not in left_out}
    if world > 1:
        environment |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
        environment |= {"LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    arguments = [*(f"--{name}={value}" for name, value in settings.items()), *flags]
    if not afresh and settings["device"] == "cpu" and rank_server.possible():
        server = _server(rank % 2)
        if server.can_start(environment):
            return server.start(script, arguments, environment)
    return subprocess.Popen(
        [sys.executable, script, *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@functools.cache
def _server(which: int) -> RankServer:
    """One for even ranks, one for odd ones: their hash seeds differ, as those of two processes do."""
    return RankServer(ENVIRONMENT)


def run_ranks(script: str, settings: dict[str, object], world: int, port: int = 0, flags: tuple[str, ...] = ()) -> str:
    """Runs a script on `world` ranks to its end; gives rank 0's output. Fails the test when a rank fails."""
    processes = [start_rank(script, settings, rank, world, port, flags) for rank in range(world)]
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert not any(process.returncode for process in processes), "\n".join(outputs)
    return outputs[0]
