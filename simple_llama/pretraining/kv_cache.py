"""Keys and values of the tokens that one sequence has so far, so that generation computes each token once.

Shapes: L layers, S rows of room, T rows at hand, H query heads, G key heads, K query/key width, V value width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from simple_llama.ops.attention import attend_suffix


@dataclass
class KVCache:
    """Rows [0, length) are filled in every layer."""

    keys_LSGK: torch.Tensor
    values_LSGV: torch.Tensor
    length: int = 0

    @property
    def room(self) -> int:
        """Rows in all."""
        return self.keys_LSGK.shape[1]

    def attend(
        self, q_THK: torch.Tensor, k_TGK: torch.Tensor, v_TGV: torch.Tensor, *, layer: int, scale: float
    ) -> torch.Tensor:
        """Writes the T rows behind the filled ones of `layer`; returns attention over all of them, (T, H, V)."""
        end = self.length + k_TGK.shape[0]
        self.keys_LSGK[layer, self.length : end] = k_TGK
        self.values_LSGV[layer, self.length : end] = v_TGV
        return attend_suffix(q_THK, self.keys_LSGK[layer, :end], self.values_LSGV[layer, :end], scale)


def attend_cached(
    q_THK: torch.Tensor,
    k_TGK: torch.Tensor,
    v_TGV: torch.Tensor,
    *,
    caches: Sequence[KVCache],
    lengths: Sequence[int],
    layer: int,
    scale: float,
) -> torch.Tensor:
    """`KVCache.attend` of several sequences, whose new rows stand one after the other; returns (T, H, V)."""
    parts = zip(caches, q_THK.split(lengths), k_TGK.split(lengths), v_TGV.split(lengths), strict=True)
    return torch.cat([cache.attend(q, k, v, layer=layer, scale=scale) for cache, q, k, v in parts])
