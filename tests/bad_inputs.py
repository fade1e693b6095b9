"""The table of `unit/rlhf/test_bad_input.py`: how an input of the tiny job is spoiled, and words of the message.

A `Case` spoils a copy of the tiny job below `job.folder` and gives the settings and flags to start the command with.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import zstandard
from safetensors.torch import load_file, save_file

from simple_llama.common.files import digest, file_digest, json_bytes
from tiny_job import ROOT, TinyJob

Spoil = Callable[[TinyJob], "Start | None"]
SHARD = "rank_00000.safetensors"
GIB = 1 << 30


@dataclass
class Start:
    """How to start the command: settings that differ from the job's, and flags behind them."""

    changes: dict[str, object] = field(default_factory=dict)
    flags: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Case:
    """One bad input. `may_change` are files that the command may write all the same."""

    name: str
    spoil: Spoil
    words: tuple[str, ...]
    may_change: tuple[str, ...] = ()  # glob patterns below the job's folder


# === Ways to spoil ===


def record(**changes: Any) -> dict[str, Any]:
    """A sound record of one turn, changed; a change to None removes the key."""
    fields = {"Template": ["CUSTOM"], "User": ["say"], "Accepted": ["the cat"], "Rejected": ["a dog"], **changes}
    return {key: value for key, value in fields.items() if value is not None}


def data(content: bytes | Any, name: str = "bad.jsonl") -> Spoil:
    """The data set is one file of these bytes, or of this value as JSON."""

    def spoil(job: TinyJob) -> Start:
        (job.folder / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        return Start({"rlhf_dataset_path": job.folder / name})

    return spoil


def sparse(setting: str, name: str, size: int, head: bytes = b"") -> Spoil:
    """The input of a setting is a file of `size` zero bytes behind `head`, which takes no room on the disk."""

    def spoil(job: TinyJob) -> Start:
        with (job.folder / name).open("wb") as file:
            file.write(head)
            file.truncate(size)
        return Start({setting: job.folder / name}) if setting else Start(flags=["--config", str(job.folder / name)])

    return spoil


def placed(setting: str, name: str, make: Callable[[Path], object]) -> Spoil:
    """The input of a setting is what `make` puts at a path."""

    def spoil(job: TinyJob) -> Start:
        make(job.folder / name)
        return Start({setting: job.folder / name}) if setting else Start(flags=["--config", str(job.folder / name)])

    return spoil


def inside(setting: str, name: str, make: Callable[[Path], object]) -> Spoil:
    """The input of a setting is a folder in which `make` puts something."""

    def spoil(job: TinyJob) -> Start:
        (job.folder / "folder").mkdir()
        make(job.folder / "folder" / name)
        return Start({setting: job.folder / "folder"})

    return spoil


def linked(target: str) -> Callable[[Path], None]:
    """Makes a symbolic link to `target`."""
    return lambda path: path.symlink_to(target)


def nothing(path: Path) -> None:
    """Puts nothing there."""


def bomb(chunk: bytes, size: int) -> bytes:
    """A gzip file of a few hundred KiB that expands to `size` bytes: one compressed member, over and over."""
    return gzip.compress(chunk) * (size // len(chunk))


def settings(content: bytes | str | Any) -> Spoil:
    """A --config file of these bytes, this text, or this value as JSON."""

    def spoil(job: TinyJob) -> Start:
        path = job.folder / "settings.json"
        text = content if isinstance(content, str) else content if isinstance(content, bytes) else json.dumps(content)
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return Start(flags=["--config", str(path)])

    return spoil


def flags(*values: str) -> Spoil:
    """These flags behind those of the job."""
    return lambda job: Start(flags=list(values))


def deepspeed(content: bytes | dict[str, Any]) -> Spoil:
    """A DeepSpeed JSON of these bytes, or the shipped fp32 one with these keys changed."""

    def spoil(job: TinyJob) -> Start:
        path = job.folder / "ds.json"
        sound = json.loads((ROOT / "ds_configs" / "zero2_fp32.json").read_text())
        path.write_bytes(content if isinstance(content, bytes) else json.dumps({**sound, **content}).encode())
        return Start({"deepspeed_config": path})

    return spoil


def zero(**changes: Any) -> Spoil:
    """The shipped fp32 DeepSpeed JSON with another ZeRO section."""
    return deepspeed({"zero_optimization": {"stage": 2, **changes}})


def tokenizer(change: Callable[[dict[str, Any]], object] | bytes) -> Spoil:
    """The tokenizer's file is these bytes, or the job's with its JSON changed in place."""

    def spoil(job: TinyJob) -> None:
        path = job.folder / "tokenizer.json"
        if isinstance(change, bytes):
            path.write_bytes(change)
            return
        saved = json.loads(path.read_text())
        change(saved)
        path.write_text(json.dumps(saved))

    return spoil


def checkpoint(change: Callable[[dict[str, Any]], Any], **save: Any) -> Spoil:
    """The SFT checkpoint with its content changed in place, or replaced by what `change` returns."""

    def spoil(job: TinyJob) -> None:
        path = job.folder / "start.pth"
        content = torch.load(path, weights_only=False)
        changed = change(content)
        torch.save(content if changed is None else changed, path, **save)

    return spoil


def weights(**changes: Any) -> Spoil:
    """The SFT checkpoint with tensors of these names (dots as __) replaced; None takes one out."""

    def change(content: dict[str, Any]) -> None:
        tensors = content["model_state_dict"]
        for name, value in changes.items():
            name = name.replace("__", ".")
            if value is None:
                del tensors[name]
            else:
                tensors[name] = value(tensors[name]) if callable(value) else value

    return checkpoint(change)


def model(**changes: Any) -> Spoil:
    """The SFT checkpoint with other values in its config."""
    return checkpoint(lambda content: content["config"].__dict__.update(changes))


def bytes_at_start(content: bytes | Callable[[bytes], bytes]) -> Spoil:
    """The SFT checkpoint is these bytes, or the job's changed."""

    def spoil(job: TinyJob) -> None:
        path = job.folder / "start.pth"
        path.write_bytes(content if isinstance(content, bytes) else content(path.read_bytes()))

    return spoil


def states(job: TinyJob) -> list[Path]:
    """State folders of the job's run."""
    return sorted((job.folder / "checkpoints" / "tiny" / "state").iterdir())


def only_state(change: Callable[[Path], object], **flags: object) -> Spoil:
    """Resumes where the newest state is changed and no other one is left."""

    def spoil(job: TinyJob) -> Start:
        *older, newest = states(job)
        for state in older:
            shutil.rmtree(state)
        change(newest)
        return Start({"resume": True, **flags})

    return spoil


def facts(**changes: Any) -> Callable[[Path], None]:
    """Changes facts of state.json and makes its digest right again; None takes one out."""

    def change(state: Path) -> None:
        found = {**json.loads((state / "state.json").read_text()), **changes}
        kept = {key: value for key, value in found.items() if value is not None and key != "digest"}
        (state / "state.json").write_bytes(json_bytes({**kept, "digest": digest(json_bytes(kept)).hex()}))

    return change


def shard(change: Callable[[Path], object]) -> Callable[[Path], None]:
    """Changes the tensors' file, and makes its digest right again."""

    def spoil(state: Path) -> None:
        change(state / SHARD)
        if (state / SHARD).is_file():
            facts(files={SHARD: file_digest(state / SHARD)})(state)

    return spoil


def parameters(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    """Changes the tensors of a state, and makes the file's digest right again."""

    def spoil(path: Path) -> None:
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return shard(spoil)


def replaced(name: str, by: Callable[[Path], object]) -> Callable[[Path], None]:
    """Takes a file of a state away and lets `by` put another thing there."""

    def change(state: Path) -> None:
        (state / name).unlink()
        by(state / name)

    return change


def moved_out(name: str) -> Callable[[Path], None]:
    """Moves a file out of its folder and leaves a link to it."""

    def change(folder: Path) -> None:
        outside = folder.parents[3] / f"outside_{name}"
        (folder / name).rename(outside)
        (folder / name).symlink_to(outside)

    return change


def store(change: Callable[[Path], object]) -> Spoil:
    """Training with a reference store whose folder is changed."""

    def spoil(job: TinyJob) -> None:
        [folder] = (job.folder / "ref_cache").iterdir()
        change(folder)

    return spoil


def shard_of_store(change: Callable[[Path], object]) -> Spoil:
    """Training with a reference store whose only shard is changed."""
    return store(lambda folder: change(*folder.glob("*.npy")))


class RunsCode:
    """Unpickled by a reader that trusts the file, it makes the folder `ran`."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


# === Data sets ===

LIST, LINE = "expected a JSON list of objects", "expected one JSON object on a line"
DATASETS = [
    Case(
        "no such path", lambda job: Start({"rlhf_dataset_path": job.folder / "none"}), ("none: expected a data file",)
    ),
    Case("an empty list file", data(b"", "bad.json"), ("bad.json: expected one JSON list, found invalid JSON",)),
    Case("an empty lines file", data(b""), ("bad.jsonl: expected at least one usable pair, found none",)),
    Case(
        "a folder without data", inside("rlhf_dataset_path", "x", nothing), ("at least one file of *.json", "no files")
    ),
    Case("a folder of a folder", inside("rlhf_dataset_path", "a.json", Path.mkdir), ("at least one file of *.json",)),
    Case("another kind of file", data(b"a,b", "bad.csv"), ("expected a file name that ends with .json, .jsonl",)),
    Case("no UTF-8", data(b'{"User": ["\xff"]}'), ("bad.jsonl:1: expected UTF-8 text, found byte 0xff",)),
    Case("UTF-16", data("[]".encode("utf-16"), "bad.json"), ("bad.json: expected UTF-8 text, found byte 0xff",)),
    Case("NUL bytes", data(b"\0" * 100), ("bad.jsonl:1", LINE, "invalid JSON")),
    Case("half a surrogate pair", data(record(User=["\ud800"])), ("User, entry 1: expected Unicode text",)),
    Case("a list without end", data(b"[" * 200_000, "bad.json"), ("bad.json: expected one JSON list", "too deeply")),
    Case("objects without end", data(b'{"a":' * 100_000), ("bad.jsonl:1", LINE, "too deeply")),
    Case("10**5000", data(b'{"User": ' + b"9" * 5000 + b"}"), ("bad.jsonl:1", "Exceeds the limit")),
    Case("a number of 4,000 digits", data(b'[{"User": 1}, ' + b"9" * 4000 + b"]", "bad.json"), ("expected key",)),
    Case("4,000 digits for a list", data(record(User=int("9" * 4000))), ("User: expected a list of", "number 9999")),
    Case("1e400", data(b'{"Template": [1e400], "User": 1, "Accepted": 1, "Rejected": 1}'), ("found the number inf",)),
    Case("Infinity", data(record(User=[float("inf")])), ("User, entry 1: expected a string, found the number inf",)),
    Case("NaN for a record", data(b"NaN"), ("bad.jsonl:1: expected a JSON object, found the number nan",)),
    Case("a key twice", data(b'{"User": ["a"], "User": ["b"]}'), ("bad.jsonl:1: key 'User' stands twice",)),
    Case("an object for a list", data({}, "bad.json"), (LIST, "found an object of 0")),
    Case("a list in a lines file", data([record()]), ("bad.jsonl:1: expected a JSON object, found a list of 1",)),
    Case("lines in a list file", data(b"{}\n{}", "bad.json"), ("Extra data", "is named .jsonl")),
    Case("a comma too many", data(b"[{},]", "bad.json"), ("bad.json: expected one JSON list, found invalid JSON",)),
    Case("a key missing", data(record(Rejected=None)), ("bad.jsonl:1: expected key 'Rejected', found ['Template',",)),
    Case(
        "a hundred thousand keys",
        data({str(i): i for i in range(100_000)}),
        ("expected the keys of a known format, found '0' (the number 0), '1' (the",),
    ),
    Case(
        "a key of a million letters",
        data({"x" * 1_000_000: 1}),
        ("expected the keys of a known format, found 'xxx", "known are Template"),
    ),
    Case(
        "a string for a list", data(record(Accepted="the cat")), ("Accepted: expected a list of one or more strings",)
    ),
    Case("lists of unequal length", data(record(User=["a", "b"])), ("Accepted: expected 2 entries as in 'User'",)),
    Case("a blank answer", data(record(Rejected=[" \n"])), ("Rejected, entry 1: expected a message, found an empty",)),
    Case(
        "an answer that nobody sees",
        data(record(Rejected=["\u200b\ufeff"])),
        ("Rejected, entry 1: expected a message",),
    ),
    Case("nearly CUSTOM", data(record(Template=["custom"])), ('Template, entry 1: expected "CUSTOM"', "write CUSTOM")),
    Case(
        "a mark inside a file",
        data(b'{"a": 1}\n\xef\xbb\xbf{"a": 1}'),
        ("2 faulty records: ", "bad.jsonl:2: " + LINE, "found a byte order mark inside the file"),
    ),
    Case("two on a line", data(b'{"a": 1}{"a": 1}'), ("bad.jsonl:1: " + LINE, "found two: a line break is missing")),
    Case(
        "a thousand faulty records",
        data(b'{"User": "%s"}\n' % (b"x" * 500) * 2000),
        ("at least 1,000 faulty records, the first 10: ", "bad.jsonl:10: expected key 'Template'"),
    ),
    Case(
        "a file of another kind in a folder",
        inside("rlhf_dataset_path", "bad.csv", Path.touch),
        ("folder: expected files of *.json", "found 1 of another kind: bad.csv"),
    ),
    Case("an empty table", inside("rlhf_dataset_path", "bad.parquet", Path.touch), ("bad.parquet: cannot be read: ",)),
    Case("no table", data(b'{"a": 1}\n' * 9, "bad.arrow"), ("bad.arrow: cannot be read: ",)),
    Case(
        "a zstd file that was cut",
        data(zstandard.compress(b"{}\n" * 100)[:-3], "bad.jsonl.zst"),
        ("cannot be read: the file ends before",),
    ),
    Case("no xz file", data(b"[]", "bad.json.xz"), ("bad.json.xz: cannot be read: ",)),
    Case("an idle label", flags("--prefer=safe"), ("prefer, keep_unsafe: expected PKU-SafeRLHF records, found none",)),
    Case(
        "another format",
        flags("--data_format=Orca"),
        ("pairs.jsonl:1: expected key 'question' with a string, found [",),
    ),
    Case(
        "records of two formats",
        data(b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"instruction": "a", "completions": []}'),
        ("bad.jsonl:2: expected the format TRL of the records before it, found instruction (a string) as",),
    ),
    Case(
        "the same last answer", data(record(User=["a"] * 2, Accepted=["b", "c"], Rejected=["d", "c"])), ("1 same last",)
    ),
    Case("the same answers", data(record(Rejected=["the cat"])), ("found none: kept 0 of 1 pairs (1 identical)",)),
    Case("all chats too long", flags("--max_seq_len=2"), ("found none: kept 0 of 24 pairs (24 too long)",)),
    Case("a single prompt", data(record()), ("expected training pairs, found none", "set val_share to 0")),
    Case("a gzip file that was cut", data(gzip.compress(b"{}" * 100)[:-9], "bad.jsonl.gz"), ("cannot be read",)),
    Case("no gzip file", data(b"[]", "bad.json.gz"), ("bad.json.gz: cannot be read: Not a gzipped file",)),
    Case("16 GiB of zeros in a gzip list", data(bomb(b"\0" * 2**24, 16 * GIB), "bad.json.gz"), ("times its size",)),
    Case("16 GiB of zeros in a gzip line", data(bomb(b"\0" * 2**24, 16 * GIB), "bad.jsonl.gz"), ("times its size",)),
    Case("16 GiB of blank lines", data(bomb(b"\n" * 2**24, 16 * GIB), "bad.jsonl.gz"), ("times its size",)),
    Case(
        "a line of 1 TiB",
        sparse("rlhf_dataset_path", "bad.jsonl", 1024 * GIB),
        ("bad.jsonl:1: expected a line of at most",),
    ),
    Case(
        "a list of 1 TiB",
        sparse("rlhf_dataset_path", "bad.json", 1024 * GIB),
        ("bad.json: expected a list of at most", ".jsonl"),
    ),
    Case(
        "a pipe",
        placed("rlhf_dataset_path", "bad.jsonl", os.mkfifo),
        ("bad.jsonl: cannot be read: expected a file, found a named pipe",),
    ),
    Case("a pipe in a folder", inside("rlhf_dataset_path", "bad.jsonl", os.mkfifo), ("bad.jsonl", "named pipe")),
    Case("a device", lambda job: Start({"rlhf_dataset_path": "/dev/zero"}), ("/dev/zero: expected a file name",)),
    Case("a link to a device", placed("rlhf_dataset_path", "bad.json", linked("/dev/zero")), ("bad.json", "device")),
    Case("a broken link", inside("rlhf_dataset_path", "bad.json", linked("gone")), ("bad.json", "No such file")),
    Case(
        "a link to itself", inside("rlhf_dataset_path", "bad.json", linked("bad.json")), ("bad.json", "Too many levels")
    ),
    Case(
        "a path of 5,000 letters",
        flags("--rlhf_dataset_path=" + "x" * 300),
        ("xxx: cannot be read: File name too long",),
    ),
    Case(
        "a file for a folder", lambda job: Start({"rlhf_dataset_path": job.folder / "pairs.jsonl" / "a"}), ("nothing",)
    ),
]

# === Settings ===

SETTINGS = [
    Case("no such settings", flags("--config", "none.json"), ("cannot read none.json: No such file",)),
    Case("empty settings", settings(""), ("settings.json, line 1, column 1: not JSON",)),
    Case("no JSON settings", settings("{'beta': 1}"), ("settings.json, line 1, column 2: not JSON",)),
    Case("settings in latin-1", settings(b'{"run_name": "\xe9"}'), ("settings.json, line 1: expected UTF-8 text",)),
    Case("settings nested without end", settings("[" * 100_000), ("settings.json: not JSON that can be read",)),
    Case("a list of settings", settings([1]), ("settings.json: expected a JSON object of settings, found list",)),
    Case("a setting twice", settings('{"beta": 1, "beta": 2}'), ("settings.json", "key 'beta' stands twice")),
    Case("a folder of settings", placed("", "folder", Path.mkdir), ("cannot read", "found a folder")),
    Case("a pipe of settings", placed("", "s.json", os.mkfifo), ("s.json", "expected a file", "named pipe")),
    Case("settings of 1 TiB", sparse("", "s.json", 1024 * GIB), ("s.json", "expected at most")),
    Case("two settings files", flags("--config=a", "--config=b"), ("--config: expected one file, found 2",)),
    Case("no settings file", flags("--config"), ("--config: expected a value behind it",)),
    Case("an unknown setting", settings({"betta": 1}), ("unknown setting 'betta', did you mean 'beta'?",)),
    Case("an unknown setting of a million letters", settings({"x" * 1_000_000: 1}), ("unknown setting 'xxx",)),
    Case("beta 0", settings({"beta": 0}), ("beta: expected a finite number above 0, found 0.0",)),
    Case("beta -0.0", settings({"beta": -0.0}), ("beta: expected a finite number above 0, found -0.0",)),
    Case("beta NaN", settings('{"beta": NaN}'), ("beta: expected a finite number above 0, found nan",)),
    Case("beta 1e400", settings('{"beta": 1e400}'), ("beta: expected a finite number above 0, found inf",)),
    Case("beta 10**400", settings({"beta": 10**400}), ("beta: expected a number that a float can hold",)),
    Case("beta 10**5000", settings('{"beta": ' + "9" * 5000 + "}"), ("settings.json", "not JSON that can be read")),
    Case("a rate of Infinity", settings('{"max_lr": Infinity}'), ("max_lr", "above 0.0 and at most 1.0")),
    Case(
        "a negative interval", settings({"eval_interval": -1}), ("eval_interval: expected a number from 0", "found -1")
    ),
    Case("a negative save interval", settings({"save_interval": -5}), ("save_interval: expected a number from 0",)),
    Case("a log interval of 0", settings({"log_interval": 0}), ("log_interval: expected a number from 1",)),
    Case("a batch of 0", settings({"batch_size": 0}), ("batch_size: expected a number from 1", "found 0")),
    Case("a batch of 10**4000", settings({"batch_size": 10**4000}), ("batch_size: expected a number from 1",)),
    Case("half an epoch", settings({"epochs": 1.5}), ("epochs: expected int, found 1.5",)),
    Case("a boolean number", settings({"epochs": True}), ("epochs: expected int, found true",)),
    Case("a number as text", settings({"epochs": "3"}), ('epochs: expected int, found "3"',)),
    Case("null", settings({"run_name": None}), ("run_name: expected str, found null",)),
    Case("a list of a million", settings({"epochs": [0] * 1_000_000}), ("epochs: expected int, found [0, 0",)),
    Case("an unknown loss", settings({"loss_type": "dpo"}), ("loss_type: expected one of sigmoid, hinge, ipo",)),
    Case("smoothing without effect", flags("--label_smoothing=0.1", "--loss_type=ipo"), ("label_smoothing", "ignores")),
    Case("a floor above the peak", flags("--min_lr=1e-2"), ("min_lr: expected at most max_lr", "found 0.01")),
    Case("a run up the tree", settings({"run_name": "../x"}), ("run_name: expected a plain name", "found '../x'")),
    Case("an absolute run", flags("--run_name=/tmp/x"), ("run_name: expected a plain name", "/tmp/x")),
    Case("the run ..", flags("--run_name=.."), ("run_name: expected a plain name", "..")),
    Case("a run with a NUL", settings({"run_name": "a\0b"}), ("run_name: expected", "a\\x00b")),
    Case("a run of two lines", settings({"run_name": "a\nb"}), ("run_name: expected", "a\\nb")),
    Case("a run of half a surrogate", settings({"run_name": "\ud800"}), ("run_name: expected", "\\ud800")),
    Case("a run of 300 letters", flags("--run_name=" + "x" * 300), ("run_name: expected", "at most 200", "xxx")),
    Case("a NUL in a path", settings({"model_path": "a\0b"}), ("model_path: expected", "a\\x00b")),
    Case("an empty path", flags("--model_path="), ("model_path: expected a path, found an empty one",)),
    Case(
        "half a surrogate in the prompt", settings({"system_prompt": "\udc80"}), ("system_prompt: expected", "\\udc80")
    ),
    Case(
        "more tokens than the model",
        flags("--max_seq_len=513"),
        ("max_seq_len: expected at most the model's 512 tokens (",),
    ),
    Case("the flag beta 0", flags("--beta=0"), ("beta: expected a finite number above 0, found 0.0",)),
    Case("the flag beta nan", flags("--beta=nan"), ("beta: expected a finite number above 0, found nan",)),
    Case("the flag beta abc", flags("--beta=abc"), ("--beta", "abc")),
    Case("a flag of 1e400", flags("--weight_decay=1e400"), ("weight_decay: expected a number from 0.0 to 10.0",)),
    Case("a flag of 10**5000", flags("--batch_size=" + "9" * 5000), ("--batch-size", "Exceeds the limit")),
    Case("a flag of 10**4000", flags("--batch_size=" + "9" * 4000), ("batch_size: expected a number from 1", "999")),
    Case("a negative seed", flags("--seed=-1"), ("seed: expected a number from 0", "found -1")),
    Case("an unknown flag", flags("--betta=1"), ("--betta",)),
    Case("an unknown device", flags("--device=tpu"), ("--device", "tpu")),
    Case("a word for a flag", flags("--resume=maybe"), ("maybe",)),
    Case("a word too many", flags("more"), ("more",)),
]

# === DeepSpeed JSON ===

DEEPSPEED = [
    Case("no DeepSpeed file", flags("--deepspeed_config=none.json"), ("cannot read none.json: No such file",)),
    Case("no DeepSpeed JSON", deepspeed(b"{"), ("ds.json, line 1", "not JSON")),
    Case("a DeepSpeed list", deepspeed(b"[]"), ("ds.json: expected a JSON object, found list",)),
    Case("a DeepSpeed key twice", deepspeed(b'{"bf16": {}, "bf16": {}}'), ("ds.json", "key 'bf16' stands twice")),
    Case("a batch size in two places", deepspeed({"train_batch_size": 8}), ("ds.json: train_batch_size", "delete it")),
    Case("fp16", deepspeed({"fp16": {"enabled": True}}), ("ds.json: fp16.enabled: expected false, found True",)),
    Case("bf16 masters", deepspeed({"bf16": {"bf16_master_weights_and_grads": True}}), ("would be bf16, which loses",)),
    Case("autocast", deepspeed({"torch_autocast": {"enabled": True, "dtype": "float16"}}), ("torch_autocast.enabled",)),
    Case("a sum over ranks", deepspeed({"gradient_allreduce_op": "sum"}), ("times the number of ranks",)),
    Case("autotuning", deepspeed({"autotuning": {"enabled": True}}), ("ends the process", "status 0")),
    Case("prescaled gradients", deepspeed({"prescale_gradients": True}), ("prescale_gradients: expected false",)),
    Case("sparse gradients", deepspeed({"sparse_gradients": True}), ("'sparse_gradients' is refused", "delete it")),
    Case("layer drop", deepspeed({"progressive_layer_drop": {}}), ("'progressive_layer_drop' is refused",)),
    Case("a key never tried", deepspeed({"aio": {}}), ("ds.json: key 'aio' was never tried here", "README.md")),
    Case("bf16 as text", deepspeed({"bf16": {"enabled": "false"}}), ("ds.json: bf16.enabled: expected true or false",)),
    Case("ZeRO as a number", deepspeed({"zero_optimization": 2}), ("zero_optimization: expected a JSON object",)),
    Case("ZeRO 1", zero(stage=1), ("zero_optimization.stage: expected 2 or 3, found 1",)),
    Case("ZeRO 2 as text", zero(stage="2"), ("zero_optimization.stage: expected 2 or 3, found '2'",)),
    Case("ZeRO true", zero(stage=True), ("zero_optimization.stage: expected 2 or 3, found True",)),
    Case("an unknown ZeRO key", zero(bucket=1), ("ds.json: zero_optimization: key 'bucket' was never",)),
    Case("an unknown section", deepspeed({"zero_optimisation": {}}), ("did you mean zero_optimization?",)),
    Case(
        "an empty bucket",
        zero(reduce_bucket_size=0),
        ("zero_optimization.reduce_bucket_size", "at least 1 and", "found 0"),
    ),
    Case("a bucket as text", zero(reduce_bucket_size="big"), ("zero_optimization.reduce_bucket_size", "'big'")),
    Case("a negative bucket", zero(reduce_bucket_size=-1), ("zero_optimization.reduce_bucket_size", "found -1")),
    Case("a bucket of 1e400", zero(allgather_bucket_size=float("inf")), ("allgather_bucket_size", "found inf")),
    Case("a flag as a number", zero(overlap_comm=2), ("zero_optimization.overlap_comm", "found 2")),
    Case("an unknown dtype", deepspeed({"communication_data_type": "fp7"}), ("communication_data_type", "'fp7'")),
]

# === Tokenizers ===


def swap_answer_tokens(saved: dict[str, Any]) -> None:
    """<SOA> and <EOA> change places."""
    other = {"<SOA>": "<EOA>", "<EOA>": "<SOA>"}
    vocab = saved["model"]["vocab"]
    vocab["<SOA>"], vocab["<EOA>"] = vocab["<EOA>"], vocab["<SOA>"]
    for token in saved["added_tokens"]:
        token["content"] = other.get(token["content"], token["content"])


TOKENIZERS = [
    Case("no tokenizer", flags("--tokenize_path=none"), ("none: expected a tokenizer JSON file, found No such file",)),
    Case("an empty tokenizer", tokenizer(b""), ("tokenizer.json: expected a tokenizer JSON file, found",)),
    Case("a binary tokenizer", tokenizer(b"\x80\x02\xff"), ("tokenizer.json: expected a tokenizer JSON file, found",)),
    Case("a tokenizer of nothing", tokenizer(b"{}"), ("tokenizer.json: expected a tokenizer JSON file, found",)),
    Case("a tokenizer nested without end", tokenizer(b"[" * 100_000), ("tokenizer.json: expected a tokenizer JSON",)),
    Case("a tokenizer folder", placed("tokenize_path", "t", Path.mkdir), ("expected a tokenizer", "found a folder")),
    Case("a tokenizer pipe", placed("tokenize_path", "t", os.mkfifo), ("t: expected a", "named pipe")),
    Case("a tokenizer of 1 TiB", sparse("tokenize_path", "t.json", 1024 * GIB), ("t.json", "expected at most")),
    Case("a tokenizer without model", tokenizer(lambda saved: saved.pop("model")), ("expected a tokenizer JSON file",)),
    Case(
        "another kind of tokenizer",
        tokenizer(lambda saved: saved["model"].update(type="WordLevel", unk_token="<UNK>", merges=None)),
        ("tokenizer.json: expected a", "WordLevel"),
    ),
    Case("tokens that change places", tokenizer(swap_answer_tokens), ("<SOA> with id 6, found 7",)),
    Case("a missing special token", tokenizer(lambda s: s["model"]["vocab"].pop("<EOT>")), ("<EOT>",)),
    Case("a plain special token", tokenizer(lambda s: s["added_tokens"].pop()), ("<EOT> among the added tokens",)),
    Case(
        "more tokens than the model",
        tokenizer(lambda s: s["model"]["vocab"].update(extra=len(s["model"]["vocab"]))),
        ("tokenizer.json: 301 tokens, but the model", "knows 300"),
    ),
    Case(
        "a token beyond the model",
        tokenizer(lambda s: s["model"]["vocab"].update({max(s["model"]["vocab"], key=s["model"]["vocab"].get): 4096})),
        ("tokenizer.json: ", "4097", "knows 300"),
    ),
    Case("a negative id", tokenizer(lambda s: s["model"]["vocab"].update(x=-1)), ("expected a tokenizer JSON file",)),
    Case("a merge of unknown tokens", tokenizer(lambda s: s["model"]["merges"].append("qq zz")), ("tokenizer JSON",)),
    Case(
        "a pattern that is none",
        tokenizer(
            lambda s: s.update(
                pre_tokenizer={"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}
            )
        ),
        ("expected a tokenizer JSON file",),
    ),
]

# === SFT checkpoints ===

EMBEDDINGS, NORM = "embeddings.weight", "decoder_blocks.0.norm1.weight"


def with_code(job: TinyJob, zipped: bool) -> None:
    """A checkpoint whose metadata makes a folder when it is unpickled."""
    change = checkpoint(
        lambda content: content.update(metadata=RunsCode(job.folder / "ran")), _use_new_zipfile_serialization=zipped
    )
    change(job)


def compressed(content: bytes) -> bytes:
    """The zip file with its entries compressed: mapped into memory, they would be read as weights."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    return out.getvalue()


def zip_bomb(content: bytes) -> bytes:
    """A zip file of some KiB whose pickle expands to 256 MiB of zeros."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as new:
        with new.open("start/data.pkl", "w") as entry:
            for _ in range(16):
                entry.write(b"\0" * 2**24)
        new.writestr("start/version", "3")
    return out.getvalue()


def claims(size: int) -> Callable[[bytes], bytes]:
    """The zip file whose central directory says that each entry has `size` bytes."""

    def change(content: bytes) -> bytes:
        changed, at = bytearray(content), 0
        while (at := changed.find(b"PK\x01\x02", at)) >= 0:
            changed[at + 20 : at + 28] = size.to_bytes(4, "little") * 2
            at += 4
        return bytes(changed)

    return change


CHECKPOINTS = [
    Case("no checkpoint", flags("--model_path=none"), ("none: expected a .pth file, or a folder with one",)),
    Case(
        "a folder without one", inside("model_path", "x", nothing), ("expected a folder with a .pth file, found none",)
    ),
    Case(
        "a broken link to one",
        inside("model_path", "a.pth", linked("gone")),
        ("a.pth: expected a .pth file, found: No such file",),
    ),
    Case(
        "a folder for a file",
        inside("model_path", "a.pth", Path.mkdir),
        ("a.pth: expected a SimpleLLaMA checkpoint", "found a folder"),
    ),
    Case("a checkpoint pipe", placed("model_path", "a.pth", os.mkfifo), ("a.pth: expected a", "named pipe")),
    Case("a pipe among checkpoints", inside("model_path", "a.pth", os.mkfifo), ("a.pth: expected a", "named pipe")),
    Case("a checkpoint device", flags("--model_path=/dev/zero"), ("/dev/zero: expected a", "device")),
    Case("an empty checkpoint", bytes_at_start(b""), ("start.pth: expected a SimpleLLaMA checkpoint",)),
    Case("text for a checkpoint", bytes_at_start(b"hello"), ("start.pth: expected a SimpleLLaMA checkpoint",)),
    Case("a checkpoint that was cut", bytes_at_start(lambda whole: whole[:-100]), ("start.pth: expected a Simple",)),
    Case(
        "a pickle that runs code", lambda job: with_code(job, True), ("start.pth: expected a SimpleLLaMA checkpoint",)
    ),
    Case("an old pickle that runs code", lambda job: with_code(job, False), ("start.pth: expected a SimpleLLaMA",)),
    Case("a bare pickle of code", bytes_at_start(b"cos\nsystem\n(S'mkdir ran'\ntR."), ("expected a SimpleLLaMA",)),
    Case(
        "a pickle nested without end", bytes_at_start(b"\x80\x02" + b"(" * 10**5 + b"t" * 10**5 + b"."), ("start.pth",)
    ),
    Case("compressed entries", bytes_at_start(compressed), ("start.pth: expected a SimpleLLaMA", "compressed")),
    Case("a zip bomb", bytes_at_start(zip_bomb), ("start.pth: expected a SimpleLLaMA", "compressed")),
    Case("entries of 2 GiB each", bytes_at_start(claims(2**31)), ("start.pth: expected a SimpleLLaMA", "more than")),
    Case(
        "a zip of something else",
        bytes_at_start(compressed(zip_bomb(b""))[:0] + b"PK\x05\x06" + b"\0" * 18),
        ("start.pth",),
    ),
    Case(
        "a list for a checkpoint", checkpoint(lambda content: [1]), ("expected a SimpleLLaMA checkpoint", "found list")
    ),
    Case("no config", checkpoint(lambda content: content.pop("config") and None), ("found ['metadata', 'model_state",)),
    Case("a dict for a config", checkpoint(lambda c: c.update(config=vars(c["config"]))), ("a config of dict",)),
    Case("a list of weights", checkpoint(lambda c: c.update(model_state_dict=[1])), ("model_state_dict of list",)),
    Case("a number for a tensor", weights(norm__weight=1), ("'norm.weight'", "no tensor of real numbers")),
    Case("whole numbers", weights(norm__weight=torch.ones(32, dtype=torch.int64)), ("'norm.weight'", "real numbers")),
    Case("complex numbers", weights(norm__weight=torch.ones(32, dtype=torch.complex64)), ("'norm.weight'", "real")),
    Case("a sparse tensor", weights(embeddings__weight=lambda t: t.to_sparse()), ("'embeddings.weight'", "dense")),
    Case("a tensor without values", weights(norm__weight=torch.ones(32, device="meta")), ("'norm.weight'", "dense")),
    Case("a tensor of one number", weights(norm__weight=torch.ones(1).expand(10**14)), ("'norm.weight'", "dense")),
    Case("a missing tensor", weights(norm__weight=None), ("start.pth: expected the tensors", "missing norm.weight")),
    Case(
        "a tensor too many", weights(surplus=torch.ones(2)), ("start.pth: expected the tensors", "unexpected surplus")
    ),
    Case("a name of two lines", weights(**{"a\nb\x1b[2J": torch.ones(2)}), ("unexpected", "a\\nb\\x1b[2J")),
    Case("a name of a million letters", weights(**{"x" * 10**6: torch.ones(2)}), ("unexpected", "xxx")),
    Case("a wrong shape", weights(norm__weight=torch.ones(31)), ("norm.weight (31,) instead of (32,)",)),
    Case("a flat tensor", weights(embeddings__weight=lambda t: t.flatten()), ("start.pth", "embeddings.weight")),
    Case("another vocabulary", weights(final_linear__weight=torch.ones(8, 32)), ("(8, 32) instead of (300, 32)",)),
    Case(
        "a smaller vocabulary",
        weights(embeddings__weight=lambda t: t[:299].clone(), final_linear__weight=lambda t: t[:299].clone()),
        ("tokenizer.json: 300 tokens, but the model", "knows 299"),
    ),
    Case("NaN weights", weights(norm__weight=torch.full((32,), torch.nan)), ("finite weights", "nan in norm.weight")),
    Case("infinite weights", weights(norm__weight=torch.full((32,), -torch.inf)), ("finite weights", "norm.weight")),
    Case("no heads", model(n_heads=0), ("start.pth: config: n_heads: expected a whole number", "found 0")),
    Case("a billion layers", model(n_layers=10**9), ("start.pth: config: n_layers: expected", "1000000000")),
    Case("a width of 2**60", model(n_embd=2**60), ("start.pth: config: n_embd: expected",)),
    Case("a width of 10**600", model(n_embd=10**600), ("start.pth: config: n_embd: expected",)),
    Case("a length as text", model(max_seq_len="512"), ("start.pth: config: max_seq_len: expected", "'512'")),
    Case("a length of 10**30", model(max_seq_len=10**30), ("start.pth: config: max_seq_len: expected",)),
    Case("eps NaN", model(eps=float("nan")), ("start.pth: config: eps: expected a positive number, found nan",)),
    Case("theta 0", model(theta=0), ("start.pth: config: theta: expected a positive number, found 0",)),
    Case("theta 10**400", model(theta=10**400), ("start.pth: config: theta: expected a positive number",)),
    Case("a switch as text", model(use_mla="no"), ("start.pth: config: use_mla: expected True or False, found 'no'",)),
    Case("LoRA without its tensors", model(use_lora=True), ("expected the tensors", "missing", "_lora")),
    Case(
        "LoRA scaled by text", model(use_lora=True, lora_alpha="x"), ("start.pth: config: lora_alpha: expected", "'x'")
    ),
]

# === States to resume from ===

NONE_LEFT = ("tiny: expected a state to resume from (state/step_*), found no complete one",)


def warned(words: str) -> tuple[str, ...]:
    """The words of the error, and those of the warning before it."""
    return (*NONE_LEFT, words)


# The curves are rewound to the step of the state before the engine, which knows the parameters, looks at it.
NAN32 = torch.full((32,), torch.nan)
STATES = [
    Case("a file name up the tree", only_state(facts(files={"../../../start.pth": "0"})), warned("is missing")),
    Case("a file name beside its file", only_state(facts(files={f"../{SHARD}": "0"})), warned("plain file name")),
    Case("an absolute file name", only_state(facts(files={"/etc/hostname": "0"})), warned("is missing")),
    Case("an absolute name of a file here", only_state(facts(files={f"/x/{SHARD}": "0"})), warned("plain file name")),
    Case("a NUL in a file name", only_state(facts(files={"a\0b": "0"})), warned("is missing")),
    Case("no file names", only_state(facts(files={})), warned("the digests of its files")),
    Case("a list of files", only_state(facts(files=[SHARD])), warned("the digests of its files")),
    Case("tensors behind a link", only_state(moved_out(SHARD)), warned("leads out of the folder")),
    Case("facts behind a link", only_state(moved_out("state.json")), warned("leads out of the folder")),
    Case(
        "a state behind a link", only_state(lambda state: moved_out(state.name)(state.parent)), warned("leads out of")
    ),
    Case("a pipe of facts", only_state(replaced("state.json", os.mkfifo)), warned("named pipe")),
    Case("a pipe of tensors", only_state(replaced(SHARD, os.mkfifo)), warned("is missing")),
    Case("a folder of facts", only_state(replaced("state.json", Path.mkdir)), warned("state.json")),
    Case("no facts", only_state(replaced("state.json", nothing)), warned("No such file")),
    Case("facts that are no JSON", only_state(replaced("state.json", Path.touch)), warned("not JSON")),
    Case("another format", only_state(facts(format=3)), warned("expected format 2 or 1")),
    Case("a step as text", only_state(facts(step="6")), warned("step: expected")),
    Case("a negative step", only_state(facts(step=-6)), warned("step: expected")),
    Case("a step of 10**30", only_state(facts(step=10**30)), warned("step: expected")),
    Case("a step of another state", only_state(facts(step=5)), warned("step: expected")),
    Case("no step", only_state(facts(step=None)), warned("expected a step")),
    Case("AdamW's steps as text", only_state(facts(optimizer_steps="6")), warned("optimizer_steps: expected")),
    Case("AdamW's steps negative", only_state(facts(optimizer_steps=-1)), warned("optimizer_steps: expected")),
    Case("no loss", only_state(facts(loss=None)), warned("loss: expected")),
    Case("no name of weights", only_state(facts(weights=None)), warned("weights: expected")),
    Case("weights up the tree", only_state(facts(weights="../../x")), warned("weights: expected")),
    Case(
        "a flipped bit",
        only_state(lambda s: (s / SHARD).write_bytes(b"x" + (s / SHARD).read_bytes())),
        warned("digest"),
    ),
    Case("a pickle for tensors", only_state(shard(lambda path: torch.save({}, path))), warned("safetensors")),
    Case(
        "a pickle that runs code for tensors",
        only_state(shard(lambda path: path.write_bytes(pickle.dumps(RunsCode(path.parents[4] / "ran"))))),
        warned("safetensors"),
    ),
    Case(
        "a header of 2**60 bytes",
        only_state(shard(lambda p: p.write_bytes((2**60).to_bytes(8, "little")))),
        warned("safet"),
    ),
    Case(
        "NaN master weights",
        only_state(parameters(lambda t: t.update({"norm.weight|weight": NAN32}))),
        warned("finite"),
    ),
    Case(
        "an infinite moment",
        only_state(parameters(lambda t: t.update({"norm.weight|exp_avg": NAN32 + 1}))),
        warned("fin"),
    ),
    Case("no second moment", only_state(parameters(lambda t: t.pop("norm.weight|exp_avg_sq"))), warned("exp_avg_sq")),
    Case(
        "a moment of another shape",
        only_state(parameters(lambda t: t.update({"norm.weight|exp_avg": NAN32[:3] * 0}))),
        warned(""),
    ),
    Case(
        "a third moment", only_state(parameters(lambda t: t.update({"norm.weight|third": torch.ones(32)}))), warned("")
    ),
    Case(
        "tensors of half the bits",
        only_state(parameters(lambda t: t.update({k: v.half() for k, v in t.items()}))),
        warned(""),
    ),
    Case(
        "a foreign parameter",
        only_state(
            parameters(lambda t: t.update({f"x|{k}": torch.ones(2) for k in ("weight", "exp_avg", "exp_avg_sq")}))
        ),
        ("expected only trained parameters, found x",),
    ),
    Case(
        "a missing parameter",
        only_state(parameters(lambda t: [t.pop(f"norm.weight|{k}") for k in ("weight", "exp_avg", "exp_avg_sq")])),
        ("missing norm.weight",),
    ),
    Case(
        "a parameter of another shape",
        only_state(
            parameters(
                lambda t: t.update({f"norm.weight|{k}": torch.ones(31) for k in ("weight", "exp_avg", "exp_avg_sq")})
            )
        ),
        ("state of norm.weight: expected shape (32,), found (31,)",),
    ),
    Case(
        "another beta",
        only_state(nothing, beta=0.25),
        ("cannot resume: beta was 0.5, is now 0.25",),
    ),
    Case("another data set", only_state(facts(data="x" * 10**6)), ("cannot resume: data was",)),
    Case("a state that is a file", only_state(lambda s: (shutil.rmtree(s), s.touch())), NONE_LEFT),
    Case("no run of that name", flags("--resume", "--run_name=none"), ("none: expected a state to resume from",)),
    Case("no run at all", flags("--resume", "--run_name=", "--ckpt_dir=none"), ("none: expected a run to resume",)),
]

# === The reference store, and folders to write to ===


def as_file(name: str) -> Spoil:
    """Puts a file where a folder is needed."""

    def spoil(job: TinyJob) -> None:
        path = job.folder / name
        shutil.rmtree(path, ignore_errors=True)
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")

    return spoil


MISSING_PAIRS = "24 of 24 pairs have no reference log-probs"
ASIDE = ("ref_cache/*/*.npy", "ref_cache/*/*.npy.corrupt")
STORES = [
    Case("no store", lambda job: shutil.rmtree(job.folder / "ref_cache"), (MISSING_PAIRS,)),
    Case("a file for the cache", as_file("ref_cache"), ("ref_cache", "expected a folder")),
    Case("a file for the store", store(lambda folder: (shutil.rmtree(folder), folder.touch())), ("reference store",)),
    Case(
        "another reference", store(lambda f: (f / "reference.json").write_text("{}")), ("reference.json was changed",)
    ),
    Case("no JSON reference", store(lambda f: (f / "reference.json").write_text("{")), ("reference.json", "not JSON")),
    Case("a reference nested", store(lambda f: (f / "reference.json").write_text("[" * 10**5)), ("reference.json",)),
    Case("a reference pipe", store(replaced("reference.json", os.mkfifo)), ("reference.json", "named pipe")),
    Case("a reference folder", store(replaced("reference.json", Path.mkdir)), ("reference.json", "found a folder")),
    Case(
        "a long reference",
        store(lambda f: (f / "reference.json").write_text('"' + "x" * 10**6 + '"')),
        ("was changed",),
    ),
    Case(
        "a damaged shard",
        shard_of_store(lambda path: path.write_bytes(b"x")),
        (MISSING_PAIRS, "is damaged"),
        may_change=ASIDE,
    ),
    Case(
        "a shard that links to garbage outside",
        shard_of_store(lambda path: (path.unlink(), path.symlink_to(path.parents[2] / "pairs.jsonl"))),
        (MISSING_PAIRS, "damaged"),
        may_change=ASIDE,
    ),
    Case("a shard pipe", shard_of_store(lambda path: (path.unlink(), os.mkfifo(path))), (MISSING_PAIRS, "named pipe")),
    Case(
        "a shard that links to a device",
        shard_of_store(lambda path: (path.unlink(), path.symlink_to("/dev/zero"))),
        (MISSING_PAIRS, "device"),
    ),
    Case(
        "a shard of 1 TiB",
        shard_of_store(lambda path: os.truncate(path, 1024 * GIB)),
        (MISSING_PAIRS, "larger than"),
        may_change=ASIDE,
    ),
    Case("a file for the logs", as_file("runs"), ("runs: expected a folder", "log_dir")),
    Case("a file for the run's logs", as_file("runs/next"), ("runs/next: expected a folder", "log_dir")),
    Case("a file for the checkpoints", as_file("checkpoints"), ("checkpoints: expected a folder", "ckpt_dir")),
    Case("a file for the run's checkpoints", as_file("checkpoints/next"), ("checkpoints/next: expected a folder",)),
    Case(
        "a broken link for the logs",
        lambda job: shutil.rmtree(job.folder / "runs") or (job.folder / "runs").symlink_to("gone"),
        ("runs: expected a folder",),
    ),
    Case("a run that is there", lambda job: Start({"run_name": "tiny"}), ("a run of this name has checkpoints",)),
    Case("lora without LoRA", flags("--trainable=lora"), ("trainable: expected a checkpoint with LoRA",)),
]
