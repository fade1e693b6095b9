"""Opens whatever a run may start from."""

from __future__ import annotations

import os

from simple_llama.pretraining.start_file import StartFile
from simple_llama.pretraining.start_model import StartModel
from simple_llama.pretraining.weights import find_weights


def open_start(path: str | os.PathLike[str]) -> StartModel:
    """The model at `path`: a `.pth`, or the newest one of a folder. UserError for what is none."""
    return StartFile(find_weights(path))
