"""What a run shows on TensorBoard: curves in groups, a page that answers "does it work", a table of runs, texts.

    eval/...  held_out/...  perf/...  samples/...  train/...     one curve a chart, in the order of the first screen
    custom scalars                                               those that belong together in one chart

Behind their group metrics keep the names of metrics.jsonl. `eval` has loss and rewards, so that they are seen first,
`held_out` what else is said of these pairs, and histograms. What is no curve stays in metrics.jsonl alone.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np

from simple_llama.common.path_lists import brief_paths, named_paths
from simple_llama.common.settings import Settings
from simple_llama.inference.guards import ENDED_AT_ONCE
from simple_llama.reinforcement_learning.rlhf.objective.preference_loss import LossConfig
from simple_llama.reinforcement_learning.rlhf.run.event_file import EventFile

_NO_CURVES = ("epoch", "eval_pairs", "eval_effective_pairs", "weights/median", "weights/bits")
_OWN_GROUPS = ("perf/", "samples/")
_FIRST = ("loss", "rewards/")  # of what is held out: on the first screen
_LAYOUT = {  # title, with the unit: curves
    "does it work": {
        "loss": ("train/loss", "eval/loss"),
        "accuracy (longer_is_chosen: a rule that reads nothing)": (
            "train/rewards/accuracies",
            "eval/rewards/accuracies",
            "held_out/longer_is_chosen",
        ),
        "reward margin (beta x nats)": ("train/rewards/margins", "eval/rewards/margins"),
        "held out: log-probs of the policy less those of the reference (nats an answer)": (
            "held_out/log_ratio/chosen",
            "held_out/log_ratio/rejected",
        ),
        "held out: log-probs of the policy (nats an answer)": ("held_out/logps/chosen", "held_out/logps/rejected"),
    },
    "is it still itself": {
        "KL to the reference on its own answers (nats a token, 95 % interval)": (
            "samples/kl",
            "samples/kl_low",
            "samples/kl_high",
        ),
        "sample answers: shares": (
            "samples/ended",
            "samples/empty",
            "samples/repeated_trigrams",
            "samples/unknown",
        ),
        "sample answers: mean tokens": ("samples/tokens",),
        "margin explained by length (correlation)": ("held_out/margin_length_correlation",),
    },
    "how it learns": {
        "gradient norm": ("train/grad_norm",),
        "learning rate": ("train/learning_rate",),
        "share of saturated pairs": ("train/rewards/saturated",),
    },
}
# Columns of the table of runs: settings that decide what is learned, of which TensorBoard shows the first five in the
# order of the alphabet until others are ticked; then results.
_SETTINGS = (
    *(field.name for field in fields(LossConfig)),
    "max_lr",
    "min_lr",
    "schedule",
    "warmup_iterations",
    "warmup_ratio",
    "epochs",
    "max_steps",
    "weight_decay",
    "max_grad_norm",
    "trainable",
    "max_seq_len",
    "val_share",
    "seed",
)
_PATHS = ("model_path", "rlhf_dataset_path")  # of each path its last part
_RESULTS = (
    "eval/loss",
    "eval/rewards/accuracies",
    "eval/rewards/margins",
    "held_out/log_ratio/chosen",
    "held_out/log_ratio/rejected",
    "samples/kl",
    "samples/ended",
    "train/loss",
    "train/rewards/accuracies",
)
_AS_IT_IS = frozenset(string.ascii_letters + string.digits + " ")  # in Markdown and HTML


def _curve_name(name: str) -> str | None:
    """The curve of a metric of metrics.jsonl; None where it is none."""
    if name in _NO_CURVES:
        return None
    if name.startswith("eval_"):
        plain = name.removeprefix("eval_")
        of_set = plain.partition("/")[2]  # behind the name of a validation set
        if of_set == "pairs":
            return None
        return f"{'eval' if plain.startswith(_FIRST) or of_set.startswith(_FIRST) else 'held_out'}/{plain}"
    return name if name.startswith(_OWN_GROUPS) else f"train/{name}"


class Board:
    """A run on TensorBoard. An OSError of the disk comes out of the call that meets it."""

    def __init__(self, folder: Path, purge_step: int, settings: Settings | None):
        """Args: settings: the run's settings, for the table of runs; None: the run is no line of it."""
        self.file = EventFile(folder, purge_step)
        self.file.add_layout(_LAYOUT | _layout_of_sets(settings))
        if settings is not None:
            self.file.add_hparams(_table_settings(settings), _RESULTS)
        self.file.flush()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """A point of each curve, on disk at once."""
        for name, value in values.items():
            if curve := _curve_name(name):
                self.file.add_scalar(curve, value, step)
        self.file.flush()  # a curve is seen at once, and a full disk too

    def histograms(self, step: int, values: Mapping[str, np.ndarray]) -> None:
        """How numbers are spread, by name; what is not finite is left out."""
        for name, found in values.items():
            finite = found[np.isfinite(found)]
            if len(finite):
                self.file.add_histogram(name, finite, step)

    def sample(self, step: int, index: int, prompt: str, before: str, after: str) -> None:
        """A page of the text tab: a prompt with the start model's answer beside the policy's."""
        self.file.add_text(f"samples/prompt_{index}", _sample_page(prompt, before, after), step)

    def text(self, step: int, name: str, parts: Sequence[tuple[str, str]]) -> None:
        """A page of the text tab: paragraphs, each a head in bold and a text."""
        page = "\n\n".join(f"**{_as_markdown(head)}** {_as_markdown(text)}" for head, text in parts)
        self.file.add_text(name, page, step)


def _layout_of_sets(settings: Settings | None) -> dict[str, dict[str, tuple[str, ...]]]:
    """Charts that show the named validation sets of a run beside each other; none where it has none."""
    names = [one.name for one in named_paths(getattr(settings, "validation_path", "")) if one.name]
    charts = {"loss": "loss", "accuracy": "rewards/accuracies", "reward margin (beta x nats)": "rewards/margins"}
    found = {title: tuple(f"eval/{name}/{metric}" for name in names) for title, metric in charts.items()}
    return {"validation sets": found} if names else {}


def _table_settings(settings: Settings) -> dict[str, bool | float | str]:
    """A run's settings as the table of runs has them."""
    has = asdict(settings)  # pyright: ignore[reportArgumentType] - settings are dataclasses
    found = {name: has[name] for name in _SETTINGS} | {name: brief_paths(has[name]) for name in _PATHS}
    return found | {"pairs_a_rank": has["batch_size"] * has["grad_accum_steps"]}


def _sample_page(prompt: str, before: str, after: str) -> str:
    """Markdown of one prompt with both answers side by side, wrapped by the browser."""
    cells = [_as_markdown(text or ENDED_AT_ONCE) for text in (before, after)]
    return f"{_as_markdown(prompt)}\n\n| start model | policy |\n| :-- | :-- |\n| {cells[0]} | {cells[1]} |\n"


def _as_markdown(text: str) -> str:
    """Text that Markdown and HTML show as it is, on one line of source; a control character as Python writes it."""
    lines = text.splitlines() or [""]
    return "<br>".join("".join(map(_shown, line)) for line in lines)


def _shown(character: str) -> str:
    """A character that no Markdown acts on."""
    if character in _AS_IT_IS:
        return character
    if not character.isprintable():
        return "".join(_shown(one) for one in repr(character)[1:-1])
    return f"&#{ord(character)};"
