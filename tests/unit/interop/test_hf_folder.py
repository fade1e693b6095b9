"""A Hugging Face folder as the start of a run: the same model as its weights say, held, read tensor by tensor."""

from __future__ import annotations

import gc
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from simple_llama.common.errors import UserError
from simple_llama.interop import hf_folder
from simple_llama.interop.hf_config import read_hf_config
from simple_llama.interop.hf_folder import HFFolder
from simple_llama.interop.hf_names import from_hf, shapes_in, to_hf
from simple_llama.interop.hf_tokenizer import tokenizer_at
from simple_llama.interop.open_start import open_start, start_metadata
from simple_llama.interop.safetensors_files import SafetensorsFiles, open_weights
from simple_llama.pretraining.start_file import StartFile
from simple_llama.pretraining.start_model import StartChanged
from simple_llama.pretraining.weights import build_model, check_weights, weights_digest
from tiny_hf import ARCHITECTURE, CONFIG, make_hf_folder, random_weights
from tiny_job import make_job

HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Writes the folder's weights again, changed."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def change_config(folder: Path, **changes: object) -> None:
    """Writes config.json again, with other values."""
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))


def split(folder: Path) -> None:
    """The same weights in two files, with an index."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "two files"])
def test_the_model_is_that_of_the_files(tmp_path: Path, sharded: bool) -> None:
    """Names, values and digest of the weights that were written; grouped keys and a tied head stay as they are."""
    folder, tensors = make_hf_folder(tmp_path), random_weights()
    if sharded:
        split(folder)
    start = open_start(folder)
    assert isinstance(start, HFFolder) and start.path == folder and start.export_suffix == ""
    assert start.architecture == ARCHITECTURE and start.names == list(tensors)
    assert start.digest == weights_digest(tensors) and start.export_dtype == torch.float32
    with start.reading() as loaded:
        assert list(loaded.state_dict) == list(tensors)
        assert all(torch.equal(loaded.state_dict[name], tensor) for name, tensor in tensors.items())
        model = build_model(loaded, torch.bfloat16, "cpu")
    assert model.head_weight is model.embeddings.weight
    assert torch.equal(model.norm.weight, tensors["norm.weight"].bfloat16())
    with pytest.raises(KeyError):
        loaded.state_dict["no.weight"]


def test_a_config_that_computes_otherwise_is_another_reference(tmp_path: Path) -> None:
    """The same tensors, other frequencies: the digest of weights does not see it, the numerics do."""
    first = HFFolder(make_hf_folder(tmp_path))
    change_config(tmp_path, rope_theta=20000.0)
    second = HFFolder(tmp_path)
    assert first.digest == second.digest and first.numerics != second.numerics


@pytest.mark.parametrize("broken", ["nan", "inf"])
def test_weights_that_are_not_finite_are_named(tmp_path: Path, broken: str) -> None:
    """As of a .pth, by our names."""
    folder = make_hf_folder(tmp_path)
    change_weights(folder, lambda tensors: tensors["model.norm.weight"].fill_(float(broken)))
    with pytest.raises(UserError, match=r"expected finite weights in torch.float32, found inf or nan in norm.weight"):
        check_weights(HFFolder(folder).load(), torch.float32)


def test_a_tied_head_that_was_written_too(tmp_path: Path) -> None:
    """The same numbers under both names are one matrix; others are refused, whichever was meant."""
    folder = make_hf_folder(tmp_path)
    change_weights(folder, lambda tensors: tensors.update({HEAD: tensors[EMBEDDINGS].clone()}))
    assert HFFolder(folder).names == list(random_weights())
    for change in (lambda head: head + 1, lambda head: head.flatten().clone(), lambda head: head.double()):
        change_weights(folder, lambda tensors, change=change: tensors.update({HEAD: change(tensors[EMBEDDINGS])}))
        with pytest.raises(UserError, match=r"the head is the embeddings .tie_word_embeddings., found lm_head.weight"):
            HFFolder(folder)


def test_frequencies_of_old_files_are_passed_over(tmp_path: Path) -> None:
    """They follow from config.json; nothing else that is left over is."""
    folder = make_hf_folder(tmp_path)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change_weights(folder, lambda tensors: tensors.update({name: torch.ones(4)}))
    assert HFFolder(folder).digest == weights_digest(random_weights())
    change_weights(folder, lambda tensors: tensors.update({f"{name}_x": torch.ones(4)}))
    with pytest.raises(UserError, match=rf"unexpected {name}_x$"):
        HFFolder(folder)


def test_an_export_of_fp64_is_in_fp32(tmp_path: Path) -> None:
    """No computation is in fp64, and no export."""
    folder = make_hf_folder(tmp_path)
    change_weights(folder, lambda tensors: tensors.update({name: t.double() for name, t in tensors.items()}))
    assert HFFolder(folder).export_dtype == torch.float32


def test_wrong_tensors_are_told_by_the_names_of_the_files(tmp_path: Path) -> None:
    """Missing, left over and misshapen ones in one message."""
    folder = make_hf_folder(tmp_path)

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.norm.weight"]
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(32)
        tensors["model.layers.1.self_attn.k_proj.weight"] = torch.zeros(32, 32)

    change_weights(folder, spoil)
    expected = (
        f"{folder}: expected the tensors that config.json describes, found missing model.norm.weight; "
        "unexpected model.layers.0.self_attn.q_proj.bias; "
        "wrong shapes: model.layers.1.self_attn.k_proj.weight (32, 32) instead of (16, 32)"
    )
    with pytest.raises(UserError, match=f"^{re.escape(expected)}$"):
        HFFolder(folder)


# === Which start it is ===


def test_a_folder_with_a_pth_is_simplellamas_unless_it_has_the_weights_of_the_other(tmp_path: Path) -> None:
    """The .pth as ever, beside any config.json; transformers' trainer leaves an rng_state.pth beside the weights."""
    job = make_job(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert isinstance(open_start(tmp_path), StartFile)
    folder = make_hf_folder(tmp_path / "model")
    (folder / "rng_state.pth").write_bytes((job.folder / "start.pth").read_bytes())
    assert isinstance(open_start(folder), HFFolder)


def test_records_of_a_run_are_no_model(tmp_path: Path) -> None:
    """The folder of a run's curves says where its checkpoints are; where both are one folder, it has them."""
    make_job(tmp_path)
    (tmp_path / "metrics.jsonl").touch()
    settings = {"ckpt_dir": str(tmp_path.parent), "run_name": tmp_path.name}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert isinstance(open_start(tmp_path), StartFile)
    (tmp_path / "config.json").write_text(json.dumps({**settings, "run_name": "first"}))
    for look in (open_start, start_metadata):
        with pytest.raises(UserError, match=f"records of a run, whose checkpoints are in {tmp_path.parent / 'first'}$"):
            look(tmp_path)


def test_of_a_run_folder_the_newest_export_is_taken(tmp_path: Path) -> None:
    """A run's folder has its settings as config.json, states, and exports: the last one written, whatever its name."""
    start = HFFolder(make_hf_folder(tmp_path / "model"))
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text("{}")
    (run / "state").mkdir()
    for number, name in enumerate(("dpo_2E", "dpo_1E", ".dpo_3E.1.tmp")):
        start.export(run / name, random_weights(number), {"step": number})
        os.utime(run / name, ns=(number, number))
    assert open_start(run).path == run / "dpo_1E"


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["config.json"], "expected model.safetensors or model.safetensors.index.json, found no weights"),
        (["pytorch_model.bin"], "expected a folder with a Hugging Face model .config.json, safetensors., found no con"),
        (["model.safetensors"], "found no config.json"),
        (["x.gguf"], "expected a folder with a .pth file, found GGUF files"),
    ],
)
def test_a_folder_that_lacks_its_files_says_what_it_needs(tmp_path: Path, names: list[str], words: str) -> None:
    """What stands in it tells which kind of folder was meant."""
    for name in names:
        (tmp_path / name).write_text(json.dumps(CONFIG))
    with pytest.raises(UserError, match=words):
        open_start(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_one_file_of_a_folder_is_not_the_model(tmp_path: Path, name: str) -> None:
    """The folder is to be given."""
    with pytest.raises(UserError, match=rf"{name}: expected the folder of a Hugging Face model, .*give its folder"):
        open_start(make_hf_folder(tmp_path) / name)


def test_a_download_of_several_versions_is_not_one_model(tmp_path: Path) -> None:
    """Which version is not guessed; each of them is a folder, whose files are links."""
    files = make_hf_folder(tmp_path / "blobs")
    version = tmp_path / "snapshots" / "3f1a"
    version.mkdir(parents=True)
    for file in files.iterdir():
        (version / file.name).symlink_to(f"../../blobs/{file.name}")
    with pytest.raises(UserError, match=r"found the folder of all; give one of snapshots/3f1a$"):
        open_start(tmp_path)
    assert open_start(version).digest == weights_digest(random_weights())


def test_a_folder_that_transformers_wrote(tmp_path: Path) -> None:
    """In shards, in bf16, with a tied head: the values that its model has. Live, where transformers is installed."""
    transformers = pytest.importorskip("transformers")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG)).to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    start, tensors = open_start(tmp_path), from_hf(dict(model.state_dict()), ARCHITECTURE)
    assert start.digest == weights_digest(tensors) and start.export_dtype == torch.bfloat16


# === Held ===


@pytest.mark.parametrize("change", ["replaced", "deleted"])
def test_the_held_files_are_read_whatever_the_folder_holds(tmp_path: Path, change: str) -> None:
    """Another model in its place, or none: the values of the first read, also in an export."""
    folder = make_hf_folder(tmp_path / "model")
    start = HFFolder(folder)
    folder.rename(tmp_path / "old")
    if change == "replaced":
        make_hf_folder(folder, seed=8)
    else:
        for file in (tmp_path / "old").iterdir():
            file.unlink()
    with start.reading() as loaded:
        assert weights_digest(loaded.state_dict) == start.digest
    start.export(tmp_path / "out", {"norm.weight": torch.full((32,), 7.0)}, {"step": 3})
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written["model.norm.weight"].tolist() == [7.0] * 32
    assert torch.equal(written[EMBEDDINGS], random_weights()["embeddings.weight"])
    assert start.export_metadata(tmp_path / "out") == {"step": 3}


def overwrite(path: Path) -> None:
    """Another model's bytes in the same file: its name, inode and size stay."""
    save_file(to_hf(random_weights(8), ARCHITECTURE), path.with_name("other"), {"format": "pt"})
    data = path.with_name("other").read_bytes()
    assert len(data) == path.stat().st_size
    with path.open("r+b") as file:
        file.write(data)


@pytest.mark.parametrize("change", [overwrite, lambda path: os.truncate(path, 4096)], ids=["overwritten", "cut"])
def test_files_changed_in_place_are_refused(tmp_path: Path, change: Callable[[Path], object]) -> None:
    """No read gives the other bytes, none ends the process, and no export is left; one that needs no read is whole."""
    folder = make_hf_folder(tmp_path / "model")
    start = HFFolder(folder)
    change(folder / "model.safetensors")
    if change is not overwrite:
        with pytest.raises(StartChanged, match=r"it had [\d,]+ bytes, now 4,096"):
            start.load()
    with (
        pytest.raises(StartChanged, match=r"model.safetensors: the start model has changed"),
        start.reading() as loaded,
    ):
        build_model(loaded, torch.float32, "cpu")
    with pytest.raises(StartChanged):
        start.export(tmp_path / "out", {"norm.weight": torch.ones(32)}, {})
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    start.export(tmp_path / "out", random_weights(9), {})
    assert HFFolder(tmp_path / "out").digest == weights_digest(random_weights(9))


def test_an_export_is_in_the_dtype_that_came(tmp_path: Path) -> None:
    """bf16 in, bf16 out: each number of the fp32 master rounded once."""
    folder = make_hf_folder(tmp_path / "model")
    change_weights(folder, lambda tensors: tensors.update({name: t.bfloat16() for name, t in tensors.items()}))
    start, trained = HFFolder(folder), random_weights(9)
    start.export(tmp_path / "out", trained, {})
    assert start.export_dtype == torch.bfloat16
    with HFFolder(tmp_path / "out").reading() as loaded:
        assert all(torch.equal(loaded.state_dict[name], tensor.bfloat16()) for name, tensor in trained.items())
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    start.export(tmp_path / "exact", trained, {}, torch.float32)
    assert HFFolder(tmp_path / "exact").digest == weights_digest(trained)


def test_each_tensor_of_an_export_has_the_dtype_that_it_came_in(tmp_path: Path) -> None:
    """Norms in fp32 beside matrices in bf16; --dtype is that of all. The sizes that the index says are the files'."""
    folder = make_hf_folder(tmp_path / "model")
    change_weights(folder, lambda found: found.update({n: t.bfloat16() for n, t in found.items() if "norm" not in n}))
    start, trained = HFFolder(folder), random_weights(9)
    start.export(tmp_path / "out", trained, {})
    start.export(tmp_path / "half", trained, {}, torch.bfloat16)
    before, after, half = (
        load_file(path / "model.safetensors") for path in (folder, tmp_path / "out", tmp_path / "half")
    )
    assert {name: tensor.dtype for name, tensor in after.items()} == {name: t.dtype for name, t in before.items()}
    assert {tensor.dtype for tensor in half.values()} == {torch.bfloat16}
    assert torch.equal(after["model.norm.weight"], trained["norm.weight"])
    assert torch.equal(after[EMBEDDINGS], trained["embeddings.weight"].bfloat16())


def test_ids_in_config_json_are_those_of_the_tokenizer_that_goes_along(tmp_path: Path) -> None:
    """<|im_start|> is 1, <|endoftext|> 0, <|im_end|> 2; another tokenizer ends at two, and names no padding."""
    start = HFFolder(make_hf_folder(tmp_path / "model"))
    other = make_hf_folder(tmp_path / "other")
    settings = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
    (other / "tokenizer_config.json").write_text(json.dumps(settings))
    (other / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))
    start.export(tmp_path / "own", {}, {})
    start.export(tmp_path / "out", {}, {}, tokenizer=tokenizer_at(other))
    own, out = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("own", "out"))
    assert (own["bos_token_id"], own["eos_token_id"], "pad_token_id" in own) == (1, 2, False)
    assert (out["bos_token_id"], out["eos_token_id"], out["pad_token_id"]) == (0, [0, 2], None)
    assert HFFolder(tmp_path / "out").architecture == start.architecture


@pytest.mark.parametrize("part", ["folder", "tokenizer_config.json"])
def test_a_folder_that_is_replaced_while_it_is_opened(
    tmp_path: Path, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights of one model beside the config or the tokenizer of another are no model."""
    folder, other = make_hf_folder(tmp_path / "model"), make_hf_folder(tmp_path / "other", seed=8)
    (other / "tokenizer_config.json").write_text("{}")

    def replace_and_open(path: Path) -> SafetensorsFiles:
        if part == "folder":
            folder.rename(tmp_path / "old")
            other.rename(folder)
        else:
            (other / part).rename(folder / part)
        return open_weights(path)

    monkeypatch.setattr(hf_folder, "open_weights", replace_and_open)
    with pytest.raises(UserError, match="model: expected one model, found that it was replaced while it was read"):
        HFFolder(folder)


# === Memory ===


def memory(which: str) -> int:
    """MiB of this process: VmRSS, or VmHWM, the most since `forget_peak`."""
    return int(Path("/proc/self/status").read_text().split(f"{which}:")[1].split()[0]) >> 10


def forget_peak() -> int:
    """Starts a new measurement; gives what is in memory now."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc")
def test_memory_of_a_load_is_bounded(tmp_path: Path) -> None:
    """100 MiB of bf16 weights, of which the embeddings are 32: opening and checking take one tensor at a time, a load
    takes the model. The bound is RSS after it + the largest tensor in fp32 + 200 MB; here less is allowed."""
    wide = {"vocab_size": 16384, "hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 4}
    folder = make_hf_folder(tmp_path)
    change_config(folder, **wide, num_attention_heads=16, num_key_value_heads=4)
    config = read_hf_config(json.loads((folder / "config.json").read_text()), "config.json")
    shapes = shapes_in(config.architecture)
    save_file({name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}, folder / "x")
    (folder / "x").rename(folder / "model.safetensors")
    assert 100 << 20 < (folder / "model.safetensors").stat().st_size < 101 << 20
    largest, slack = 32, 64  # MiB: pieces in fp32, and what the heap keeps; together less than the file
    before = forget_peak()
    start = HFFolder(folder)
    check_weights(start.load(), torch.bfloat16)
    assert memory("VmHWM") <= before + largest + slack
    forget_peak()
    with start.reading() as loaded:
        model = build_model(loaded, torch.float32, "cpu")
    assert memory("VmHWM") <= memory("VmRSS") + largest + slack
    del model
