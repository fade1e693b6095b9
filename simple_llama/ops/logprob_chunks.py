"""How many rows of the log-prob head exist at once, and which."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch

# Scored tokens of each part of each group, of a pair as (chosen, rejected), on the host: no sync to read them. A part
# may be empty.
Counts = Sequence[tuple[int, ...]]
LossFn = Callable[[torch.Tensor, slice], torch.Tensor]  # (sums, which groups) -> losses, as many as these groups have

MOST_CHUNKS = 4  # as many times the rows at once: a CPU's logits of one large group, a GPU's gradients of logits
_CPU_ROWS = 512  # measured
_LOGITS_BYTES = 2**29
_LEAST_ROWS = 512
_TILE = 128  # rows of a GEMM's tile


class Chunk(NamedTuple):
    """Whole groups, and their rows."""

    groups: slice
    rows: slice


def rows_at_once(device_type: str, vocabulary: int) -> int:
    """Rows whose logits exist at once on a device.

    On a GPU as many as take 512 MiB in fp32, in whole tiles of a GEMM: 16,384 of 8,192 tokens, 1,024 of 128,256. But
    512 at least, as vocabularies above 262,144 would have fewer: a GEMM of n rows does n FLOPs for each byte of a bf16
    vocabulary matrix that it reads, and an H100 does 240 in the time of one (800 TFLOP/s, 3.35 TB/s; an H200 170). So
    at 512 rows reading takes half the time of computing, at 128 twice that time. The weight's gradient is added up over
    MOST_CHUNKS times as many rows, 2,048 at least: reading and writing it in fp32 then takes half the time of its GEMM.
    """
    if device_type == "cpu":
        return _CPU_ROWS
    return max(_LEAST_ROWS, _LOGITS_BYTES // (4 * vocabulary) // _TILE * _TILE)


def group_chunks(counts: Counts, chunk_rows: int) -> list[Chunk]:
    """Whole groups in about equal chunks: a group belongs to the chunk that its middle row falls into.

    A chunk has at most chunk_rows rows and the halves of its first and last group that stick out.
    """
    return _in_chunks(counts, -(-sum(map(sum, counts)) // chunk_rows))


def bounded_chunks(counts: Counts, most_rows: int) -> list[Chunk]:
    """The same in as few chunks as leave none with more than most_rows but those of one group that has more itself."""
    sizes = list(map(sum, counts))
    for n_chunks in itertools.count(-(-sum(sizes) // most_rows)):  # sum(sizes) part any two groups that have rows
        chunks = _in_chunks(counts, n_chunks)
        if all(sum(sizes[chunk.groups]) <= max(most_rows, *sizes[chunk.groups]) for chunk in chunks):
            return chunks
    raise AssertionError


def _in_chunks(counts: Counts, n_chunks: int) -> list[Chunk]:
    """Whole groups in at most n_chunks chunks, each group where its middle row falls."""
    total = sum(map(sum, counts))
    chunks: list[Chunk] = []
    previous, start = -1, 0
    for group, parts in enumerate(counts):
        stop = start + sum(parts)
        index = min((start + stop) * n_chunks // (2 * total), n_chunks - 1)  # the last ones may have no rows
        if index == previous:
            last = chunks.pop()
            chunks.append(Chunk(slice(last.groups.start, group + 1), slice(last.rows.start, stop)))
        else:
            chunks.append(Chunk(slice(group, group + 1), slice(start, stop)))
        previous, start = index, stop
    return chunks


def at_once(rows: slice, chunk_rows: int) -> list[slice]:
    """What of a CPU's chunk exists at once: all, or of very many rows about `chunk_rows`."""
    count = rows.stop - rows.start
    if count <= MOST_CHUNKS * chunk_rows:
        return [rows]
    return [slice(rows.start + part.start, rows.start + part.stop) for part in row_chunks(count, chunk_rows)]


def row_chunks(n_rows: int, chunk_rows: int) -> list[slice]:
    """Rows in about equal chunks of at most chunk_rows."""
    n_chunks = -(-n_rows // chunk_rows)
    edges = [n_rows * i // n_chunks for i in range(n_chunks)] + [n_rows]
    return [slice(start, stop) for start, stop in pairwise(edges)]


def tiled_chunks(rows: slice, chunk_rows: int) -> list[slice]:
    """Some rows in about equal chunks of at most chunk_rows, all but the last of whole tiles."""
    count = rows.stop - rows.start
    n_chunks = -(-count // chunk_rows)
    step = min(chunk_rows, -(-count // (n_chunks * _TILE)) * _TILE) if count else 1
    return [slice(start, min(start + step, rows.stop)) for start in range(rows.start, rows.stop, step)]
