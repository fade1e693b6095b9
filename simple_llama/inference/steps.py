"""Steps of generation with little between the matrix products: a token for each of several sequences at once.

`LLaMaTransformer.decode_together` is the specification, for every architecture; here, for plain multi-head attention,
the same numbers to the rounding of the dtype. A step is a short list of calls; attention is one for all sequences.

Shapes: B sequences, S rows of room, R query heads that each key head serves, K width of a head, D width of the stream,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
from torch.nn import functional as F

from simple_llama.ops.linear import emulates_bf16, linear
from simple_llama.pretraining.attention_blocks import MHSelfAttention
from simple_llama.pretraining.kv_cache import KVCache
from simple_llama.pretraining.layers import FeedForward, RMSNorm
from simple_llama.pretraining.llama_transformer import LLaMaTransformer
from simple_llama.pretraining.rotary import rotation

# Of a few fp32 rows MKL makes products that take up to three times as long as reading the weights.
_ROWS_OF_ONEDNN = range(4, 17)
_MOST_PADDING = 2  # times the rows of all sequences, which get as much room as the longest one


class _Block(NamedTuple):
    """The model's own weights of a block, matrices (I, O): no copies."""

    norm1: torch.Tensor
    qkv: torch.Tensor
    out: torch.Tensor
    norm2: torch.Tensor
    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor


class Steps:
    """Keys and values of B sequences in one tensor, and steps over them."""

    def __init__(self, model: LLaMaTransformer, rooms: Sequence[int]):
        """Args: rooms: tokens of each sequence, at most."""
        a, like = model.architecture, model.embeddings.weight
        self._model, self._room, self._key_heads = model, max(rooms), a.key_heads
        self._width, self._eps, self._scale = a.width, a.eps, a.key_width**-0.5
        kept = like.new_zeros(a.layers, len(rooms), self._room, a.key_heads, 2, a.key_width)  # keys, then values
        self._kept = list(kept)
        self._zero = like.new_zeros(())
        self._blocks = [_weights(block) for block in model.decoder_blocks]
        positions_S = torch.arange(self._room, device=like.device)
        self._turns = rotation(positions_S, a.rope_width, a.theta, a.rope_scaling).turns  # (S, 1, K/2)
        # the sequences as the model's own caches: what it fills, a step sees
        self.caches = [KVCache(kept[:, row, :, :, 0], kept[:, row, :, :, 1]) for row in range(len(rooms))]

    @staticmethod
    def fit(model: LLaMaTransformer, rooms: Sequence[int]) -> bool:
        """Whether steps know the architecture, the weights stay here (those of ZeRO-3, which have a `ds_tensor`, come
        when a module is called, and go again), and sequences of nearly one length waste little memory."""
        a = model.architecture
        plain = not (a.latent or a.lora or a.qkv_bias or a.out_bias or a.ffwd_bias or a.qk_norm)
        whole = all(weight.numel() and not hasattr(weight, "ds_tensor") for weight in model.parameters())
        level = bool(rooms) and len(rooms) * max(rooms) <= _MOST_PADDING * sum(rooms)
        return plain and whole and level and a.key_width == a.value_width

    def drop(self, row: int) -> None:
        """Ends a sequence; the last one takes its row."""
        last = self.caches.pop()
        if row < len(self.caches):
            for kept in self._kept:
                kept[row, : last.length] = kept[len(self.caches), : last.length]
            self.caches[row].length = last.length

    @torch.inference_mode()
    def step(self, tokens_B: torch.Tensor) -> torch.Tensor:
        """Logits (B, V) after one more token of each sequence, to be read alone (an inference tensor)."""
        lengths = [cache.length for cache in self.caches]
        times = _way_to_multiply(self._model.head_weight, len(lengths))
        count, end, room = len(lengths), max(lengths) + 1, self._room
        last_B = torch.tensor(lengths)
        rows_B = (last_B + room * torch.arange(count)).to(tokens_B.device)
        last_B = last_B.to(tokens_B.device)
        turns = self._turns[last_B].unsqueeze(1)  # (B, 1, 1, K/2)
        x_BD = self._model.embeddings(tokens_B)
        mask = None if min(lengths) == end - 1 else _mask(last_B, end, x_BD)
        for kept, block in zip(self._kept, self._blocks, strict=True):
            normed = self._normed(x_BD, block.norm1)
            heads = times(normed, block.qkv).view(count, self._key_heads, -1, kept.shape[-1])  # R queries, key, value
            served = heads.shape[2] - 2
            _turn(heads.narrow(2, 0, served + 1), turns)
            kept.view(-1, *kept.shape[2:]).index_copy_(0, rows_B, heads.narrow(2, served, 2))
            keys, values = kept[:count, :end].permute(3, 0, 2, 1, 4)
            y = F.scaled_dot_product_attention(heads.narrow(2, 0, served), keys, values, mask, scale=self._scale)
            x_BD = times(y.reshape(count, -1), block.out, x_BD)
            normed = self._normed(x_BD, block.norm2)
            gated = F.silu(times(normed, block.gate), inplace=True).mul_(times(normed, block.up))
            x_BD = times(gated, block.down, x_BD)
        for cache in self.caches:
            cache.length += 1
        return times(self._normed(x_BD, self._model.norm.weight), self._model.head_weight.t())

    def _normed(self, x_BD: torch.Tensor, weight_D: torch.Tensor) -> torch.Tensor:
        """RMSNorm. Of one row on a CPU in two calls for eight: behind a matrix that has emptied the caches each call
        takes some 5 us."""
        if len(x_BD) > 1 or x_BD.device.type != "cpu":
            return F.rms_norm(x_BD, (self._width,), weight_D, self._eps)
        norm = float(torch.linalg.vector_norm(x_BD, dtype=torch.float32))
        scale = (norm * norm / self._width + self._eps) ** -0.5
        return torch.addcmul(self._zero, x_BD, weight_D, value=scale)


def _weights(block: torch.nn.Module) -> _Block:
    attention, ffwd = cast(MHSelfAttention, block.attention), cast(FeedForward, block.ffwd)
    norm1, norm2 = cast(RMSNorm, block.norm1), cast(RMSNorm, block.norm2)
    return _Block(
        norm1.weight,
        attention.qkv_linear.weight.t(),
        attention.out.weight.t(),
        norm2.weight,
        ffwd.w1.weight.t(),
        ffwd.w3.weight.t(),
        ffwd.w2.weight.t(),
    )


def _way_to_multiply(weight: torch.Tensor, rows: int) -> Callable[..., torch.Tensor]:
    """The fastest of those below for so many rows of `weight`'s dtype."""
    if emulates_bf16(weight):
        return _upcast_times
    if rows == 1 and weight.dtype == torch.bfloat16 and not weight.is_cuda:
        return _row_times
    fits = weight.dtype == torch.float32 and not weight.is_cuda and rows in _ROWS_OF_ONEDNN
    return _onednn_times if fits and torch.backends.mkldnn.is_available() else _times


def _times(x_BI: torch.Tensor, weight_IO: torch.Tensor, onto_BO: torch.Tensor | None = None) -> torch.Tensor:
    """x W, added to `onto_BO` where there is one: rounded once."""
    return torch.mm(x_BI, weight_IO) if onto_BO is None else torch.addmm(onto_BO, x_BI, weight_IO)


def _row_times(x_1I: torch.Tensor, weight_IO: torch.Tensor, onto_1O: torch.Tensor | None = None) -> torch.Tensor:
    """`_times` of one bf16 row, but for a second rounding: what torch does for a vector reads the weights a third
    faster. It too adds up in fp32."""
    product = torch.mv(weight_IO.t(), x_1I[0]).unsqueeze(0)
    return product if onto_1O is None else product.add_(onto_1O)


def _upcast_times(x_BI: torch.Tensor, weight_IO: torch.Tensor, onto_BO: torch.Tensor | None = None) -> torch.Tensor:
    """`_times` in fp32, where the CPU has no bf16 units (ops/linear.py)."""
    product = linear(x_BI, weight_IO.t(), upcast=True)
    return product if onto_BO is None else onto_BO + product


def _onednn_times(x_BI: torch.Tensor, weight_IO: torch.Tensor, onto_BO: torch.Tensor | None = None) -> torch.Tensor:
    """`_times` by oneDNN, which F.linear takes for bf16 alone."""
    product = torch.ops.mkldnn._linear_pointwise(x_BI, weight_IO.t(), None, "none", [], "")
    return product if onto_BO is None else product.add_(onto_BO)


def _turn(heads: torch.Tensor, turns: torch.Tensor) -> None:
    """Turns the pairs of queries and keys in place, in fp32 (rotary.py). The heads of fp32 rows begin where a complex
    number can: rows and heads are of an even width."""
    wide = heads.float()  # of fp32 the same memory
    torch.view_as_complex(wide.view(*wide.shape[:-1], -1, 2)).mul_(turns)
    if wide is not heads:
        heads.copy_(wide)


def _mask(last_B: torch.Tensor, end: int, like: torch.Tensor) -> torch.Tensor:
    """Additive (B, 1, 1, end): a sequence sees its own tokens, the newest one among them."""
    beyond = torch.arange(end, device=last_B.device) > last_B.unsqueeze(1)
    return like.new_zeros(beyond.shape).masked_fill_(beyond, -torch.inf)[:, None, None]
