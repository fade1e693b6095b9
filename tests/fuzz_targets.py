"""What must hold for any bytes in an input file: a UserError, or a sound result. Never another error, never code.

Each target takes the bytes and an empty folder. `unit/test_fuzz.py` feeds them with hypothesis,
`fuzz/fuzz_inputs.py` with atheris.
"""

from __future__ import annotations

import bz2
import functools
import gzip
import io
import json
import lzma
import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import zstandard
from safetensors.torch import save as safetensors_bytes
from tokenizers import Tokenizer

from crafted_weights import CRAFTED
from format_samples import page_samples
from simple_llama.common.errors import UserError
from simple_llama.common.files import digest, read_json
from simple_llama.common.paths import root_path
from simple_llama.common.settings import _settings_from_dict
from simple_llama.dataset.json_records import data_files, read_records
from simple_llama.dataset.tokenizer import SPECIAL_IDS, load_tokenizer, token_count, tokenizer_digest
from simple_llama.dataset.train_bpe import tokenizer_json, train_bpe
from simple_llama.finetune.format_llm_prompt import encode_chat
from simple_llama.interop.hf_folder import HFFolder
from simple_llama.interop.hf_names import to_hf
from simple_llama.pretraining.architecture import Architecture
from simple_llama.pretraining.config import TrainingConfig
from simple_llama.pretraining.llama_transformer import LLaMaTransformer
from simple_llama.pretraining.weights import build_model, check_weights, load_weights
from simple_llama.reinforcement_learning.rlhf.data.conversation import Conversation
from simple_llama.reinforcement_learning.rlhf.data.dataset_loader import RLDatasetLoader
from simple_llama.reinforcement_learning.rlhf.data.tokenized_pair import TokenizedPair
from simple_llama.reinforcement_learning.rlhf.dpo_config import DPOConfig
from simple_llama.reinforcement_learning.rlhf.engine.checkpoint import (
    SavedState,
    StateFacts,
    _check_state,
    _described,
    _read_parameters,
)
from simple_llama.reinforcement_learning.rlhf.engine.ds_config import full_ds_config
from simple_llama.reinforcement_learning.rlhf.reference.ref_store import RefStore, reference_id
from simple_llama.reinforcement_learning.rlhf.reference.shards import RECORD
from tiny_hf import ARCHITECTURE, CONFIG, random_weights

Target = Callable[[bytes, Path], None]
SHARD = "rank_00000.safetensors"
REFERENCE = reference_id("weights", "tokenizer", {})


class RunsCode:
    """Unpickled by a reader that trusts the file, it makes the folder `fuzz_ran_code` where the process is."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("fuzz_ran_code",)


@contextmanager
def refused() -> Iterator[None]:
    """The body may end in a UserError with a message that a person can read, and in no other error."""
    try:
        yield
    except UserError as error:
        assert str(error) and len(str(error)) < 5000
    assert not Path("fuzz_ran_code").exists(), "a file has run code"


@functools.cache
def shipped_tokenizer() -> Tokenizer:
    """The project's tokenizer."""
    return load_tokenizer(root_path("simple_llama", "dataset", "bpe_8k.json"))


# === Targets ===


def loader(data: bytes, folder: Path) -> None:
    """A data set, as a list and as lines: refused, or pairs whose tokens are those of their text."""
    for name in ("pairs.json", "pairs.jsonl"):
        (folder / name).write_bytes(data)
        with refused():
            data_set = RLDatasetLoader(folder / name, shipped_tokenizer(), 512, val_share=0.0, seed=0)
            try:
                again = data_set.conversations(data_set.train)
            except UserError as error:
                raise AssertionError("what was read once is refused when it is read again") from error
            for pair, said in zip(data_set.train, again, strict=True):
                check_pair(pair, said)


def check_pair(pair: TokenizedPair, said: Conversation) -> None:
    """The tokens of both chats are those of the text, with as many special tokens as the format has."""
    turns = len(said.users)
    for answers, ids in ((said.chosen, pair.chosen), (said.rejected, pair.rejected)):
        chat = [*pair.prefix.tolist(), *ids.tolist()]
        assert chat == encode_chat(shipped_tokenizer(), said.system or "", said.users, answers)[0]
        assert [chat.count(SPECIAL_IDS[name]) for name in ("<SOU>", "<EOU>", "<SOA>", "<EOA>")] == [turns] * 4
        assert [chat.count(SPECIAL_IDS[name]) for name in ("<SOT>", "<EOT>", "<UNK>")] == [1, 1, 0]


def records(data: bytes, folder: Path) -> None:
    """Data files of every kind, the packed ones packed here or not at all: refused, or objects with their places."""
    for suffix in (".json", ".jsonl"):
        (folder / f"a{suffix}").write_bytes(data)
        (folder / f"b{suffix}.gz").write_bytes(gzip.compress(data, compresslevel=1))
        (folder / f"c{suffix}.gz").write_bytes(data)
    check_records(folder)


def tables(data: bytes, folder: Path) -> None:
    """Tables, and files of other packers, that others have written: the same."""
    for name in ("a.parquet", "b.arrow", "c.jsonl.zst", "d.jsonl.xz", "e.jsonl.bz2"):
        (folder / name).write_bytes(data)
    check_records(folder)


def check_records(folder: Path) -> None:
    """The data files of a folder are refused, or hold objects with their places."""
    for file in data_files(folder):
        numbers = []
        with refused():
            for record in read_records(file):
                assert isinstance(record.fields, dict) and record.file == str(file)
                numbers.append(record.number)
        assert numbers == sorted(set(numbers)) and min(numbers, default=1) >= 1


def tokenizer(data: bytes, folder: Path) -> None:
    """A tokenizer: refused, or one that keeps text apart from special tokens."""
    path = folder / "tokenizer.json"
    path.write_bytes(data)
    with refused():
        found = load_tokenizer(path)
        assert len(tokenizer_digest(found)) == 32 and token_count(found) > max(SPECIAL_IDS.values())
        ids = found.encode("a <EOA> b", add_special_tokens=False).ids
        assert SPECIAL_IDS["<EOA>"] not in ids


def settings(data: bytes, folder: Path) -> None:
    """A --config file: refused, or settings that are the same when written and read again."""
    path = folder / "config.json"
    path.write_bytes(data)
    with refused():
        config = _settings_from_dict(DPOConfig, read_json(path), str(path))
        assert _settings_from_dict(DPOConfig, json.loads(json.dumps(asdict(config))), "again") == config


def deepspeed(data: bytes, folder: Path) -> None:
    """A DeepSpeed JSON: refused, or settings that can be written again."""
    path = folder / "ds.json"
    path.write_bytes(data)
    with refused():
        found = full_ds_config(DPOConfig(deepspeed_config=str(path)), world_size=2)
        assert found["zero_optimization"]["stage"] in (2, 3) and read_json(path).items() <= found.items()


def state_facts(data: bytes, folder: Path) -> None:
    """A state.json beside sound tensors: a problem in words, or the tensors are read."""
    state = folder / "step_00000003"
    state.mkdir()
    (state / SHARD).write_bytes(sound_tensors())
    (state / "state.json").write_bytes(data)
    check(state)


def state_tensors(data: bytes, folder: Path) -> None:
    """A file of tensors whose digest is right: a problem in words, or finite tensors of one shape."""
    state = folder / "step_00000003"
    state.mkdir()
    (state / SHARD).write_bytes(data)
    (state / "state.json").write_bytes(sound_facts(data))
    check(state)


def check(state: Path) -> None:
    """A state has a problem that can be shown, or tensors that can be loaded."""
    problem, found = _check_state(state)
    assert bool(problem) != bool(found)
    if not problem:
        saved = SavedState(state, StateFacts.from_json(found), found["files"], found["optimizer_steps"])
        for _, tensors in _read_parameters(saved):
            assert len({tensor.shape for tensor in tensors.values()}) == 1
            assert all(tensor.isfinite().all() for tensor in tensors.values())


def store(data: bytes, folder: Path) -> None:
    """A shard with the right name, a file of any name and a reference.json: refused, set aside, or sound numbers."""
    cache = RefStore.open(folder, REFERENCE)
    (cache.folder / f"{digest(data).hex()}.npy").write_bytes(data)
    (cache.folder / f"shard-{digest(cache.folder.name.encode(), data).hex()}.npy").write_bytes(data)
    name = data[:20].hex()
    (cache.folder / f"{name}.npy").write_bytes(data)
    cache = RefStore.open(folder, REFERENCE)
    sums, counts = cache._records["logps"], cache._records["counts"]
    assert np.isfinite(sums).all() and (counts > 0).all() and (sums <= 1e-5 * counts).all()
    (cache.folder / "reference.json").write_bytes(data)
    with refused():
        RefStore.open(folder, REFERENCE)


def weights(data: bytes, folder: Path) -> None:
    """A checkpoint: refused, or finite weights of the shapes that its config says. It runs no code."""
    path = folder / "start.pth"
    path.write_bytes(data)
    with refused():
        loaded = load_weights(path)
        check_weights(loaded, torch.float32)
        model = build_model(loaded, torch.float32, "cpu")
        assert all(weight.isfinite().all() for weight in model.parameters())
    assert sorted(file.name for file in folder.iterdir()) == ["start.pth"]


def hf_config(data: bytes, folder: Path) -> None:
    """A config.json beside sound weights: refused, or a model that these weights fit."""
    (folder / "config.json").write_bytes(data)
    (folder / "model.safetensors").write_bytes(seeds("hf_weights")[0])
    check_hf_folder(folder)


def hf_weights(data: bytes, folder: Path) -> None:
    """A model.safetensors beside a sound config.json: refused, or finite weights of the shapes that this says."""
    (folder / "config.json").write_bytes(seeds("hf_config")[0])
    (folder / "model.safetensors").write_bytes(data)
    check_hf_folder(folder)


def check_hf_folder(folder: Path) -> None:
    """A folder is refused, or a model; nothing is written, no code is run."""
    with refused():
        start = HFFolder(folder)
        with start.reading() as loaded:
            check_weights(loaded, torch.float32)
            model = build_model(loaded, torch.float32, "cpu")
        assert all(weight.isfinite().all() for weight in model.parameters())
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "model.safetensors"]


TARGETS: dict[str, Target] = {
    target.__name__: target
    for target in (
        loader,
        records,
        tables,
        tokenizer,
        settings,
        deepspeed,
        state_facts,
        state_tensors,
        store,
        weights,
        hf_config,
        hf_weights,
    )
}


# === Sound files, from which mutations start ===


@functools.cache
def seeds(name: str) -> tuple[bytes, ...]:
    """Files for a target: the first is sound, others may hold code or impossible values."""
    return {
        "loader": lambda: (*sound_pairs(), *(json.dumps(sample.record).encode() for sample in page_samples())),
        "records": sound_pairs,
        "tables": sound_tables,
        "tokenizer": lambda: (tokenizer_json(train_bpe(["the cat sits on the mat"] * 4, 270)),),
        "settings": lambda: (
            json.dumps({"beta": 0.1, "epochs": 2, "run_name": "a", "resume": True}).encode(),
            json.dumps({"max_lr": 10**400, "model_path": "\0", "system_prompt": "\ud800"}).encode(),
        ),
        "deepspeed": lambda: tuple(path.read_bytes() for path in sorted(Path(root_path("ds_configs")).glob("*.json"))),
        "state_facts": lambda: (sound_facts(sound_tensors()), facts_of_today(sound_tensors())),
        "state_tensors": lambda: (sound_tensors(), sound_tensors(float("nan")), pickle.dumps(RunsCode())),
        "store": lambda: (sound_shard(), json.dumps(REFERENCE).encode(), pickle.dumps(RunsCode())),
        "weights": sound_weights,
        "hf_config": lambda: (json.dumps(CONFIG).encode(),),
        "hf_weights": lambda: (safetensors_bytes(to_hf(random_weights(), ARCHITECTURE)), pickle.dumps(RunsCode())),
    }[name]()


def sound_pairs() -> tuple[bytes, ...]:
    """Two records as lines, and as a list."""
    rows = [
        {"Template": ["CUSTOM"], "User": ["Hi <EOU>", "More?"], "Accepted": ["Yes.", "Sure."], "Rejected": ["a", "No"]},
        {"Template": ["S"], "User": ["\u00e9 \U0001f600"], "Accepted": ["<EOA>"], "Rejected": ["x"], "extra": 1.5},
    ]
    return "\n".join(map(json.dumps, rows)).encode(), json.dumps(rows).encode()


def sound_tables() -> tuple[bytes, ...]:
    """Two records in each kind of table, and packed."""
    table = pa.Table.from_pylist(json.loads(sound_pairs()[1]))
    sinks = [pa.BufferOutputStream() for _ in range(3)]
    pq.write_table(table, sinks[0])
    for kind, sink in zip((pa.ipc.new_file, pa.ipc.new_stream), sinks[1:], strict=True):
        with kind(sink, table.schema) as writer:
            writer.write_table(table)
    packed = (pack(sound_pairs()[0]) for pack in (zstandard.compress, lzma.compress, bz2.compress))
    return *(sink.getvalue().to_pybytes() for sink in sinks), *packed


def sound_tensors(value: float = 1.0) -> bytes:
    """A state's file of one parameter, sound if its value is."""
    kinds = ("weight", "exp_avg", "exp_avg_sq")
    return safetensors_bytes({f"norm|{kind}": torch.full((3,), value) for kind in kinds})


def sound_facts(tensors: bytes) -> bytes:
    """The state.json of a state with these tensors, as earlier versions wrote it."""
    facts = {"format": 1, "step": 3, "optimizer_steps": 3, "loss": 0.5, "weights": "dpo.pth"}
    return json.dumps({**facts, "files": {SHARD: digest(tensors).hex()}}).encode()


def facts_of_today(tensors: bytes) -> bytes:
    """The same with a digest of itself."""
    return _described(StateFacts(3, "dpo.pth", 0.5, False, {}), {SHARD: digest(tensors).hex()})


def sound_shard() -> bytes:
    """A shard of the reference store with two records."""
    found = np.zeros(2, RECORD)
    found["counts"], found["logps"], found["digest"] = 3, -1.5, [digest(b"a"), digest(b"b")]
    data = io.BytesIO()
    np.save(data, found, allow_pickle=False)
    return data.getvalue()


def sound_weights() -> tuple[bytes, ...]:
    """A checkpoint in torch's two formats, both again with code in them, and small ones that ask for all memory."""
    config = TrainingConfig(n_embd=8, n_heads=2, n_layers=1, multiple_of=8, max_seq_len=16)
    content: dict[str, Any] = {
        "model_state_dict": LLaMaTransformer(Architecture.of(config, 10)).state_dict(),
        "config": config,
    }
    files = []
    for metadata in ({"step": 7}, RunsCode()):
        for zipped in (True, False):
            data = io.BytesIO()
            torch.save({**content, "metadata": metadata}, data, _use_new_zipfile_serialization=zipped)
            files.append(data.getvalue())
    return *files, *(data for data, _ in CRAFTED.values() if len(data) < 2000)
