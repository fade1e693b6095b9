"""The soak of changes: start checkpoint, reference store and data change under a run, and it must not learn from them.

Each change is made while a start of the job runs, then meets a start of its own. Each start goes on with the numbers of
a job that nobody touched, or ends with the message that is expected; then what was changed is put right, as a person
would. At the end the job must be as the one that nobody touched.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from simple_llama.common.files import digest
from simple_llama.pretraining.architecture import Architecture
from simple_llama.pretraining.llama_transformer import LLaMaTransformer
from simple_llama.pretraining.weights import load_weights, save_weights
from soak_run import PRECOMPUTE, TOO_LONG_S, TRAIN, Failure, Rank, Twins, records, same, same_tensors, visible, wait_for
from tiny_job import write_pairs

TRAINABLE = ("all", "lora")
STOPPED, MISTAKE, LOST, BUS_ERROR = 75, 2, 3, -7  # exit statuses
NOTHING_THERE = "found nothing there|[Nn]o such file"
OTHERS_VALUES = "are not those in|further from the reference than rounding"
MISSING_PAIRS = "have no reference log-probs"
OTHER_MODEL, OTHER_DATA = "cannot resume: .*reference was", "cannot resume: .*data was"


@dataclass(frozen=True)
class Place:
    """Files that a change finds."""

    start: Path
    data: Path
    store: Path  # the reference's folder
    strange: Path  # the folder of another model's
    other: Path  # that model


@dataclass(frozen=True)
class Change:
    """What is done to a file, and what a start says that meets it."""

    make: Callable[[Place], object]
    refused: str = ""  # a pattern in the message; "": it goes on
    at_first: str = ""  # where there is no state to resume, and it differs


def put(path: Path, data: bytes) -> None:
    """A new file in the place of the old one, which stays whole for whoever has it open."""
    path.with_name("coming").write_bytes(data)
    os.replace(path.with_name("coming"), path)


def cut(path: Path) -> None:
    """Half of the same file."""
    os.truncate(path, path.stat().st_size // 2)


def overwrite(path: Path, data: bytes) -> None:
    """Other bytes in the same file, from its middle on: no program writes so, but a tool that copies in place does."""
    with path.open("r+b") as file:
        file.seek(len(data) // 2)
        file.write(data[len(data) // 2 :])


def a_shard(folder: Path) -> Path:
    """The first shard of a store."""
    return sorted(folder.glob("*.npy"))[0]


def flip(path: Path) -> None:
    """One bit of the last byte."""
    data = path.read_bytes()
    put(path, data[:-1] + bytes([data[-1] ^ 1]))


def copy_unbound(source: Path, folder: Path) -> None:
    """All shards of a store, called by their bytes alone, as they were before they were bound to a reference."""
    for shard in source.glob("*.npy"):
        data = shard.read_bytes()
        (folder / f"{digest(data).hex()}.npy").write_bytes(data)


def exchange(folder: Path, source: Path) -> None:
    """The shards of `source`, unbound, in the place of those of `folder`."""
    copies = folder.with_name("copies")
    copies.mkdir()
    copy_unbound(source, copies)
    for shard in folder.glob("*.npy"):
        shard.unlink()
    for shard in copies.iterdir():
        shard.rename(folder / shard.name)
    copies.rmdir()


CHANGES: dict[str, Change] = {
    "start replaced": Change(lambda at: put(at.start, at.other.read_bytes()), OTHER_MODEL, MISSING_PAIRS),
    "start overwritten": Change(lambda at: overwrite(at.start, at.other.read_bytes()), OTHER_MODEL, MISSING_PAIRS),
    "start deleted": Change(lambda at: at.start.unlink(), NOTHING_THERE),
    "start cut": Change(lambda at: cut(at.start), "cannot be read"),
    "start written again": Change(lambda at: put(at.start, at.start.read_bytes())),
    "shard of another reference": Change(lambda at: shutil.copy(a_shard(at.strange), at.store)),
    "another reference's, in its name": Change(
        lambda at: shutil.copy(a_shard(at.strange), at.store / a_shard(at.store).name), MISSING_PAIRS
    ),
    "unbound shards of another reference": Change(lambda at: copy_unbound(at.strange, at.store)),
    "another reference's alone": Change(lambda at: exchange(at.store, at.strange), OTHERS_VALUES),
    "shards of the old form": Change(lambda at: exchange(at.store, at.store)),
    "shard damaged": Change(lambda at: flip(a_shard(at.store)), MISSING_PAIRS),
    "shard cut": Change(lambda at: cut(a_shard(at.store)), MISSING_PAIRS),
    "shard deleted": Change(lambda at: a_shard(at.store).unlink(), MISSING_PAIRS),
    "store deleted": Change(lambda at: shutil.rmtree(at.store), MISSING_PAIRS),
    "data replaced": Change(lambda at: write_pairs(at.data, range(100, 124)), f"{OTHER_DATA}|{MISSING_PAIRS}"),
    "data longer": Change(lambda at: write_pairs(at.data, range(25)), f"{OTHER_DATA}|{MISSING_PAIRS}"),
    "data cut": Change(lambda at: cut(at.data), "expected"),
    "data deleted": Change(lambda at: at.data.unlink(), NOTHING_THERE),
    "data written again": Change(lambda at: put(at.data, at.data.read_bytes())),
}


class Changes(Twins):
    """A job whose inputs change, and its twin whose inputs do not."""

    def __init__(self, folder: Path, options: argparse.Namespace):
        lora = {"use_lora": True, "lora_rank": 2} if options.trainable == "lora" else {}
        super().__init__(folder, options, steps=9 * options.changes + 12, **lora)
        self.base |= {"trainable": options.trainable, "keep_states": 1000}
        self.changes, self.refused = list[str](), set[str]()

    def settings(self, twin: str) -> dict[str, object]:
        """The twins have their own copies of the inputs."""
        inputs = {"model_path": "start.pth", "rlhf_dataset_path": "pairs.jsonl"}
        return {**super().settings(twin), **{key: str(self.job.folder / twin / name) for key, name in inputs.items()}}

    def make_inputs(self, twin: str, start: Path) -> None:
        """The inputs of a twin."""
        folder = self.job.folder / twin
        folder.mkdir(exist_ok=True)
        put(folder / "start.pth", start.read_bytes())
        put(folder / "pairs.jsonl", (self.job.folder / "pairs.jsonl").read_bytes())

    def other_model(self) -> Path:
        """A model of the same shape with other weights."""
        start, path = load_weights(self.job.folder / "start.pth"), self.job.folder / "other.pth"
        model = LLaMaTransformer(Architecture.of(start.config, start.architecture.vocab_size))
        save_weights(path, model.state_dict(), start.config, start.metadata)
        return path

    def place(self) -> Place:
        """What the next change finds."""
        store, strange = (next(self.folder(twin, "ref_cache_dir").iterdir()) for twin in ("whole", "strange"))
        folder = self.job.folder / "hit"
        mine = self.folder("hit", "ref_cache_dir") / store.name
        return Place(folder / "start.pth", folder / "pairs.jsonl", mine, strange, self.job.folder / "other.pth")

    # === The plan ===

    def go(self, count: int) -> None:
        """Everything: the job that nobody touches, the changes, the last start, the judgement."""
        start = self.job.folder / "start.pth"
        for twin, model in (("whole", start), ("strange", self.other_model()), ("hit", start)):
            self.make_inputs(twin, model)
        self.run_whole("whole")
        self.run_to_end(PRECOMPUTE, "strange")
        names = [name for name in CHANGES for _ in range(-(-count // len(CHANGES)))]
        self.random.shuffle(names)
        early = [name for name in names if not name.startswith(("shard", "store", "another", "unbound"))][:2]
        for name in early:
            self.change(name, PRECOMPUTE)
        self.run_to_end(PRECOMPUTE, "hit")
        for name in [name for name in CHANGES if name in names and name not in early][: 2 if count > 5 else 0]:
            self.meet(name, "with nothing to resume")
            self.put_right(name)
        for name in names[: count - len(early)]:
            self.change(name, TRAIN)
        self.run_to_end(TRAIN, "hit")
        self.judge("whole", "hit")

    def change(self, name: str, script: str) -> None:
        """One change while a start of the script runs, and a start that meets it."""
        self.changes.append(name)
        there = self.folder("hit", "ref_cache_dir") / self.place().strange.name
        if self.has_state("hit") and not there.exists():  # before, a start with the other model would be a sound run
            shutil.copytree(self.place().strange, there)
        delay_s, lines = self.random.uniform(0.0, self.startup_s), self.random.choice((0, 1, 3))
        if script == PRECOMPUTE:
            delay_s, lines = delay_s / 2, 0
        ranks = self.start(script, "hit")
        if lines:
            before = self.lines_written("hit")
            wait_for(lambda: ended(ranks) or self.lines_written("hit") >= before + lines, TOO_LONG_S)
        else:
            wait_for(lambda: ended(ranks), delay_s)
        CHANGES[name].make(self.place())
        where = f"after {lines} lines" if lines else f"after {delay_s:.2f} s"
        told = self.outcome(ranks, name, f"{name} {where}", running=True)
        print(f"change {len(self.changes)}: {name} {where} of {script}: {told}", flush=True)
        if script == TRAIN:
            self.meet(name, "")
        self.put_right(name)

    def meet(self, name: str, when: str) -> None:
        """A start of training that meets the change, which is made where it is not there yet."""
        if when:
            CHANGES[name].make(self.place())
        told = self.outcome(self.start(TRAIN, "hit"), name, f"{name}, met by a start {when}", running=False)
        print(f"  met by a start {when}: {told}", flush=True)

    def put_right(self, name: str) -> None:
        """What a person does then: the input as it was; of a store of others' values, none; and the pass again."""
        self.make_inputs("hit", self.job.folder / "start.pth")
        if name == "another reference's alone":
            shutil.rmtree(self.place().store)
        if "start" not in name and "data" not in name:
            self.run_to_end(PRECOMPUTE, "hit")

    # === What a start did ===

    def outcome(self, ranks: list[Rank], name: str, what: str, running: bool) -> str:
        """Waits for the start's end, which is asked for after some steps, and judges it; gives it in words."""
        before = self.lines_written("hit")
        wait_for(lambda: ended(ranks) or self.lines_written("hit") >= before + 2, TOO_LONG_S)
        if not ended(ranks):
            ranks[0].process.terminate()
        wait_for(lambda: all(rank.ended for rank in ranks), TOO_LONG_S)
        hangs = [rank for rank in ranks if not rank.ended]
        for rank in ranks:
            rank.end()
        status, output = {rank.process.returncode or 0 for rank in ranks}, "\n".join(rank.output for rank in ranks)
        self.refused |= set(re.findall(r"(dpo_\S+\.pth) is not written", output))
        expected = CHANGES[name].refused
        if not self.has_state("hit"):
            expected = CHANGES[name].at_first or expected
        told = re.findall(r"error[^:]*: (.*)", output)
        goes_on = status <= {0, STOPPED}
        refused = status <= {MISTAKE, LOST} and bool(told)
        problem = ""
        if hangs or "Traceback" in output:
            problem = "a start hangs" if hangs else "a traceback"
        elif not running and (refused if not expected else not (refused and re.search(expected, output))):
            problem = f"expected {expected or 'that it goes on'}"
        elif running and not goes_on and not (refused and re.search(f"{expected or '(?!)'}|has changed since", output)):
            cut_early = name == "start cut" and BUS_ERROR in status  # where it is mapped, until the first step
            problem = "" if cut_early else "expected that it goes on, or says why not"
        if problem:
            raise Failure(f"{what}: {problem}; status {sorted(status)}:\n{output}")
        self.compare_so_far(what)
        return (
            f"goes on, status {sorted(status)}" if goes_on else f"status {sorted(status)}: {(told or ['-'])[0][:150]}"
        )

    def compare_so_far(self, what: str) -> None:
        """Fails where a line of the metrics is not that of the job that nobody touches."""
        path = self.folder("hit", "log_dir") / "metrics.jsonl"
        mine = records(path) if path.exists() else []
        whole = records(self.folder("whole", "log_dir") / "metrics.jsonl")
        for line, expected in zip(mine, whole, strict=False):
            if line != expected:
                raise Failure(f"{what}: wrong numbers: expected {expected}, found {line}")

    def judge(self, whole: str, hit: str) -> None:
        """As for kills, but exports that were refused may be missing, and shards set aside may lie in the store."""
        name = next(self.folder(whole, "ref_cache_dir").iterdir()).name
        same("log-probs of the reference", *(self.log_probs(twin, name).tobytes() for twin in (whole, hit)))
        runs = [self.folder(twin, "ckpt_dir") for twin in (whole, hit)]
        files = visible(runs[1])
        same(
            "files of the run", [file for file in visible(runs[0]) if file in files or file not in self.refused], files
        )
        for path in sorted(runs[1].glob("dpo_*.pth")):
            same_tensors(path.name, *(load_weights(run / path.name).state_dict for run in runs))
        exported = len(list(runs[1].glob("dpo_*.pth")))
        print(f"equal bit for bit: the weights in {exported} .pth files; {len(self.refused)} were refused")
        self.judge_states(*runs)
        for file in ("metrics.jsonl", "samples.jsonl"):
            same(file, *(records(self.folder(twin, "log_dir") / file) for twin in (whole, hit)))


def ended(ranks: list[Rank]) -> bool:
    """Whether one of them has."""
    return any(rank.ended for rank in ranks)
