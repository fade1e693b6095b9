"""Makes tests/golden/before: what the code of one commit wrote, which all later code must read and take up.

    git worktree add ../then 7a852ca
    PYTHONPATH=../then python tests/golden/make_before.py --checkout ../then --output tests/golden/before

Three runs are broken off by the code of that commit, and a copy of each is taken up and ended by it. Kept is what lay
on disk when a run broke off, and of its end what a test compares: the curve, the samples and the weights. All paths are
relative to the output folder, in which the commands run, so that no file names this machine's.

Of later commits, bee0401 writes the same: stores and states byte for byte, weights and curves bit for bit, config.json
with the same settings in another order. It is the last one whose shards no name binds to the reference, whose
state.json has no digest of itself and keeps none of the reference's values, and whose config.json may have relative
paths.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from simple_llama.dataset.tokenizer import SPECIAL_TOKENS
from simple_llama.pretraining.config import TrainingConfig

PASS, TRAIN = "launch/precompute_ref.py", "launch/train_dpo.py"
SYSTEM = "be kind"
WORDS = ["the", "a", "cat", "dog", "bird", "sits", "runs", "sings", "on", "under"]
WORDS += ["near", "mat", "tree", "house", "red", "blue", "green", "quick", "slow", "old"]
SHAPE: dict[str, Any] = {"n_embd": 8, "n_layers": 1, "n_heads": 2, "multiple_of": 8, "max_seq_len": 64}
LATENT: dict[str, Any] = {
    "use_mla": True,
    "kv_lora_rank": 6,
    "qk_nope_head_dim": 2,
    "qk_rope_head_dim": 2,
    "v_head_dim": 4,
    "use_lora": True,
    "lora_rank": 2,
}
VOCABULARY = 64
BLOCK = "decoder_blocks.0."
ENDS: dict[str, tuple[int, ...]] = {"embeddings": (VOCABULARY, 8), "norm": (8,), "final_linear": (VOCABULARY, 8)}
FEED_FORWARD = {"ffwd.w1": (24, 8), "ffwd.w2": (8, 24), "ffwd.w3": (24, 8), "norm1": (8,), "norm2": (8,)}
HEADS = {"attention.qkv_linear": (24, 8), "attention.out": (8, 8)}
LATENT_HEADS = {"attention.wq": (8, 8), "attention.wkv_a": (8, 8), "attention.wkv_b": (12, 6), "attention.wo": (8, 8)}
ADAPTERS = {"q_lora_layer.lora_a": (8, 2), "q_lora_layer.lora_b": (2, 4), "v_lora_layer.lora_a": (8, 2)}
ADAPTERS |= {"v_lora_layer.lora_b": (2, 8)}
COMMON = {
    "tokenize_path": "tokenizer.json",
    "rlhf_dataset_path": "pairs.jsonl",
    "ckpt_dir": "checkpoints",
    "ref_cache_dir": "ref_cache",
    "log_dir": "runs",
    "device": "cpu",
    "system_prompt": SYSTEM,
    "val_share": 0.15,
    "batch_size": 2,
    "epochs": 2,
    "warmup_iterations": 2,
    "max_lr": 1e-2,
    "min_lr": 1e-3,
    "eval_interval": 2,
    "save_interval": 2,
    "n_samples": 2,
    "sample_tokens": 4,
}
# name: (ranks, changes of COMMON, what rank 0 says when it is struck, the signal, changes when it is taken up)
RUNS: dict[str, tuple[int, dict[str, object], str, int, dict[str, object]]] = {
    # in the evaluation after step 2, before the save that is due there: a state of unfinished work, without a .pth
    "stopped": (
        1,
        {"model_path": "start.pth", "deepspeed_config": "zero2_fp32.json", "grad_accum_steps": 4, "weight_decay": 0.1},
        "step 2/",
        signal.SIGTERM,
        {},
    ),
    # after the save of step 2; two ranks wrote the state, one takes it up
    "killed": (
        2,
        {"model_path": "start.pth", "deepspeed_config": "zero2_bf16.json", "grad_accum_steps": 2},
        "saved ",
        signal.SIGKILL,
        {"grad_accum_steps": 4},
    ),
    "adapters": (
        1,
        {
            "model_path": "latent.pth",
            "deepspeed_config": "zero2_fp32.json",
            "grad_accum_steps": 4,
            "trainable": "lora",
            "loss_type": "ipo",
        },
        "saved ",
        signal.SIGKILL,
        {},
    ),
}
# Runs a script; with a text, rank 0 sends itself a signal once a line of the log begins so. The kernel's name is left
# out of the records.
STRIKE = """
import logging, os, platform, runpy, sys
platform.platform = lambda *args, **kwargs: "Linux"
begins, number, sys.argv = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
def strike(record):
    if begins and os.environ.get("RANK", "0") == "0" and record.getMessage().startswith(begins):
        os.kill(os.getpid(), number)
    return True
logging.getLogger("simple_llama").addFilter(strike)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def make_inputs(folder: Path, checkout: Path) -> None:
    """The tokenizer, 24 pairs, two start models of random weights, and the DeepSpeed files of the commit."""
    texts = [f"{SYSTEM} say 0 1 2 3 4 5 6 7 8 9 {' '.join(WORDS)}\n"] * 4
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=list(SPECIAL_TOKENS), show_progress=False)
    )
    folder.joinpath("tokenizer.json").write_text(json.dumps(json.loads(tokenizer.to_str())) + "\n")
    lines = []
    for n in range(24):
        chosen, rejected = (
            " ".join(WORDS[(n * first + 2 * k + odd) % 20] for k in range(2 + n % most))
            for first, most, odd in ((3, 5, 0), (5, 7, 1))
        )
        record = {"Template": ["CUSTOM"], "User": [f"say {n}"], "Accepted": [chosen], "Rejected": [rejected]}
        lines.append(json.dumps(record) + "\n")
    folder.joinpath("pairs.jsonl").write_text("".join(lines))
    for name, changes in (("start", {}), ("latent", LATENT)):
        paths = dict.fromkeys(("dataset_dir", "tokenizer_path", "ckpt_dir", "log_file"), "none")
        config = TrainingConfig(batch_size=1, tokens_per_update=64, **{**SHAPE, **changes, **paths})
        weights = random_weights(config.use_mla)
        torch.save({"model_state_dict": weights, "config": config, "metadata": {}}, folder / f"{name}.pth")
    for name in ("zero2_fp32", "zero2_bf16"):
        shutil.copy(checkout / "ds_configs" / f"{name}.json", folder)


def random_weights(latent: bool) -> dict[str, torch.Tensor]:
    """Weights by the names of the commit; of the model with latent attention, with its adapters."""
    block = {**(LATENT_HEADS if latent else HEADS), **({"attention.kv_norm": (6,)} if latent else {}), **FEED_FORWARD}
    shapes = {f"{name}.weight": shape for name, shape in ENDS.items()}
    shapes |= {f"{BLOCK}{name}.weight": shape for name, shape in block.items()}
    if latent:
        shapes |= {f"{BLOCK}{name}.bias": shape[:1] for name, shape in LATENT_HEADS.items()}
        shapes |= {f"{BLOCK}attention.{name}": shape for name, shape in ADAPTERS.items()}
    torch.manual_seed(7)
    weights = {name: 0.3 * torch.randn(shape) for name, shape in shapes.items()}
    return {name: value + ("norm" in name) for name, value in weights.items()}


def start(
    script: Path, settings: dict[str, object], folder: Path, ranks: int, struck: tuple[str, int], *flags: str
) -> None:
    """Runs a script in `folder` on `ranks` ranks; they must end with 0, or not, where rank 0 is struck."""
    arguments = [*(f"--{name}={value}" for name, value in settings.items()), *flags]
    begins, number = struck
    processes = []
    for rank in range(ranks):
        variables = dict(os.environ)
        if ranks > 1:
            variables |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
            variables |= {"LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29533"}
        command = [sys.executable, "-c", STRIKE, begins, str(number), str(script), *arguments]
        processes.append(subprocess.Popen(command, cwd=folder, env=variables))
    for process in processes:
        if (process.wait(120) == 0) == bool(begins):
            raise SystemExit(f"{script}: unexpected exit status {process.returncode}")


def make_run(name: str, folder: Path, checkout: Path) -> None:
    """Breaks a run off, takes up a copy of it, and keeps of the copy what shows its end."""
    ranks, changes, begins, number, later = RUNS[name]
    settings = {**COMMON, **changes, "run_name": name}
    start(checkout / PASS, settings, folder, ranks, ("", 0))
    start(checkout / TRAIN, settings, folder, ranks, (begins, number))
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary) / "copy"
        shutil.copytree(folder, copy)
        start(checkout / TRAIN, {**settings, **later}, copy, 1, ("", 0), "--resume")
        ended = folder / "ended" / name
        ended.mkdir(parents=True)
        for file in ("metrics.jsonl", "samples.jsonl", "finished.json"):
            shutil.copy(copy / "runs" / name / file, ended)
        shutil.copy(copy / json.loads((ended / "finished.json").read_text())["weights"], ended)
    for path in (folder / "runs" / name).glob("events.*"):
        path.unlink()  # its name is the machine's
    for path in (folder / "checkpoints" / name / "lock", folder / "runs" / name / "train.log"):
        path.unlink(missing_ok=True)  # a killed run's lock names the machine


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=Path, required=True, help="of the commit, the one on PYTHONPATH")
    parser.add_argument("--output", type=Path, required=True, help="folder to make")
    options = parser.parse_args()
    checkout, folder = options.checkout.resolve(), options.output.resolve()
    folder.mkdir(parents=True)
    make_inputs(folder, checkout)
    for name in RUNS:
        make_run(name, folder, checkout)


if __name__ == "__main__":
    main()
