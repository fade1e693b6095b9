"""The transformer: equal to upstream's, and the same for a sequence however it is packed."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from simple_llama.common.errors import UserError
from simple_llama.ops.attention import PackedLayout
from simple_llama.ops.remade import keeping_all
from simple_llama.pretraining.architecture import Architecture
from simple_llama.pretraining.config import TrainingConfig
from simple_llama.pretraining.llama_transformer import LLaMaTransformer
from simple_llama.pretraining.rotary import rotation
from simple_llama.pretraining.weights import build_model, load_weights
from tiny_job import MLA

VOCAB = 50
SMALL: dict[str, Any] = {"n_embd": 32, "n_heads": 4, "n_layers": 2, "multiple_of": 16, "max_seq_len": 32}
LORA: dict[str, Any] = {"use_lora": True, "lora_rank": 2, "k_lora": True, "o_lora": True}
KINDS: dict[str, Any] = {
    "mha": {},
    "mla": MLA,
    "mla_q": {**MLA, "q_lora_rank": 10},
    "mha_lora": LORA,
    "mla_lora": {**MLA, **LORA},
}

# one pair: a prefix of 4 tokens and branches of 3 and 5
PAIR = PackedLayout(((4, (3, 5)),))
POSITIONS = torch.tensor([0, 1, 2, 3, 4, 5, 6, 4, 5, 6, 7, 8])


def _model(kind: str = "mha", **changes) -> LLaMaTransformer:
    """A small model in fp32, weights large enough that every part matters."""
    torch.manual_seed(0)
    model = LLaMaTransformer(Architecture.of(TrainingConfig(**{**SMALL, **KINDS[kind], **changes}), VOCAB))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def _tokens(count: int, seed: int = 0) -> torch.Tensor:
    """Token ids of the small vocabulary."""
    return torch.randint(VOCAB, (count,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ["mha", "mla", "mha_lora"])
def test_fixtures(shared_dir: Path, name: str):
    """Checkpoints and logits of the original code: strict load, fp32 logits within 1e-4, by forward and by decode."""
    model = build_model(load_weights(shared_dir / "fixtures" / f"{name}.pth"), torch.float32, "cpu").eval()
    with np.load(shared_dir / "fixtures" / f"{name}.npz") as file:
        ids, logits = torch.from_numpy(file["ids"]), torch.from_numpy(file["logits"])
    with torch.no_grad():
        assert (model(ids) - logits).abs().max() <= 1e-4
    assert (model.decode(ids[0], model.new_cache(ids.shape[1])) - logits[0, -1]).abs().max() <= 1e-4


def test_lora_fixture_needs_its_updates(shared_dir: Path):
    """With lora_b at zero the logits of the LoRA checkpoint are others: the updates are applied, and they matter."""
    model = build_model(load_weights(shared_dir / "fixtures" / "mha_lora.pth"), torch.float32, "cpu").eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        on = model(ids)
        for name, parameter in model.named_parameters():
            if name.endswith("lora_b"):
                parameter.zero_()
        off = model(ids)
    assert (on - off).abs().max() > 1e-2


def _merged(model: LLaMaTransformer, name: str) -> LLaMaTransformer:
    """Adds the `name` update, scale * (A B)^T, to the rows of the matrix that it stands beside, and zeroes it."""
    heads, lora, latent = model.architecture.heads, model.architecture.lora, model.architecture.latent
    assert lora
    parameters = dict(model.named_parameters())
    for layer in range(model.architecture.layers):
        attention = f"decoder_blocks.{layer}.attention"
        lora_b = parameters[f"{attention}.{name}_lora_layer.lora_b"]
        update = (lora.alpha / lora.rank * parameters[f"{attention}.{name}_lora_layer.lora_a"] @ lora_b).T
        if name == "o":
            rows = parameters[f"{attention}.{'wo' if latent else 'out'}.weight"].data
        elif latent:  # queries of a head: [without position | with]
            rows = parameters[f"{attention}.wq.weight"].data.unflatten(0, (heads, -1))
            rows = rows[:, : latent.plain_width]
        else:  # rows of a head: [q | k | v]
            part = "qkv".index(name)
            rows = parameters[f"{attention}.qkv_linear.weight"].data.unflatten(0, (heads, 3, -1))[:, part]
        rows += update.detach().view(rows.shape)
        lora_b.data.zero_()
    return model


@pytest.mark.parametrize(
    ("kind", "name"), [("mha_lora", name) for name in "qkvo"] + [("mla_lora", "q"), ("mla_lora", "o")]
)
def test_lora_equals_merged_weights(kind: str, name: str):
    """alpha/rank * A B beside a matrix is alpha/rank * (A B)^T added to it: same logits within 1e-4."""
    ids = _tokens(9)[None]
    with torch.no_grad():
        assert torch.allclose(_model(kind)(ids), _merged(_model(kind), name)(ids), atol=1e-4)


@pytest.mark.parametrize("kind", ["mha_lora", "mla_lora"])
@pytest.mark.parametrize("name", list("qkvo"))
def test_every_lora_update_matters(kind: str, name: str):
    """With one of the four at zero the logits are others."""
    ids, model = _tokens(9)[None], _model(kind)
    with torch.no_grad():
        before = model(ids)
        for parameter_name, parameter in model.named_parameters():
            if f"{name}_lora_layer.lora_b" in parameter_name:
                parameter.zero_()
        assert (model(ids) - before).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_packed_pair_equals_each_chat_alone(kind: str):
    """Prefix shared or computed with each chat: the same hidden rows within 1e-5; causal and per-sequence positions."""
    model, tokens = _model(kind), _tokens(12)
    packed = model.hidden(tokens, POSITIONS, PAIR)
    for branch in (slice(4, 7), slice(7, 12)):
        chat = torch.cat((tokens[:4], tokens[branch]))
        alone = model.hidden(chat, torch.arange(len(chat)), PackedLayout.causal([len(chat)]))
        assert torch.allclose(packed[:4], alone[:4], atol=1e-5)
        assert torch.allclose(packed[branch], alone[4:], atol=1e-5)


@pytest.mark.parametrize("kind", ["mha", "mla"])
def test_positions_not_reset_are_seen(kind: str):
    """Branch 1 at positions 7.. instead of 4..: its rows must differ, or the exactness test above could not fail."""
    model, tokens = _model(kind), _tokens(12)
    right, wrong = model.hidden(tokens, POSITIONS, PAIR), model.hidden(tokens, torch.arange(12), PAIR)
    assert (right[7:] - wrong[7:]).abs().max() > 1e-3
    assert torch.equal(right[:7], wrong[:7])


@pytest.mark.parametrize("kind", ["mha", "mla"])
def test_branches_do_not_see_each_other(kind: str):
    """Another token in branch 0 leaves branch 1 as it was, bit for bit; so does the gradient."""
    model, tokens = _model(kind), _tokens(12)
    other = tokens.clone()
    other[4] = (other[4] + 1) % VOCAB
    first, second = model.hidden(tokens, POSITIONS, PAIR), model.hidden(other, POSITIONS, PAIR)
    assert torch.equal(first[7:], second[7:])
    assert torch.equal(first[:4], second[:4])
    assert not torch.allclose(first[4:7], second[4:7], atol=1e-3)
    embedded = []
    model.embeddings.register_forward_hook(lambda _, __, out: embedded.append(out.retain_grad() or out))
    model.hidden(tokens, POSITIONS, PAIR)[7:].sum().backward()
    assert not embedded[0].grad[4:7].any()
    assert embedded[0].grad[:4].any()


@pytest.mark.parametrize(("kind", "scale"), [("mha", 8**-0.5), ("mla", 10**-0.5)])
def test_score_scale(kind: str, scale: float):
    """1 / sqrt(width of a query): 32 / 4 heads = 8, or 6 without position + 4 with."""
    scales = []

    def mix(q_THK: torch.Tensor, k_THK: torch.Tensor, v_THV: torch.Tensor, *, scale: float) -> torch.Tensor:
        scales.append(scale)
        return v_THV

    attention = dict(_model(kind).named_modules())["decoder_blocks.0.attention"]
    attention(torch.zeros(3, 32), rotation(torch.arange(3), 8 if kind == "mha" else 4, 10_000), mix)
    assert scales == [scale]


def test_forward_does_not_depend_on_batch_mates():
    """Two sequences as a batch equal each alone; later tokens do not reach earlier rows."""
    model = _model()
    ids = torch.stack((_tokens(9, 1), _tokens(9, 2)))
    both = model(ids)
    assert both.shape == (2, 9, VOCAB)
    assert torch.allclose(both[1:], model(ids[1:]), atol=1e-5)
    assert torch.allclose(both[:1, :5], model(ids[:1, :5]), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_decode_equals_forward(kind: str):
    """A prompt of 5 tokens at once, then 4 one by one, then 3 at once: each last row's logits as in forward."""
    model, tokens = _model(kind), _tokens(12)
    expected = model(tokens[None])[0]
    cache = model.new_cache(12)
    ends = [5, 6, 7, 8, 9, 12]
    for start, end in zip([0, *ends], ends, strict=False):
        assert torch.allclose(model.decode(tokens[start:end], cache), expected[end - 1], atol=1e-5)
    with pytest.raises(UserError, match=r"at most 12 tokens .* found 13"):
        model.decode(tokens[:1], cache)


def test_too_long_is_refused():
    """max_seq_len 32: a sequence of 33 tokens and a cache of 33 rows are refused before any work."""
    model = _model()
    with pytest.raises(UserError, match="max_seq_len = 32 tokens, found 33"):
        model(_tokens(33)[None])
    with pytest.raises(UserError, match="found 33"):
        model.hidden(_tokens(36), torch.arange(36), PackedLayout(((29, (3, 4)),)))
    with pytest.raises(UserError, match="found 33"):
        model.new_cache(33)
    assert model(_tokens(32)[None]).shape == (1, 32, VOCAB)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_activation_checkpointing_changes_nothing(dropout: float):
    """Blocks computed again in backward give the same loss and gradients, dropout masks included."""

    def gradients(checkpointing: bool) -> tuple[torch.Tensor, ...]:
        model = _model(dropout=dropout)
        model.activation_checkpointing = checkpointing
        torch.manual_seed(1)
        loss = model.hidden(_tokens(12), POSITIONS, PAIR).square().sum()
        return torch.autograd.grad(loss, [p for n, p in model.named_parameters() if n != "final_linear.weight"])

    for plain, again in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(plain, again)


@pytest.mark.parametrize("kind", ["mha", "mla", "mha_lora", "mla_lora"])
def test_what_is_made_again_changes_nothing(kind: str):
    """Norms and SwiGLU made again in the backward pass give the gradients of kept ones bit for bit, LoRA's too."""

    def gradients(context: AbstractContextManager[object]) -> tuple[torch.Tensor, ...]:
        model = _model(kind).bfloat16()
        with context:
            loss = model.hidden(_tokens(12), POSITIONS, PAIR).float().square().sum()
        return torch.autograd.grad(loss, [p for n, p in model.named_parameters() if n != "final_linear.weight"])

    for again, kept in zip(gradients(nullcontext()), gradients(keeping_all()), strict=True):
        assert torch.equal(again, kept)


def test_activation_checkpointing_keeps_less():
    """Of each block only its input is kept: fewer bytes saved for backward."""

    def saved(checkpointing: bool) -> int:
        model, sizes = _model(), []
        model.activation_checkpointing = checkpointing
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t)
        with hooks, keeping_all():  # or the model's own hooks would take the place of these
            model.hidden(_tokens(12), POSITIONS, PAIR)
        return sum(sizes)

    assert saved(True) < saved(False) / 5


def test_activation_checkpointing_holds_nothing_within_a_block():
    """What the feed-forward's matrices give is gone after the forward pass: nothing waits to make products again."""

    def held(checkpointing: bool) -> int:
        model, made = _model(), []
        model.activation_checkpointing = checkpointing
        for block in model.decoder_blocks:
            matrix = block.get_submodule("ffwd.w1")
            matrix.register_forward_hook(lambda _, __, out: made.append(StorageWeakRef(out.untyped_storage())))
        out = model.hidden(_tokens(12), POSITIONS, PAIR)
        return sum(not storage.expired() for storage in made) if out.requires_grad else -1

    assert held(True) == 0 and held(False) == 2


@pytest.mark.parametrize("kind", ["mha", "mla"])
def test_dropout_after_attention_and_feed_forward(kind: str):
    """With half dropped, about half of the numbers that each of the two adds to the stream are exactly 0."""
    block = _model(kind, dropout=0.5).decoder_blocks[0]
    zeros = []
    for name in ("attention", "ffwd"):
        block.get_submodule(name).register_forward_hook(lambda _, __, out: zeros.append((out == 0).float().mean()))
    by = rotation(torch.arange(20), 8 if kind == "mha" else 4, 10_000)
    block(torch.randn(20, 32), None, by, lambda q_THK, k_THK, v_THV, *, scale: v_THV)
    assert zeros == [pytest.approx(0.5, abs=0.1)] * 2


def test_dropout_only_in_training():
    """dropout 0.5: eval is repeatable, training is not; dropout 0: training is repeatable too."""
    ids = _tokens(6)[None]
    model = _model(dropout=0.5)
    assert not torch.equal(model(ids), model(ids))
    model.eval()
    assert torch.equal(model(ids), model(ids))
    model = _model(dropout=0.0).train()
    assert torch.equal(model(ids), model(ids))


def test_every_parameter_gets_a_gradient():
    """No part of the LoRA and MLA variants is left out of the graph."""
    for kind in KINDS:
        model = _model(kind)
        model(_tokens(8)[None]).square().sum().backward()
        assert all(p.grad is not None and p.grad.any() for p in model.parameters()), kind


def test_bf16_is_near_fp32():
    """The same weights in bf16: logits within 3 % of their size."""
    model, ids = _model(), _tokens(16)[None]
    with torch.no_grad():
        exact = model(ids)
        low = model.bfloat16()(ids)
    assert low.dtype == torch.bfloat16
    assert (low.float() - exact).abs().max() < 0.03 * exact.abs().max()


def test_start_weights():
    """normal(0, 0.02); the two matrices a layer that add to the stream are smaller by sqrt(2 * 2 layers) = 2."""
    torch.manual_seed(0)
    model = LLaMaTransformer(Architecture.of(TrainingConfig(**{**SMALL, "n_embd": 128}), VOCAB))
    weights = dict(model.named_parameters())
    for name, std in (
        ("embeddings", 0.02),
        ("final_linear", 0.02),
        ("decoder_blocks.1.ffwd.w1", 0.02),
        ("decoder_blocks.1.ffwd.w2", 0.01),
        ("decoder_blocks.1.attention.out", 0.01),
    ):
        assert weights[f"{name}.weight"].std().item() == pytest.approx(std, rel=0.05)
    assert torch.equal(weights["norm.weight"], torch.ones(128))


def test_parameter_count_by_hand():
    """2 * 50 * 32 embeddings and head, a layer 4 * 32^2 + 3 * 32 * 96 (8/3 * 32 = 85, up to 96) + 2 norms, a norm."""
    parameters = 2 * 50 * 32 + 2 * (4 * 32**2 + 3 * 32 * 96 + 2 * 32) + 32
    assert sum(p.numel() for p in _model().parameters()) == parameters
