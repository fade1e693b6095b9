"""`make demo`: the whole main job on shipped data, on a laptop's CPU, through the real launcher with two processes.

start model (SFT on accepted answers) -> launch/precompute_ref.py -> launch/train_dpo.py -> a table
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from simple_llama.common.paths import root_path

ROOT = Path(root_path())
FOLDER = ROOT / "demo"  # everything that the demo writes; made anew by each demo
DATA = ROOT / "simple_llama" / "reinforcement_learning" / "rl_dataset"
SPLIT = {"val_share": 0.2, "seed": 42}  # 0.2 of the prompts: enough held-out pairs to read an accuracy from
CONFIG: dict[str, Any] = {
    **SPLIT,
    "model_path": str(FOLDER / "start.pth"),
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
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    (FOLDER / "config.json").write_text(json.dumps(CONFIG, indent=2))
    (FOLDER / "hostfile").write_text("localhost slots=2\n")
    split = [f"--{name}={value}" for name, value in SPLIT.items()]
    run([sys.executable, "benchmarks/start_model.py", f"--data={DATA}", f"--out={CONFIG['model_path']}", *split])
    for script in ("launch/precompute_ref.py", "launch/train_dpo.py"):
        run([*launcher(), script, "--config", str(FOLDER / "config.json")])
    print(table(time.perf_counter() - started))


def launcher() -> list[str]:
    """DeepSpeed's launcher for two processes on this machine, without ssh, on a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    deepspeed = Path(sys.executable).with_name("deepspeed")
    address = ["--no_ssh_check", "--master_addr", "127.0.0.1", "--master_port", str(port)]
    return [str(deepspeed), "--hostfile", str(FOLDER / "hostfile"), *address]


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
        f"checkpoint   {checkpoint.relative_to(ROOT)}",
        "curves       .venv/bin/tensorboard --logdir demo/runs --host localhost",
    ]
    return "\n" + "\n".join(body)


if __name__ == "__main__":
    main()
