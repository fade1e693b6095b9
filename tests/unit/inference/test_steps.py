"""Steps against the model's own decode, in every dtype and with sequences of any lengths."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from simple_llama.inference.generate import generate_together
from simple_llama.inference.steps import Steps, _onednn_times, _way_to_multiply
from tiny_model import MLA, PROMPTS, tiny_model

GROUPED = {"key_heads": 1, "tied_head": True}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, GROUPED], ids=["mha", "grouped and tied"])
def test_logits_are_those_of_decode(changes: dict[str, Any], dtype: torch.dtype) -> None:
    """Four sequences, then three (the first has ended: the last takes its row), then those without a mask, all of one
    length: after each of five tokens, and the caches beside, to the rounding of some ten operations on numbers of 3."""
    model = tiny_model(changes).to(dtype)
    steps = Steps(model, [20] * 4)
    own = [model.new_cache(20) for _ in PROMPTS]
    prompts = [torch.tensor(ids) for ids in PROMPTS]
    torch.testing.assert_close(model.decode_together(prompts, steps.caches), model.decode_together(prompts, own))
    near: dict[str, Any] = {"atol": 64 * torch.finfo(dtype).eps, "rtol": 16 * torch.finfo(dtype).eps}
    for count in range(5):
        if count == 3:
            steps.drop(0)
            own = [own[3], own[1], own[2]]
        tokens = torch.tensor([7, 8, 9, 10][: len(own)]) + count
        expected = model.decode_together(tokens.split(1), own)
        torch.testing.assert_close(steps.step(tokens), expected, **near)
        for mine, theirs in zip(steps.caches, own, strict=True):
            assert mine.length == theirs.length
            for name in ("keys_LSGK", "values_LSGV"):
                both = (getattr(cache, name)[:, : mine.length] for cache in (mine, theirs))
                torch.testing.assert_close(*both, **near)


def test_a_sequence_does_not_see_another_ones_room() -> None:
    """Where a longer one stood before, or beside: what lies behind a sequence's end counts for nothing."""
    model = tiny_model()
    logits = []
    for rubbish in (0.0, 1e4):
        steps = Steps(model, [12, 12])
        model.decode_together([torch.tensor([8, 9, 10, 11]), torch.tensor([6])], steps.caches)
        steps.caches[1].keys_LSGK[:, 1:] = steps.caches[1].values_LSGV[:, 1:] = rubbish
        logits.append(steps.step(torch.tensor([5, 7])))
    assert torch.equal(*logits)


def test_where_steps_do_not_fit() -> None:
    """Latent attention, biases, normed queries, LoRA; weights that are elsewhere; one long sequence beside many short
    ones, which would all get its room: 10 x 64 for 73 tokens. There the model's decode goes on alone."""
    assert Steps.fit(tiny_model(), [8, 9]) and Steps.fit(tiny_model(GROUPED), [8])
    assert not Steps.fit(tiny_model(), [64] + [1] * 9) and not Steps.fit(tiny_model(), [])
    for changes in ({"qkv_bias": True}, {"out_bias": True}, {"ffwd_bias": True}, {"qk_norm": True}):
        assert not Steps.fit(tiny_model(changes), [8])
    assert not Steps.fit(tiny_model(**MLA), [8])
    assert not Steps.fit(tiny_model(use_lora=True, lora_rank=2, q_lora=True), [8])
    model = tiny_model()
    model.embeddings.weight.data = torch.empty(0)
    assert not Steps.fit(model, [8])
    gathered = tiny_model()
    vars(gathered.norm.weight)["ds_tensor"] = torch.zeros(
        1
    )  # as ZeRO-3 marks weights, those too that are whole just now
    assert not Steps.fit(gathered, [8])


def test_long_and_short_answers_together() -> None:
    """Prompts of 60 and 1 tokens in nine answers: without steps, the same as one by one."""
    model = tiny_model(max_seq_len=64)
    prompts = [[8 + i % 30 for i in range(60)], *([40 + i] for i in range(8))]
    columns = zip(*generate_together(model, prompts, 3, ()), strict=True)
    alone = [[step[0] for step in generate_together(model, [ids], 3, ())] for ids in prompts]
    assert list(map(list, columns)) == alone


def test_a_few_rows_of_fp32_are_multiplied_by_onednn() -> None:
    """From 4 to 16, as in the test above with four sequences, added to a sum where there is one; no others."""
    weight, x_BI, onto_BO = torch.randn(24, 32), torch.randn(5, 32), torch.randn(5, 24)
    ways = {rows: _way_to_multiply(weight, rows) for rows in (1, 3, 4, 16, 17)}
    assert [rows for rows, way in ways.items() if way is _onednn_times] == [4, 16]
    assert _way_to_multiply(weight.bfloat16(), 4) is not _onednn_times
    torch.testing.assert_close(_onednn_times(x_BI, weight.t()), x_BI @ weight.t())
    torch.testing.assert_close(_onednn_times(x_BI, weight.t(), onto_BO), onto_BO + x_BI @ weight.t())


def test_without_bf16_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where bf16 products are emulated, steps multiply in fp32, as the model does."""
    monkeypatch.setattr("simple_llama.inference.steps.emulates_bf16", lambda tensor: True)
    monkeypatch.setattr("simple_llama.ops.linear.emulates_bf16", lambda tensor: True)
    model = tiny_model().to(torch.bfloat16)
    steps, own = Steps(model, [8]), [model.new_cache(8)]
    model.decode_together([torch.tensor(PROMPTS[0])], steps.caches)
    model.decode_together([torch.tensor(PROMPTS[0])], own)
    expected = model.decode_together([torch.tensor([7])], own)
    torch.testing.assert_close(steps.step(torch.tensor([7])), expected, atol=64 * 2**-7, rtol=16 * 2**-7)
