"""The bench of what stands between matrix products, on a few rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from benchmarks import bench_layers
from benchmarks.bench_layers import Bench, error, main, measured, pieces, plain_rotate, run

SMALL = Bench(device="cpu", rounds=1, calls=1, rows=64, width=32, hidden=48, head_width=8, pairs=4, compiled=False)


def test_every_way_is_its_definition() -> None:
    """In bf16, to two of its roundings of the largest number; and a wrong one is seen."""
    for piece in pieces(SMALL):
        exact = run(piece.plain, tuple(x.float() for x in piece.operands))
        for call in piece.ways.values():
            assert error(run(call, piece.operands), exact) < 2**-6, piece.name
        assert error(run(lambda *x: piece.plain(*(2 * part for part in x)), piece.operands), exact) > 0.1  # noqa: B023


def test_rotation_by_hand() -> None:
    """(1, 0) by a right angle is (0, 1)."""
    zero, one = torch.zeros(1, 1, 1), torch.ones(1, 1, 1)
    assert plain_rotate(torch.tensor([[[1.0, 0.0]]]), zero, one).tolist() == [[[0.0, 1.0]]]


def test_rows_come_one_by_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each is printed and kept as soon as it is measured, and all are in the section."""
    results = tmp_path / "results.md"
    main(Bench(**{**vars(SMALL), "results": str(results)}))
    said = capsys.readouterr().out
    kept, table = results.with_suffix(".partial.jsonl").read_text(), results.read_text()
    for piece, way in (("addition and norm", "ours"), ("SwiGLU", "torch"), ("attention", "ours")):
        assert f"{piece}, {way}: ms" in said and f'"{piece}, {way}"' in kept and piece in table


def test_no_piece_is_begun_when_time_is_over(tmp_path: Path) -> None:
    """A microsecond: the table has no row."""
    results = tmp_path / "results.md"
    main(Bench(**{**vars(SMALL), "results": str(results), "minutes": 1e-9}))
    assert "| piece" in results.read_text() and "SwiGLU" not in results.read_text()


def test_another_flash_is_active_within_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Around the calls of its own way, backward passes too."""
    active: list[str] = []
    monkeypatch.setattr("torch.nn.attention.activate_flash_attention_impl", active.append)
    monkeypatch.setattr("torch.nn.attention.restore_flash_attention_impl", active.clear)
    with bench_layers._activated("FA3"):
        assert active == ["FA3"]
    assert not active


def test_liger_is_given_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is installed: addition and norm in this order, rounding as Llama does."""
    pytest.importorskip("liger_kernel")
    seen: list[tuple] = []
    kernel = "liger_kernel.ops.fused_add_rms_norm.LigerFusedAddRMSNormFunction.apply"
    monkeypatch.setattr(kernel, lambda *given: seen.append(given) or (F.silu(given[0]), given[1]))
    x, update, weight = torch.ones(2, 3), torch.zeros(2, 3), torch.ones(3)
    total, _ = bench_layers._liger()["Liger norm"](x, update, weight)
    assert total is update and seen[0][3:] == (1e-5, 0.0, "llama", False)


class Overwriting(torch.autograd.Function):
    """A product whose gradients are written into its factors, as Liger's is."""

    @staticmethod
    def forward(ctx, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.factors = gate, up
        return gate * up

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.factors
        gate.mul_(0)
        up.mul_(0)
        return gate.detach(), up.detach()


def test_a_way_that_overwrites_its_operands_leaves_the_others_theirs() -> None:
    """All have the same numbers."""
    piece = list(pieces(SMALL))[1]
    before = [x.clone() for x in piece.operands]
    measured(piece._replace(ways={"overwriting": Overwriting.apply, **piece.ways}), SMALL)
    assert all(torch.equal(one, other) for one, other in zip(piece.operands, before, strict=True))
