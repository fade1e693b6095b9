"""Attention over a packed stream of rows, where each row sees only its own sequence; sequences may share a prefix.

    one segment of the stream   [ prefix | branch 0 | branch 1 | ... ]
    what a row of branch i sees [ prefix | branch i up to the row itself ]

So a segment is one causal block, [prefix | branch 0], and one rectangular block for each further branch: its queries
are the last rows of its keys, [prefix | branch i] ("bottom-right causal"). CUDA in half precision runs all blocks of a
stream in one varlen call; everything else runs one SDPA call a block, which is the specification.

Keys and values may have fewer heads than queries (grouped-query attention, arXiv:2305.13245): H is then a multiple of
G, and query head h reads key head h * G // H. With H = G every head has its own.

Shapes: T query rows, S key rows, H query heads, G key heads, K query/key width, V value width.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from simple_llama.ops.elementwise import fused_kernels
from simple_llama.ops.linear import emulates_bf16
from simple_llama.ops.machine import cpu_emulates_bf16

# Part of a reference's identity: raise it when the numbers that attention gives change beyond rounding, which is what
# a CPU with bf16 units and one without differ by, too.
ATTENTION_VERSION = "1"

_VARLEN_DTYPES = (torch.bfloat16, torch.float16)
_VARLEN_MAX_WIDTH = 256  # widest head that the flash kernels have
_MOST_WIDE_KEYS = 512  # of blocks of bf16 that a CPU computes in fp32
_MOST_MASKED_ROWS = 1024  # of a branch, behind a prefix, that are computed at once: a mask has rows x keys numbers


class Block(NamedTuple):
    """Query rows [start, start + rows) that see `prefix` rows from `prefix_start` on, and themselves causally."""

    start: int
    rows: int
    prefix_start: int
    prefix: int


class KeyPlan(NamedTuple):
    """Which row of the stream each key is, and the way back: int64 tensors on one device."""

    rows_S: torch.Tensor  # row of the stream for each key
    places_TC: torch.Tensor  # keys that each row is: its own, in its own block, then copies for branches, or -1


class VarlenPlan(NamedTuple):
    """The blocks of a layout as the varlen kernel wants them, on one device."""

    keys: KeyPlan | None  # None when keys are the stream itself
    query_starts: torch.Tensor  # int32, cumulative rows of each block's queries, from 0
    key_starts: torch.Tensor  # int32, the same of its keys
    longest_query: int
    longest_key: int


@dataclass(frozen=True)
class PackedLayout:
    """Which rows of a packed stream see which. Index tensors and masks are made once and serve all layers.

    One entry of `segments` is (prefix rows, (rows of branch 0, rows of branch 1, ...)); a plain causal sequence of n
    rows is (n, ()). Any count may be 0.
    """

    segments: tuple[tuple[int, tuple[int, ...]], ...]
    _made: dict = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def causal(cls, lengths: Sequence[int]) -> PackedLayout:
        """Sequences of the given lengths, one after the other, that share nothing."""
        return cls(tuple((length, ()) for length in lengths))

    @cached_property
    def rows(self) -> int:
        """Rows of the whole stream."""
        return sum(prefix + sum(branches) for prefix, branches in self.segments)

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest sequence: a prefix with its longest branch."""
        return max((prefix + max(branches, default=0) for prefix, branches in self.segments), default=0)

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """The stream's blocks in order, empty ones left out."""
        return tuple(block for block in self._all_blocks() if block.rows)

    def _all_blocks(self) -> Iterator[Block]:
        start = 0
        for prefix, branches in self.segments:
            trunk = prefix + sum(branches[:1])
            yield Block(start, trunk, start, 0)
            branch_start = start + trunk
            for rows in branches[1:]:
                yield Block(branch_start, rows, start, prefix)
                branch_start += rows
            start = branch_start

    def to(self, device: torch.device | str) -> PackedLayout:
        """The layout itself, with what a GPU needs already on its way there; the host does not wait."""
        device = torch.device(device)
        if device.type == "cuda":
            self.varlen_plan(device if device.index is not None else torch.device("cuda", torch.cuda.current_device()))
        return self

    def varlen_plan(self, device: torch.device) -> VarlenPlan:
        """Index tensors for the varlen kernel on `device` (as tensors name it: with its index), made on first use."""
        key = ("varlen", device)
        if key not in self._made:
            self._made[key] = _varlen_plan(self.blocks, device)
        return self._made[key]

    def mask(self, rows: int, prefix: int, like: torch.Tensor) -> torch.Tensor:
        """Additive bottom-right causal mask (rows, prefix + rows) in the dtype and place of `like`."""
        key = (rows, prefix, like.dtype, like.device)
        if key not in self._made:
            self._made[key] = _suffix_mask(rows, prefix + rows, like)
        return self._made[key]


def attend(
    q_THK: torch.Tensor, k_TGK: torch.Tensor, v_TGV: torch.Tensor, layout: PackedLayout, scale: float
) -> torch.Tensor:
    """softmax(scale * q k^T) v over what `layout` lets each row see: (T, H, V) in the dtype of v."""
    width = max(q_THK.shape[-1], v_TGV.shape[-1])
    if q_THK.is_cuda and q_THK.dtype in _VARLEN_DTYPES and width <= _VARLEN_MAX_WIDTH:
        return _attend_varlen(q_THK, k_TGK, v_TGV, layout, scale)
    return _attend_by_block(q_THK, k_TGK, v_TGV, layout, scale)


def _attend_by_block(
    q_THK: torch.Tensor, k_TGK: torch.Tensor, v_TGV: torch.Tensor, layout: PackedLayout, scale: float
) -> torch.Tensor:
    """`attend` by one SDPA call a block, on any device and dtype."""
    dtype = v_TGV.dtype
    if emulates_bf16(v_TGV):
        q_THK, k_TGK, v_TGV = q_THK.float(), k_TGK.float(), v_TGV.float()
    # split, not slices: the backward of a slice fills a whole stream with zeros
    lengths = [block.rows for block in layout.blocks]
    parts = zip(layout.blocks, q_THK.split(lengths), k_TGK.split(lengths), v_TGV.split(lengths), strict=True)
    outputs = []
    trunk_k, trunk_v = k_TGK[:0], v_TGV[:0]
    for (_, rows, _, prefix), q, k, v in parts:
        if prefix:  # then the block before the branches was [prefix | branch 0]
            k, v = torch.cat((trunk_k[:prefix], k)), torch.cat((trunk_v[:prefix], v))
        else:
            trunk_k, trunk_v = k, v
        if is_widened(v.dtype, v.device.type, prefix + rows):
            q, k, v = q.float(), k.float(), v.float()
        outputs += _attend_branch(q, k, v, layout, scale) if prefix else [attend_suffix(q, k, v, scale)]
    return torch.cat(outputs).to(dtype)


def _attend_branch(
    q_THK: torch.Tensor, k_SGK: torch.Tensor, v_SGV: torch.Tensor, layout: PackedLayout, scale: float
) -> list[torch.Tensor]:
    """`attend_suffix` of a branch behind its prefix, a long one in parts, each of which sees no later keys."""
    rows, keys = len(q_THK), len(k_SGK)
    if rows <= _MOST_MASKED_ROWS:
        return [attend_suffix(q_THK, k_SGK, v_SGV, scale, layout.mask(rows, keys - rows, q_THK))]
    parts, seen = [], keys - rows
    for part in q_THK.split(_MOST_MASKED_ROWS):
        mask = layout.mask(len(part), seen, part)
        seen += len(part)
        parts.append(attend_suffix(part, k_SGK[:seen], v_SGV[:seen], scale, mask))
    return parts


def is_widened(dtype: torch.dtype, device_type: str, keys: int) -> bool:
    """Whether a block with so many keys is computed in fp32 rather than in its bf16: on a CPU, up to some hundred keys,
    or all where it emulates bf16.

    There torch's kernel (2.13) is faster in fp32, since in bf16 it makes thousands of small calls; and exact in more
    digits. A segment alone decides, whatever else is packed: a prefix is computed with the first of its branches.
    """
    if dtype != torch.bfloat16 or device_type != "cpu":
        return False
    return keys <= _MOST_WIDE_KEYS or cpu_emulates_bf16()


def attend_suffix(
    q_THK: torch.Tensor, k_SGK: torch.Tensor, v_SGV: torch.Tensor, scale: float, mask_TS: torch.Tensor | None = None
) -> torch.Tensor:
    """Causal attention of T rows that are the last T of S: a branch after its prefix, or a step of generation.

    Args:
        mask_TS: `PackedLayout.mask` of these rows where the caller has it; otherwise made here if one is needed.

    Returns (T, H, V) in the dtype of v.
    """
    rows, keys = q_THK.shape[0], k_SGK.shape[0]
    square = rows == keys
    if mask_TS is None and not square and rows > 1:  # a single last row sees every key
        mask_TS = _suffix_mask(rows, keys, q_THK)
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q_THK, k_SGK, v_SGV))
    mask = None if square else mask_TS
    grouped = _is_grouped(q_THK, k_SGK)
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=square, scale=scale, enable_gqa=grouped)
    return out.squeeze(0).transpose(0, 1)


def _suffix_mask(rows: int, keys: int, like: torch.Tensor) -> torch.Tensor:
    """Additive mask (rows, keys): 0 where row i of the last `rows` sees key j <= keys - rows + i, else -inf."""
    return like.new_full((rows, keys), -torch.inf).triu(keys - rows + 1)


def _is_grouped(q_THK: torch.Tensor, k_SGK: torch.Tensor) -> bool:
    return q_THK.shape[1] != k_SGK.shape[1]


def _attend_varlen(
    q_THK: torch.Tensor, k_TGK: torch.Tensor, v_TGV: torch.Tensor, layout: PackedLayout, scale: float
) -> torch.Tensor:
    """`attend` by one flash call: block by block, keys are [prefix | own rows], aligned at the last row."""
    from torch.nn.attention.varlen import varlen_attn  # registers operators when imported

    plan = layout.varlen_plan(q_THK.device)
    value_width = v_TGV.shape[-1]
    k_SGK, v_SGV = k_TGK, v_TGV
    if plan.keys is not None:
        k_SGK, v_SGV = (_GatherKeys.apply(rows, plan.keys) for rows in (k_TGK, v_TGV))
    # one width for all three, a multiple of 8: zeros add nothing to q k^T and give zero columns of the output
    width = -(-max(q_THK.shape[-1], value_width) // 8) * 8
    q, k, v = (F.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x for x in (q_THK, k_SGK, v_SGV))
    call = partial(varlen_attn, enable_gqa=True) if _is_grouped(q, k) and _has_gqa_flag(varlen_attn) else varlen_attn
    out = call(
        q,
        k,
        v,
        plan.query_starts,
        plan.key_starts,
        plan.longest_query,
        plan.longest_key,
        scale=scale,
        window_size=(-1, 0),
    )
    assert isinstance(out, torch.Tensor)  # a tuple only where auxiliary outputs are asked for
    return out[..., :value_width]


@cache
def _has_gqa_flag(varlen_attn: Any) -> bool:
    """Whether it refuses fewer key heads than query heads without that flag; earlier ones take them, and know none."""
    return "enable_gqa" in inspect.signature(varlen_attn).parameters


class _GatherKeys(torch.autograd.Function):
    """Rows (T, G, K) to keys (S, G, K).

    The backward pass of `index_select` adds every element by an atomic operation; here each row takes its own key's
    gradient and those of its copies, one after the other: no atomics, and the same result at each call.
    """

    @staticmethod
    def forward(ctx: Any, rows_TGK: torch.Tensor, plan: KeyPlan) -> torch.Tensor:
        ctx.save_for_backward(plan.places_TC)
        kernels = fused_kernels(rows_TGK)
        return kernels.gathered(rows_TGK, plan.rows_S) if kernels else rows_TGK.index_select(0, plan.rows_S)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SGK: torch.Tensor) -> tuple[torch.Tensor, None]:
        (places_TC,) = ctx.saved_tensors
        kernels = fused_kernels(grad_SGK)
        return kernels.added_places(grad_SGK, places_TC) if kernels else _added_places(grad_SGK, places_TC), None


def _added_places(grad_SGK: torch.Tensor, places_TC: torch.Tensor) -> torch.Tensor:
    """The gradient (T, G, K) of rows that are keys: of each the sum of grad[places], rounded after each addition."""
    own_T, *copies = places_TC.unbind(1)
    grad_TGK = grad_SGK.index_select(0, own_T)
    for place_T in copies:
        more = grad_SGK.index_select(0, place_T.clamp_min(0))
        grad_TGK += more.masked_fill_((place_T < 0)[:, None, None], 0)
    return grad_TGK


def _varlen_plan(blocks: Sequence[Block], device: torch.device) -> VarlenPlan:
    """Keys block by block: the prefix's rows of the stream, then the block's own; cumulative lengths beside them."""
    queries = [block.rows for block in blocks]
    keys = [block.prefix + block.rows for block in blocks]
    return VarlenPlan(
        _key_plan(blocks, device) if any(block.prefix for block in blocks) else None,
        _send(torch.tensor([0, *accumulate(queries)], dtype=torch.int32), device),
        _send(torch.tensor([0, *accumulate(keys)], dtype=torch.int32), device),
        max(queries, default=0),
        max(keys, default=0),
    )


def _key_plan(blocks: Sequence[Block], device: torch.device) -> KeyPlan:
    """The rows that a layout's blocks have as keys, and each row's places among them."""
    pieces: list[torch.Tensor] = []
    rows = blocks[-1].start + blocks[-1].rows
    columns = [torch.full((rows,), -1)]  # of places: own ones, those of branch 1, of branch 2, ...
    key, branch = 0, 0
    for block in blocks:
        prefix = slice(block.prefix_start, block.prefix_start + block.prefix)
        own = slice(block.start, block.start + block.rows)
        pieces += [torch.arange(part.start, part.stop) for part in (prefix, own)]
        branch = branch + 1 if block.prefix else 0
        if branch == len(columns):
            columns.append(torch.full((rows,), -1))
        columns[branch][prefix] = torch.arange(key, key + block.prefix)
        columns[0][own] = torch.arange(key + block.prefix, key + block.prefix + block.rows)
        key += block.prefix + block.rows
    while len(columns).bit_count() > 1:  # a power of two of them: kernels are compiled for each number
        columns.append(torch.full((rows,), -1))
    return KeyPlan(_send(torch.cat(pieces), device), _send(torch.stack(columns, dim=1), device))


def _send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy on `device`; from pinned memory a GPU fetches it without making the host wait."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
