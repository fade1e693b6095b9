"""The commands over reference stores: what `launch/store.py` does. Only `export` and `import` need torch."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from typing_extensions import Doc

from simple_llama.common.errors import UserError
from simple_llama.common.files import listed, shown
from simple_llama.common.settings import WHOLE, Bounds, parse_settings
from simple_llama.reinforcement_learning.rlhf.reference.merge import merge
from simple_llama.reinforcement_learning.rlhf.reference.ref_store import CacheConfig
from simple_llama.reinforcement_learning.rlhf.reference.store_folders import (
    StoreFacts,
    facts_of,
    named,
    prune_leftovers,
    prune_stores,
    store_folders,
    verify,
)

_FAULTS = 2  # exit status of `verify` that found some
_A_DAY = 86400.0  # seconds


@dataclass(frozen=True)
class _ChosenConfig(CacheConfig):
    """Which stores."""

    digests: Annotated[str, Doc("first letters of the stores' digests, commas between them; empty: all")] = ""

    def folders(self) -> list[Path]:
        """Of the chosen stores."""
        found = store_folders(self.ref_cache_dir)
        return named(found, self.names()) if self.digests else found

    def names(self) -> list[str]:
        """What `digests` has."""
        return [text.strip() for text in self.digests.split(",")]


@dataclass(frozen=True)
class _PruneConfig(_ChosenConfig):
    """What to remove; nothing without a choice."""

    digests: Annotated[str, Doc("first letters of the digests of stores to remove, commas between them")] = ""
    older_than_days: Annotated[
        float | None, Bounds(0, WHOLE), Doc("stores that no run and no pass has opened for so many days")
    ] = None
    leftovers: bool = False  # what killed passes and merges left a week ago or more, and shards that were set aside
    yes: bool = False  # do it; without it what would be done is said


def run_store(description: str | None, argv: Sequence[str] | None = None) -> int:
    """Does what the first word of a command line says; gives the exit status. `export` ends the process itself.

    Raises UserError for anything that a person can put right.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    actions: dict[str, Callable[[list[str], str | None], int]] = {
        "list": _list,
        "verify": _verify,
        "merge": _merge,
        "prune": _prune,
        "export": _export,
        "import": _import,
    }
    if words[:1] in (["-h"], ["--help"]):
        print(description)
        return 0
    if not words or words[0] not in actions:
        found = shown(words[0]) if words else "nothing"
        raise UserError(f"expected one of {listed(list(actions))} as the first word, found {found}; see --help")
    return actions[words[0]](words[1:], description)


def _list(words: list[str], description: str | None) -> int:
    """Each store with what is known of it."""
    config = parse_settings(_ChosenConfig, words, description)
    folders = config.folders()
    for folder in folders:
        print(_about(facts_of(folder)))
    print(f"{len(folders)} reference store{'s' * (len(folders) != 1)} in {config.ref_cache_dir}")
    return 0


def _about(facts: StoreFacts) -> str:
    """A store in a few lines."""
    numerics = facts.reference.get("numerics")
    dtype, rest = "unknown dtype", ""
    if isinstance(numerics, dict):
        dtype = str(numerics.get("dtype", dtype))
        rest = "".join(f", {name} {value}" for name, value in numerics.items() if name != "dtype")
    lines = [
        facts.folder.name,
        f"  {facts.entries:,} entries in {facts.merged} merged and {facts.others} other shards, {facts.size:,} bytes",
        f"  {dtype}; model {facts.model or 'not noted'}; used {_day(facts.used)}, written {_day(facts.written)}",
        f"  weights {facts.reference.get('weights', '?')}, tokenizer {facts.reference.get('tokenizer', '?')}{rest}",
    ]
    if facts.leftovers:
        lines.append(f"  {len(facts.leftovers)} leftovers: `prune --leftovers`")
    if facts.foreign:
        lines.append(f"  files that no store has: {listed(facts.foreign)}")
    return "\n".join(lines)


def _day(seconds: float) -> str:
    """A time for people."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds)) if seconds else "never"


def _verify(words: list[str], description: str | None) -> int:
    """Reads all; status 2 where something is damaged."""
    folders = parse_settings(_ChosenConfig, words, description).folders()
    faults = [fault for folder in folders for fault in verify(folder)]
    for fault in faults:
        print(fault)
    print(f"{len(folders)} reference stores read: {len(faults)} faults")
    return _FAULTS if faults else 0


def _merge(words: list[str], description: str | None) -> int:
    """Merges one store after the other."""
    for folder in parse_settings(_ChosenConfig, words, description).folders():
        print(merge(folder), flush=True)
    return 0


def _prune(words: list[str], description: str | None) -> int:
    """Removes what is chosen, or says what it would remove."""
    config = parse_settings(_PruneConfig, words, description)
    if not (config.digests or config.older_than_days is not None or config.leftovers):
        raise UserError(
            "prune: expected what to remove, found no word of it; give --digests, --older_than_days or --leftovers"
        )
    folders = store_folders(config.ref_cache_dir)
    chosen = named(folders, config.names()) if config.digests else []
    if config.older_than_days is not None:
        before = time.time() - _A_DAY * config.older_than_days
        chosen += [folder for folder in folders if folder not in chosen and facts_of(folder).used < before]
    count = 0
    for line in prune_stores(chosen, dry=not config.yes):
        print(line)
        count += 1
    for line in prune_leftovers(config.ref_cache_dir, not config.yes) if config.leftovers else ():
        print(line)
        count += 1
    print(f"{count} removed" if config.yes else f"{count} would be removed; add --yes to do it")
    return 0


def _export(words: list[str], description: str | None) -> int:
    """A data set with the store's sums; see `store_export`."""
    # Imported here: torch and DeepSpeed take seconds, which `list` need not wait for.
    from simple_llama.reinforcement_learning.rlhf.store_export import run_export

    run_export(words, description)
    return 0


def _import(words: list[str], description: str | None) -> int:
    """Sums that another program put into a data set; see `store_import`."""
    from simple_llama.reinforcement_learning.rlhf.store_import import run_import

    run_import(words, description)
    return 0
