"""Log-probs of several models on the same pairs, through the store, and what tells the pairs apart. N pairs."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from simple_llama.cluster.distributed import Ranks, fail_together
from simple_llama.common.errors import UserError
from simple_llama.common.logging import LOGGER
from simple_llama.common.path_lists import same_paths
from simple_llama.dataset.json_records import Faults, read_records
from simple_llama.reinforcement_learning.rlhf.assess.evaluate_config import EvaluateConfig, trained_on
from simple_llama.reinforcement_learning.rlhf.data.pair_set import PairSet
from simple_llama.reinforcement_learning.rlhf.data.safety_records import category_of
from simple_llama.reinforcement_learning.rlhf.inputs import Inputs
from simple_llama.reinforcement_learning.rlhf.precompute import precompute
from simple_llama.reinforcement_learning.rlhf.reference.ref_source import open_store

_MOST_NAME = 60  # characters


def pairs_asked(config: EvaluateConfig, inputs: Inputs) -> tuple[PairSet, str]:
    """The pairs to evaluate on, and what they are in words. UserError where none is held out."""
    same = same_paths(config.rlhf_dataset_path, trained_on(config))
    held_out = config.share == "held_out" or (config.share == "auto" and same)
    if not held_out:
        trained = ", most of which the first model was trained on" if same else ""
        return inputs.data.pairs, f"all {len(inputs.data.pairs):,} pairs{trained}"
    found = inputs.data.validation
    if not len(found):
        raise UserError(
            f"share: expected held-out pairs of {config.rlhf_dataset_path}, found none with val_share "
            f"{config.held_out_share:g}; give the --val_share and --seed of the training, other pairs, or --share all"
        )
    of = "the training's own" if same else "those that a training would hold out"
    how = "validation_path" if config.validation_path else f"val_share {config.held_out_share:g}, seed {config.seed}"
    return found, f"{len(found):,} held-out pairs ({of}: {how})"


def log_probs(config: EvaluateConfig, inputs: Inputs, pairs: PairSet, ranks: Ranks) -> np.ndarray:
    """Log-prob sums (N, 2) fp32 of (chosen, rejected) of a model, nats (collective): from the store, where they are,
    else computed by all ranks and put there."""
    LOGGER.info("log-probs of %s on %d pairs", inputs.start.path, len(pairs))
    precompute(config, inputs, ranks, pairs)
    store = open_store(config.ref_cache_dir, inputs.reference_id, ranks)
    with fail_together(ranks):
        entries = pairs.entries()
        return entries.sums(store.lookup(entries.keys))


def check_same_pairs(inputs: Inputs, first: Inputs) -> None:
    """UserError where a model reads the data as other tokens than the start model: no sums could be compared."""
    if not np.array_equal(_sorted(inputs.data.pairs), _sorted(first.data.pairs)):
        raise UserError(
            f"{inputs.start.path}: expected the tokens of the start model {first.start.path}, found others: its "
            "tokenizer or chat template differs, so their log-probs cannot be compared; give the model that it was "
            "trained from as --model_path, or evaluate it with --model_path alone"
        )


def _sorted(pairs: PairSet) -> np.ndarray:
    """The keys of pairs (N, 3), in an order that a split does not change: where a chat template has the system prompt,
    and a record none, other prompts are held out."""
    keys_N3 = np.ascontiguousarray(pairs.keys).view("<u8").reshape(len(pairs), -1)
    return keys_N3[np.lexsort(keys_N3.T)]


def categories(pairs: PairSet) -> list[str]:
    """Of each pair what its record calls its category (`category_of`), or the name of its file where no record has one.

    A list of categories is one of its own ("a + b"). Files are read again: a pair keeps no text.
    """
    wanted: dict[int, set[int]] = {}
    for file, record in pairs.places[["file", "record"]].tolist():
        wanted.setdefault(file, set()).add(record)
    said = {
        (file, record.number): category_of(record.fields)
        for file, numbers in wanted.items()
        for record in read_records(pairs.files[file], Faults(are_dropped=True))
        if record.number in numbers
    }
    found = {place: _category(value) for place, value in said.items() if value is not None}
    if found:
        return [found.get(place, "(none)") for place in pairs.places[["file", "record"]].tolist()]
    return [Path(pairs.files[file]).name for file in pairs.places["file"].tolist()]


def _category(value: object) -> str:
    """A record's category as one short text."""
    parts = value if isinstance(value, list) else [value]
    text = " + ".join(sorted(str(part) for part in parts)) or "(none)"
    return text if len(text) <= _MOST_NAME else text[: _MOST_NAME - 3] + "..."
