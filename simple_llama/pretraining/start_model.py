"""What a run needs of the model it starts from, whatever file it came in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch

from simple_llama.common.errors import UserError
from simple_llama.dataset.own_tokenizer import OwnTokenizer
from simple_llama.pretraining.architecture import Architecture
from simple_llama.pretraining.weights import Loaded


class StartChanged(UserError):
    """The files no longer hold what was read at the start."""


class StartModel(Protocol):
    """A model on disk, held open to the run's end: every read is of the bytes that were digested.

    A path may lead to another file at any time. Here the files themselves are held, so it does not matter whether they
    are renamed, replaced or deleted; one that was cut or overwritten in place is refused at the next read. Where the
    digest is still being made, whichever read comes first counts: the digest and all others have to agree with it.
    """

    @property
    def path(self) -> Path:
        """Of the file or the folder."""
        ...

    @property
    def architecture(self) -> Architecture:
        """Without dropout, which is a run's own."""
        ...

    @property
    def slides(self) -> bool:
        """Whether a sliding window, and not the positions that it knows, bounds its sequences."""
        ...

    @property
    def names(self) -> Sequence[str]:
        """Of its tensors, ours."""
        ...

    @property
    def digest(self) -> str:
        """Of names, dtypes, shapes and values. Where it is made in a thread, whoever asks waits; StartChanged."""
        ...

    @property
    def numerics(self) -> Mapping[str, str]:
        """What else decides its output: numbers that are not weights."""
        ...

    @property
    def own_tokenizer(self) -> OwnTokenizer | None:
        """What came with the model; None where its tokenizer is a file of its own."""
        ...

    @property
    def export_suffix(self) -> str:
        """How the names of its exports end: ".pth", or nothing for a folder."""
        ...

    @property
    def export_dtype(self) -> torch.dtype:
        """Of the tensors of a run's exports."""
        ...

    def load(self) -> Loaded:
        """The model, whose values are not checked; `state_dict` reads a tensor each time it is asked for it.

        StartChanged where the files differ openly, and at a tensor that is another one than at the first read.
        """
        ...

    def reading(self) -> AbstractContextManager[Loaded]:
        """The model while the body uses it: no tensor that it gets is another one than was digested (StartChanged)."""
        ...

    def export(
        self,
        path: Path,
        trained: Mapping[str, torch.Tensor],
        metadata: dict[str, Any],
        dtype: torch.dtype | None = None,
        tokenizer: OwnTokenizer | None = None,
    ) -> None:
        """Writes the trained tensors, and the files' own where a name is not among them, in the form in which the
        model came, whole or not at all.

        Args:
            metadata: JSON values only (TypeError otherwise).
            dtype: of all tensors; None: each as it came, `export_dtype` most of them.
            tokenizer: the one that was trained with; None: what came with the model. A .pth has none.

        Raises StartChanged.
        """
        ...

    def export_metadata(self, path: Path) -> dict[str, Any]:
        """What an export of this form says of itself; nothing for what is none."""
        ...
