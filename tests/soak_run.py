"""What the soaks share: a small job and its twins, starts on real ranks, and the judgement of what they left."""

from __future__ import annotations

import argparse
import json
import random
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from simple_llama.pretraining.weights import load_weights
from simple_llama.reinforcement_learning.rlhf.reference.ref_store import RefStore
from tiny_job import ROOT, RankProcess, free_port, make_job, start_rank

PRECOMPUTE, TRAIN = "launch/precompute_ref.py", "launch/train_dpo.py"
RUN = "tiny"
CONFIGS = {"fp32": "zero2_fp32", "bf16": "zero2_bf16", "zero3": "zero3_bf16", "offload": "zero2_offload"}
ENDS_BY_ITSELF_S = 60.0  # in which a rank that lost another one must end
TOO_LONG_S = 240.0  # for any start
FOLDERS = ("ckpt_dir", "ref_cache_dir", "log_dir")
# A job on another number of ranks adds up the same micro-batches in another order. What that does to the weights is
# measured in each soak: the distance of two jobs that nobody hit, one on one rank and one on two. AdamW's first steps
# can double such a distance where ranks change in them, and a job that changes them has two sums of it.
NOISES_ALLOWED = 4.0
LARGEST_NOISE = 0.05  # of the way that the weights went: beyond it, it is no noise


class Failure(Exception):
    """What a soak found wrong."""


class Twins:
    """A job that is hit, and its twins that are not: the same but for where they write."""

    def __init__(self, folder: Path, options: argparse.Namespace, steps: int, **model: Any):
        self.random, self.ranks = random.Random(options.seed), options.ranks
        self.job = make_job(folder, **model)
        interval = self.random.choice((1, 2))
        self.base: dict[str, object] = {
            **self.job.settings,
            "deepspeed_config": str(ROOT / "ds_configs" / f"{CONFIGS[options.config]}.json"),
            "epochs": -(-steps // 3),
            "save_interval": interval,
            "ref_flush_pairs": 2,
            "start_timeout_s": ENDS_BY_ITSELF_S / 3,  # wait for one that was killed before it came; torch tries twice
        }
        self.startup_s = 5.0  # until a training start has made its first step
        print(f"seed {options.seed}: {options.config}, {self.ranks} ranks, {steps} steps, a save every {interval}")

    def settings(self, twin: str) -> dict[str, object]:
        """Settings of one of the jobs; a step has eight pairs on any number of ranks."""
        folders = {name: str(self.job.folder / twin / name) for name in FOLDERS}
        return {**self.base, "grad_accum_steps": 4 // self.ranks, **folders}

    def folder(self, twin: str, name: str) -> Path:
        """Where that job has its checkpoints, its records or all stores."""
        return self.job.folder / twin / name / ("" if name == "ref_cache_dir" else RUN)

    # === Starts ===

    def start(self, script: str, twin: str, stand_in: Callable[[int], tuple[str, dict[str, object]]] | None = None):
        """Starts a script on all ranks, training with --resume where a person would.

        Args:
            stand_in: of a rank, the script to start in the place of `script`, and further settings.
        """
        flags = ("--resume",) if script == TRAIN and self.has_state(twin) else ()
        port, ranks = free_port(), list[Rank]()
        for rank in range(self.ranks):
            mine, more = stand_in(rank) if stand_in else (script, {})
            settings = {**more, **self.settings(twin)}
            ranks.append(Rank(start_rank(mine, settings, rank, self.ranks, port, flags)))
        return ranks

    def has_state(self, twin: str) -> bool:
        """Whether a person would see something to resume."""
        folder = self.folder(twin, "ckpt_dir")
        return (folder / "latest").exists() or any((folder / "state").glob("step_*"))

    def run_to_end(self, script: str, twin: str) -> str:
        """A start that nobody hits; gives rank 0's output."""
        ranks = self.start(script, twin)
        wait_for(lambda: all(rank.ended for rank in ranks), TOO_LONG_S)
        for rank in ranks:
            rank.end()
        if any(rank.process.returncode for rank in ranks):
            raise Failure(f"{script} failed:\n" + "\n".join(rank.output for rank in ranks))
        return ranks[0].output

    def run_whole(self, twin: str) -> None:
        """A job that nobody hits; notes how long it takes to its first step."""
        started = time.monotonic()
        self.run_to_end(PRECOMPUTE, twin)
        passed, ranks = time.monotonic(), self.start(TRAIN, twin)
        wait_for(lambda: self.lines_written(twin) > 1 or any(rank.ended for rank in ranks), TOO_LONG_S)
        self.startup_s = time.monotonic() - passed
        wait_for(lambda: all(rank.ended for rank in ranks), TOO_LONG_S)
        for rank in ranks:
            rank.end()
        if any(rank.process.returncode for rank in ranks):
            raise Failure("the job that nobody hits failed:\n" + "\n".join(rank.output for rank in ranks))
        print(f"the job that nobody hits, {self.ranks} ranks: {time.monotonic() - started:.1f} s", flush=True)

    def lines_written(self, twin: str) -> int:
        """Lines of its metrics."""
        path = self.folder(twin, "log_dir") / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def last_step(self, twin: str) -> int:
        """The last step in its metrics; -1 for none."""
        path = self.folder(twin, "log_dir") / "metrics.jsonl"
        steps = re.findall(r'^\{"step": (\d+)', path.read_text(), re.MULTILINE) if path.exists() else []
        return int(steps[-1]) if steps else -1

    # === The judgement ===

    def judge(self, whole: str, hit: str) -> None:
        """Compares all that two jobs left: equal bit for bit."""
        name = next(self.folder(whole, "ref_cache_dir").iterdir()).name
        same("log-probs of the reference", *(self.log_probs(twin, name).tobytes() for twin in (whole, hit)))
        whole_run, hit_run = self.folder(whole, "ckpt_dir"), self.folder(hit, "ckpt_dir")
        same("files of the run", *(visible(folder) for folder in (whole_run, hit_run)))
        same("latest", *((folder / "latest").read_text() for folder in (whole_run, hit_run)))
        for name in ("metrics.jsonl", "samples.jsonl"):
            same(name, *(records(self.folder(twin, "log_dir") / name) for twin in (whole, hit)))
        exported = [path.name for path in sorted(whole_run.glob("dpo_*.pth"))]
        for name in exported:
            same_tensors(name, *(load_weights(run / name).state_dict for run in (whole_run, hit_run)))
        print(f"equal bit for bit: the weights in {len(exported)} .pth files")
        self.judge_states(whole_run, hit_run)
        left = [path.name for folder in FOLDERS for path in self.folder(hit, folder).rglob(".*.tmp")]
        print(f"temp files that were left: {len(left)} {sorted({re.sub('[0-9a-f]{4,}', '*', n) for n in left})}")

    @staticmethod
    def judge_states(whole: Path, hit: Path) -> None:
        """Compares master weights and moments of all states."""
        states = [path.relative_to(whole) for path in sorted(whole.glob("state/*/*.safetensors"))]
        for name in states:
            same_tensors(str(name), *(load_file(run / name) for run in (whole, hit)))
        print(f"equal bit for bit: weights and moments in {len(states)} files of states, the last one {states[-1]}")

    def judge_noise(self, whole: str, other: str, hit: str) -> None:
        """Compares all that a job left which changed its number of ranks: as near to `whole` as `other` is, which was
        not hit and had another number of ranks all along."""
        steps, lines = {}, {}
        for twin in (whole, other, hit):
            steps[twin] = self.weights_by_step(twin)
            lines[twin] = records(self.folder(twin, "log_dir") / "metrics.jsonl")
            same(f"steps saved, {twin}", [*steps[whole]], [*steps[twin]])
            same(f"lines of metrics, {twin}", *([list(line) for line in lines[name]] for name in (whole, twin)))
        start = load_weights(self.job.folder / "start.pth").state_dict
        went = max(apart(weights, start) for weights in steps[whole].values())
        for what, distance in (("weights", self.weights_apart), ("losses", self.losses_apart)):
            noise, found = distance(steps, lines, whole, other), distance(steps, lines, whole, hit)
            print(f"{what}: {found:.3g} from the job that nobody hit; one and two ranks: {noise:.3g}", flush=True)
            if not found <= NOISES_ALLOWED * noise:
                raise Failure(f"{what}: expected at most {NOISES_ALLOWED:g} times {noise:.3g}, found {found:.3g}")
            if what == "weights" and not noise <= LARGEST_NOISE * went:
                raise Failure(f"one and two ranks are {noise:.3g} apart, while weights went {went:.3g}: no noise")
        print(f"weights went {went:.3g}")

    @staticmethod
    def weights_apart(steps: Any, lines: Any, one: str, two: str) -> float:
        """Largest difference of a weight in any .pth of two jobs."""
        return max(apart(steps[one][step], steps[two][step]) for step in steps[one])

    @staticmethod
    def losses_apart(steps: Any, lines: Any, one: str, two: str) -> float:
        """Largest difference of a loss of two jobs."""
        losses = (
            [line[key] for line in lines[twin] for key in ("loss", "eval_loss") if key in line] for twin in (one, two)
        )
        return max(abs(a - b) for a, b in zip(*losses, strict=True))

    def weights_by_step(self, twin: str) -> dict[int, dict[str, torch.Tensor]]:
        """The weights of each .pth by the steps that they had made."""
        loaded = [load_weights(path) for path in self.folder(twin, "ckpt_dir").glob("dpo_*.pth")]
        return {file.metadata["step"]: file.state_dict for file in sorted(loaded, key=lambda f: f.metadata["step"])}

    def log_probs(self, twin: str, name: str) -> np.ndarray:
        """All that the store of that name has, sorted."""
        store = RefStore(self.folder(twin, "ref_cache_dir") / name)
        store.load()
        return store._records


class Rank:
    """A started process whose output is read all the time, so that it never waits for us."""

    def __init__(self, process: RankProcess):
        self.process, self.output = process, ""
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self) -> None:
        """Takes what it says, to its end."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output += line

    @property
    def ended(self) -> bool:
        """Whether the process has ended."""
        return self.process.poll() is not None

    def end(self) -> None:
        """Kills it if it still runs."""
        if not self.ended:
            self.process.kill()
        self.process.wait()
        self.reader.join(10)
        assert self.process.stdout is not None
        self.process.stdout.close()


def wait_for(condition: Callable[[], bool], at_most_s: float) -> None:
    """Returns when it holds, or after that time."""
    deadline = time.monotonic() + at_most_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)


def visible(folder: Path) -> list[str]:
    """Everything below a folder that is no temp file."""
    names = [path.relative_to(folder) for path in folder.rglob("*")]
    return sorted(str(name) for name in names if not any(part.startswith(".") for part in name.parts))


def records(path: Path) -> list[dict[str, Any]]:
    """Lines of a .jsonl file without what depends on the clock."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith("perf/")} for line in lines]


def same(what: str, whole: object, hit: object) -> None:
    """Says that it is equal, or fails with the first difference."""
    if whole == hit:
        print(f"equal: {what}")
        return
    if isinstance(whole, list) and isinstance(hit, list):
        pairs = [(a, b) for a, b in zip(whole, hit, strict=False) if a != b] or [(len(whole), len(hit))]
        whole, hit = pairs[0]
    raise Failure(f"{what} differ:\n  never hit: {str(whole)[:400]}\n  hit: {str(hit)[:400]}")


def same_tensors(what: str, whole: dict[str, torch.Tensor], hit: dict[str, torch.Tensor]) -> None:
    """Fails where they are not equal bit for bit, and says all that differ."""
    if whole.keys() != hit.keys():
        raise Failure(f"{what}: names differ: {sorted(whole.keys() ^ hit.keys())}")
    differ = [
        f"{name}: {(tensor != hit[name]).sum()} of {tensor.numel()} by up to {(tensor - hit[name]).abs().max():.3g}"
        for name, tensor in whole.items()
        if not torch.equal(tensor, hit[name])
    ]
    if differ:
        raise Failure(f"{what}: {len(differ)} of {len(whole)} tensors differ:\n  " + "\n  ".join(differ))


def apart(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
    """The largest difference of two weights of the same name."""
    return max((tensor - two[name]).abs().max().item() for name, tensor in one.items())
