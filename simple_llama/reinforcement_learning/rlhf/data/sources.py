"""Which files the pairs come from, and how often those of a file stand in an epoch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from simple_llama.common.errors import UserError
from simple_llama.common.path_lists import ListedPath, shared_paths
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
        times_N[: self.trained] = np.repeat(self.times_U, _sizes(self.pairs[: self.trained]))
        return times_N

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
    """Data files in the order in which they are read, and the path of the settings that each is of."""

    files: tuple[Path, ...]
    paths: tuple[ListedPath, ...]  # of each file

    @classmethod
    def of(cls, text: str) -> Sources:
        """Those of a setting. UserError where a path has no data, or a file stands in two paths."""
        found = [(file, path) for path in shared_paths(text) for file in data_files(path.path)]
        known: dict[str, ListedPath] = {}
        for file, path in found:
            place = os.path.realpath(file)
            if place in known:
                raise UserError(
                    f"{file}: expected each data file once, found it in {known[place]} and in {path}; leave one out"
                )
            known[place] = path
        return cls(tuple(file for file, _ in found), tuple(path for _, path in found))

    @property
    def shares(self) -> dict[str, float]:
        """Of each file, by its name in a PairSet."""
        return {str(file): path.share for file, path in zip(self.files, self.paths, strict=True)}

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
        shares_U = np.array([self.shares[file] for file in pairs.files])[pairs.places["file"][first_U]]
        whole_U = np.floor(shares_U)
        numbers_U2 = np.ascontiguousarray(pairs.keys["digest"][first_U]).view("<u8").reshape(-1, 2)
        hashes_U = (numbers_U2[:, 1] >> np.uint64(64 - _BITS)) / 2.0**_BITS
        return (whole_U + (hashes_U < shares_U - whole_U)).astype(np.int64)

    def _told(self, pairs: PairSet, times_U: np.ndarray) -> str:
        """What the shares make of training pairs, in words; empty where all are 1."""
        if all(path.share == 1 for path in self.paths):
            return ""
        sizes_U, numbers_U = _sizes(pairs), pairs.places["file"][pairs.units]
        parts = []
        for path in dict.fromkeys(self.paths):
            own = {str(file) for file, of in zip(self.files, self.paths, strict=True) if of == path}
            mine_U = np.isin(numbers_U, [number for number, file in enumerate(pairs.files) if file in own])
            read, stand = int(sizes_U[mine_U].sum()), int((sizes_U * times_U)[mine_U].sum())
            parts.append(f"{path.path} {path.share:.15g} times ({read:,} pairs make {stand:,})")
        return f"; an epoch has {', '.join(parts)}"


def _sizes(pairs: PairSet) -> np.ndarray:
    """Pairs of each unit (U,)."""
    return np.diff(np.append(pairs.units, len(pairs)))
