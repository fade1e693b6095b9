"""A real model's whole road, checked: `python -m benchmarks.check_real --model MODEL --folder FOLDER`.

1. The reference pass and a run on two ranks through DeepSpeed's launcher, to the end; and a run that is stopped in the
   middle and resumed: their exports and states have to be equal bit for bit.
2. The same run under ZeRO-3 and with offload: the largest difference of a step's loss is printed.
3. The export in fp32 against transformers: the same greedy text for 20 prompts of 64 tokens. Where the two differ, the
   two best logits have to lie within 1e-3; how often that was is printed.

Needs transformers (requirements.txt). Exits with 1 where something is not so.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from tyro.conf import arg

from benchmarks.demo import DATA, ROOT, launcher
from simple_llama.common.files import atomic_write_json, file_digest, read_json
from simple_llama.finetune.chat_config import ChatConfig, own_chat
from simple_llama.finetune.chat_format import Chat
from simple_llama.inference.generate import generate
from simple_llama.interop.hf_folder import HFFolder
from simple_llama.pretraining.weights import build_model
from simple_llama.reinforcement_learning.rlhf.data.dataset_loader import RLDatasetLoader

_PROMPTS, _TOKENS, _CLOSE = 20, 64, 1e-3
_STOP_AFTER = 3  # steps
_SETTINGS: dict[str, Any] = {
    "rlhf_dataset_path": str(DATA),
    "val_share": 0.2,
    "device": "cpu",
    "batch_size": 8,
    "grad_accum_steps": 1,
    "epochs": 1,
    "max_lr": 2e-5,
    "min_lr": 2e-6,
    "warmup_iterations": 2,
    "log_interval": 1,
    "eval_interval": 0,
    "n_samples": 0,
    "max_seq_len": 128,
}


@dataclass(frozen=True)
class Check:
    """What is checked, and where."""

    model: Annotated[str, arg(help="a .gguf file or a Hugging Face folder")]
    folder: Annotated[str, arg(help="of all that is written; it has to be new")]


def main(check: Check) -> int:
    """All three checks; the exit status."""
    folder = Path(check.folder).absolute()
    folder.mkdir(parents=True)
    common = {**_SETTINGS, "model_path": str(Path(check.model).absolute())}
    common |= {"ckpt_dir": str(folder / "checkpoints"), "log_dir": str(folder / "runs")}
    common["ref_cache_dir"] = str(folder / "ref_cache")
    atomic_write_json(folder / "config.json", common)
    config = ["--config", str(folder / "config.json")]
    _run(["launch/precompute_ref.py", *config])
    _run(["launch/train_dpo.py", *config, "--run_name=whole"])
    _stop_and_resume(config, folder)
    files = [_files(folder / "checkpoints" / name) for name in ("whole", "halves")]
    failed = files[0] != files[1] or not files[0]
    print(f"stopped after step {_STOP_AFTER} and resumed: {len(files[0])} files of exports and states", end=" ")
    print("DIFFER" if failed else "are equal bit for bit")
    for stage in ("zero3_bf16.json", "zero2_offload.json"):
        _run(["launch/train_dpo.py", *config, f"--run_name={stage}", f"--deepspeed_config=ds_configs/{stage}"])
        pairs = zip(_losses(folder / "runs" / "whole"), _losses(folder / "runs" / stage), strict=True)
        print(f"{stage}: largest difference of a step's loss {max(abs(a - b) for a, b in pairs):.2g}")
    [export] = (path for path in (folder / "checkpoints" / "whole").glob("dpo_*") if path.is_dir())
    return int(_compare_text(export) or failed)


def _run(command: Sequence[str]) -> None:
    """Through the launcher, with what it says in a log of ours."""
    started = time.perf_counter()
    done = subprocess.run([*launcher(), *command], cwd=ROOT, capture_output=True, text=True)
    print(f"{' '.join([command[0], *command[3:]])}: status {done.returncode}, {time.perf_counter() - started:.0f} s")
    if done.returncode:
        sys.exit(done.stdout[-3000:] + done.stderr[-3000:])


def _stop_and_resume(config: Sequence[str], folder: Path) -> None:
    """A run whose rank 0 is asked to stop once the metrics of a step are there, then resumed."""
    metrics = folder / "runs" / "halves" / "metrics.jsonl"
    command = [*launcher(), "launch/train_dpo.py", *config, "--run_name=halves"]
    with (folder / "halves.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        while process.poll() is None and not (metrics.exists() and len(_losses(metrics.parent)) >= _STOP_AFTER):
            time.sleep(0.05)
        os.kill(read_json(folder / "checkpoints" / "halves" / "lock")["pid"], signal.SIGTERM)
        process.wait()
    _run(["launch/train_dpo.py", *config, "--run_name=halves", "--resume"])


def _losses(run: Path) -> list[float]:
    """The loss of each step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "perf/pairs_per_second" in line]


def _files(run: Path) -> dict[str, str]:
    """Digests of the weights in the last state and in the export, by path."""
    newest = run / "state" / (run / "latest").read_text().strip()
    found = [*newest.glob("*.safetensors"), *run.glob("dpo_*/*.safetensors")]
    return {str(path.relative_to(run)): file_digest(path) for path in found}


@torch.no_grad()
def _compare_text(export: Path) -> bool:
    """Whether transformers writes another text than we do, beyond ties."""
    import transformers  # pyright: ignore[reportMissingImports]

    start = HFFolder(export)
    assert start.own_tokenizer is not None
    chat = own_chat(start.own_tokenizer, ChatConfig())
    data = RLDatasetLoader(DATA, chat, 512, val_share=0.2, seed=42)
    said = islice(data.conversations(data.validation), _PROMPTS)
    with start.reading() as loaded:
        ours = build_model(loaded, torch.float32, "cpu").eval()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32).eval()
    same = ties = 0
    for told in said:
        prompt = chat.encode_prompt(Chat(told.system, told.users, told.chosen[:-1]))
        mine = list(generate(ours, prompt, _TOKENS, chat.stop_ids))
        ids = theirs.generate(torch.tensor([prompt]), max_new_tokens=_TOKENS, do_sample=False, repetition_penalty=1.0)
        other = [token for token in ids[0, len(prompt) :].tolist() if token not in chat.stop_ids]
        if mine == other:
            same += 1
            continue
        at = next((i for i, (a, b) in enumerate(zip(mine, other, strict=False)) if a != b), min(len(mine), len(other)))
        best = ours(torch.tensor([[*prompt, *mine[:at]]]))[0, -1].topk(2).values
        ties += bool(best[0] - best[1] <= _CLOSE)
    print(f"greedy text as transformers': {same} of {_PROMPTS} prompts, {ties} differ where logits lie within {_CLOSE}")
    return same + ties < _PROMPTS


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Check, description=__doc__)))
