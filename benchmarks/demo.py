"""`make demo`: the whole main job on shipped data, on a laptop's CPU, through the real launcher with two processes.

start model (SFT on accepted answers) -> launch/precompute_ref.py -> launch/train_dpo.py -> a table

A second demo replaces the first one's run and nothing else: the start model stays while what it is made from is the
same, and so does the reference; other runs may use both.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from simple_llama.cluster.lock import FolderLock
from simple_llama.common.errors import UserError
from simple_llama.common.files import atomic_write_json, file_digest, read_json
from simple_llama.common.paths import root_path

ROOT = Path(root_path())
FOLDER = ROOT / "demo"  # everything that the demo writes
DATA = ROOT / "simple_llama" / "reinforcement_learning" / "rl_dataset"
START = FOLDER / "start.pth"
MADE_FROM = (  # files that decide what the start model is
    DATA / "curated_safety.json",
    ROOT / "simple_llama" / "dataset" / "bpe_8k.json",
    ROOT / "simple_llama" / "finetune" / "format_llm_prompt.py",
    ROOT / "simple_llama" / "finetune" / "full_sft" / "sft.py",
    *sorted((ROOT / "simple_llama" / "pretraining").glob("*.py")),
    ROOT / "benchmarks" / "start_model.py",
)
SPLIT = {"val_share": 0.2, "seed": 42}  # 0.2 of the prompts: enough held-out pairs to read an accuracy from
CONFIG: dict[str, Any] = {
    **SPLIT,
    "model_path": str(START),
    "rlhf_dataset_path": str(DATA),
    "ckpt_dir": str(FOLDER / "rlhf_checkpoints"),
    "ref_cache_dir": str(FOLDER / "ref_cache"),
    "log_dir": str(FOLDER / "runs"),
    "run_name": "demo",
    "device": "cpu",
    "batch_size": 8,
    "grad_accum_steps": 1,
    "epochs": 2,
    "warmup_iterations": 8,
    "max_lr": 5e-4,  # a model of a few million weights needs far larger steps than the default for billions
    "min_lr": 1e-5,
    "eval_interval": 10,
    "n_samples": 2,
    "sample_tokens": 48,
}


def main() -> None:
    """Runs the three steps, each as the command a person would type, and prints what came of it."""
    started = time.perf_counter()
    clear(Path(CONFIG["ckpt_dir"]) / CONFIG["run_name"], Path(CONFIG["log_dir"]) / CONFIG["run_name"])
    atomic_write_json(FOLDER / "config.json", CONFIG)
    make_start(START, MADE_FROM)
    for script in ("launch/precompute_ref.py", "launch/train_dpo.py"):
        run([*launcher(), script, "--config", str(FOLDER / "config.json")])
    print(table(time.perf_counter() - started))


def clear(checkpoints: Path, records: Path) -> None:
    """Removes the last demo's run. UserError while it still goes on."""
    FolderLock.take(checkpoints).release()
    shutil.rmtree(checkpoints, ignore_errors=True)
    shutil.rmtree(records, ignore_errors=True)


def make_start(path: Path, made_from: Sequence[Path]) -> None:
    """Trains the start model, unless the one of an earlier demo was made from the same files; one of others moves
    aside."""
    facts = {**SPLIT, **{file.name: file_digest(file) for file in made_from}}
    record = path.with_suffix(".json")
    if path.exists() and record.exists() and read_json(record) == facts:
        print(f"\nkept {shown(path)}, the start model of an earlier demo; what it is made from is the same")
        return
    if path.exists():
        aside = path.with_name(f"{path.stem}-{time.strftime('%Y%m%d-%H%M%S')}{path.suffix}")
        path.rename(aside)
        print(f"\n{shown(path)} was made from other files: moved to {shown(aside)}")
    split = [f"--{name}={value}" for name, value in SPLIT.items()]
    run([sys.executable, "benchmarks/start_model.py", f"--data={DATA}", f"--out={path}", *split])
    atomic_write_json(record, facts)


def launcher() -> list[str]:
    """DeepSpeed's launcher for two processes on this machine, without ssh, on a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2", "--master_port", str(port)]


def shown(path: Path) -> str:
    """A path from the project's root."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def run(command: list[str]) -> None:
    """Runs one command from the project's root; ends the demo with its status when it fails."""
    print("\n$", " ".join(command).replace(str(ROOT) + "/", ""), flush=True)
    done = subprocess.run(command, cwd=ROOT)
    if done.returncode:
        sys.exit(f"demo: this command ended with status {done.returncode}")


def table(seconds: float) -> str:
    """The outcome, read from the run's own records."""
    folder = FOLDER / "runs" / "demo"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    held_out = [line for line in lines if "eval_loss" in line]
    steps = [line for line in lines if "perf/pairs_per_second" in line]
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    first, last = held_out[0], held_out[-1]
    rows = [
        (f"held-out {title}", f"{first[name]:.4f}", f"{last[name]:.4f}")
        for title, name in (
            ("reward accuracy", "eval_rewards/accuracies"),
            ("margin", "eval_rewards/margins"),
            ("loss", "eval_loss"),
        )
    ]
    speed = sorted(line["perf/pairs_per_second"] for line in steps)[len(steps) // 2]
    checkpoint = max((FOLDER / "rlhf_checkpoints" / "demo").glob("*.pth"), key=lambda path: path.stat().st_mtime)
    body = [f"{'':26}{'before':>10}{'after':>10}", *(f"{name:26}{a:>10}{b:>10}" for name, a, b in rows)]
    body += [
        f"on {first['eval_pairs']:.0f} held-out pairs (split by prompt), after {last['step']} optimizer steps",
        "",
        f"training speed       {speed:.1f} pairs/s (median step, 2 processes)",
        f"peak memory          {max(line['perf/peak_memory_gb'] for line in steps):.2f} GiB a process",
        f"whole demo           {seconds:.0f} s",
        "",
        f"prompt   {samples[0]['prompts'][0]!r}",
        f"before   {samples[0]['answers'][0]!r}",
        f"after    {samples[-1]['answers'][0]!r}",
        "(2.6 M weights, half a minute of SFT: read the numbers; nobody has taught this model to write yet)",
        "",
        f"checkpoint   {shown(checkpoint)}",
        "curves       make tensorboard",
    ]
    return "\n" + "\n".join(body)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
