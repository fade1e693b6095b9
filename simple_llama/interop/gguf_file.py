"""A model in a GGUF file, held open for a run (a StartModel). Its exports are Hugging Face folders."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from simple_llama.dataset.own_tokenizer import OwnTokenizer
from simple_llama.interop.gguf_config import read_gguf_config
from simple_llama.interop.gguf_container import GGUFContainer
from simple_llama.interop.gguf_tokenizer import read_gguf_tokenizer, token_ids
from simple_llama.interop.hf_config import config_json
from simple_llama.interop.hf_export import ExportForm, TrainedOver, export_metadata, write_folder
from simple_llama.interop.hf_names import LLAMA
from simple_llama.interop.our_tensors import OurTensors
from simple_llama.pretraining.architecture import Architecture
from simple_llama.pretraining.beside import Beside
from simple_llama.pretraining.weights import LoadedModel, weights_digest


class GGUFFile:
    """A file's model: the file held open, its metadata in memory."""

    export_suffix = ""
    export_dtype = torch.float32

    def __init__(self, path: str | os.PathLike[str], beside: bool = False):
        """Opens and digests the file; `beside`: in a thread. UserError for a model that is not whole, not sound or not
        of the known family."""
        self.path = Path(path)
        self._container = GGUFContainer(self.path)
        self._config = read_gguf_config(self._container)
        self.own_tokenizer = read_gguf_tokenizer(self._container.metadata, self.path)
        self.architecture: Architecture = self._config.architecture
        self.slides = self._config.slides
        self.numerics: Mapping[str, str] = self._config.numerics
        self._tensors = OurTensors(self._container, self.architecture, self._config.names)
        self.names = list(self._tensors)
        self._digest = Beside(partial(weights_digest, self._tensors), at_once=not beside)

    @property
    def digest(self) -> str:
        """Of names, dtypes, shapes and values. Waits for it; StartChanged where it was never made of one file."""
        return self._digest.result()

    def load(self) -> LoadedModel:
        """The model; each tensor is read, compared with the first read and dequantized when it is asked for.

        Raises StartChanged.
        """
        self._container.check_size()
        return LoadedModel(self._tensors, self.architecture, self.path)

    @contextlib.contextmanager
    def reading(self) -> Iterator[LoadedModel]:
        """The model while the body uses it: no tensor that it gets is another one than was digested (StartChanged)."""
        yield self.load()

    def export(
        self,
        path: Path,
        trained: Mapping[str, torch.Tensor],
        metadata: dict[str, Any],
        dtype: torch.dtype | None = None,
        tokenizer: OwnTokenizer | None = None,
    ) -> None:
        """Writes a Hugging Face folder in `dtype`, or fp32, with the tokenizer's files and ids or its own; see
        `write_folder`. StartChanged."""
        dtype = dtype or self.export_dtype
        found = {**self._config.raw, **token_ids(self._container.metadata)}
        config = {**config_json(self.architecture, dtype, found), **(tokenizer.token_ids if tokenizer else {})}
        tokenizer = tokenizer or self.own_tokenizer
        form = ExportForm(self.architecture, LLAMA, config, dtype, tokenizer.files if tokenizer else {})
        write_folder(path, TrainedOver(trained, self._tensors), form, metadata)

    def export_metadata(self, path: Path) -> dict[str, Any]:
        """What an exported folder says of itself; nothing for what is none."""
        return export_metadata(path)
