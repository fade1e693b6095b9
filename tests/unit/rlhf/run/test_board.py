"""TensorBoard: groups, the page of charts, the table of runs, texts that stay as they are."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2

from simple_llama.reinforcement_learning.rlhf.dpo_config import DPOConfig
from simple_llama.reinforcement_learning.rlhf.run.board import _RESULTS, Board, _as_markdown, _curve_name, _sample_page

Layout: Any = layout_pb2.Layout  # pyright: ignore[reportAttributeAccessIssue]
HParams: Any = plugin_data_pb2.HParamsPluginData  # pyright: ignore[reportAttributeAccessIssue]


def test_curves_stand_in_groups() -> None:
    """Training, held out, speed, samples; what counts or never changes is no curve."""
    names = ("loss", "rewards/margins", "eval_loss", "eval_log_ratio/chosen", "perf/mfu", "samples/kl")
    shown = ["train/loss", "train/rewards/margins", "eval/loss", "held_out/log_ratio/chosen", "perf/mfu", "samples/kl"]
    assert [_curve_name(name) for name in names] == shown
    assert {_curve_name(name) for name in ("epoch", "eval_pairs", "weights/median", "weights/bits")} == {None}


def test_validation_sets_have_curves_and_a_page(tmp_path: Path) -> None:
    """Loss and rewards of a set stand with those of all, its size is no curve, and sets share charts."""
    names = ("eval_safe/loss", "eval_safe/rewards/margins", "eval_safe/logps/chosen", "eval_safe/pairs")
    shown = ["eval/safe/loss", "eval/safe/rewards/margins", "held_out/safe/logps/chosen", None]
    assert [_curve_name(name) for name in names] == shown
    board = Board(tmp_path, 0, DPOConfig(validation_path="safe=a.jsonl,help=b.jsonl"))
    board.file.close()
    [event] = EventAccumulator(str(tmp_path)).Reload().Tensors("custom_scalars__config__")
    [sets] = [
        one for one in Layout.FromString(event.tensor_proto.string_val[0]).category if one.title.startswith("val")
    ]
    assert next(list(chart.multiline.tag) for chart in sets.chart) == ["eval/safe/loss", "eval/help/loss"]


def test_the_first_page_and_the_table_of_runs(tmp_path: Path) -> None:
    """The loss of both in one chart; a run's settings and results as a line of the table, done at its end; a histogram
    without what is not finite, and none of nothing."""
    board = Board(tmp_path, 0, DPOConfig(beta=0.25, model_path="/models/small.pth"))
    board.histograms(3, {"held_out/margin_nats": np.array([1.0, np.nan, 2.0, np.inf]), "none": np.array([np.nan])})
    board.file.add_end()
    board.file.close()
    found = EventAccumulator(str(tmp_path)).Reload()
    [event] = found.Tensors("custom_scalars__config__")
    layout = Layout.FromString(event.tensor_proto.string_val[0])
    charts = {chart.title: list(chart.multiline.tag) for category in layout.category for chart in category.chart}
    assert charts["loss"] == ["train/loss", "eval/loss"] and layout.category[0].title == "does it work"
    content = found.summary_metadata
    start = HParams.FromString(content["_hparams_/session_start_info"].plugin_data.content)
    hparams = start.session_start_info.hparams
    assert hparams["beta"].number_value == 0.25 and hparams["model_path"].string_value == "small.pth"
    experiment = HParams.FromString(content["_hparams_/experiment"].plugin_data.content).experiment
    assert [metric.name.tag for metric in experiment.metric_infos] == list(_RESULTS)
    assert "_hparams_/session_end_info" in content
    assert found.Tags()["histograms"] == ["held_out/margin_nats"]
    assert found.Histograms("held_out/margin_nats")[0].histogram_value.num == 2


@pytest.mark.parametrize("text", ["# a\n\n* b | c", "<b>&amp;", "1. x_y_ `z`", "\u00e9 \U0001f600", "a\r\nb", ""])
def test_text_is_shown_as_it_is(text: str) -> None:
    """No character that Markdown or HTML acts on stays; lines become lines, so the browser wraps them."""
    made = _as_markdown(text)
    assert not set(made.replace("<br>", "")) - set("&#;") & set("*_`|<>[]()\\\n.!-")
    assert html.unescape(made.replace("<br>", "\n")) == "\n".join(text.splitlines())


def test_a_sample_stands_beside_the_start_models() -> None:
    """Two cells of one row; an empty answer in words, a control character as Python writes it."""
    page = _sample_page("a", "", "b\x0f")
    assert page == ("a\n\n| start model | policy |\n| :-- | :-- |\n| &#40;ended at once&#41; | b&#92;x0f |\n")
