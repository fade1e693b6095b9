"""A model in a folder as Hugging Face's libraries write it, held open for a run (a StartModel).

Of such a folder only safetensors and JSON decide anything; no pickle in it is ever opened.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from simple_llama.common.errors import UserError
from simple_llama.common.files import parse_json, read_bytes
from simple_llama.dataset.own_tokenizer import OwnTokenizer
from simple_llama.dataset.tokenizer import MOST_BYTES
from simple_llama.interop.hf_config import HFModelConfig, config_json, read_hf_config
from simple_llama.interop.hf_export import ExportForm, TrainedOver, export_metadata, write_folder
from simple_llama.interop.hf_names import NameMap, check_shapes, names_in, shapes_in
from simple_llama.interop.hf_tokenizer import TOKENIZER_FILES, load_hf_tokenizer
from simple_llama.interop.our_tensors import OurTensors
from simple_llama.interop.safetensors_files import SafetensorsFiles, open_weights, weights_there
from simple_llama.pretraining.architecture import Architecture
from simple_llama.pretraining.beside import Beside
from simple_llama.pretraining.weights import LoadedModel, weights_digest

_CONFIG = "config.json"
_FILES = (_CONFIG, *TOKENIZER_FILES, "LICENSE")  # that are read or go into an export unchanged
_DERIVED = re.compile(r"(?:.*\.)?rotary_emb\.inv_freq")  # of old files: follows from config.json
_EXPECTED = "expected a folder with a Hugging Face model (config.json, safetensors)"


class HFFolder:
    """A folder's model: its weights' files held open, its small files in memory."""

    export_suffix = ""

    def __init__(self, path: str | os.PathLike[str], beside: bool = False):
        """Opens and digests the folder; `beside`: in a thread. UserError for a model that is not whole, not sound or
        not of a known family."""
        self.path = Path(path)
        there = _which(self.path)
        self.files = dict(_small_files(self.path))  # by name, as they were found
        source = self.path / _CONFIG
        if _CONFIG not in self.files:
            raise UserError(f"{path}: {_EXPECTED}, found no {_CONFIG} but {weights_there(self.path)}")
        self.config = read_hf_config(parse_json(self.files[_CONFIG], source), str(source))
        self.own_tokenizer = None
        if "tokenizer.json" in self.files:
            self.own_tokenizer = load_hf_tokenizer(self.files, self.path, self.architecture.vocab_size)
        self._files = open_weights(self.path)
        if _which(self.path) != there or dict(_small_files(self.path)) != self.files:
            raise UserError(f"{path}: expected one model, found that it was replaced while it was read; start again")
        _check_fit(self._files, self.config, self.path)
        self._tensors = OurTensors(self._files, self.architecture, self.config.names)
        self.names = list(self._tensors)
        self._digest = Beside(partial(weights_digest, self._tensors), at_once=not beside)

    @property
    def digest(self) -> str:
        """Of names, dtypes, shapes and values. Waits for it; StartChanged where it was never made of one folder."""
        return self._digest.result()

    @property
    def architecture(self) -> Architecture:
        """The model's shape."""
        return self.config.architecture

    @property
    def slides(self) -> bool:
        """As `config` says."""
        return self.config.slides

    @property
    def numerics(self) -> Mapping[str, str]:
        """Numbers of config.json that decide the output."""
        return self.config.numerics

    @property
    def export_dtype(self) -> torch.dtype:
        """That of the embeddings in the files; fp32 for fp64."""
        [embeddings] = names_in("embeddings.weight", self.config.names)
        return self._dtypes()[embeddings]

    def _dtypes(self) -> dict[str, torch.dtype]:
        """Of each tensor of an export, by the family's names: norms may be fp32 beside matrices in bf16."""
        found = {name: self._files.dtype(name) for name in shapes_in(self.architecture, self.config.names)}
        return {name: torch.float32 if dtype == torch.float64 else dtype for name, dtype in found.items()}

    def load(self) -> LoadedModel:
        """The model; each tensor is read, and compared with the first read, when it is asked for. StartChanged."""
        self._files.check_sizes()
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
        """Writes a folder of this form, in `dtype` or each tensor in its own, with the tokenizer's files and ids or
        its own; see `write_folder`. StartChanged."""
        dtypes = self._dtypes() if dtype is None else {}
        dtype = dtype or self.export_dtype
        config = config_json(self.architecture, dtype, self.config.raw)
        files = {name: data for name, data in self.files.items() if name != _CONFIG}
        if tokenizer is not None:
            config |= tokenizer.token_ids
            files = {name: data for name, data in files.items() if name not in TOKENIZER_FILES} | dict(tokenizer.files)
        form = ExportForm(self.architecture, self.config.names, config, dtype, files, dtypes)
        write_folder(path, TrainedOver(trained, self._tensors), form, metadata)

    def export_metadata(self, path: Path) -> dict[str, Any]:
        """What an exported folder says of itself; nothing for what is none."""
        return export_metadata(path)


def _which(folder: Path) -> tuple[int, int] | None:
    """What tells a folder from another one of its name; None where there is none."""
    try:
        found = folder.stat()
    except OSError:  # reading it says why
        return None
    return found.st_dev, found.st_ino


def _small_files(folder: Path) -> Iterator[tuple[str, bytes]]:
    """The files beside the weights that are there, by their names. UserError for one that cannot be read."""
    for name in _FILES:
        try:
            yield name, read_bytes(folder / name, MOST_BYTES)
        except FileNotFoundError:
            if os.path.lexists(folder / name):
                raise UserError(f"{folder / name}: expected a file, found a broken link") from None
        except OSError as error:
            raise UserError(f"{folder / name}: expected a file, found: {error.strerror or error}") from error


def _check_fit(tensors: SafetensorsFiles, config: HFModelConfig, path: Path) -> None:
    """UserError where the files' tensors are not those that config.json describes."""
    passed = {name for name in tensors if _DERIVED.fullmatch(name)}
    if config.architecture.tied_head:
        passed |= _second_head(tensors, config.names, path)
    shapes = {name: tensors.shape(name) for name in tensors if name not in passed}
    try:
        check_shapes(shapes, config.architecture, config.names, _CONFIG)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _second_head(tensors: SafetensorsFiles, family: NameMap, path: Path) -> set[str]:
    """The name of a tied head that was written too. UserError where it is not the embeddings: which counts is not
    guessed."""
    [embeddings], [head] = names_in("embeddings.weight", family), names_in("final_linear.weight", family)
    if head in tensors and embeddings in tensors and not tensors.same(head, embeddings):
        raise UserError(
            f"{path}: config.json says that the head is the embeddings (tie_word_embeddings), found {head} that "
            f"differs from {embeddings}; set tie_word_embeddings to false, or take {head} out"
        )
    return {head}
