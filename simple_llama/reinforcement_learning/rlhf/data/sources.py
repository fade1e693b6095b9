"""Which files the pairs come from, which of them are held out, and how often those of the others stand in an epoch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from simple_llama.common.errors import UserError
from simple_llama.common.path_lists import ListedPath, named_paths, shared_paths
from simple_llama.dataset.json_records import data_files
from simple_llama.reinforcement_learning.rlhf.data.pair_set import PairSet

_BITS = 53  # of a digest that decide: as many as are exact in a float


class Epoch(NamedTuple):
    """How often pairs stand in an epoch, of which the first are trained on, and all others are held out."""

    pairs: PairSet
    trained: int  # how many are not held out
    times_U: np.ndarray  # how often each unit of these stands in an epoch
    words: str  # what shares make of them; empty where all are 1

    @property
    def times_N(self) -> np.ndarray:
        """How often each pair counts: a held-out one once."""
        times_N = np.ones(len(self.pairs), np.int64)
        if (self.times_U == 1).all():
            return times_N
        times_N[: self.trained] = np.repeat(self.times_U, _sizes(self.pairs[: self.trained]))
        return times_N

    @property
    def held_out(self) -> int:
        """How many pairs are held out."""
        return len(self.pairs) - self.trained

    @property
    def used(self) -> Epoch:
        """Without the pairs that no epoch has."""
        if self.times_U.all():
            return self
        stays_N, times_U = self.times_N > 0, self.times_U
        kept = self.pairs.select(np.flatnonzero(stays_N))
        return self._replace(pairs=kept, trained=int(stays_N[: self.trained].sum()), times_U=times_U[times_U > 0])

    def repeated(self, once: PairSet) -> PairSet:
        """These training pairs as often as in an epoch."""
        return once if (self.times_U == 1).all() else once.repeated(self.times_U)


@dataclass(frozen=True)
class Sources:
    """Data files in the order in which they are read, and the path of the settings that each is of: first those that
    are held out, so that what is held out is not trained on."""

    files: tuple[Path, ...]
    paths: tuple[ListedPath, ...]  # of each file
    held_files: frozenset[str] = frozenset()  # their names in a PairSet

    @classmethod
    def of(cls, text: str, validation: str = "") -> Sources:
        """Those of two settings. UserError where a path has no data, or a file stands in two paths."""
        held = [(file, path) for path in named_paths(validation) for file in data_files(path.path)]
        found = held + [(file, path) for path in shared_paths(text) for file in data_files(path.path)]
        known: dict[str, ListedPath] = {}
        for file, path in found:
            place = os.path.realpath(file)
            if place in known:
                raise UserError(
                    f"{file}: expected each data file once, found it in {known[place]} and in {path}; leave one out"
                )
            known[place] = path
        names = frozenset(str(file) for file, _ in held)
        return cls(tuple(file for file, _ in found), tuple(path for _, path in found), names)

    @property
    def of_file(self) -> dict[str, ListedPath]:
        """The path that each file is of, by its name in a PairSet."""
        return {str(file): path for file, path in zip(self.files, self.paths, strict=True)}

    def held(self, pairs: PairSet) -> np.ndarray:
        """Which pairs are of files that are held out (N,)."""
        return np.array([file in self.held_files for file in pairs.files], bool)[pairs.places["file"]]

    def sets(self, held: PairSet) -> dict[str, slice]:
        """Where the pairs of each named path are among all held-out ones, in the order of the paths. UserError where
        a path has none."""
        found = self._held_places(held)
        for path, places in found.items():
            if not len(places):
                raise UserError(
                    f"validation_path: {path}: expected at least one usable pair, found none; the log says what was "
                    "dropped: add data, or leave it out"
                )
        return {path.name: slice(int(at[0]), int(at[-1]) + 1) for path, at in found.items() if path.name}

    def told_held(self, held: PairSet) -> str:
        """What paths hold out, in words; empty where a share does."""
        if not self.held_files:
            return ""
        counts = (f"{path.name} {len(places):,}".strip() for path, places in self._held_places(held).items())
        return f"; held out by files: {', '.join(counts)}"

    def _held_places(self, held: PairSet) -> dict[ListedPath, np.ndarray]:
        """Of each path whose pairs are held out, where these are among all of them."""
        of_file = self.of_file
        paths = dict.fromkeys(path for file, path in of_file.items() if file in self.held_files)
        numbers = {path: [n for n, file in enumerate(held.files) if of_file[file] == path] for path in paths}
        return {path: np.flatnonzero(np.isin(held.places["file"], mine)) for path, mine in numbers.items()}

    def epoch(self, pairs: PairSet, trained: int) -> Epoch:
        """How often pairs, of which the first `trained` are not held out, stand in an epoch."""
        train = pairs[:trained]
        times_U = self._times(train)
        return Epoch(pairs, trained, times_U, self._told(train, times_U))

    def _times(self, pairs: PairSet) -> np.ndarray:
        """How often each unit of training pairs stands in an epoch (U,).

        Of a share of 2.4 those are three times there whose digest, as a number in [0, 1), is below 0.4, all others
        twice: whatever other data there is, and in which order. What a share of 0.4 has, one of 0.5 has too.
        """
        first_U = pairs.units
        if all(path.share == 1 for path in self.paths):
            return np.ones(len(first_U), np.int64)
        of_file = self.of_file
        shares_U = np.array([of_file[file].share for file in pairs.files])[pairs.places["file"][first_U]]
        whole_U = np.floor(shares_U)
        numbers_U2 = np.ascontiguousarray(pairs.keys["digest"][first_U]).view("<u8").reshape(-1, 2)
        hashes_U = (numbers_U2[:, 1] >> np.uint64(64 - _BITS)) / 2.0**_BITS
        return (whole_U + (hashes_U < shares_U - whole_U)).astype(np.int64)

    def _told(self, pairs: PairSet, times_U: np.ndarray) -> str:
        """What the shares make of training pairs, in words; empty where all are 1."""
        if all(path.share == 1 for path in self.paths):
            return ""
        sizes_U, numbers_U = _sizes(pairs), pairs.places["file"][pairs.units]
        of_file, parts = self.of_file, []
        for path in dict.fromkeys(path for file, path in of_file.items() if file not in self.held_files):
            mine_U = np.isin(numbers_U, [number for number, file in enumerate(pairs.files) if of_file[file] == path])
            read, stand = int(sizes_U[mine_U].sum()), int((sizes_U * times_U)[mine_U].sum())
            parts.append(f"{path.path} {path.share:.15g} times ({read:,} pairs make {stand:,})")
        return f"; an epoch has {', '.join(parts)}"


def _sizes(pairs: PairSet) -> np.ndarray:
    """Pairs of each unit (U,)."""
    return np.diff(np.append(pairs.units, len(pairs)))
