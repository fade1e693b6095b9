"""Weights files: what is read is checked, what is written is whole, and neither runs code."""

from __future__ import annotations

import os
import pickle
import resource
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import IO

import pytest
import torch

from simple_llama.common.errors import UserError
from simple_llama.pretraining.architecture import Architecture
from simple_llama.pretraining.config import TrainingConfig
from simple_llama.pretraining.llama_transformer import LLaMaTransformer
from simple_llama.pretraining.weights import (
    WeightsFile,
    build_model,
    check_finite,
    empty_model,
    find_weights,
    load_weights,
    save_weights,
    weights_digest,
)

CONFIG = TrainingConfig(n_embd=8, n_heads=2, n_layers=1, multiple_of=8, max_seq_len=16)


@pytest.fixture
def state_dict() -> dict[str, torch.Tensor]:
    """Weights of a model with 10 tokens."""
    torch.manual_seed(0)
    return {name: tensor.clone() for name, tensor in LLaMaTransformer(Architecture.of(CONFIG, 10)).state_dict().items()}


@pytest.fixture
def path(tmp_path: Path, state_dict: dict[str, torch.Tensor]) -> Path:
    """A saved weights file."""
    save_weights(tmp_path / "model.pth", state_dict, CONFIG, {"step": 7, "nested": {"loss": [0.5, None]}})
    return tmp_path / "model.pth"


def _loaded(state_dict: dict[str, torch.Tensor]) -> WeightsFile:
    """As if read from some.pth."""
    return WeightsFile(state_dict, CONFIG, {}, Path("some.pth"))


def test_round_trip(path: Path, state_dict: dict[str, torch.Tensor]):
    """Names, values, config and metadata come back."""
    loaded = load_weights(path)
    assert list(loaded.state_dict) == list(state_dict)
    assert all(torch.equal(loaded.state_dict[name], tensor) for name, tensor in state_dict.items())
    assert loaded.config == CONFIG
    assert loaded.metadata == {"step": 7, "nested": {"loss": [0.5, None]}}
    assert loaded.path == path
    assert [file.name for file in path.parent.iterdir()] == ["model.pth"]  # no temp file left


def test_saved_as_upstream_does(path: Path, shared_dir: Path, tmp_path: Path):
    """A file of the original code goes through load, build and save with its names, order, values and config kept."""
    original = load_weights(shared_dir / "fixtures" / "mha.pth")
    assert original.metadata == {}
    model = build_model(original, torch.float32, "cpu", dropout=0.1)
    save_weights(tmp_path / "copy.pth", model.state_dict(), original.config, {})
    with torch.serialization.safe_globals([TrainingConfig]):
        plain = torch.load(tmp_path / "copy.pth", weights_only=True)
    assert set(plain["model_state_dict"]) == set(original.state_dict)
    assert weights_digest(plain["model_state_dict"]) == weights_digest(original.state_dict)
    assert plain["config"].__dict__ == original.config.__dict__


def test_upstream_config_without_a_field(tmp_path: Path, state_dict: dict[str, torch.Tensor]):
    """An older config that lacks a field gets its default; one it has in addition is kept."""
    config = TrainingConfig.__new__(TrainingConfig)
    config.__dict__.update({k: v for k, v in CONFIG.__dict__.items() if k != "theta"}, extra=3)
    torch.save({"model_state_dict": state_dict, "config": config}, tmp_path / "old.pth")
    loaded = load_weights(tmp_path / "old.pth")
    assert loaded.config.theta == 10_000
    model = build_model(loaded, torch.float32, "cpu", dropout=0.25)
    assert model.architecture == replace(Architecture.of(CONFIG, 10), dropout=0.25)
    assert (loaded.config.dropout, vars(loaded.config)["extra"]) == (0.0, 3)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_taken_off(tmp_path: Path, state_dict: dict[str, torch.Tensor], prefix: str):
    """Files saved from a compiled or data-parallel model load under upstream's names."""
    wrapped = {prefix + name: tensor for name, tensor in state_dict.items()}
    torch.save({"model_state_dict": wrapped, "config": CONFIG}, tmp_path / "wrapped.pth")
    assert list(load_weights(tmp_path / "wrapped.pth").state_dict) == list(state_dict)
    save_weights(tmp_path / "saved.pth", wrapped, CONFIG, {})
    assert list(load_weights(tmp_path / "saved.pth").state_dict) == list(state_dict)


def test_a_name_twice_is_refused(tmp_path: Path, state_dict: dict[str, torch.Tensor]):
    """With and without a prefix: which one counts is not guessed."""
    state_dict["module.norm.weight"] = state_dict["norm.weight"] + 1
    torch.save({"model_state_dict": state_dict, "config": CONFIG}, tmp_path / "twice.pth")
    with pytest.raises(UserError, match=r"norm.weight twice"):
        load_weights(tmp_path / "twice.pth")


class _TouchesAFile:
    """Unpickled by a loader that trusts the file, it would make `path`."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("zipped", [True, False])
def test_crafted_file_runs_nothing(tmp_path: Path, state_dict: dict[str, torch.Tensor], zipped: bool):
    """A pickle that opens a file for writing is refused before it does, in both of torch's formats."""
    marker, path = tmp_path / "was_here", tmp_path / "crafted.pth"
    content = {"model_state_dict": state_dict, "config": CONFIG, "metadata": _TouchesAFile(marker)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"crafted.pth: expected a SimpleLLaMA checkpoint"):
        load_weights(path)
    assert not marker.exists()
    torch.load(path, weights_only=False)["metadata"].close()  # the file does what this test says it would
    assert marker.exists()


def test_old_format_loads(tmp_path: Path, state_dict: dict[str, torch.Tensor]):
    """torch's format before zip files, which cannot be mapped."""
    content = {"model_state_dict": state_dict, "config": CONFIG}
    torch.save(content, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert torch.equal(load_weights(tmp_path / "old.pth").state_dict["norm.weight"], state_dict["norm.weight"])


def test_unreadable_files_are_named(tmp_path: Path, path: Path):
    """Absent, a folder, text, a bare pickle, cut short: always the file's name and what it should hold."""
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "pickle.pth").write_bytes(pickle.dumps([1]))
    (tmp_path / "cut.pth").write_bytes(path.read_bytes()[:-100])
    with zipfile.ZipFile(tmp_path / "other.pth", "w") as file:
        file.writestr("a.txt", "b")
    for name in ("absent.pth", ".", "text.pth", "pickle.pth", "cut.pth", "other.pth"):
        with pytest.raises(UserError, match="expected a SimpleLLaMA checkpoint") as raised:
            load_weights(tmp_path / name)
        assert str(tmp_path / name) in str(raised.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weights": {}}, r"found \['weights'\]"),
        ([1], "found list"),
        ({"model_state_dict": {}, "config": {"n_embd": 8}}, "config of dict"),
        ({"model_state_dict": [1], "config": CONFIG}, "model_state_dict of list"),
        ({"model_state_dict": {"norm.weight": 1}, "config": CONFIG}, "'norm.weight'"),
        ({"model_state_dict": {"norm.weight": torch.ones(8, dtype=torch.int64)}, "config": CONFIG}, "real numbers"),
    ],
)
def test_other_contents_are_refused(tmp_path: Path, content: object, message: str):
    """Readable, but no checkpoint."""
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(UserError, match=message):
        load_weights(tmp_path / "other.pth")


def test_build_model_copies(state_dict: dict[str, torch.Tensor]):
    """The model has the file's weights in the dtype asked for; training it leaves the loaded tensors alone."""
    before = torch.get_rng_state()
    for dtype in (torch.float32, torch.bfloat16):
        model = build_model(_loaded(state_dict), dtype, "cpu")
        assert model.head_weight.dtype == dtype
        assert model.head_weight.requires_grad
        assert torch.equal(model.norm.weight, state_dict["norm.weight"].to(dtype))
        with torch.no_grad():
            model.norm.weight.add_(1)
        assert torch.equal(state_dict["norm.weight"], torch.ones(8))
        assert model(torch.tensor([[1, 2, 9]])).shape == (1, 3, 10)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_empty_model_draws_nothing(state_dict: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing without values imports torch's compiler, a second of each start; one with values draws as ever."""
    drawn: list[torch.Tensor] = []
    monkeypatch.setattr(torch.Tensor, "normal_", lambda self, *args, **kwargs: drawn.append(self) or self)
    loaded = _loaded(state_dict)
    assert all(parameter.is_meta for parameter in empty_model(loaded).parameters()) and not drawn
    LLaMaTransformer(loaded.architecture)
    assert drawn


def test_build_model_names_what_does_not_fit(state_dict: dict[str, torch.Tensor]):
    """Missing, unexpected and mis-shaped tensors, all in one message."""
    state_dict["surplus"] = state_dict.pop("norm.weight")
    state_dict["decoder_blocks.0.ffwd.w1.weight"] = torch.zeros(3, 8)
    with pytest.raises(UserError) as raised:
        build_model(_loaded(state_dict), torch.float32, "cpu")
    message = str(raised.value)
    assert message.startswith("some.pth: ")
    assert "missing norm.weight" in message
    assert "unexpected surplus" in message
    assert "w1.weight (3, 8) instead of (24, 8)" in message


def test_build_model_without_embeddings():
    """An empty state dict is a UserError like any other: the first few names, and how many more."""
    with pytest.raises(UserError, match=r"missing decoder_blocks.0.attention.out.weight, .* and 4 more"):
        build_model(_loaded({}), torch.float32, "cpu")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3.4e38])
def test_build_model_refuses_weights_that_are_not_finite(state_dict: dict[str, torch.Tensor], value: float):
    """One bad number in one tensor; 3.4e38 is finite in fp32 but rounds to infinity in bf16."""
    state_dict["decoder_blocks.0.norm1.weight"][3] = value
    with pytest.raises(UserError, match=r"found inf or nan in decoder_blocks.0.norm1.weight"):
        build_model(_loaded(state_dict), torch.bfloat16, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_not_finite_is_found_wherever_it_is(dtype: torch.dtype, value: float) -> None:
    """At the ends and within, of sizes around those of vectors, and of one that several threads share."""
    for size in (1, 15, 16, 17, 33, 100_003):
        for at in {0, size // 2, size - 1}:
            tensor = torch.linspace(-1, 1, size).to(dtype)
            check_finite(Path("some.pth"), dtype, {"a": tensor})
            tensor[at] = value
            with pytest.raises(UserError, match="found inf or nan in b$"):
                check_finite(Path("some.pth"), dtype, {"a": torch.ones(2), "b": tensor})


def test_architecture_of_a_file(state_dict: dict[str, torch.Tensor]):
    """The vocabulary is counted in the embeddings; the dropout of the file's own training is not a run's."""
    loaded = WeightsFile(state_dict, replace(CONFIG, dropout=0.3), {}, Path("some.pth"))
    assert loaded.architecture == Architecture.of(CONFIG, 10)
    assert loaded.config.dropout == 0.3
    assert build_model(loaded, torch.float32, "cpu", dropout=0.2).architecture.dropout == 0.2


def test_build_model_checks_the_config(state_dict: dict[str, torch.Tensor]):
    """A config that no model can have is reported with the file's name."""
    config = TrainingConfig.__new__(TrainingConfig)
    config.__dict__.update(CONFIG.__dict__, n_heads=3)
    with pytest.raises(UserError, match=r"some.pth: config: n_embd: expected a multiple"):
        build_model(WeightsFile(state_dict, config, {}, Path("some.pth")), torch.float32, "cpu")


def test_find_weights(tmp_path: Path):
    """A file is itself; a folder is its newest .pth; other files and half-written ones do not count."""
    with pytest.raises(UserError, match=r"expected a folder with a .pth file"):
        find_weights(tmp_path)
    with pytest.raises(UserError, match="found nothing there"):
        find_weights(tmp_path / "absent")
    for name, age in (("b.pth", 10), ("a.pth", 20), (".c.pth", 30), ("d.txt", 40)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (age, age))
    assert find_weights(tmp_path) == tmp_path / "a.pth"
    assert find_weights(tmp_path / "b.pth") == tmp_path / "b.pth"


@pytest.mark.parametrize(
    ("name", "files", "found"),
    [
        ("HuggingFaceTB/SmolLM2-135M", (), "found nothing there"),
        ("model", ("config.json", "model.safetensors"), "found safetensors files"),
        ("model", ("model-Q4_K_M.gguf",), "found GGUF files"),
        ("model/model.safetensors", ("model.safetensors",), "found a safetensors file"),
        ("model/model.gguf", ("model.gguf",), "found a GGUF file"),
    ],
)
def test_other_forms_are_named_and_refused(tmp_path: Path, name: str, files: tuple[str, ...], found: str):
    """A model's name, a Hugging Face folder, GGUF: the message says what a checkpoint holds, and who writes one."""
    for file in files:
        (tmp_path / "model").mkdir(exist_ok=True)
        (tmp_path / "model" / file).touch()
    with pytest.raises(UserError, match=found) as error:
        find_weights(tmp_path / name)
    for said in ("model_state_dict", "TrainingConfig", "start_model.py", "make demo", "Hugging Face", "not looked up"):
        assert said in str(error.value)


def test_a_checkpoint_among_other_files_is_found(tmp_path: Path):
    """A .pth beside the files of another program is taken."""
    for file in ("config.json", "model.safetensors", "sft.pth"):
        (tmp_path / file).touch()
    assert find_weights(tmp_path) == tmp_path / "sft.pth"


def test_save_writes_views_alone(tmp_path: Path, state_dict: dict[str, torch.Tensor]):
    """Tensors that are views of one large buffer (as ZeRO keeps them) do not bring the buffer along."""
    flat = torch.zeros(1_000_000)
    views = {name: flat[: t.numel()].view(t.shape) for name, t in state_dict.items()}
    save_weights(tmp_path / "views.pth", views, CONFIG, {})
    assert (tmp_path / "views.pth").stat().st_size < 100_000


def test_save_leaves_the_old_file_when_it_fails(path: Path, monkeypatch: pytest.MonkeyPatch):
    """A full disk in the middle of a write (torch reports it as RuntimeError): the old file stays, no temp remains."""

    def full(obj: object, file: IO[bytes]) -> None:
        file.write(b"half")
        raise RuntimeError("unexpected pos")

    before = path.read_bytes()
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match=r"cannot write .*model.pth"):
        save_weights(path, {}, CONFIG, {})
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["model.pth"]


@pytest.mark.parametrize("room", [100, 5000, 500_000])
def test_a_full_disk_is_said_in_its_own_words(tmp_path: Path, state_dict: dict[str, torch.Tensor], room: int):
    """Wherever in the file it shows: torch has words of its own for some places."""
    state_dict["norm.weight"] = torch.zeros(200_000)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))  # a disk with so much room
    try:
        with pytest.raises(UserError, match=r"cannot write .*model.pth: File too large; free space or choose"):
            save_weights(tmp_path / "model.pth", state_dict, CONFIG, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_the_same_weights_are_the_same_file(tmp_path: Path, state_dict: dict[str, torch.Tensor]):
    """Whatever its name, and that of its temporary file: none of them stands in it."""
    for name in ("a.pth", "b.pth"):
        save_weights(tmp_path / name, state_dict, CONFIG, {"step": 1})
    assert (tmp_path / "a.pth").read_bytes() == (tmp_path / "b.pth").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.pth") as archive:
        assert {name.split("/")[0] for name in archive.namelist()} == {"archive"}


def test_of_files_of_one_moment_the_highest_number_is_taken(tmp_path: Path):
    """sft_10E comes after sft_9E, 0.10 before 0.9; a copy keeps times, so they may well be equal."""
    names = ["sft_9E_0.5L.pth", "sft_10E_0.9L.pth", "sft_10E_0.10L.pth", "sft_1E.pth"]
    for name in names:
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (10, 10))
    assert find_weights(tmp_path).name == "sft_10E_0.9L.pth"


def test_adapters_alone_are_told_what_they_need(tmp_path: Path):
    """Upstream's LoRA files: what they are, which base they need, and that it is the file to give."""
    config = replace(CONFIG, use_lora=True, lora_rank=4, lora_alpha=8, q_lora=True, k_lora=False, v_lora=True)
    adapters = {"decoder_blocks.0.attention.q_lora_layer.lora_a": torch.ones(8, 4)}
    torch.save({"lora_adapters": adapters, "config": config}, tmp_path / "lora.pth")
    with pytest.raises(UserError, match=r"lora.pth: expected a SimpleLLaMA checkpoint") as raised:
        load_weights(tmp_path / "lora.pth")
    for said in (
        "LoRA adapters alone (1 tensors, rank 4, alpha 8, of the projections q, v)",
        "the SFT or pretraining .pth that they were trained on, a checkpoint with n_embd 8, n_layers 1, n_heads 2",
        "give that as --model_path and this as --adapter_path",
    ):
        assert said in str(raised.value)


def test_digest(state_dict: dict[str, torch.Tensor]):
    """Order does not count; one weight, a name, a dtype or a shape does."""
    digest = weights_digest(state_dict)
    assert weights_digest(dict(reversed(state_dict.items()))) == digest
    assert len(digest) == 32

    def changed(name: str, tensor: torch.Tensor) -> str:
        return weights_digest({**state_dict, name: tensor})

    weight = state_dict["final_linear.weight"]
    nudged = weight.clone()
    nudged[0, 0] = torch.nextafter(nudged[0, 0], torch.tensor(1.0))
    others = [
        changed("final_linear.weight", nudged),
        changed("final_linear.weight", weight.reshape(8, 10)),
        changed("norm.weight", state_dict["norm.weight"].bfloat16()),  # ones: the same values in another dtype
        changed("another", weight),
    ]
    assert len({digest, *others}) == 5
