"""The tokens of data files, kept on disk: a start that finds them reads no JSON, and all ranks map the same files.

    REF_CACHE_DIR/tokens/files/<digest of a path>.json       what a data file was (dataset/data_blocks.py)
    REF_CACHE_DIR/tokens/<options>/<block>-<format>.arr      a shard: the pairs of a block of a file, with their tokens
    REF_CACHE_DIR/tokens/<options>/set-<digest>.arr          the pairs of a data set, split, without tokens

<options> is a digest of all that decides what a block becomes: tokenizer, chat format, what is scored, which pairs are
left out, and the version of this form. A file is whole or absent, and has the same bytes whoever makes it: what is
killed goes on with the blocks that are missing. All of it may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from simple_llama.common.array_file import Damaged, map_arrays, write_arrays
from simple_llama.common.files import digest
from simple_llama.common.logging import LOGGER
from simple_llama.dataset.data_blocks import Block
from simple_llama.dataset.json_records import KeptCount, Tally
from simple_llama.reinforcement_learning.rlhf.data.data_report import Unknown
from simple_llama.reinforcement_learning.rlhf.data.group_table import GroupTable
from simple_llama.reinforcement_learning.rlhf.data.merge_blocks import BlockPairs
from simple_llama.reinforcement_learning.rlhf.data.pair_set import PairSet
from simple_llama.reinforcement_learning.rlhf.data.span_table import SpanTable
from simple_llama.reinforcement_learning.rlhf.data.token_files import TokenFiles

_FORMAT = 1  # of shards and sets
_ASKED = "asked"  # in a shard's name: the format was the one asked for, or not known before the block was read


@dataclass
class FoundPairs:
    """What the records of a data set are: those that train, then those that are held out."""

    pairs: PairSet
    shares: np.ndarray  # (N,) fp64: where the prompt of each stands in [0, 1)
    trained: int  # pairs that are not held out
    count: KeptCount
    extra_keys: Tally
    spelled: tuple[int, int, str]  # characters spelled in ASCII, their pairs, the first one's origin
    unknown: Unknown
    formats: str  # in words


class ReadBlock(NamedTuple):
    """What reading made of a block."""

    arrays: Mapping[str, np.ndarray]
    facts: Mapping[str, Any]


class TokenShards:
    """Shards and sets of one group of options, in a folder."""

    def __init__(self, folder: Path, options: Mapping[str, Any], verify: bool = False):
        self.facts_folder = folder / "files"
        text = json.dumps({"format": _FORMAT, **options}, sort_keys=True)
        self._folder, self._verify = folder / digest(text.encode()).hex(), verify

    def shard(self, block: Block, known_format: str = "") -> tuple[Mapping[str, np.ndarray], Mapping[str, Any]] | None:
        """The arrays and facts of a block; None where it has no sound shard."""
        found = self._mapped(self._path(block, known_format))
        if found and found[1].get("place") not in (None, [block.file, block.first]):
            return None  # its faulty records are named by another place
        return found

    def add(self, block: Block, known_format: str, made: ReadBlock) -> None:
        """Keeps what was made of a block. UserError where the disk does not take it."""
        write_arrays(self._path(block, known_format), made.arrays, dict(made.facts))

    def kept(self, name: str, blocks: Sequence[BlockPairs], make: Callable[[], FoundPairs | None]) -> FoundPairs | None:
        """The pairs of these blocks: those that are kept under a name, or what `make` makes, kept for the next start.

        Args:
            name: of all that decides which pairs they are, and on which side of the split.
        """
        path = self._folder / f"set-{digest(name.encode()).hex()}.arr"
        if (found := self._mapped(path)) is None:
            made = make()
            if made is None:
                return None
            write_arrays(path, _arrays(made), _facts(made))
            found = self._mapped(path)
            if found is None:
                return made
        tokens = TokenFiles([block.arrays["tokens"] for block in blocks])
        return _found(*found, tokens)

    def _path(self, block: Block, known_format: str) -> Path:
        return self._folder / f"{block.digest}-{known_format or _ASKED}.arr"

    def _mapped(self, path: Path) -> tuple[Mapping[str, np.ndarray], Mapping[str, Any]] | None:
        """What a file has; None, and the file is gone, where it is none that could be used."""
        try:
            return map_arrays(path, self._verify)
        except FileNotFoundError:
            return None
        except (OSError, Damaged) as error:
            LOGGER.warning("%s; it is made again", error)
            with contextlib.suppress(OSError):
                path.unlink()
            return None


def arrays_of(pairs: PairSet) -> dict[str, np.ndarray]:
    """The arrays of a set, but for its tokens."""
    found = {"keys": pairs.keys, "places": pairs.places}
    if pairs.strengths is not None:
        found["strengths"] = pairs.strengths
    if pairs.spans is not None:
        found |= {"spans": pairs.spans.spans, "span_places": pairs.spans.places}
    if pairs.groups is not None:
        found["groups"] = pairs.groups.places
    return found


def _arrays(found: FoundPairs) -> dict[str, np.ndarray]:
    return {**arrays_of(found.pairs), "shares": found.shares}


def _facts(found: FoundPairs) -> dict[str, Any]:
    """All else, as JSON values."""
    tallies = (found.count.dropped, found.count.noticed, found.extra_keys)
    return {
        "files": list(found.pairs.files),
        "trained": found.trained,
        "total": found.count.total,
        "faulty": found.count.faulty,
        "tallies": [[tally.times, tally.first] for tally in tallies],
        "spelled": list(found.spelled),
        "unknown": list(found.unknown),
        "formats": found.formats,
    }


def _found(arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any], tokens: TokenFiles) -> FoundPairs:
    """A set of pairs as it was kept."""
    spans = SpanTable(arrays["spans"], arrays["span_places"]) if "spans" in arrays else None
    groups = GroupTable(arrays["groups"]) if "groups" in arrays else None
    files = tuple(facts["files"])
    pairs = PairSet(tokens, arrays["keys"], arrays["places"], files, arrays.get("strengths"), spans, groups)
    dropped, noticed, extra_keys = (Tally(times, first) for times, first in facts["tallies"])
    count = KeptCount(facts["total"], dropped, noticed, facts["faulty"])
    spelled, unknown = tuple(facts["spelled"]), Unknown(*facts["unknown"])
    return FoundPairs(pairs, arrays["shares"], facts["trained"], count, extra_keys, spelled, unknown, facts["formats"])
