"""A GPU's way through the model on CPU tensors, by Triton's interpreter: what it launches and what it keeps.

For a process with TRITON_INTERPRET=1. Attention's kernel is a stand-in with that one's arguments, results and what it
keeps; everything else is the code that a GPU runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

from simple_llama.ops import attention, elementwise
from simple_llama.ops.attention import attend_suffix
from simple_llama.ops.elementwise_triton import TRITON_KERNELS
from simple_llama.pretraining import llama_transformer

_FLASH = ("flash forward",), ("flash dot", "flash backward", "flash convert")  # kernels of a call, as traces show them
# operators of aten that launch nothing: they give another look at a tensor, or take memory
_VIEWS = {"detach", "view", "_unsafe_view", "t", "transpose", "expand", "split", "split_with_sizes", "slice", "select"}
_VIEWS |= {"unsqueeze", "squeeze", "permute", "as_strided", "alias", "unbind", "view_as_complex", "view_as_real"}
_VIEWS |= {"empty", "empty_like", "empty_strided", "new_empty", "lift_fresh", "resize_", "_conj"}


@contextmanager
def gpu_way(kernels: bool = True) -> Iterator[None]:
    """Layers and attention as on a GPU, with its kernels or with torch's own operators alone."""
    found = TRITON_KERNELS if kernels else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(elementwise, "_kernels", lambda _: found)
        patch.setattr(elementwise, "_keeps_less", lambda *_: False)
        patch.setattr(llama_transformer, "attend", attention._attend_varlen)
        patch.setattr("torch.nn.attention.varlen.varlen_attn", _varlen)
        patch.setattr(interpreter, "_convert_float", rounded)
        yield


_convert = interpreter._convert_float


def rounded(data: np.ndarray, given: Any, wanted: Any, mode: Any) -> np.ndarray:
    """The interpreter cuts fp32 to bf16, where a GPU rounds to the nearest: here it rounds too."""
    if str(given) != "fp32" or str(wanted) != "bf16":
        return _convert(data, given, wanted, mode)
    return torch.from_numpy(np.array(data, np.float32)).bfloat16().view(torch.uint16).numpy()


class Launches(TorchDispatchMode):
    """Counts what would be a kernel on a GPU, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self._quiet = 0

    @property
    def sum(self) -> int:
        """All of them."""
        return self.counts.total()

    def __enter__(self) -> Launches:
        run = self._run = interpreter.GridExecutor.__call__

        def counted(executor: Any, *args: Any, **kwargs: Any) -> Any:
            self.counts[executor.fn.__name__] += 1
            with self.quiet():
                return run(executor, *args, **kwargs)

        setattr(interpreter.GridExecutor, "__call__", counted)  # noqa: B010 - for pyright
        _open.append(self)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        interpreter.GridExecutor.__call__ = self._run
        _open.remove(self)
        super().__exit__(*error)

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Within, nothing counts: what a stand-in does."""
        self._quiet += 1
        try:
            yield
        finally:
            self._quiet -= 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Counts an operator of aten that is no view."""
        name = func.overloadpacket.__name__
        if not self._quiet and name not in _VIEWS:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


_open: list[Launches] = []


class _Flash(torch.autograd.Function):
    """Causal attention of blocks aligned at the last row; keeps queries, keys, values and its own output."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: Any, scale: float) -> torch.Tensor:
        out = _quietly(_FLASH[0], lambda: _by_blocks(q, k, v, spans, scale))
        ctx.save_for_backward(q, k, v, out)
        ctx.spans, ctx.scale = spans, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        def gradients() -> Any:
            with torch.enable_grad():
                q, k, v = (part.detach().requires_grad_() for part in ctx.saved_tensors[:3])
                return torch.autograd.grad(_by_blocks(q, k, v, ctx.spans, ctx.scale), (q, k, v), grad)

        return *_quietly(_FLASH[1], gradients), None, None


def _varlen(q, k, v, starts_q, starts_k, _max_q, _max_k, *, scale, window_size, enable_gqa=False):
    """torch.nn.attention.varlen.varlen_attn, of which the plain definition is in test_attention.py."""
    assert window_size == (-1, 0) and enable_gqa == (q.shape[1] != k.shape[1])
    spans = _quietly((), lambda: list(zip(pairwise(starts_q.tolist()), pairwise(starts_k.tolist()), strict=True)))
    return _Flash.apply(q, k, v, spans, scale)


def _by_blocks(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: Any, scale: float) -> torch.Tensor:
    return torch.cat([attend_suffix(q[a:b], k[c:d], v[c:d], scale) for (a, b), (c, d) in spans])


def _quietly(names: tuple[str, ...], call: Any) -> Any:
    """The call, which counts as kernels of these names."""
    if not _open:
        return call()
    _open[-1].counts.update(names)
    with _open[-1].quiet():
        return call()
