"""How many rows of the head exist at once, and that chunks hold whole groups."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simple_llama.ops.logprob_chunks import Chunk, bounded_chunks, group_chunks, rows_at_once, tiled_chunks

Counts = tuple[tuple[int, int], ...]
PAIRS = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=40).map(tuple)


@pytest.mark.parametrize(
    ("device", "vocabulary", "rows"),
    [
        ("cpu", 8192, 512),
        ("cpu", 128256, 512),
        ("cuda", 8192, 16384),  # 2^29 / (4 * 2^13) = 2^14
        ("cuda", 49152, 2688),  # 2,730.6, in whole tiles 21 * 128
        ("cuda", 128256, 1024),  # 1,046.5
        ("cuda", 262144, 512),
        ("cuda", 1_000_000, 512),  # 134, which would be bound by memory
    ],
)
def test_rows_by_hand(device: str, vocabulary: int, rows: int) -> None:
    """512 MiB of fp32 logits on a GPU, but 512 rows at least; on a CPU whatever was measured there."""
    assert rows_at_once(device, vocabulary) == rows


def check_whole_pairs(counts: Counts, chunks: list[Chunk]) -> None:
    """Chunks tile the pairs and rows in order."""
    sizes = [sum(pair) for pair in counts]
    assert [p for chunk in chunks for p in range(chunk.groups.start, chunk.groups.stop)] == list(range(len(counts)))
    assert [r for chunk in chunks for r in range(chunk.rows.start, chunk.rows.stop)] == list(range(sum(sizes)))
    assert all(chunk.rows.stop - chunk.rows.start == sum(sizes[chunk.groups]) for chunk in chunks)


@settings(deadline=None)
@given(counts=PAIRS, chunk_rows=st.integers(1, 200))
def test_chunks_hold_whole_pairs(counts: Counts, chunk_rows: int) -> None:
    """Their rows stay below chunk_rows plus half the first and last pair."""
    chunks = group_chunks(counts, chunk_rows)
    check_whole_pairs(counts, chunks)
    for chunk in chunks:
        inside = [sum(pair) for pair in counts[chunk.groups]]
        assert len(inside) == 1 or sum(inside) <= chunk_rows + (inside[0] + inside[-1]) / 2


@settings(deadline=None)
@given(counts=PAIRS, most_rows=st.integers(1, 200), empty=st.booleans())
def test_bounded_chunks_are_never_larger_but_for_one_pair(counts: Counts, most_rows: int, empty: bool) -> None:
    """No more than most_rows, or one pair that alone has more; a pair without rows may stand beside it."""
    counts = ((0, 0), *counts, (0, 0)) if empty else counts
    chunks = bounded_chunks(counts, most_rows)
    check_whole_pairs(counts, chunks)
    for chunk in chunks:
        inside = [sum(pair) for pair in counts[chunk.groups]]
        assert sum(inside) <= most_rows or sum(inside) == max(inside)


def test_bounded_chunks_are_few_and_about_equal() -> None:
    """Ten pairs of 10 rows of which 30 may exist at once: not three of 30 and a rest, and two where 50 may."""
    counts = ((4, 6),) * 10
    assert [chunk.rows.stop - chunk.rows.start for chunk in bounded_chunks(counts, 30)] == [20, 30, 20, 30]
    assert [chunk.rows.stop - chunk.rows.start for chunk in bounded_chunks(counts, 50)] == [50, 50]


@given(start=st.integers(0, 500), count=st.integers(0, 5000), chunk_rows=st.integers(1, 1024))
def test_tiled_chunks_tile(start: int, count: int, chunk_rows: int) -> None:
    """In order, none too large, all but the last of one size; as few as there can be."""
    chunks = tiled_chunks(slice(start, start + count), chunk_rows)
    assert [row for chunk in chunks for row in range(chunk.start, chunk.stop)] == list(range(start, start + count))
    sizes = [chunk.stop - chunk.start for chunk in chunks]
    assert len(sizes) == -(-count // chunk_rows) and all(0 < size <= chunk_rows for size in sizes)
    assert len(set(sizes[:-1])) <= 1 and (not sizes or sizes[-1] <= sizes[0])


def test_tiled_chunks_by_hand() -> None:
    """1,100 rows of which 1,024 may exist at once: 5 tiles of 128 and a rest, not 550 and 550."""
    assert tiled_chunks(slice(10, 1110), 1024) == [slice(10, 650), slice(650, 1110)]
    assert tiled_chunks(slice(0, 4096), 1024) == [slice(i, i + 1024) for i in range(0, 4096, 1024)]
