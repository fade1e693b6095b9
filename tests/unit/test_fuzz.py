"""Any bytes in any input file: refused with a message, or read to a sound result (see `tests/fuzz_targets.py`)."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from format_samples import page_samples
from fuzz_targets import REFERENCE, SHARD, TARGETS, seeds, shipped_tokenizer
from simple_llama.common.files import digest
from simple_llama.reinforcement_learning.rlhf.data.dataset_loader import RLDatasetLoader
from simple_llama.reinforcement_learning.rlhf.engine.checkpoint import _check_state
from simple_llama.reinforcement_learning.rlhf.reference.ref_store import RefStore

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tests" / "fuzz" / "fuzz_inputs.py"
KEYS = ["Template", "User", "Accepted", "Rejected", "format", "step", "files", "beta", "epochs", "run_name", "stage"]
KEYS += ["zero_optimization", "bf16", "enabled", "model", "vocab", "merges", "added_tokens", "type", "weights", "loss"]
KEYS += ["prompt", "chosen", "rejected", "role", "content", "system", "question", "instruction", "input", "history"]
KEYS += ["completions", "response", "conversations", "from", "value", "score_chosen", "margin", "response_0", "tools"]
EXAMPLES = {"loader": 90, "records": 60, "tokenizer": 40, "store": 60, "weights": 80, "hf_config": 40}  # others: 100

values: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from([10**400, 10**4000, 2**63, -1, 0.0, -0.0, float("inf"), float("nan")])
    | st.text()
    | st.sampled_from(["CUSTOM", "<EOA>", "\ud800", "\0", "../x"]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=5), inner, max_size=5)
    ),
    max_leaves=12,
)


@st.composite
def messages(draw: st.DrawFn) -> bytes:
    """Lines or a list of records that are nearly of the loader's format, with any text."""
    turns = draw(st.integers(1, 2))
    text = st.text(min_size=1, max_size=20) | st.sampled_from(["<EOA>", "<SOU>a<EOU>", "a\n\nb", " x "])
    texts = st.lists(text, min_size=turns, max_size=turns)
    rows = [
        {"Template": ["CUSTOM"], "User": draw(texts), "Accepted": draw(texts), "Rejected": draw(texts)}
        for _ in range(draw(st.integers(1, 3)))
    ]
    if draw(st.booleans()):
        rows[0] |= draw(st.dictionaries(st.sampled_from(KEYS[:4]), values, max_size=1))
    return json.dumps(rows).encode() if draw(st.booleans()) else "\n".join(map(json.dumps, rows)).encode()


@st.composite
def others_records(draw: st.DrawFn) -> bytes:
    """Lines of one of docs/data.md's samples, with some values replaced, down to those of its messages."""
    sample = draw(st.sampled_from(page_samples())).record
    rows = [json.loads(json.dumps(sample)) for _ in range(draw(st.integers(1, 2)))]
    for _ in range(draw(st.integers(1, 3))):
        place: Any = draw(st.sampled_from(rows))
        while True:
            key = draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
            if not isinstance(place[key], (dict, list)) or not place[key] or draw(st.booleans()):
                break
            place = place[key]
        place[key] = draw(values)
    return "\n".join(map(json.dumps, rows)).encode()


@st.composite
def mutated(draw: st.DrawFn, name: str) -> bytes:
    """A sound file of a target with a few bytes changed, put in or cut out, and perhaps its end gone."""
    data = bytearray(draw(st.sampled_from(seeds(name))))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        data[at : at + draw(st.integers(0, 3))] = draw(st.binary(max_size=3))
    return bytes(data[: draw(st.integers(0, len(data)))] if draw(st.integers(0, 5)) == 0 else data)


def changed_json(name: str) -> st.SearchStrategy[bytes]:
    """A sound JSON object of a target with some values replaced by any others."""
    sound = [json.loads(seed) for seed in seeds(name) if seed.startswith(b"{") and b"\n{" not in seed]
    changes = st.dictionaries(st.sampled_from(sorted({key for found in sound for key in found})), values, max_size=2)
    pick = st.sampled_from(sound)
    return st.builds(lambda found, change: json.dumps({**found, **change}).encode(), pick, changes)


def inputs(name: str) -> st.SearchStrategy[bytes]:
    """Bytes for a target: any, any JSON, nearly sound."""
    some = st.binary(max_size=64) | values.map(lambda value: json.dumps(value).encode()) | mutated(name)
    if name in ("loader", "records"):
        return some | messages() | others_records()
    if name in ("settings", "deepspeed", "tokenizer", "state_facts", "hf_config"):
        return some | changed_json(name)
    return some


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that each example finds empty; code in a file would run there."""
    monkeypatch.chdir(tmp_path)
    return tmp_path / "input"


@pytest.mark.parametrize("name", TARGETS)
def test_any_bytes_are_refused_or_sound(name: str, folder: Path) -> None:
    """No error but the one that is meant for people, whatever stands in the file."""

    def check(data: bytes) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        TARGETS[name](data, folder)

    @settings(
        max_examples=EXAMPLES.get(name, 100), suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
    )
    @given(inputs(name))
    def fuzz(data: bytes) -> None:
        check(data)

    for seed in seeds(name):
        check(seed)
    fuzz()


@pytest.mark.parametrize("name", ["tokenizer", "settings", "deepspeed", "weights", "hf_config", "hf_weights"])
def test_sound_files_are_read(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first seed is no error: else mutations would start from what is refused anyway."""
    monkeypatch.setattr("fuzz_targets.refused", contextlib.nullcontext)
    folder.mkdir()
    TARGETS[name](seeds(name)[0], folder)


def test_a_sound_state_shard_and_data_set_are_read(tmp_path: Path) -> None:
    """One state, two records of the store, two pairs."""
    state = tmp_path / "step_00000003"
    state.mkdir()
    (state / SHARD).write_bytes(seeds("state_tensors")[0])
    (state / "state.json").write_bytes(seeds("state_facts")[0])
    assert _check_state(state)[0] == ""
    cache = RefStore.open(tmp_path, REFERENCE)
    (cache.folder / f"{digest(seeds('store')[0]).hex()}.npy").write_bytes(seeds("store")[0])
    assert len(RefStore.open(tmp_path, REFERENCE)) == 2
    (tmp_path / "pairs.jsonl").write_bytes(seeds("loader")[0])
    assert len(RLDatasetLoader(tmp_path / "pairs.jsonl", shipped_tokenizer(), 512, val_share=0.0, seed=0).train) == 2


def test_the_script_says_what_it_needs() -> None:
    """A target that is not there, or atheris that is not installed: status 2 and one line."""
    done = subprocess.run([sys.executable, str(SCRIPT), "none"], capture_output=True, text=True)
    expected = "expected a target (" if importlib.util.find_spec("atheris") else "atheris is not installed: pip install"
    assert done.returncode == 2 and done.stderr.startswith(f"error: {expected}"), done.stderr
