"""The mean of the models that a run exported at the ends of its last epochs (arXiv:1803.05407 averages along a run)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from simple_llama.common.errors import UserError
from simple_llama.common.files import listed, shown
from simple_llama.interop.adapted_start import AdaptedStart
from simple_llama.interop.open_start import open_start, start_metadata
from simple_llama.pretraining.named_tensors import NamedTensors
from simple_llama.pretraining.start_model import StartModel

_OF_ONE_RUN = ("run", "reference", "start")  # metadata


class MeanWeights(NamedTensors):
    """The mean of several models' tensors in fp64, each made when it is asked for."""

    def __init__(self, models: Sequence[Mapping[str, torch.Tensor]]):
        self._names, self._models = models[0], models

    def _make(self, name: str) -> torch.Tensor:
        total = self._models[0][name].to(torch.float64, copy=True)
        for model in self._models[1:]:
            total += model[name]
        return total / len(self._models)


class _Export(NamedTuple):
    """What a run wrote at an epoch's end."""

    step: int
    path: Path
    metadata: Mapping[str, Any]


def last_epochs(run: Path, count: int) -> tuple[list[StartModel], list[Mapping[str, Any]]]:
    """The models of the newest `count` ends of epochs in a run's checkpoint folder, newest first, and their metadata.
    Of adapters and the merged model beside the last of them the adapters.

    UserError where there are fewer, or where they are not of one run and one architecture.
    """
    every = [(export, open_start(export.path)) for export in _exports(run)]
    adapted = {export.step for export, model in every if isinstance(model, AdaptedStart)}
    found = [export for export, model in every if isinstance(model, AdaptedStart) or export.step not in adapted]
    found.sort(reverse=True, key=lambda export: export.step)
    if len(found) < count:
        there = listed([export.path.name for export in found]) if found else "none"
        raise UserError(f"average: expected {count} exports of ends of epochs in {run}, found {there}")
    chosen = found[:count]
    newest = chosen[0]
    models = [open_start(export.path) for export in chosen]
    for export, model in zip(chosen, models, strict=True):
        for key in _OF_ONE_RUN:
            one, other = newest.metadata.get(key), export.metadata.get(key)
            if one != other:
                raise UserError(
                    f"{export.path}: expected an export of the run of {newest.path.name}, found another {key}: "
                    f"{shown(other)}, not {shown(one)}; move what is another run's away"
                )
        if (model.architecture, set(model.names)) != (models[0].architecture, set(models[0].names)):
            raise UserError(f"{export.path}: expected the architecture of {newest.path.name}, found another one")
    return models, [export.metadata for export in chosen]


def _exports(run: Path) -> Iterator[_Export]:
    """What bears the name that a run gave it, and says that whole epochs were done."""
    for path in run.glob("dpo_*"):
        try:
            metadata = start_metadata(path)
        except UserError:  # half written, or a person's
            continue
        step, epochs = metadata.get("step"), metadata.get("epochs")
        ends = isinstance(epochs, (int, float)) and epochs > 0 and epochs == int(epochs)
        if ends and type(step) is int and metadata.get("file") == path.name:
            yield _Export(step, path, metadata)
