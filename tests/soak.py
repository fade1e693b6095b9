"""The soak: a small job is killed (kill -9) again and again, and must end as one that never was, bit for bit.

    python tests/soak.py --kills 20 --seed 1 [--ranks 2] [--config bf16] [--places latest,prune] [--keep FOLDER]

Where it is killed is drawn from tests/crash_at.py's places without replacement, and from moments by the clock. After
each kill the command is what a person would type: the reference pass again, or training with --resume once there is
something to resume. With two ranks one of them is killed; the other one must end by itself.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from crash_at import PLACES
from simple_llama.pretraining.weights import load_weights
from simple_llama.reinforcement_learning.rlhf.reference.ref_store import RefStore
from tiny_job import ROOT, RankProcess, free_port, make_job, start_rank

PRECOMPUTE, TRAIN, CRASH = "launch/precompute_ref.py", "launch/train_dpo.py", "tests/crash_at.py"
RUN = "tiny"
ENDS_BY_ITSELF_S = 60.0  # in which the rank that was not killed must end
TOO_LONG_S = 240.0  # for any start

# Beside the places in the code: moments by the clock, while a script starts and while steps are made.
CLOCK = ("clock_pass", "clock_start", "clock_steps")
ONLY_MAIN = {"reference", "records", "metrics", "samples", "weights", "state_json", "state_rename", "latest", "prune"}
ONLY_MAIN |= {"end"}
SEVERAL = {"backward": 6, "step": 2, "metrics": 2, "shard": 2, "state_shard": 2}  # calls, of which one is drawn
ALL = [*PLACES, *CLOCK]


class Failure(Exception):
    """What the soak found wrong."""


@dataclass
class Kill:
    """One kill, and what came of it."""

    place: str
    when: str
    rank: int
    call: int = 1
    delay_s: float = 0.0
    step: int = -1  # last one in metrics.jsonl
    others_ended_s: float = 0.0
    restart: str = ""

    def __str__(self) -> str:
        where = f"{self.place}, {self.when}"
        where += f" {self.delay_s:.2f} s" if self.place.startswith("clock") else f" call {self.call}"
        return f"{where}, rank {self.rank}"


class Soak:
    """A job that is killed, and its twin that is not."""

    def __init__(self, folder: Path, options: argparse.Namespace):
        self.random, self.ranks = random.Random(options.seed), options.ranks
        self.job, self.kills = make_job(folder), list[Kill]()
        steps = 2 * options.kills + 12  # each kill may cost the work of two steps, some more by the clock
        interval = self.random.choice((1, 2))
        self.base: dict[str, object] = {
            **self.job.settings,
            "deepspeed_config": str(ROOT / "ds_configs" / f"zero2_{options.config}.json"),
            "grad_accum_steps": 4 // self.ranks,
            "epochs": -(-steps // 3),
            "save_interval": interval,
            "ref_flush_pairs": 2,
            "start_timeout_s": ENDS_BY_ITSELF_S / 3,  # wait for one that was killed before it came; torch tries twice
        }
        self.startup_s = 5.0
        print(f"seed {options.seed}: {options.config}, {self.ranks} ranks, {steps} steps, a save every {interval}")

    def settings(self, twin: str) -> dict[str, object]:
        """Settings of the killed job or of the one that is not: the same but for where they write."""
        folders = ("ckpt_dir", "ref_cache_dir", "log_dir")
        return {**self.base, **{name: str(self.job.folder / twin / name) for name in folders}}

    def folder(self, twin: str, name: str) -> Path:
        return Path(str(self.settings(twin)[name])) / ("" if name == "ref_cache_dir" else RUN)

    # === Starts ===

    def start(self, script: str, twin: str, kill: Kill | None = None) -> list[Rank]:
        """Starts a script on all ranks; the one to be killed through crash_at.py."""
        flags = ("--resume",) if script == TRAIN and self.has_state(twin) else ()
        port = free_port()
        ranks = []
        for rank in range(self.ranks):
            mine, settings = script, self.settings(twin)
            if kill is not None and kill.rank == rank and not kill.place.startswith("clock"):
                crash = {"script": script, "place": kill.place, "when": kill.when, "call": kill.call}
                mine, settings = CRASH, {**{f"crash_{key}": value for key, value in crash.items()}, **settings}
            ranks.append(Rank(start_rank(mine, settings, rank, self.ranks, port, flags)))
        return ranks

    def has_state(self, twin: str) -> bool:
        """Whether a person would see something to resume."""
        folder = self.folder(twin, "ckpt_dir")
        return (folder / "latest").exists() or any((folder / "state").glob("step_*"))

    def run_to_end(self, script: str, twin: str) -> str:
        """A start that nobody kills; gives rank 0's output."""
        ranks = self.start(script, twin)
        wait_for(lambda: all(rank.ended for rank in ranks), TOO_LONG_S)
        for rank in ranks:
            rank.end()
        if any(rank.process.returncode for rank in ranks):
            raise Failure(f"{script} failed:\n" + "\n".join(rank.output for rank in ranks))
        return ranks[0].output

    def run_and_kill(self, script: str, kill: Kill) -> None:
        """A start in which one rank is killed; the others have to end by themselves, and not with success."""
        before = self.lines_written()
        ranks = self.start(script, "killed", kill)
        victim = ranks[kill.rank]
        if kill.place == "clock_steps":
            wait_for(lambda: victim.ended or self.lines_written() > before, TOO_LONG_S)
        if kill.place.startswith("clock"):
            wait_for(lambda: victim.ended, kill.delay_s)
            victim.process.kill()
        wait_for(lambda: victim.ended or any(rank.ended for rank in ranks), TOO_LONG_S)
        died = time.monotonic()
        wait_for(lambda: all(rank.ended for rank in ranks), ENDS_BY_ITSELF_S)
        kill.others_ended_s = time.monotonic() - died
        hangs = [rank for rank in ranks if not rank.ended]
        for rank in ranks:
            rank.end()
        kill.restart, kill.step = said(ranks[0].output), self.last_step()
        outputs = "\n".join(rank.output for rank in ranks)
        if hangs:
            raise Failure(f"{kill}: the other rank did not end within {ENDS_BY_ITSELF_S:g} s:\n{outputs}")
        if kill.place == "clock_pass" and not any(rank.process.returncode for rank in ranks):
            kill.restart += " (it ended before the clock)"
            return
        if victim.process.returncode != -9:
            raise Failure(f"{kill}: was not reached, status {victim.process.returncode}:\n{outputs}")
        if any(rank.process.returncode == 0 for rank in ranks):
            raise Failure(f"{kill}: a rank ended with status 0 after another one was killed:\n{outputs}")

    def lines_written(self) -> int:
        path = self.folder("killed", "log_dir") / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def last_step(self) -> int:
        path = self.folder("killed", "log_dir") / "metrics.jsonl"
        steps = re.findall(r'^\{"step": (\d+)', path.read_text(), re.MULTILINE) if path.exists() else []
        return int(steps[-1]) if steps else -1

    # === The plan ===

    def draw(self, place: str) -> Kill:
        """The place's moment ("latest:half"), or one of its moments."""
        place, _, when = place.partition(":")
        rank = 0 if place in ONLY_MAIN else self.random.randrange(self.ranks)
        if place in PLACES:
            when = when or self.random.choice(sorted(PLACES[place]))
            return Kill(place, when, rank, self.random.randint(1, SEVERAL.get(place, 1)))
        longest = {"clock_pass": 0.5 * self.startup_s, "clock_start": 0.9 * self.startup_s, "clock_steps": 0.4}[place]
        return Kill(place, "after", rank, delay_s=self.random.uniform(0.0, longest))

    def plan(self, kills: int, places: Sequence[str]) -> tuple[list[str], list[str]]:
        """(places in the reference pass, places in training): each once before any comes again."""
        drawn = self.random.sample(places, min(kills, len(places)))
        again = [place for place in places if stage(place) == 2 and place not in CLOCK] or drawn
        while len(drawn) < kills:
            drawn += self.random.sample(again, min(kills - len(drawn), len(again)))
        drawn.sort(key=stage)  # stable: the order drawn within a stage
        return [place for place in drawn if stage(place) < 1], [place for place in drawn if stage(place) >= 1]

    def next_place(self, pending: list[str]) -> str:
        """Takes the next place; a resumed start cannot be killed before there is something to resume."""
        early = not self.has_state("killed")
        able = [place for place in pending if not (early and place.startswith("resume")) and stage(place) < 3]
        place = (able or pending)[0]
        pending.remove(place)
        return "state_rename" if early and place.startswith("resume") else place

    def go(self, kills: int, places: Sequence[str]) -> None:
        """Everything: the job that is not killed, the kills, the last start, the judgement."""
        started = time.monotonic()
        self.run_to_end(PRECOMPUTE, "whole")
        self.startup_s = time.monotonic() - started
        self.run_to_end(TRAIN, "whole")
        print(f"the job that is not killed: {time.monotonic() - started:.1f} s", flush=True)
        in_pass, in_training = self.plan(kills, places)
        for place in in_pass:
            self.strike(PRECOMPUTE, self.draw(place))
        print(f"  the pass ends: {said(self.run_to_end(PRECOMPUTE, 'killed'))}", flush=True)
        while in_training:
            self.strike(TRAIN, self.draw(self.next_place(in_training)))
        print(f"  training ends: {said(self.run_to_end(TRAIN, 'killed'))}", flush=True)
        self.judge()

    def strike(self, script: str, kill: Kill) -> None:
        """One kill, told."""
        self.kills.append(kill)
        self.run_and_kill(script, kill)
        print(f"kill {len(self.kills)}: {kill}; step {kill.step}; this start: {kill.restart}", flush=True)

    # === The judgement ===

    def judge(self) -> None:
        """Compares all that the two jobs left."""
        stores = [next(self.folder(twin, "ref_cache_dir").iterdir()) for twin in ("whole", "killed")]
        whole, killed = (RefStore(folder) for folder in stores)
        whole.load()
        killed.load()
        same("log-probs of the reference", whole._records.tobytes(), killed._records.tobytes())
        same("shards set aside", [], killed.set_aside)
        whole_run, killed_run = self.folder("whole", "ckpt_dir"), self.folder("killed", "ckpt_dir")
        same("files of the run", *(visible(folder) for folder in (whole_run, killed_run)))
        same("latest", *((folder / "latest").read_text() for folder in (whole_run, killed_run)))
        exported = [path.name for path in sorted(whole_run.glob("dpo_*.pth"))]
        for name in exported:
            same_tensors(name, *(load_weights(run / name).state_dict for run in (whole_run, killed_run)))
        print(f"equal bit for bit: the weights in {len(exported)} .pth files")
        states = [path.relative_to(whole_run) for path in sorted(whole_run.glob("state/*/*.safetensors"))]
        for name in states:
            same_tensors(str(name), *(load_file(run / name) for run in (whole_run, killed_run)))
        print(f"equal bit for bit: weights and moments in {', '.join(map(str, states))}")
        for name in ("metrics.jsonl", "samples.jsonl"):
            same(name, *(records(self.folder(twin, "log_dir") / name) for twin in ("whole", "killed")))
        left = [path.name for path in killed_run.rglob(".*.tmp")] + [path.name for path in stores[1].glob(".*.tmp")]
        print(f"temp files that kills left: {len(left)} {sorted({re.sub('[0-9a-f]{4,}', '*', n) for n in left})}")


class Rank:
    """A started process whose output is read all the time, so that it never waits for us."""

    def __init__(self, process: RankProcess):
        self.process, self.output = process, ""
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output += line

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    def end(self) -> None:
        """Kills it if it still runs."""
        if not self.ended:
            self.process.kill()
        self.process.wait()
        self.reader.join(10)
        assert self.process.stdout is not None
        self.process.stdout.close()


def stage(place: str) -> float:
    """Where in a job the place can be reached: files written once at the start of the pass, the pass, files written
    once at the start of training, training, its end."""
    place = place.partition(":")[0]
    return {"reference": 0, "shard": 0.5, "clock_pass": 0.75, "records": 1, "end": 3}.get(place, 2)


def wait_for(condition: Any, at_most_s: float) -> None:
    """Returns when it holds, or after that time."""
    deadline = time.monotonic() + at_most_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)


def said(output: str) -> str:
    """What a start said about what it found."""
    patterns = (
        r"resumed from \S+ (at step \d+)|(\d+ of \d+ pairs are there)|(state \S+ is not used.*)|(computed \d+ pairs)"
    )
    found = ["".join(match) for match in re.findall(patterns, output)]
    return ", ".join(found).replace("at step", "resumed at step") or "nothing yet"


def visible(folder: Path) -> list[str]:
    """Everything below a folder that is no temp file."""
    names = [path.relative_to(folder) for path in folder.rglob("*")]
    return sorted(str(name) for name in names if not any(part.startswith(".") for part in name.parts))


def records(path: Path) -> list[dict[str, Any]]:
    """Lines of a .jsonl file without what depends on the clock."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith("perf/")} for line in lines]


def same(what: str, whole: object, killed: object) -> None:
    """Says that it is equal, or fails with the first difference."""
    if whole == killed:
        print(f"equal: {what}")
        return
    if isinstance(whole, list) and isinstance(killed, list):
        pairs = [(a, b) for a, b in zip(whole, killed, strict=False) if a != b] or [(len(whole), len(killed))]
        whole, killed = pairs[0]
    raise Failure(f"{what} differ:\n  never killed: {str(whole)[:400]}\n  killed: {str(killed)[:400]}")


def same_tensors(what: str, whole: dict[str, torch.Tensor], killed: dict[str, torch.Tensor]) -> None:
    """Fails where they are not equal bit for bit."""
    if whole.keys() != killed.keys():
        raise Failure(f"{what}: names differ: {sorted(whole.keys() ^ killed.keys())}")
    for name, tensor in whole.items():
        if not torch.equal(tensor, killed[name]):
            raise Failure(f"{what}: {name} differs by up to {(tensor - killed[name]).abs().max():.3g}")


def table(kills: list[Kill]) -> str:
    """The kills as a table."""
    rows = [("kill", "rank", "at step", "the start that was killed", "others ended after")]
    rows += [
        (
            f"{kill.place}, {kill.when}",
            str(kill.rank),
            str(kill.step) if kill.step >= 0 else "-",
            kill.restart,
            f"{kill.others_ended_s:.1f} s",
        )
        for kill in kills
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; gives its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, choices=(1, 2), default=1)
    parser.add_argument("--config", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--places", default=",".join(ALL), help="only these; with a moment: latest:half,prune")
    parser.add_argument("--keep", type=Path, help="folder that is kept for a look; must not exist")
    options = parser.parse_args(arguments)
    places = options.places.split(",")
    known = {*ALL, *(f"{place}:{when}" for place in PLACES for when in PLACES[place])}
    if unknown := set(places) - known:
        parser.error(f"--places: expected some of {', '.join(sorted(known))}, found {', '.join(sorted(unknown))}")
    if options.keep and options.keep.exists():
        parser.error(f"--keep: {options.keep} exists")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin cost more than the work, on a busy machine
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        soak = Soak(options.keep or Path(temporary), options)
        try:
            soak.go(options.kills, places)
            verdict = "PASS"
        except Failure as failure:
            verdict = f"FAIL: {failure}"
    print(table(soak.kills))
    print(f"{verdict}\n{len(soak.kills)} kills in {time.monotonic() - started:.0f} s")
    return verdict != "PASS"


if __name__ == "__main__":
    sys.exit(main())
