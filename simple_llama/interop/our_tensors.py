"""The tensors of files of another library as ours, one at a time."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from simple_llama.interop.hf_names import NameMap, names_in, our_shapes, to_ours
from simple_llama.pretraining.architecture import Architecture
from simple_llama.pretraining.named_tensors import NamedTensors


class OurTensors(NamedTensors):
    """A family's tensors under our names and in our order of rows, each made when it is asked for."""

    def __init__(self, theirs: Mapping[str, torch.Tensor], architecture: Architecture, family: NameMap):
        self._theirs, self._architecture, self._family = theirs, architecture, family
        self._names = dict.fromkeys(our_shapes(architecture))

    def _make(self, name: str) -> torch.Tensor:
        parts = [self._theirs[their] for their in names_in(name, self._family)]
        return to_ours(name, parts, self._architecture, self._family)
