"""Opens whatever a run may start from."""

from __future__ import annotations

import os
from pathlib import Path

from simple_llama.common.errors import UserError
from simple_llama.interop.hf_folder import HFFolder
from simple_llama.interop.safetensors_files import INDEX, WEIGHTS
from simple_llama.pretraining.start_file import StartFile
from simple_llama.pretraining.start_model import StartModel
from simple_llama.pretraining.weights import find_weights

_HF_FILES = ("config.json", "adapter_config.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def open_start(path: str | os.PathLike[str]) -> StartModel:
    """The model at `path`: a `.pth`, a folder's newest one, or a Hugging Face folder. UserError for what is none."""
    path = Path(path)
    if path.suffix == ".safetensors" and not path.is_dir():
        raise UserError(
            f"{path}: expected the folder of a Hugging Face model, found one of its files; give the folder, with its "
            "config.json"
        )
    return HFFolder(path) if _is_hf_folder(path) else StartFile(find_weights(path))


def _is_hf_folder(path: Path) -> bool:
    """Whether a folder is, or was meant to be, a Hugging Face model's. A `.pth` in it counts more than anything but
    weights as such a model has them: transformers' trainer leaves rng_state.pth beside those."""
    try:
        names = {file.name for file in path.iterdir()} if path.is_dir() else set()
    except OSError:
        return False  # find_weights says why
    if not names.isdisjoint((WEIGHTS, INDEX)):
        return True
    kinds = {os.path.splitext(name)[1] for name in names}
    return ".pth" not in kinds and (".safetensors" in kinds or not names.isdisjoint(_HF_FILES))
