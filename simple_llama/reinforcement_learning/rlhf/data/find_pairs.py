"""The pairs of a data set, split: read in one go, or put together from shards of blocks, which are kept for the next
start. Both ways give the same pairs."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from simple_llama.cluster import watchdog
from simple_llama.common.errors import UserError
from simple_llama.common.files import digest
from simple_llama.dataset.data_blocks import Block, UncutFile, blocks_of, read_block
from simple_llama.dataset.json_records import Faults, KeptCount, Record, Tally, first_records, read_lines, read_records
from simple_llama.reinforcement_learning.rlhf.data.merge_blocks import BlockPairs, merge
from simple_llama.reinforcement_learning.rlhf.data.pair_reader import PairReader, ReadPairs
from simple_llama.reinforcement_learning.rlhf.data.readers import Formats
from simple_llama.reinforcement_learning.rlhf.data.reading import ReadingConfig
from simple_llama.reinforcement_learning.rlhf.data.sources import Sources
from simple_llama.reinforcement_learning.rlhf.data.token_files import narrow
from simple_llama.reinforcement_learning.rlhf.data.token_shards import FoundPairs, ReadBlock, TokenShards, arrays_of
from simple_llama.reinforcement_learning.rlhf.data.unknown_tokens import unknown_counts, unknown_of
from simple_llama.reinforcement_learning.rlhf.data.usable_pairs import ForMerge, held_out_prompts

_LEAST_BYTES = 16 << 20  # of data of which shards are kept: less is read within a second or two
_FIRST_RECORDS = 100  # that may show the format of a file
_BEAT = "reading the data"


class TokenCache(NamedTuple):
    """Where shards are kept, and how data files are compared with what they were."""

    folder: Path
    verify: bool = False  # whether files are read whole, and shards too


def is_large(sources: Sources) -> bool:
    """Whether shards of these files are kept."""
    try:
        return sum(file.stat().st_size for file in sources.files) >= _LEAST_BYTES
    except OSError:
        return False  # reading says what is wrong


def find_pairs(reader: PairReader, sources: Sources, val_share: float, cache: TokenCache | None) -> FoundPairs:
    """The pairs of all files, those that train first. UserError for faulty data."""
    found = None
    if cache and is_large(sources):
        found = _from_shards(reader, sources, val_share, cache)
    return found or _in_one_reading(reader, sources, val_share)


def make_share(reader: PairReader, sources: Sources, cache: TokenCache, rank: int, ranks: int) -> None:
    """Makes the missing shards among a rank's share of the blocks of large data, so that all ranks together make all.

    Where a record is faulty it ends, as at a shard that only reading all would show to be damaged: whoever then finds
    the pairs says so, or makes the rest. UserError where the disk takes no more.
    """
    if not is_large(sources):
        return
    cache = cache._replace(verify=False)  # all is read once, by those who find the pairs
    shards = TokenShards(cache.folder, _options(reader))
    with contextlib.suppress(UncutFile), watchdog.patience(_BEAT):
        for block, known in list(_blocks(reader, sources, cache, shards))[rank::ranks]:
            if _block_pairs(reader, sources, shards, block, known) is None:
                return


def _in_one_reading(reader: PairReader, sources: Sources, val_share: float) -> FoundPairs:
    """The pairs, in memory."""
    read = reader.read(lambda faults: (record for file in sources.files for record in read_records(file, faults)))
    read.faults.end()
    read.faults.count_in(read.count)
    unknown = unknown_of(read.pairs, unknown_counts(read.pairs, reader.chat.unknown_id))
    spelled = read.speller.characters, read.speller.pairs, read.speller.first
    words = reader.said(read.formats)
    found = FoundPairs(read.pairs, read.shares, 0, read.count, read.extra_keys, spelled, unknown, words)
    return _split(found, sources, val_share)


def _split(found: FoundPairs, sources: Sources, val_share: float) -> FoundPairs:
    """The same pairs, those that are held out last."""
    pairs, shares_N = found.pairs, found.shares
    if not pairs:
        return found
    held_out_N = sources.held(pairs) if sources.held_files else held_out_prompts(shares_N, val_share)
    if held_out_N.any():
        order = np.argsort(held_out_N, kind="stable")
        pairs, shares_N = pairs.select(order), shares_N[order]
    return replace(found, pairs=pairs, shares=shares_N, trained=int(np.count_nonzero(~held_out_N)))


# === Shards ===


def _options(reader: PairReader) -> dict[str, Any]:
    """All that decides what a block becomes, as JSON values."""
    chat, usable = reader.chat, asdict(reader.usable)
    usable = {name: usable[name] for name in ("max_seq_len", "seed", "compared")}
    return {
        "tokenizer": digest(chat.tokenizer.to_str().encode()).hex(),
        "chat": [type(chat).__name__, dict(chat.identity), chat.default_system],
        "unknown": chat.unknown_id,
        "spelled": reader.spelling.is_used,
        "scoring": list(reader.scoring),
        "reading": {field.name: getattr(reader.config, field.name) for field in fields(ReadingConfig)},
        "shorten_to": reader.shorten_to,
        **usable,
    }


def _from_shards(reader: PairReader, sources: Sources, val_share: float, cache: TokenCache) -> FoundPairs | None:
    """The pairs from shards; None where one reading has to tell what they are."""
    shards = TokenShards(cache.folder, _options(reader), cache.verify)
    try:
        blocks = list(_blocks(reader, sources, cache, shards))
    except UncutFile:
        return None
    made: list[BlockPairs] = []
    for block, known in blocks:
        found = _block_pairs(reader, sources, shards, block, known)
        if found is None:
            return None
        made.append(found)
    places = [(one.digest, known, one.file, one.first, one.file in sources.held_files) for one, known in blocks]
    name = json.dumps([places, val_share, reader.usable.drop_contradictions])
    return shards.kept(name, made, lambda: _together(reader, sources, val_share, made))


def _together(
    reader: PairReader, sources: Sources, val_share: float, blocks: Sequence[BlockPairs]
) -> FoundPairs | None:
    """The pairs of all blocks, split; None where one reading has to tell."""
    watchdog.beat(_BEAT)
    found = merge(blocks, reader.usable.drop_contradictions)
    if found is None:
        return None
    formats, faults = {}, Faults(are_dropped=True)
    for block in blocks:
        for name in block.facts["formats"]:
            formats[block.file] = name
        number, shown, first = block.facts["faults"]
        faults.number += number
        faults.shown = [*faults.shown, *shown][: Faults.most_shown]
        faults.first = faults.first or first
    faults.count_in(found.count)
    words = reader.said(formats)
    whole = FoundPairs(found.pairs, found.shares, 0, found.count, found.extra_keys, found.spelled, found.unknown, words)
    return _split(whole, sources, val_share)


def _blocks(
    reader: PairReader, sources: Sources, cache: TokenCache, shards: TokenShards
) -> Iterator[tuple[Block, str]]:
    """The blocks of all files in order, each with the format of its file. UncutFile for one that has no blocks."""
    for file in sources.files:
        known = _format_of(reader, file)
        for block in blocks_of(file, shards.facts_folder, cache.verify, lambda: watchdog.beat(_BEAT)):
            yield block, known


def _format_of(reader: PairReader, file: Path) -> str:
    """The format that the first record of a file shows; "" where the first ones show none: each block is read for
    itself then. UncutFile for a file that cannot be read: one reading says why."""
    formats = Formats(reader.config.data_format)
    try:
        for record in islice(first_records(file), _FIRST_RECORDS):
            with contextlib.suppress(UserError):
                return formats.of(record)
    except UserError as error:
        raise UncutFile(str(error)) from error
    return ""


def _block_pairs(
    reader: PairReader, sources: Sources, shards: TokenShards, block: Block, known: str
) -> BlockPairs | None:
    """The pairs of a block, from its shard, which is made where it is missing. None where a record is faulty."""
    found = shards.shard(block, known)
    if found is None:
        made = _read(reader, block, known)
        if made is None:
            return None
        shards.add(block, known, made)
        found = shards.shard(block, known) or made
    return BlockPairs(block.file, block.first, block.file in sources.held_files, *found)


def _read(reader: PairReader, block: Block, known: str) -> ReadBlock | None:
    """A block, read and tokenized; None where a record is faulty, and faulty ones are not dropped."""

    def records(faults: Faults) -> Iterator[Record]:
        if block.is_lines:
            return read_lines(block.file, read_block(block), block.first, faults)
        return read_records(block.file, faults)

    merging = ForMerge()
    read = reader.read(records, {block.file: known} if known else None, merging)
    if read.faults.end_the_start:
        return None
    pairs = read.pairs
    arrays = arrays_of(pairs)
    arrays["places"] = pairs.places.copy()
    arrays["places"]["record"] -= np.uint32(block.first - 1)
    arrays["tokens"] = narrow(pairs.token_array, reader.chat.tokenizer.get_vocab_size())
    arrays["shares"] = read.shares
    arrays["swapped"] = np.frombuffer(bytes(merging.swapped), "V16")
    arrays["odd"] = np.frombuffer(bytes(merging.odd), np.uint8)
    if (counts := unknown_counts(pairs, reader.chat.unknown_id)) is not None:
        arrays["unknown"] = counts
    return ReadBlock(arrays, _facts(read, block))


def _facts(read: ReadPairs, block: Block) -> dict[str, Any]:
    """The counts of a block; records are counted from its first one."""

    def tally(found: Tally) -> dict[str, list[int]]:
        return {name: [times, _record(found.first[name], block)] for name, times in found.times.items()}

    count: KeptCount = read.count
    speller, faults = read.speller, read.faults
    return {
        "total": count.total,
        "dropped": tally(count.dropped),
        "noticed": tally(count.noticed),
        "extra_keys": tally(read.extra_keys),
        "spelled": [speller.characters, speller.pairs, _record(speller.first, block) if speller.first else 0],
        "formats": sorted(set(read.formats.values())),
        "faults": [faults.number, faults.shown, faults.first],
        "place": [block.file, block.first] if faults.number else None,
    }


def _record(origin: str, block: Block) -> int:
    """The number of a record, `file:number`, within its block, from 1."""
    return int(origin.rpartition(":")[2]) - block.first + 1
