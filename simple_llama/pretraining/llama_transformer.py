"""The SimpleLLaMA transformer over a packed stream of rows. Parameter names are those of upstream's checkpoints.

Shapes: B sequences, T packed rows (or tokens of a sequence), D width, V vocabulary, H heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from simple_llama.common.errors import UserError
from simple_llama.ops.attention import PackedLayout, attend
from simple_llama.ops.linear import Linear
from simple_llama.ops.remade import keeping_all, remade
from simple_llama.pretraining.architecture import Architecture
from simple_llama.pretraining.attention_blocks import MLA, Attend, MHSelfAttention
from simple_llama.pretraining.kv_cache import KVCache, attend_cached
from simple_llama.pretraining.layers import AddNorm, FeedForward, TiedEmbedding
from simple_llama.pretraining.rotary import Rotation, rotation


class _DecoderBlock(nn.Module):
    """Attention, then feed-forward, each behind a norm and added to its input."""

    def __init__(self, architecture: Architecture):
        super().__init__()
        latent = architecture.latent
        self.attention = MLA(architecture, latent) if latent else MHSelfAttention(architecture)
        self.ffwd = FeedForward(architecture)
        self.norm1 = AddNorm(architecture.width, architecture.eps)
        self.norm2 = AddNorm(architecture.width, architecture.eps)

    def forward(
        self, x_TD: torch.Tensor, update_TD: torch.Tensor | None, by: Rotation, mix: Attend
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The stream and the last block's update of it, which is added first (none to embeddings), to the stream and
        this block's own: rows (T, D). So a norm and the addition before it are one pass."""
        x_TD, y_TD = self.norm1(x_TD, update_TD)
        with remade(y_TD, self.norm1.again(x_TD)):
            update_TD = self.attention(y_TD, by, mix)
        x_TD, y_TD = self.norm2(x_TD, update_TD)
        with remade(y_TD, self.norm2.again(x_TD)):
            return x_TD, self.ffwd(y_TD)


def _whole(block: nn.Module, x_TD: torch.Tensor, by: Rotation, mix: Attend) -> torch.Tensor:
    """A block as torch's checkpoint needs it: one stream between two, and that itself decides what is kept."""
    with keeping_all():
        x_TD, update_TD = block(x_TD, None, by, mix)
        return x_TD + update_TD


class LLaMaTransformer(nn.Module):
    """Embeddings, decoder blocks, a norm and a vocabulary matrix, which may be the embeddings (`tied_head`).

    `activation_checkpointing` (off; set it after construction) computes the blocks again in backward: less memory for
    about a third more time.
    """

    def __init__(self, architecture: Architecture):
        """Random weights: normal(0, 0.02), smaller where a block adds to the stream."""
        super().__init__()
        width, vocab_size, layers = architecture.width, architecture.vocab_size, architecture.layers
        self.architecture = architecture
        self.activation_checkpointing = False
        self.embeddings = (TiedEmbedding if architecture.tied_head else nn.Embedding)(vocab_size, width)
        self.decoder_blocks = nn.ModuleList(_DecoderBlock(architecture) for _ in range(layers))
        self.norm = AddNorm(width, architecture.eps)
        self.final_linear = None if architecture.tied_head else Linear(width, vocab_size, bias=False)
        nn.init.normal_(self.embeddings.weight, std=0.02)
        for name, parameter in self.decoder_blocks.named_parameters():
            if name.endswith(("attention.out.weight", "attention.wo.weight", "ffwd.w2.weight")):
                # 2 * layers outputs add up in the stream (GPT-2)
                nn.init.normal_(parameter, std=0.02 / (2 * layers) ** 0.5)

    @property
    def head_weight(self) -> torch.Tensor:
        """The vocabulary matrix (V, D)."""
        return self._head.weight

    def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        """Logits (B, T, V) of B sequences of equal length."""
        batch, length = ids_BT.shape
        layout = PackedLayout.causal([length] * batch).to(ids_BT.device)
        positions_T = torch.arange(length, device=ids_BT.device).repeat(batch)
        hidden_TD = self.hidden(ids_BT.flatten(), positions_T, layout)
        return self._head(hidden_TD).view(batch, length, -1)

    def hidden(self, tokens_T: torch.Tensor, positions_T: torch.Tensor, layout: PackedLayout) -> torch.Tensor:
        """Rows (T, D) after the last norm: what the vocabulary matrix is multiplied with.

        Args:
            tokens_T: token ids of the packed stream.
            positions_T: each row's position in its own sequence.
            layout: which rows see which; UserError when a sequence of it is longer than the architecture's max_seq_len.
        """
        self.check_length(layout.longest)
        by = self._rotation(positions_T)
        mix = partial(attend, layout=layout)
        x_TD, update_TD = self.embeddings(tokens_T), None
        for block in self.decoder_blocks:
            if self.activation_checkpointing and torch.is_grad_enabled():
                keep_rng = self.training and self.architecture.dropout > 0  # the same dropout mask both times
                x_TD = checkpoint(_whole, block, x_TD, by, mix, use_reentrant=False, preserve_rng_state=keep_rng)
            else:
                x_TD, update_TD = block(x_TD, update_TD, by, mix)
        return self.norm(x_TD, update_TD)[1]

    def new_cache(self, max_len: int) -> KVCache:
        """An empty cache for one sequence of up to `max_len` tokens (UserError beyond max_seq_len)."""
        self.check_length(max_len)
        architecture, weight = self.architecture, self.embeddings.weight
        shape = (architecture.layers, max_len, architecture.key_heads)
        return KVCache(
            weight.new_zeros(*shape, architecture.key_width), weight.new_zeros(*shape, architecture.value_width)
        )

    @torch.no_grad()
    def decode(self, tokens_T: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """Logits (V,) after the last of T tokens that follow the cached ones: a whole prompt first, then one by one.

        Fills the cache. UserError when it has no room left.
        """
        return self.decode_together([tokens_T], [cache])[0]

    @torch.no_grad()
    def decode_together(self, tokens: Sequence[torch.Tensor], caches: Sequence[KVCache]) -> torch.Tensor:
        """`decode` of B sequences, which may have any lengths: logits (B, V). One GEMM serves the rows of all."""
        lengths = [len(tokens_T) for tokens_T in tokens]
        for cache, length in zip(caches, lengths, strict=True):
            if (end := cache.length + length) > cache.room:
                raise UserError(f"generation: expected at most {cache.room} tokens (new_cache), found {end}")
        device = tokens[0].device
        places = [torch.arange(c.length, c.length + length) for c, length in zip(caches, lengths, strict=True)]
        by = self._rotation(torch.cat(places).to(device))
        x_TD, update_TD = self.embeddings(torch.cat(list(tokens))), None
        for layer, block in enumerate(self.decoder_blocks):
            x_TD, update_TD = block(
                x_TD, update_TD, by, partial(attend_cached, caches=caches, lengths=lengths, layer=layer)
            )
        for cache, length in zip(caches, lengths, strict=True):
            cache.length += length
        last_B = torch.tensor(lengths, device=device).cumsum(0) - 1
        _, y_TD = self.norm(x_TD, update_TD)
        return self._head(y_TD[last_B])

    @property
    def _head(self) -> nn.Embedding | Linear:
        return self.final_linear or self.embeddings

    def _rotation(self, positions_T: torch.Tensor) -> Rotation:
        architecture = self.architecture
        return rotation(positions_T, architecture.rope_width, architecture.theta, architecture.rope_scaling)

    def check_length(self, tokens: int) -> None:
        """UserError for a sequence of more tokens than the model takes."""
        if tokens > (limit := self.architecture.max_seq_len):
            raise UserError(f"sequence: expected at most the model's max_seq_len = {limit} tokens, found {tokens}")
