"""Models of each family compute what transformers computes: logits and a DPO step's gradients, in fp32.

Against recorded values, and against transformers itself where it is installed (in an environment of its own).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from families import BETA, CONFIGS, VOCAB, pairs, reference, weights
from golden.make_families import Computed, chats, computed_by, model_of, rows_of
from simple_llama.interop.hf_config import HFModelConfig, config_json, read_hf_config
from simple_llama.interop.hf_export import ExportForm, write_folder
from simple_llama.interop.hf_folder import HFFolder
from simple_llama.interop.hf_names import LLAMA, from_hf, shapes_in, to_hf
from simple_llama.ops.attention import PackedLayout
from simple_llama.pretraining.llama_transformer import LLaMaTransformer
from simple_llama.pretraining.weights import build_model
from simple_llama.reinforcement_learning.rlhf.data.pair_batch import PairBatch
from simple_llama.reinforcement_learning.rlhf.data.tokenized_pair import TokenizedPair
from simple_llama.reinforcement_learning.rlhf.objective.policy import DPOPolicy, pair_logps
from simple_llama.reinforcement_learning.rlhf.objective.preference_loss import PreferenceLoss

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "families.safetensors"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small are slower on several threads, by far where other processes are at work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def config_of(family: str) -> HFModelConfig:
    """The family's config.json, read."""
    return read_hf_config(CONFIGS[family], family)


def our_model(family: str) -> LLaMaTransformer:
    """Our model with the family's values."""
    architecture = config_of(family).architecture
    model = LLaMaTransformer(architecture)
    model.load_state_dict(from_hf(weights(family, shapes_in(architecture)), architecture))
    return model


@cache
def _recorded() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN)


def recorded(family: str) -> Computed:
    """What make_families.py wrote."""
    found = _recorded()
    prefix = f"{family}/gradient/"
    gradients = {name.removeprefix(prefix): tensor for name, tensor in found.items() if name.startswith(prefix)}
    return Computed(found[f"{family}/logits"], found[f"{family}/logps_B2"], found[f"{family}/loss"], gradients)


def assert_logits(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Within 1e-4 + 3e-6 |logit|."""
    assert found.shape == expected.shape
    excess = (found - expected).abs() - 3e-6 * expected.abs()
    assert excess.max() <= 1e-4, f"{excess.max():.1e}"


def plain_logits(model: LLaMaTransformer) -> torch.Tensor:
    """Each chat alone."""
    with torch.no_grad():
        return torch.cat([rows_of(model(torch.tensor([chat]))[0]) for chat in chats(pairs())])


def packed_logits(model: LLaMaTransformer) -> torch.Tensor:
    """All chats in one stream, both answers behind one prompt."""
    found, tokens, positions, places, segments = pairs(), [], [], [], []
    for prompt, chosen, rejected in found:
        start, prefix = len(tokens), len(prompt)
        segments.append((prefix, (len(chosen), len(rejected))))
        tokens += prompt + chosen + rejected
        positions += [*range(prefix + len(chosen)), *range(prefix, prefix + len(rejected))]
        trunk, end = list(range(start, start + prefix)), start + prefix + len(chosen)
        places += [trunk + list(range(start + prefix, end)), trunk + list(range(end, end + len(rejected)))]
    with torch.no_grad():
        hidden_TD = model.hidden(torch.tensor(tokens), torch.tensor(positions), PackedLayout(tuple(segments)))
        logits_TV = hidden_TD @ model.head_weight.T
    return torch.cat([rows_of(logits_TV[rows]) for rows in places])


def our_step(model: LLaMaTransformer, logps_B2: torch.Tensor) -> Computed:
    """A DPO step on the packed pairs, its reference that of the log-probs given; gradients by transformers' names."""
    architecture = model.architecture
    batch = PairBatch.pack(
        [
            TokenizedPair.from_chats(
                pair.prompt + pair.chosen, len(pair.chosen), pair.prompt + pair.rejected, len(pair.rejected)
            )
            for pair in pairs()
        ]
    )
    policy = DPOPolicy(model, PreferenceLoss("sigmoid", BETA))
    found_B2 = pair_logps(model, batch)
    loss = policy(batch, reference(logps_B2)).loss / 2
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert len(gradients) == len(list(model.parameters()))
    return Computed(torch.empty(0), found_B2, loss.detach(), to_hf(gradients, architecture))


def assert_step(found: Computed, expected: Computed) -> None:
    """Each parameter's gradient within 1e-4 of its largest element; loss and log-probs with it."""
    torch.testing.assert_close(found.logps_B2, expected.logps_B2, rtol=3e-6, atol=1e-4)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-4, atol=0)
    assert found.gradients.keys() == expected.gradients.keys()
    for name, gradient in found.gradients.items():
        largest = expected.gradients[name].abs().max()
        assert largest > 0, name
        assert (gradient - expected.gradients[name]).abs().max() <= 1e-4 * largest, name


@pytest.mark.parametrize("family", CONFIGS)
def test_logits_are_those_of_transformers(family: str) -> None:
    """Rows up to position 2,046: each chat alone; packed, both answers behind one prompt; one by one with a cache."""
    model, expected = our_model(family), recorded(family).logits
    assert expected.abs().max() > 3  # values worth comparing
    assert_logits(plain_logits(model), expected)
    assert_logits(packed_logits(model), expected)
    chat = torch.tensor(chats(pairs())[0])
    cache = model.new_cache(2000)
    generated = [model.decode(rows, cache) for rows in chat[:2000].split([10, 1, 1988, 1])]
    assert_logits(torch.stack(generated[1::2]), expected[[2, 4]])  # rows 10 and 1,999


@pytest.mark.parametrize("family", CONFIGS)
def test_gradients_are_those_of_a_padded_step_of_transformers(family: str) -> None:
    """Packed pairs with shared prompts against one padded batch of four chats."""
    expected = recorded(family)
    assert_step(our_step(our_model(family), expected.logps_B2), expected)


@pytest.mark.parametrize("family", CONFIGS)
def test_live(family: str) -> None:
    """The same against transformers as it is here, and the recorded values are its values."""
    pytest.importorskip("transformers")
    theirs = computed_by(model_of(family))
    ours = our_model(family)
    assert_logits(packed_logits(ours), theirs.logits)
    assert_step(our_step(ours, theirs.logps_B2), theirs)
    assert_logits(theirs.logits, recorded(family).logits)
    assert_step(theirs, recorded(family))


def make_folder(family: str, folder: Path) -> HFFolder:
    """The family's model as a folder without a tokenizer, opened."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIGS[family]))
    theirs = weights(family, shapes_in(config_of(family).architecture))
    save_file(theirs, folder / "model.safetensors", {"format": "pt"})
    return HFFolder(folder)


@pytest.mark.parametrize("family", CONFIGS)
def test_through_a_folder_and_back(family: str, tmp_path: Path) -> None:
    """A folder's model computes the same (the rows of the short chats), and an export has every tensor bit for bit."""
    start = make_folder(family, tmp_path / "in")
    with start.reading() as loaded:
        model = build_model(loaded, torch.float32, "cpu")
    short = chats(pairs())[2:]
    with torch.no_grad():
        found = torch.cat([rows_of(model(torch.tensor([chat]))[0]) for chat in short])
    assert_logits(found, recorded(family).logits[-len(found) :])
    start.export(tmp_path / "out", dict(model.state_dict()), {})
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("in", "out"))
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert HFFolder(tmp_path / "out").architecture == start.architecture


@pytest.mark.parametrize("family", [*CONFIGS, "ours"])
def test_live_export(family: str, tmp_path: Path) -> None:
    """The other direction: a model of ours with random values, exported, is loaded by transformers and computes the
    same; so is one that came as no folder (`ours`), as a LlamaForCausalLM."""
    transformers = pytest.importorskip("transformers")
    architecture = config_of("llama2" if family == "ours" else family).architecture
    torch.manual_seed(0)
    ours, out = LLaMaTransformer(architecture), tmp_path / "out"
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    if family == "ours":
        form = ExportForm(architecture, LLAMA, config_json(architecture, torch.float32), torch.float32, {})
        write_folder(out, ours.state_dict(), form, {})
    else:
        make_folder(family, tmp_path / "in").export(out, ours.state_dict(), {}, torch.float32)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(report.values()), report
    assert type(theirs).__name__ == CONFIGS.get(family, CONFIGS["llama2"])["architectures"][0]
    ids = torch.randint(VOCAB, (1, 300), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert_logits(ours(ids), theirs(input_ids=ids).logits)
